"""Ternary models in vLLM beside this project's engine and transformers: texts, predictions, processes, refusals.

Run by `make vllm`. A start of vLLM takes most of the time, so all of them run in one process. How near two programs can
be, and what is a near-tie, is said in `agreement.py`.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bitnet.vllm
from bitnet.inference.generation import generate
from bitnet.inference.loading import open_model
from bitnet.inference.options import SamplingConfig
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.config import PRESETS
from bitnet.model.lora import projections
from bitnet.storage.adapters import WEIGHTS, base_files, load_adapter
from bitnet.storage.foreign import ADAPTER_BASE
from bitnet.storage.hf.write import write
from bitnet.storage.safetensors import save_tensors
from bitnet.storage.source import open_source
from bitnet.tokenizer import Tokenizer
from bitnet.tokenizer.json_write import sentencepiece_files
from tests.vllm.agreement import Judge, likeliest
from tests.vocabularies import stdlib_tokenizer

if not os.environ.get("BITNET_VLLM_TESTS"):
    pytest.skip("vLLM has an environment of its own: make vllm", allow_module_level=True)

SMALL = ModelConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
LLAMA = SMALL.replace(sub_norm=False)
TRAINED = "demo, trained"
# Name: the model, of random weights, and the form of its folder.
MODELS: dict[str, tuple[ModelConfig, str]] = {
    "bitnet": (SMALL, "packed"),
    "bitnet, relu2, untied": (SMALL.replace(hidden_act="relu2", tie_word_embeddings=False), "packed-inverse"),
    "bitnet, latent floats": (SMALL, "master"),
    "llama": (LLAMA, "packed-inverse"),
    "qwen2": (LLAMA.replace(qkv_bias=True), "packed"),
    "qwen2, latent floats": (LLAMA.replace(qkv_bias=True), "master"),
    "qwen3": (LLAMA.replace(qk_norm=True, head_dim=96), "packed"),
}
WAYS: dict[str, dict[str, Any]] = {f"{TRAINED}, in chunks": {"max_num_batched_tokens": 64, "max_num_seqs": 8}}
LORA, LOG = f"{TRAINED}, with LoRA", "what vLLM printed"
if os.environ.get("BITNET_LONG") == "1":
    MODELS["2b-4t, 4 layers"] = (PRESETS["2b-4t"].replace(num_hidden_layers=4), "packed")
    WAYS[f"{TRAINED}, compiled"] = {"enforce_eager": False}
NAMES = (TRAINED, *MODELS)
DECIDED = ("llama",)
"""Models that prefer one token clearly: the last bits of sums move hardly any of their choices."""
TWO_PROCESSES = (TRAINED, "bitnet, latent floats", "qwen2, latent floats")
TRANSFORMERS = (TRAINED, "bitnet", "qwen3")
FLOATS = {"bitnet": {"embeddings": "float"}}
PADDED, UNUSED = "padded", {300, 301, *range(500, SMALL.vocab_size)}
"""A model whose unused rows have the largest logits, beside a tokenizer of 500 tokens."""
PROMPTS, TOKENS, NEW = 20, 101, 64
GREEDY = SamplingConfig(temperature=0)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown choice": ({"additional_config": {"bitnet": {"embedings": "int8"}}}, "it may hold embeddings"),
    "LoRA over processes": ({"enable_lora": True, "tensor_parallel_size": 2}, "tensor-parallel-size 1"),
}


def random_model(config: ModelConfig) -> BitNetForCausalLM:
    torch.manual_seed(0)
    model = BitNetForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith(".bias"):
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def folders(trained, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {name: root / str(index) for index, name in enumerate(NAMES)}
    write(open_source(str(trained)).model(), found[TRAINED], "packed")
    for name, (config, form) in MODELS.items():
        write(random_model(config), found[name], form)
    padded = random_model(LLAMA.replace(tie_word_embeddings=False))
    with torch.no_grad():  # of rows w and -w one is always far above all others
        for place, row in enumerate(sorted(UNUSED)):
            padded.lm_head.weight[row] = (-1) ** place * padded.lm_head.weight[0].sign()
    tokenizer = Tokenizer(stdlib_tokenizer(500).model_proto, unused=(300, 301))
    write(padded, found.setdefault(PADDED, root / PADDED), "packed", tokenizer_files=sentencepiece_files(tokenizer))
    return found


@pytest.fixture(scope="module")
def prompts(folders) -> dict[str, list[list[int]]]:
    """Of the trained model texts that it wrote itself, of the others random tokens."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(3, SMALL.vocab_size, (PROMPTS, TOKENS), generator=generator).tolist()
    model = open_model(open_source(str(folders[TRAINED])))
    texts = generate(model, [[1]] * PROMPTS, max_new_tokens=TOKENS - 1, sampling=SamplingConfig(), seed=0)
    written = [[1, *row] for row in torch.stack(list(texts), 1).tolist()]
    return dict.fromkeys(MODELS, drawn) | {PADDED: [[token % 300 for token in row] for row in drawn], TRAINED: written}


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory) -> Path:
    """Random matrices beside every projection of the trained model."""
    folder = tmp_path_factory.mktemp("lora")
    for name, content in base_files("demo", "", 8, 8.0).items():
        if name != ADAPTER_BASE:
            (folder / name).write_bytes(content)
    generator, tensors = torch.Generator().manual_seed(2), {}
    for name, layer in projections(open_source(str(folders[TRAINED])).model()):
        for part, shape in (("A", (8, layer.in_features)), ("B", (layer.out_features, 8))):
            value = 0.05 * torch.randn(*shape, generator=generator)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = value
    save_tensors(folder / WEIGHTS, tensors)
    return folder


