"""What tests build: models with random weights, their inputs, folders of runs, and short runs to train."""

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitnet import kernels
from bitnet.inference.generation import (
    SamplingConfig,
    generate,
)
from bitnet.model import PRESETS, BitNetForCausalLM, ModelConfig
from bitnet.storage.folders import MODEL, OPTIMIZER, resolve
from bitnet.storage.safetensors import load_tensors
from bitnet.tokenizer import Tokenizer
from bitnet.training import config as recipes
from bitnet.training.checkpoint import save_checkpoint
from bitnet.training.reporter import read_metrics
from tests.forked import Forked

SMALL = (
    *("--preset", "tiny", "--model.vocab-size", "300", "--wandb", "off"),
    *("--compile", "off", "--device", "cpu", "--threads", "1"),
)


FOXES = "The quick brown fox jumps over the lazy dog. " * 40 + "user assistant one two three\n"


def fox_corpus(folder: Path) -> Path:
    """Twenty files of one text, which a tiny model learns in a few steps."""
    for part in range(20):
        (folder / f"{part:02}.txt").write_text(FOXES)
    return folder


def packed_model(config: ModelConfig, seed: int = 0) -> BitNetForCausalLM:
    """A random packed model, norms included."""
    torch.manual_seed(seed)
    model = BitNetForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.pack()


def random_ids(config: ModelConfig, *shape: int) -> Tensor:
    return torch.randint(config.vocab_size, shape)


@torch.no_grad()
def torch_logits(model: BitNetForCausalLM, ids: Tensor) -> Tensor:
    with kernels.use_backend("reference"):
        return model(ids)


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> BitNetForCausalLM:
    """A model in which nothing is near 1 or 0 by initialization: norm weights too, and logits of size 1."""
    model = BitNetForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    return model.to(dtype).eval()


def tiny_model(quantizer: str = "ternary", seed: int = 0, **changes: Any) -> BitNetForCausalLM:
    """The preset "tiny" with random weights large enough that its texts differ."""
    torch.manual_seed(seed)
    config = PRESETS["tiny"].replace(quantizer=quantizer, initializer_range=0.2, **changes)
    return BitNetForCausalLM(config).eval()


def save_run(folder: Path, model: BitNetForCausalLM, tokenizer: Tokenizer | None = None) -> Path:
    """A run folder with one checkpoint, the best and the last, without the state of an optimizer."""
    config, proto = {"model": dataclasses.asdict(model.config)}, b"" if tokenizer is None else tokenizer.model_proto
    save_checkpoint(
        folder, model=model, optimizer_state={}, state={"step": 1}, config=config, tokenizer=proto, best=True
    )
    return folder


def configuration(tmp_path: Path, corpus: Path, **changes: Any) -> recipes.TrainConfig:
    """A short run of a small model on the CPU, below `tmp_path`."""
    defaults = {
        "model": PRESETS["tiny"].replace(vocab_size=300, max_position_embeddings=32, num_hidden_layers=1),
        "data": recipes.DataConfig(corpus=str(corpus), cache=str(tmp_path / "data")),
        "out": str(tmp_path / "run"), "steps": 8, "batch_size": 4, "eval_every": 4, "eval_tokens": 512,
        "sample_every": 0, "log_every": 1, "dtype": "float32", "compile": "off", "wandb": "off", "device": "cpu",
    }  # fmt: skip
    return recipes.TrainConfig(**{**defaults, **changes})


def tensors(run: Path, which: str = "last") -> dict[str, Tensor]:
    """Weights and the optimizer's moments of a checkpoint of a run."""
    folder = resolve(run, which)
    found = load_tensors(folder / MODEL)
    optimizer = load_tensors(folder / OPTIMIZER)
    return {**found, **{f"optimizer.{k}": v for k, v in optimizer.items()}}


def torchrun(processes: int, tmp_path: Path, jobs: list[dict]) -> subprocess.CompletedProcess[str]:
    """Runs, one behind the other, in a group of processes as torchrun starts them; a job is what
    tests/training/distributed_worker.py says."""
    return Forked(tmp_path, processes=processes, jobs=[{"resume": False, "hang": None} | job for job in jobs]).wait()


def losses(config: recipes.TrainConfig) -> Tensor:
    """The loss of every step of a finished run."""
    rows = [row for row in read_metrics(Path(config.out) / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, config.steps + 1))
    return torch.tensor([row["loss"] for row in rows], dtype=torch.float64)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))


GREEDY = SamplingConfig(temperature=0)


def generate_ids(model, prompt, n, sampling=GREEDY, seed=0, **kwargs) -> torch.Tensor:
    """Generated ids `[B, steps]`."""
    return torch.stack(list(generate(model, prompt, max_new_tokens=n, sampling=sampling, seed=seed, **kwargs)), 1)


# Text


def expected_text(text: str, stop: list[str]) -> str:
    """Character by character: the text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        matches = [s for s in stop if text[:end].endswith(s)]
        if matches:
            return text[: end - max(map(len, matches))]
    return text
