"""How much loss ternary weights cost: BitNet b1.58 against its float twin, each with its own best learning rate.

    python benchmarks/twin_gap.py                   every run of the grid that benchmarks/results/ lacks, then a table
    python benchmarks/twin_gap.py --corpora sotu    a part of it, for a second process beside the first
    python benchmarks/twin_gap.py --table           the table only

A run is `train.py --preset demo` with another width, corpus, weight quantizer and learning rate: same tokenizer,
tokens, order, seed and optimizer. The loss is over the whole validation split. The best learning rate of a row is the
one with the lowest loss; if it lies at the edge of the grid, the table says so.
"""

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import train as trainer
from bitnet.files import write_atomic
from bitnet.training import config as recipes

RESULTS = Path(__file__).parent / "results" / "twin_gap"
SIZES = {"128x4": (128, 384, 2), "256x4": (256, 768, 4)}  # hidden_size, intermediate_size, heads


@dataclass(frozen=True)
class Options:
    corpora: tuple[str, ...] = ("sotu", "stdlib")
    sizes: tuple[str, ...] = tuple(SIZES)
    quantizers: tuple[str, ...] = ("ternary", "none")
    lrs: tuple[float, ...] = (5e-3, 1e-2, 2e-2)
    tokens: float = 1.2e6
    """Training tokens of every run."""
    seed: int = 0
    threads: int = 1
    table: bool = False
    """Train nothing, print what is there."""


def configuration(corpus: str, size: str, quantizer: str, lr: float, options: Options, out: str) -> recipes.TrainConfig:
    """The demo's recipe at another shape, corpus, quantizer and learning rate."""
    base = recipes.PRESETS["demo"]
    hidden, ffn, heads = SIZES[size]
    model = base.model.replace(
        hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads, num_key_value_heads=heads,
        quantizer=quantizer,
    )  # fmt: skip
    steps = int(options.tokens / (base.batch_size * base.window))
    return dataclasses.replace(
        base,
        model=model, data=dataclasses.replace(base.data, corpus=corpus), optim=dataclasses.replace(base.optim, lr=lr),
        steps=steps, minutes=None, eval_every=steps, sample_every=0, seed=options.seed, threads=options.threads,
        wandb="off", out=out,
    )  # fmt: skip


def run(corpus: str, size: str, quantizer: str, lr: float, options: Options) -> None:
    """Train one cell of the grid, unless its result is there."""
    name = f"{corpus}-{size}-{quantizer}-lr{lr:g}-{options.tokens / 1e6:g}M-seed{options.seed}.json"
    if (RESULTS / name).exists():
        return
    print(f"== {name}", flush=True)
    torch.compiler.reset()  # else the compilations of earlier shapes use up dynamo's limit per function
    with tempfile.TemporaryDirectory() as folder:
        done = trainer.train(configuration(corpus, size, quantizer, lr, options, f"{folder}/run"))
        if done.stop_signal is not None:
            raise SystemExit(128 + done.stop_signal)
        result = done.validate(whole=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    row = {
        "corpus": corpus, "size": size, "quantizer": quantizer, "lr": lr, "seed": options.seed,
        "tokens": done.config.steps * done.config.batch_size * done.config.window,
        "parameters": done.model.num_parameters(), "dtype": str(done.dtype).removeprefix("torch."),
        "loss": result.loss, "standard_error": result.standard_error, "bits_per_byte": result.bits_per_byte,
    }  # fmt: skip
    write_atomic(RESULTS / name, json.dumps(row, indent=1) + "\n")


def table(options: Options) -> None:
    """Print the best losses of this budget and seed and the gap between them, as Markdown."""
    pattern = f"*-{options.tokens / 1e6:g}M-seed{options.seed}.json"
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]
    print("| corpus | size | ternary: loss (lr) | float: loss (lr) | gap | bits/byte |")
    print("|---|---|---|---|---|---|")
    for corpus, size in sorted({(row["corpus"], row["size"]) for row in rows}):
        best = {}
        for quantizer in ("ternary", "none"):
            cells = sorted(
                (row for row in rows if (row["corpus"], row["size"], row["quantizer"]) == (corpus, size, quantizer)),
                key=lambda row: row["lr"],
            )
            if not cells:
                break
            best[quantizer] = min(cells, key=lambda row: row["loss"])
            best[quantizer]["edge"] = best[quantizer] in (cells[0], cells[-1])
        if len(best) < 2:
            continue
        ternary, twin = best["ternary"], best["none"]
        bits = " / ".join(f"{row['bits_per_byte']:.3f}" for row in (ternary, twin))
        losses = [f"{row['loss']:.4f} ({row['lr']:g}{', edge' if row['edge'] else ''})" for row in (ternary, twin)]
        print(
            f"| {corpus} | {size} ({twin['parameters'] / 1e6:.1f} M) | {losses[0]} | {losses[1]} | "
            f"{ternary['loss'] / twin['loss'] - 1:+.1%} | {bits} |"
        )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    unknown = set(options.sizes) - set(SIZES)
    if unknown:
        raise SystemExit(f"error: sizes {sorted(unknown)} are unknown; choose from {', '.join(SIZES)}")
    if not options.table:
        torch.set_num_threads(options.threads)
        for size in options.sizes:
            for corpus in options.corpora:
                for lr in options.lrs:
                    for quantizer in options.quantizers:
                        run(corpus, size, quantizer, lr, options)
    table(options)


if __name__ == "__main__":
    main()
