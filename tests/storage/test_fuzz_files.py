"""Damaged and hostile files of every format give an error of ours, at once, in bounded memory, or they open.

Thousands of small mutations of a good file, from a fixed seed: bits, numbers, lengths, truncations, JSON values. A
mutation that leaves a good file must open.
"""

import contextlib
import dataclasses
import json
import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitnet.inference.loading import open_model
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.ptq.drivers import Options
from bitnet.ptq.methods import quantize_model
from bitnet.storage.folders import save_packed, save_quantized
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.gguf.container import GGUFFile
from bitnet.storage.hf import write as hf_write
from bitnet.storage.safetensors import save_tensors
from bitnet.storage.source import open_source
from bitnet.tokenizer import Tokenizer, from_gguf_metadata, load_tokenizer, train_tokenizer
from bitnet.tokenizer.json_write import sentencepiece_files
from tests import oracles

CONFIG = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
)  # fmt: skip
SECONDS, MEMORY = 1.0, 1 << 30
NUMBERS = [
    0,
    1,
    2,
    3,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
]
VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "../x", "/etc/passwd", "\u0000", "U8", "F64", [], {}, [0, 1 << 62], [1, 2, 3, 4], {"a": 1}, [[]],
]  # fmt: skip


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """At most a gigabyte more of address space, where the system can say so."""
    try:
        import resource
    except ImportError:
        yield
        return
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    size = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmSize")) << 10
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def mutate(content: bytes, rng: random.Random, header: int) -> bytes:
    """One of the usual accidents and attacks, within the first `header` bytes."""
    data = bytearray(content)
    place = rng.randrange(min(header, len(data)))
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(header, len(data)))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[place] = rng.randrange(256)
    elif kind == 2:
        number = rng.choice(NUMBERS) + rng.randint(-1, 1)
        layout = rng.choice(["<I", "<Q", ">I", ">Q"])
        packed = struct.pack(layout, number % (1 << (32 if layout[1] == "I" else 64)))
        data[place : place + len(packed)] = packed
    elif kind == 3:
        del data[place:]
    elif kind == 4:
        del data[place : place + rng.randint(1, 9)]
    elif kind == 5:
        data[place:place] = rng.randbytes(rng.randint(1, 9))
    else:
        source = rng.randrange(len(data))
        data[place : place + 16] = data[source : source + rng.randint(1, 16)]
    return bytes(data)


def mutate_json(value: object, rng: random.Random) -> object:
    """A copy of a JSON value with something in it replaced, removed, renamed or nested."""
    value = json.loads(json.dumps(value))
    holder: object = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return rng.choice(VALUES)
        key = rng.choice(keys[:400])
        if not isinstance(holder[key], (dict, list)) or not holder[key] or rng.random() < 0.15:
            break
        holder = holder[key]
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(key) + rng.choice(["x", "\u0000", " "])] = holder.pop(key)
    elif kind == 2:
        holder[key] = [holder[key]]
    elif kind == 3 and isinstance(holder[key], (int, float)):
        holder[key] = holder[key] * rng.choice([-1, 2, 1000, 10**9]) + rng.randint(-1, 1)
    else:
        holder[key] = rng.choice(VALUES)
    return value


def fuzz(
    attempts: int, seed: int, prepare: Callable[[random.Random], object], load: Callable[[], object]
) -> Counter[str]:
    """Try `load` after every `prepare`; only ValueError may come out. Returns how often it opened and failed."""
    rng, counts = random.Random(seed), Counter[str]()
    load()  # the file is good as it is, and what is imported late is now there
    with limited_memory():
        for attempt in range(attempts):
            what = prepare(rng)
            start = time.process_time()
            try:
                load()
                counts["opened"] += 1
            except ValueError as error:
                counts["refused" if str(error) else "refused without a word"] += 1
            except BaseException as error:
                raise AssertionError(
                    f"attempt {attempt} with {what!r:.2000}: {type(error).__name__}: {error}"
                ) from error
            seconds = time.process_time() - start
            assert seconds < SECONDS, f"attempt {attempt} took {seconds:.1f} s: {what!r:.2000}"
    assert not counts["refused without a word"], counts
    assert counts["refused"] > attempts // 20, counts
    return counts


def prepare_file(path: Path, header: int | None = None) -> Callable[[random.Random], bytes]:
    """Mutations of a file in its place."""
    good = path.read_bytes()

    def prepare(rng: random.Random) -> bytes:
        bad = mutate(good, rng, header or len(good))
        path.write_bytes(bad)
        return bad[: header or 300]

    return prepare


def prepare_json(path: Path) -> Callable[[random.Random], object]:
    good = json.loads(path.read_text())

    def prepare(rng: random.Random) -> object:
        if rng.random() < 0.2:
            bad = mutate(json.dumps(good).encode(), rng, 1 << 20)
        else:
            bad = json.dumps(mutate_json(good, rng)).encode()
        path.write_bytes(bad)
        return bad

    return prepare


