"""One run of the recipe's grid, in a process of its own that waits for the next one: `benchmarks/recipe.py` starts it.

    python benchmarks/recipe_runs.py DATA RUNS DEVICE compiled|eager     jobs as JSON lines on stdin, results on stdout

DATA has a folder for each corpus: shards as `tokenize_corpus` writes them, and tokenizer.model. What a job does beside
the configuration of `train.py --preset demo` is a technique of `TECHNIQUES`: something that acts on the layers'
products during training alone, so that what is validated is the quantized model that a checkpoint becomes.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train as trainer
from bitnet.bench.report import describe_machine
from bitnet.data.feed import TextFeed
from bitnet.data.mixture import Mixture
from bitnet.data.tokens import TokenizedCorpus
from bitnet.kernels.reference import fake_quant_linear, fake_quantize_weight
from bitnet.model import bit_linears
from bitnet.quant import ternary
from bitnet.quant.affine import SCALE_EPS
from bitnet.tokenizer import Tokenizer
from bitnet.training import config as recipes
from bitnet.training.checkpoint import save_checkpoint
from bitnet.training.step import Trainer

SIZES = {"64x2": (64, 128, 1, 2), "128x4": (128, 384, 2, 4), "256x4": (256, 768, 4, 4)}
"""hidden_size, intermediate_size, heads, layers."""


def open_shards(data: Path, corpus: str, window: int, batch_size: int, seed: int) -> TextFeed:
    """The feed of a corpus that was tokenized elsewhere."""
    folder = data / corpus
    mixture = Mixture({corpus: TokenizedCorpus.load(folder)}, (1,))
    return TextFeed(mixture, Tokenizer.load(folder / "tokenizer.model"), None, window, batch_size=batch_size, seed=seed)


def configuration(job: dict[str, Any], runs: Path, device: str, *, compiled: bool) -> recipes.TrainConfig:
    """The demo's recipe with the changes of a job, whose keys are fields of the configuration, dotted those within."""
    base = dataclasses.replace(recipes.PRESETS["demo"], float_start=0.5, ramp=0.0)
    hidden, ffn, heads, layers = SIZES[job["size"]]
    shape = {
        "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads, "num_key_value_heads": heads,
        "num_hidden_layers": layers,
    }  # fmt: skip
    parts: dict[str, dict[str, Any]] = {"model": shape, "optim": {"lr": job["lr"]}, "": {}}
    for name, value in job["changes"].items():
        part, _, field = name.rpartition(".")
        parts[part][field] = value
    steps = max(1, int(job["tokens"] / (base.batch_size * base.window)))
    for role in ("teacher", "init"):
        if job.get(role):
            parts[""][role] = str(runs / job[role])
    return dataclasses.replace(
        base, model=base.model.replace(**parts["model"]), optim=dataclasses.replace(base.optim, **parts["optim"]),
        steps=steps, minutes=None, sample_every=0, seed=job["seed"], device=device, threads=1,
        compile="on" if compiled else "off", wandb="off", out=str(runs / job["key"]), **parts[""],
    )  # fmt: skip


def run(job: dict[str, Any], data: Path, runs: Path, device: str, *, compiled: bool) -> dict[str, Any]:
    """Train and validate; what `keep` names is saved as a run."""
    trainer.open_feed = lambda *_, window, batch_size, seed, **__: open_shards(
        data, job["corpus"], window, batch_size, seed
    )
    with TECHNIQUES[job["technique"]]():
        started = time.perf_counter()
        done = trainer.prepare(configuration(job, runs, device, compiled=compiled))
        with contextlib.closing(done.batches):
            begun = time.perf_counter()
            while done.progress.step < done.config.steps:
                result = done.step()
                if result.fault:
                    raise RuntimeError(result.fault.what)
            trained = time.perf_counter()
            found = done.validate(whole=True)
    if job["keep"]:
        save_checkpoint(
            done.folder, model=done.model, optimizer_state={}, state=done.progress.state(done.feed.fingerprint, None),
            config=dataclasses.asdict(done.config), tokenizer=done.feed.tokenizer.files(), best=True,
        )  # fmt: skip
    return {
        "key": job["key"], "row": job["row"], "corpus": job["corpus"], "size": job["size"], "lr": job["lr"],
        "seed": job["seed"], "tokens": done.config.steps * done.config.tokens_per_step,
        "parameters": done.model.num_parameters(), "dtype": str(done.dtype).removeprefix("torch."),
        "device": str(done.device), "compiled": done.compiled, "machine": describe_machine(),
        "loss": found.loss, "standard_error": found.standard_error, "bits_per_byte": found.bits_per_byte,
        "start_seconds": round(begun - started, 2), "seconds": round(trained - begun, 2),
        "validation_seconds": round(time.perf_counter() - trained, 2),
    }  # fmt: skip


# Techniques: what acts on the products of the layers before a step.

Product = Callable[[Tensor, Tensor, Tensor | None, str, Tensor, Tensor], Tensor]
"""Of x, weight, bias and quantizer; of the quantizers' strength and the share of the steps that is left, scalars."""


@contextlib.contextmanager
def with_products(product: Product) -> Iterator[None]:
    """`product` in the layers, instead of the ordinary one, from the switch on."""
    original = Trainer.set_products
    # One callable and two tensors for all steps, so that the layers are compiled once.
    share, rest = torch.ones(()), torch.ones(())

    def chosen(x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: str) -> Tensor:
        return product(x, weight, bias, quantizer, share, rest)

    def set_products(self: Trainer) -> None:
        original(self)
        step, steps = self.progress.step, self.config.steps
        strength = self.config.quantizer_strength(step)
        if step >= steps or strength == 0:
            return  # what is validated is the model itself
        share.fill_(strength)
        rest.fill_(1 - step / steps)
        for _, layer in bit_linears(self.model):
            layer.product = chosen

    Trainer.set_products = set_products  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.set_products = original  # type: ignore[method-assign]


def dead_zone(x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: str, share: Tensor, rest: Tensor) -> Tensor:
    """Weights whose code is 0 add lambda times their sum to every output (arXiv 2509.23809), so that each gets a
    gradient of its own; lambda falls from 0.01 to 0 by the end, and the model needs no bias."""
    y = fake_quant_linear(x, weight, bias, quantizer, share)
    dead = fake_quantize_weight(weight.detach(), quantizer) == 0
    return y + (0.01 * rest * (weight * dead).sum(1)).to(y.dtype)


@contextlib.contextmanager
def median_scale() -> Iterator[None]:
    """gamma = median |W| instead of the mean (arXiv 2407.09527), in training and in what is validated."""
    original = ternary.absmean_scale
    ternary.absmean_scale = lambda weight: weight.float().abs().median().clamp(min=SCALE_EPS)
    try:
        yield
    finally:
        ternary.absmean_scale = original


TECHNIQUES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "": contextlib.nullcontext,
    "dead zone": partial(with_products, dead_zone),
    "median scale": median_scale,
}


def main() -> None:
    data, runs, device, compiled = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "compiled"
    # Results alone go to the pipe; everything that is printed goes where stderr goes.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        print(f"== {job['key']}", flush=True)
        results.write(json.dumps(run(job, data, runs, device, compiled=compiled)) + "\n")


if __name__ == "__main__":
    main()
