"""Code that was planted in a folder, of whatever kind and in whatever file, does not run when the folder is used."""

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from bitnet.data.chats import TokenizedChats
from bitnet.data.corpus import open_corpus
from bitnet.data.tokens import TokenizedCorpus
from bitnet.data.tokens_write import tokenize_corpus
from bitnet.inference.loading import open_model
from bitnet.model import BitNetForCausalLM
from bitnet.ptq.drivers import Options
from bitnet.ptq.methods import quantize_model
from bitnet.storage.contents import open_contents, report
from bitnet.storage.folders import resolve, save_packed, save_quantized
from bitnet.storage.hf import write as hf_write
from bitnet.storage.source import open_source
from bitnet.training.arguments import parse
from bitnet.training.checkpoint import alone_in, consolidate, newest_good, save_checkpoint
from bitnet.training.processes import World
from bitnet.training.shards import names_and_shapes, read_whole
from tests.builders import tiny_model
from tests.vocabularies import byte_tokenizer

PICKLES = (
    "pytorch_model.bin", "model.pt", "optimizer.pt", "training_args.bin", "scheduler.pt", "data.pkl", "rng_state.pth",
    ".metadata", "checkpoint.ckpt", "tokenizer.pkl", "vocab.pkl",
)  # fmt: skip
MODULES = (
    "sitecustomize", "usercustomize", "conftest", "__init__", "modeling_bitnet", "jinja2", "tokenization_bitnet",
    "torch", "json", "setup", "bitnet", "chat_worker", "markupsafe", "encode_worker", "tokenizers",
)  # fmt: skip


class Planted:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def plant(folder: Path, victim: Path) -> None:
    """Into a folder what runs code in one program or another, and beside what is there already."""
    code = f"import os\nos.makedirs({str(victim)!r}, exist_ok=True)\n"
    payload = pickle.dumps(Planted(victim))
    for name in PICKLES:
        (folder / name).write_bytes(payload)
    for name in MODULES:
        (folder / f"{name}.py").write_text(code)
    (folder / "x.pth").write_text(f"import os; os.makedirs({str(victim)!r}, exist_ok=True)")
    np.save(folder / "planted.npy", np.array([Planted(victim)], dtype=object), allow_pickle=True)
    (folder / "chat_template.jinja").write_text(
        f"{{{{ cycler.__init__.__globals__.os.mkdir({str(victim)!r}) }}}}"
        f"{{{{ lipsum.__globals__['os'].mkdir({str(victim)!r}) }}}}"
    )
    remote = {"auto_map": dict.fromkeys(("AutoModelForCausalLM", "AutoConfig"), "modeling_bitnet.X")}
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            about = json.loads((folder / name).read_text())
            if "model_type" in about or name != "config.json":
                (folder / name).write_text(json.dumps(about | remote | {"tokenizer_class": "os.system"}))


def use(folder: Path) -> None:
    """Everything that this project does with a folder, whether or not it is one of that kind."""

    def render() -> None:
        open_source(folder).chat_template.render([{"role": "user", "content": "x"}])

    def inspect() -> None:
        with open_contents(folder) as contents:
            report(contents)

    actions = [
        lambda: open_model(folder), lambda: open_source(folder).latent(), lambda: open_source(folder).tokenizer, render,
        inspect, lambda: resolve(folder), lambda: newest_good(folder), lambda: consolidate(folder),
        lambda: names_and_shapes(folder), lambda: read_whole(folder, "model."), lambda: TokenizedCorpus.load(folder),
        lambda: TokenizedChats(folder), lambda: list(open_corpus(str(folder)).documents()),
        lambda: parse(["--resume", str(folder)]), lambda: parse(["--resume", "auto", "--out", str(folder)]),
        lambda: open_source(folder).tokenizer_files(),
    ]  # fmt: skip
    with contextlib.chdir(folder):
        for action in actions:
            with contextlib.suppress(ValueError, OSError):
                action()
        with contextlib.suppress(ValueError), alone_in(folder, World()):
            pass


def make_run(folder: Path) -> list[Path]:
    model = tiny_model()
    for step in (1, 2):
        save_checkpoint(
            folder, model=model, optimizer_state={}, state={"step": step}, best=True, keep=2,
            config={"model": dataclasses.asdict(model.config)}, tokenizer=byte_tokenizer().files(),
        )  # fmt: skip
    shards = folder / "checkpoints" / "step-00000001" / "shards"
    shards.mkdir()
    (folder / "checkpoints" / "step-00000001" / "model.safetensors").unlink()
    return [folder, folder / "checkpoints", folder / "checkpoints" / "step-00000002", shards.parent, shards]


def make_packed(folder: Path) -> list[Path]:
    save_packed(folder, tiny_model().pack(), byte_tokenizer().files())
    return [folder]


def make_quantized(folder: Path) -> list[Path]:
    model = BitNetForCausalLM(tiny_model().config.replace(quantizer="none"))
    save_quantized(
        quantize_model(model, "nf4", options=Options(group_size=32, progress=False)), folder, "nf4",
        byte_tokenizer().files(),
    )  # fmt: skip
    return [folder]


def make_hugging_face(folder: Path) -> list[Path]:
    hf_write.write(tiny_model(), folder, "master", tokenizer_files=byte_tokenizer().files())
    return [folder]


def make_hugging_face_pickles(folder: Path) -> list[Path]:
    make_hugging_face(folder)
    (folder / "model.safetensors").unlink()
    return [folder]


def make_tokens(folder: Path) -> list[Path]:
    folder.mkdir()
    (folder / "corpus.txt").write_text("words and words and words\n\n" * 50)
    corpus = open_corpus(str(folder / "corpus.txt"))
    return [tokenize_corpus(corpus, byte_tokenizer(), folder, progress=False, workers=1).folder, folder]


def make_chats(folder: Path) -> list[Path]:
    folder.mkdir()
    (folder / "meta.json").write_text("{}")
    for name in ("tokens", "loss_mask", "starts", "held_out"):
        np.save(folder / f"{name}.npy", np.array([Planted(folder.parent / "victim")], dtype=object), allow_pickle=True)
    return [folder]


KINDS = {
    name.removeprefix("make_"): maker for name, maker in list(globals().items()) if name.startswith("make_")
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_planted_code_does_not_run(tmp_path, kind):
    victim, before = tmp_path / "victim", set(sys.modules)
    for folder in KINDS[kind](tmp_path / "model"):
        plant(folder, victim)
    for folder in [tmp_path / "model", *(p for p in (tmp_path / "model").rglob("*") if p.is_dir())]:
        use(folder)
    assert not victim.exists()
    assert not {"modeling_bitnet", "tokenization_bitnet"} & (set(sys.modules) - before)


def test_what_is_planted_does_run_where_it_can(tmp_path):
    victim = tmp_path / "victim"
    plant(tmp_path, victim)
    pickle.loads((tmp_path / "model.pt").read_bytes())
    assert victim.is_dir()
    shutil.rmtree(victim)
    np.load(tmp_path / "planted.npy", allow_pickle=True)
    assert victim.is_dir()