def prepare_safetensors(path: Path) -> Callable[[random.Random], object]:
    """Mutations of the JSON header, its length and its first bytes."""
    good = path.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + size])

    def prepare(rng: random.Random) -> object:
        if rng.random() < 0.4:
            bad = mutate(good, rng, size + 16)
        else:
            text = json.dumps(mutate_json(header, rng)).encode()
            bad = struct.pack("<Q", len(text)) + text + good[8 + size :]
        path.write_bytes(bad)
        return bad[: size + 16]

    return prepare


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = " ".join(chr(97 + i * 7 % 26) + chr(97 + i * 11 % 26) + chr(97 + i % 26) for i in range(3000))
    return train_tokenizer([words], CONFIG.vocab_size, threads=1)


@pytest.fixture
def model() -> BitNetForCausalLM:
    return BitNetForCausalLM(CONFIG).eval()


# GGUF


@pytest.mark.parametrize(("kind", "quantizer"), [("F16", "ternary"), ("Q8_0", "none"), ("I2_S", "ternary")])
def test_gguf(tmp_path, tokenizer, kind, quantizer):
    sizes = {"hidden_size": 128, "intermediate_size": 128} if kind == "I2_S" else {}
    model = BitNetForCausalLM(CONFIG.replace(quantizer=quantizer, **sizes))
    path = tmp_path / "x.gguf"
    gguf_write.write(model, path, kind)
    header = min(info.start for info in GGUFFile(path).tensors.values())
    prepare = prepare_file(path, header)
    assert fuzz(800, 1, prepare, lambda: open_source(path).model())["opened"]


def test_gguf_with_a_vocabulary(tmp_path, tokenizer, model):
    path = tmp_path / "x.gguf"
    gguf_write.write(model, path, "F16", tokenizer=tokenizer, chat_template="{{ messages }}")
    header = min(info.start for info in GGUFFile(path).tensors.values())
    prepare = prepare_file(path, header)

    def load() -> None:
        from_gguf_metadata(GGUFFile(path).metadata).encode("hello world 123")

    assert fuzz(600, 2, prepare, load)["opened"]


# safetensors and config.json


@pytest.mark.parametrize("form", ["packed", "packed-inverse", "master"])
def test_hugging_face_folders(tmp_path, model, form):
    folder = tmp_path / "x"
    hf_write.write(model, folder, form)
    good = (folder / "model.safetensors").read_bytes()
    prepare = prepare_safetensors(folder / "model.safetensors")
    assert fuzz(350, 3, prepare, lambda: open_source(folder).model())["opened"]
    (folder / "model.safetensors").write_bytes(good)
    assert fuzz(350, 4, prepare_json(folder / "config.json"), lambda: open_source(folder).model())["opened"]


def test_indexes_of_shards(tmp_path, model):
    folder = tmp_path / "x"
    hf_write.write(model, folder, "master")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = list(model.state_dict())
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    open_source(folder).model()
    prepare = prepare_json(folder / "model.safetensors.index.json")
    assert fuzz(250, 5, prepare, lambda: open_source(folder).model())["refused"]


def test_our_own_folders(tmp_path, tokenizer, model):
    folder = tmp_path / "packed"
    save_packed(folder, model.pack(), tokenizer.model_proto)
    (folder / "checksums.json").unlink()  # by which every mutation of the weights would be found
    good = (folder / "model.safetensors").read_bytes()
    prepare = prepare_safetensors(folder / "model.safetensors")
    assert fuzz(350, 6, prepare, lambda: open_model(folder))["opened"]
    (folder / "model.safetensors").write_bytes(good)
    assert fuzz(350, 7, prepare_json(folder / "config.json"), lambda: open_model(folder))["opened"]


def test_checkpoints(tmp_path, model):
    save_tensors(tmp_path / "model.safetensors", model.state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"model": dataclasses.asdict(CONFIG)}))
    good = (tmp_path / "model.safetensors").read_bytes()
    prepare = prepare_safetensors(tmp_path / "model.safetensors")
    assert fuzz(250, 10, prepare, lambda: open_source(tmp_path).model())["opened"]
    (tmp_path / "model.safetensors").write_bytes(good)
    assert fuzz(250, 11, prepare_json(tmp_path / "config.json"), lambda: open_source(tmp_path).model())["opened"]


@pytest.mark.parametrize("method", ["nf4", "rtn-int4", "w8a8-dynamic", "gguf-q4_0"])
def test_quantized_folders(tmp_path, method):
    model = quantize_model(
        BitNetForCausalLM(CONFIG.replace(quantizer="none")), method, options=Options(group_size=32, progress=False)
    )
    folder = tmp_path / "x"
    save_quantized(model, folder, method, {})
    (folder / "checksums.json").unlink()
    assert fuzz(150, 12, prepare_json(folder / "config.json"), lambda: open_model(folder))["opened"]


# Tokenizers


def test_sentencepiece_models(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.model_proto)
    assert fuzz(900, 8, prepare_file(path), lambda: Tokenizer.load(path).encode("hello world 123"))["opened"]


def test_tokenizer_json(tmp_path, tokenizer):
    oracles.require("tokenizers")
    for name, content in sentencepiece_files(tokenizer.model_proto).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "tokenizer.model").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        good = (tmp_path / name).read_bytes()
        attempts = 400 if name == "tokenizer.json" else 200
        fuzz(attempts, 9, prepare_json(tmp_path / name), lambda: load_tokenizer(tmp_path).encode("hello world 123"))
        (tmp_path / name).write_bytes(good)
