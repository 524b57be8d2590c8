"""A model trained for some seconds writes the same text on every backend, instruction set and cache."""

import contextlib
import dataclasses
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import generate as cli
import train as trainer
from bitnet import kernels
from bitnet.data.feed import TextFeed
from bitnet.data.tokens import TokenArray
from bitnet.evaluation.loss import evaluate
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.cpu_rows import CACHE_DTYPES
from bitnet.inference.generation import SamplingConfig, generate
from bitnet.inference.loading import open_model
from bitnet.kernels.cpu import native
from bitnet.model import PRESETS, BitNetForCausalLM
from bitnet.storage.folders import MODEL, TOKENIZER, resolve, save_packed
from bitnet.storage.source import open_source
from bitnet.tokenizer import Tokenizer
from bitnet.training import config as recipes
from tests.builders import torch_logits
from tests.inference.builders import ON_NATIVE_KERNELS

ISAS = native.instruction_sets()
pytestmark = ON_NATIVE_KERNELS
GREEDY = SamplingConfig(temperature=0)


ROUNDS = {
    "days": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "seasons": ["spring", "summer", "autumn", "winter"],
    "numbers": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
}
PROMPTS = {
    "The days: Friday, Saturday,": " Sunday, Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday,",
    "The seasons: winter, spring,": " summer, autumn, winter, spring, summer, autumn, winter, spring,",
    "The numbers: eight, nine,": " one, two, three, four, five, six, seven, eight, nine, one, two,",
    "The numbers: four, five, six,": " seven, eight, nine, one, two, three, four, five, six, seven,",
}
TEXT_TOKENS = 80