@pytest.fixture(scope="module")
def in_vllm(folders, adapter, prompts, tmp_path_factory, request) -> dict[str, dict[str, Any]]:
    """What vLLM made of every model, by its name, and of some in other ways, by the name and the way: of those that
    the chosen tests name."""
    folder = tmp_path_factory.mktemp("vllm")
    over_two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    wanted: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in NAMES}
    wanted |= {f"{name} in two": (name, over_two) for name in TWO_PROCESSES}
    wanted |= {f"{name} as floats": (name, {"additional_config": FLOATS}) for name in TRANSFORMERS}
    wanted |= {way: (TRAINED, options) for way, options in WAYS.items()}
    with_tokenizer = {"skip_tokenizer_init": False}
    wanted |= {PADDED: (PADDED, with_tokenizer), f"{PADDED} in two": (PADDED, over_two | with_tokenizer)}
    wanted[f"{PADDED} as floats"] = (PADDED, with_tokenizer | {"additional_config": FLOATS})
    wanted[LORA] = (TRAINED, {"enable_lora": True, "max_lora_rank": 8})
    wanted |= {name: ("bitnet", over_two | options) for name, (options, _) in REFUSED.items()}
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    named = {value for item in items for value in item.callspec.params.values()}
    wanted = {key: job for key, job in wanted.items() if any(f"{key} ".startswith(f"{name} ") for name in named)}
    jobs = [
        {
            "model": str(folders[model]), "prompts": prompts[model], "new_tokens": NEW, "options": options,
            "lora": str(adapter) if "enable_lora" in options else None,
        }
        for model, options in wanted.values()
    ]  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = [sys.executable, Path(__file__).with_name("in_vllm.py"), folder / "jobs.json", folder / "out.json"]
    # Each process of two on a core of its own; on one machine of several sockets vLLM would choose.
    cores = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": cores}
    result = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-5000:]
    found = dict(zip(wanted, json.loads((folder / "out.json").read_text()), strict=True))
    return found | {LOG: {"text": result.stdout + result.stderr}}


@pytest.fixture(scope="module")
def judge_of(folders, adapter, prompts):
    @cache
    def make(way: str, embeddings: bool = True) -> Judge:
        torch.manual_seed(0)
        name, lora = TRAINED if way in (*WAYS, LORA) else way, load_adapter(adapter) if way == LORA else None
        return Judge(open_source(str(folders[name])), prompts[name], embeddings, lora)

    return make


def positions_of(found: dict[str, Any]) -> list[dict[str, float]]:
    assert "positions" in found, found
    return [position for row in found["positions"] for position in row]


def greedy(judge: Judge) -> list[list[int]]:
    ids = generate(judge.engine, judge.prompts, max_new_tokens=NEW, sampling=GREEDY, seed=0)
    return torch.stack(list(ids), 1).tolist()


@pytest.mark.parametrize("way", [*NAMES, *WAYS])
def test_texts_and_predictions_are_those_of_our_engine(way, judge_of, in_vllm):
    judge = judge_of(way)
    predictions = judge.positions(positions_of(in_vllm[way]))
    ours = greedy(judge)
    texts, cached = (judge.texts(in_vllm[way][kind], ours) for kind in ("texts", "cached"))
    print(f"\n{way}: {2 * judge.error:.2e}, {judge.undecided}, {judge.bound:.2e}; {predictions} {texts} {cached}")
    assert judge.accepts_positions(predictions)
    assert judge.accepts_texts(texts)
    assert judge.accepts_texts(cached)
    assert in_vllm[way]["found_in_cache"] >= 64
    assert predictions.count == PROMPTS * (TOKENS - 1)
    assert predictions.equal >= 0.98 * predictions.count


@pytest.mark.parametrize("way", [PADDED, f"{PADDED} as floats", f"{PADDED} in two"])
def test_unused_rows_are_not_drawn(way, in_vllm):
    found = in_vllm[way]
    assert all(not UNUSED & {*map(int, position)} for position in positions_of(found))
    assert len(found["texts"]) == PROMPTS
    assert not UNUSED & {token for text in found["texts"] for token in text}


@pytest.mark.parametrize("way", [LORA])
def test_texts_beside_an_adapter_are_those_of_our_engine(way, judge_of, in_vllm):
    judge = judge_of(way)
    ours = greedy(judge)
    assert "texts" in in_vllm[way], in_vllm[way]
    texts = judge.texts(in_vllm[way]["texts"], ours)
    print(f"\n{way}: {judge.bound:.2e}; {texts}")
    assert judge.accepts_texts(texts)
    assert texts.equal >= 0.6 * texts.count
    without = greedy(judge_of(TRAINED))
    assert sum(a == b for a, b in zip(ours, without, strict=True)) < 0.5 * PROMPTS  # the adapter says something


@pytest.mark.parametrize("name", DECIDED)
def test_where_models_are_decided_predictions_are_equal(name, judge_of, in_vllm):
    judge = judge_of(name)
    predictions = judge.positions(positions_of(in_vllm[name]))
    assert judge.undecided <= 0.001 * predictions.count
    assert predictions.equal >= 0.999 * predictions.count
    assert in_vllm[name]["texts"] == greedy(judge)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_says_the_same(name, folders, judge_of, in_vllm):
    """Its embedding and head are floats."""
    from transformers import AutoModelForCausalLM

    judge, found = judge_of(name, False), in_vllm[f"{name} as floats"]
    ids = torch.tensor(judge.prompts)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # or it compiles how bytes become codes
        model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
        model.generation_config.eos_token_id = None
        positions = likeliest(model(ids).logits[:, :-1])
        texts = model.generate(ids, max_new_tokens=NEW, do_sample=False)[:, TOKENS:].tolist()
    theirs, vllms = judge.positions(positions), judge.positions(positions_of(found))
    written = judge.texts(found["texts"], texts)
    pairs = zip(positions, positions_of(found), strict=True)
    equal = sum(max(a, key=a.get) == max(b, key=b.get) for a, b in pairs)
    print(f"\n{name}: {equal} equal to transformers, {written.equal} texts; {theirs} {vllms}; {judge.bound:.2e}")
    assert judge.accepts_positions(theirs)
    assert judge.accepts_positions(vllms)
    assert judge.accepts_texts(written)
    assert equal >= (0.999 if name in DECIDED else 0.98) * len(positions)


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_give_the_bits_of_one(name, in_vllm):
    assert positions_of(in_vllm[f"{name} in two"]) == positions_of(in_vllm[name])
    assert in_vllm[f"{name} in two"] == in_vllm[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_right_is_refused_at_start(name, in_vllm):
    assert in_vllm[name].get("refused")
    assert (
        REFUSED[name][1] in in_vllm[LOG]["text"]
    )  # of several processes the first one says no more than where to look


def test_other_releases_and_classes_are_refused_where_such_a_model_is_opened(monkeypatch):
    from vllm.model_executor.layers.quantization import get_quantization_config

    monkeypatch.setattr(bitnet.vllm, "vllm_version", lambda: "0.33.0")
    bitnet.vllm.register()
    with pytest.raises(ValueError, match=r"tested in vLLM 0\.32\.\* and this is 0\.33\.0; run: pip install"):
        get_quantization_config("bitnet").from_config({"quant_method": "bitnet"})
    monkeypatch.undo()
    bitnet.vllm.register()
    method = get_quantization_config("bitnet").from_config({"quant_method": "bitnet"})
    with pytest.raises(ValueError, match=r"of the class \['MixtralForCausalLM'\]; ternary models here are BitNetFor"):
        method.maybe_update_config("folder", SimpleNamespace(architectures=["MixtralForCausalLM"]))