@dataclasses.dataclass(frozen=True)
class Trained:
    run: Path
    folder: Path
    tokenizer: Tokenizer
    held_out: TokenArray
    bytes_per_token: float

    def prompt(self, text: str) -> Tensor:
        return torch.tensor([self.tokenizer.encode(text, bos=True)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of some seconds on text that goes round in circles, so that every next word of it is certain, with
    sentences between that are not, so that the loss is not zero."""
    root = tmp_path_factory.mktemp("trained")
    (root / "corpus").mkdir()
    generator = torch.Generator().manual_seed(0)

    def pick(words: list[str]) -> int:
        return int(torch.randint(len(words), (1,), generator=generator))

    nouns, verbs = ["cat", "dog", "bird", "fish", "horse"], ["sees", "likes", "hears", "follows"]
    for index in range(60):
        name = list(ROUNDS)[index % 3]
        words = ROUNDS[name]
        start = pick(words)
        text = f"The {name}: " + ", ".join(words[(start + i) % len(words)] for i in range(120)) + ".\n"
        for _ in range(25):
            text += f"The {nouns[pick(nouns)]} {verbs[pick(verbs)]} the {nouns[pick(nouns)]}.\n"
        (root / "corpus" / f"{index:02}.txt").write_text(text)
    config = recipes.TrainConfig(
        model=PRESETS["tiny"].replace(vocab_size=400), out=str(root / "run"), steps=200, batch_size=4, context=96,
        data=recipes.DataConfig(corpus=str(root / "corpus"), cache=str(root / "data"), val_fraction=0.1),
        optim=dataclasses.replace(recipes.SHORT_RUN, warmup_steps=10, lr=2e-2), float_start=0.4, eval_every=200,
        eval_tokens=512, sample_every=0, log_every=100, dtype="float32", compile="off", wandb="off", device="cpu",
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        run = trainer.train(config)
    folder = resolve(run.folder)
    assert isinstance(run.feed, TextFeed)
    [held_out] = run.feed.mixture.split("val").values()
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    return Trained(run.folder, folder, tokenizer, held_out, run.feed.mixture.bytes_per_token("val"))


@pytest.fixture
def call(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run generate.py's main() on the trained model: exit status, standard output, standard error."""

    def run_main(*arguments: str, model: Path = trained.run) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        status = cli.main([str(model), "--device", "cpu", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_main


def write(model: BitNetForCausalLM | Engine, prompt: Tensor, sampling: SamplingConfig = GREEDY) -> list[int]:
    steps = generate(model, prompt, max_new_tokens=TEXT_TOKENS, sampling=sampling, seed=3)
    return torch.stack(list(steps), 1)[0].tolist()


@pytest.fixture(scope="module")
def golden(trained: Trained) -> dict[str, list[int]]:
    """The greedy text of the specification behind every prompt. Its next token always leads by several times what an
    activation that rounds the other way moves a logit (0.1), so no machine's order of float additions decides."""
    texts = {}
    with kernels.use_backend("reference"):
        model = open_model(trained.folder)
        for prompt in PROMPTS:
            ids = trained.prompt(prompt)
            texts[prompt] = write(model, ids)
            whole = torch.cat([ids, torch.tensor([texts[prompt]])], 1)
            first, second = torch_logits(model, whole)[0, ids.shape[1] - 1 : -1].topk(2).values.unbind(1)
            assert float((first - second).min()) > 1
    return texts


def test_the_golden_text_is_what_was_learned(trained: Trained, golden: dict[str, list[int]]) -> None:
    for prompt, expected in PROMPTS.items():
        ids = trained.tokenizer.encode(prompt, bos=True)
        text = trained.tokenizer.decode(ids + golden[prompt]).removeprefix(prompt)
        assert text.startswith(expected)
        assert len(golden[prompt]) == TEXT_TOKENS


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_greedy_text_is_the_same_on_every_instruction_set(
    trained: Trained, golden: dict[str, list[int]], cache_dtype: str
) -> None:
    for isa in ISAS:
        with native.use_instruction_set(isa), kernels.use_backend("native"):
            engine = open_model(trained.folder, cache_dtype=cache_dtype)
            assert isinstance(engine, Engine)
            for prompt, expected in golden.items():
                assert write(engine, trained.prompt(prompt)) == expected, (isa, prompt)


def test_greedy_text_is_the_same_in_torch_on_native_products(trained: Trained, golden: dict[str, list[int]]) -> None:
    model = open_source(trained.folder).model().pack()
    with kernels.use_backend("native"):
        for prompt, expected in golden.items():
            assert write(model, trained.prompt(prompt)) == expected, prompt


def test_rows_of_a_batch_write_what_they_write_alone(trained: Trained, golden: dict[str, list[int]]) -> None:
    engine = open_model(trained.folder)
    by_length: dict[int, list[str]] = {}
    for prompt in PROMPTS:
        by_length.setdefault(trained.prompt(prompt).shape[1], []).append(prompt)
    for prompts in by_length.values():
        ids = torch.cat([trained.prompt(prompt) for prompt in [*prompts, prompts[0]]])
        rows = torch.stack(list(generate(engine, ids, max_new_tokens=TEXT_TOKENS, sampling=GREEDY, seed=0)), 1)
        assert rows.tolist() == [golden[prompt] for prompt in [*prompts, prompts[0]]]


def test_sampled_text_is_the_same_on_every_instruction_set(trained: Trained) -> None:
    texts = []
    for isa in ISAS:
        with native.use_instruction_set(isa):
            engine = open_model(trained.folder)
            texts.append(write(engine, trained.prompt("The"), SamplingConfig(2.0, top_p=0.98)))
    assert all(text == texts[0] for text in texts)
    assert texts[0] != write(engine, trained.prompt("The"))


def test_the_command_line_writes_the_golden_text(trained: Trained, golden: dict[str, list[int]], call) -> None:
    for prompt, expected in list(golden.items())[:2]:
        options = ("--prompt", prompt, "--temperature", "0", "--max-new-tokens", str(TEXT_TOKENS))
        text = trained.tokenizer.decode(trained.tokenizer.encode(prompt, bos=True) + expected)
        status, out, err = call(*options, "--backend", "reference")
        assert (status, out.removesuffix("\n")) == (0, text)
        assert f"decode {TEXT_TOKENS} tokens" in err
        for more in ((), ("--cache", "float16"), ("--cache", "int8"), ("--backend", "auto")):
            assert call(*options, "--backend", "native", *more)[:2] == (0, out), (prompt, more)
    for isa in ISAS:
        with native.use_instruction_set(isa):
            assert call(*options, "--backend", "native")[:2] == (0, out), isa


def test_the_command_line_takes_a_packed_folder(trained: Trained, call, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    save_packed(folder, open_source(trained.folder).model().pack(), trained.tokenizer.model_proto)
    prompt = next(iter(PROMPTS))
    options = ("--prompt", prompt, "--temperature", "0", "--max-new-tokens", "70")
    for backend in ("reference", "native", "auto"):
        expected = call(*options, "--backend", backend)
        assert expected[0] == 0
        assert call(*options, "--backend", backend, model=folder)[:2] == expected[:2]
    status, out, err = call(*options, "--no-pack", model=folder)
    assert (status, out) == (2, "")
    assert "error: " in err
    assert "holds packed weights and no latent floats" in err
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:3000])
    for backend in ("reference", "native"):
        status, out, err = call(*options, "--backend", backend, model=folder)
        assert (status, out) == (2, "")
        assert MODEL in err
        assert "Traceback" not in err


def test_the_command_line_says_what_native_needs(trained: Trained, call, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--prompt", "The", "--temperature", "0", "--max-new-tokens", "5")
    expected = call(*options, "--backend", "reference")
    monkeypatch.setattr(native, "_tables", lambda: {})
    kernels.native_available.cache_clear()
    try:
        status, out, err = call(*options, "--backend", "native")
        assert (status, out) == (2, "")
        assert "error: the native CPU kernels were not built" in err
        status, out, err = call(*options, "--backend", "auto")
        assert (status, out) == expected[:2]
        assert "note: the native CPU kernels were not built" in err
    finally:
        kernels.native_available.cache_clear()


def test_narrow_caches_stay_close(trained: Trained) -> None:
    ids = torch.from_numpy(trained.held_out.read(0, 4 * 96).astype("int64")).view(4, 96)
    exact = open_model(trained.folder)(ids)
    for cache_dtype in ("float16", "int8"):
        logits = open_model(trained.folder, cache_dtype=cache_dtype)(ids)
        # Measured: 0.004 and 0.005, nearly all of it from activations that then round the other way.
        assert 0 < float((logits - exact).abs().mean() / exact.abs().mean()) < 0.02


def test_the_int8_head_costs_next_to_nothing(trained: Trained) -> None:
    def perplexity(model: BitNetForCausalLM) -> float:
        tokens = trained.held_out
        return evaluate(model, tokens, context=96, bytes_per_token=trained.bytes_per_token).perplexity

    model = open_source(trained.folder).model()
    exact = perplexity(model)
    assert 1.1 < exact < 5  # learned, and not all of it certain
    packed = model.pack()
    for backend in ("reference", "native"):
        with kernels.use_backend(backend):
            assert abs(perplexity(packed) / exact - 1) < 1e-3
