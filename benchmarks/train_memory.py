"""The memory estimate of training (`bitnet/training/memory.py`) against what processes that train really take.

    python benchmarks/train_memory.py                a spread of configurations, each in a process of its own

Every process prepares a run on random tokens (`train.prepare`) and does some steps of it. Its peak is the last step's
VmHWM, when the moments are there. "Net" is the ratio without what the process held before it made the model, with
torch's optimizer and, where it compiles, a compiled trifle loaded.
Results go to benchmarks/results/train_memory.json. Linux alone (VmHWM).
"""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import train as trainer
from bitnet.bench.report import describe_machine
from bitnet.data.feed import TextFeed
from bitnet.data.mixture import Mixture
from bitnet.data.tokens import TokenArray
from bitnet.files import write_atomic
from bitnet.machine import MAPPED_BLOCK_COMPILED, process_memory, reset_peak_memory, return_freed_blocks
from bitnet.training import config as recipes
from bitnet.training.memory import estimate
from bitnet.training.weight_stats import weight_codes, weight_statistics

RESULTS = Path(__file__).parent / "results" / "train_memory.json"


@dataclass(frozen=True)
class Options:
    only: str = ""
    """Configurations whose name contains this."""
    steps: int = 3
    child: str | None = None
    """Configuration, as JSON, to measure in this process."""


def configuration(
    layers: int = 8, hidden: int = 512, optimizer: str = "muon", model: dict[str, Any] | None = None, **changes: Any
) -> recipes.TrainConfig:
    """The preset `small`, made of so many layers of this width, in float32 on a CPU."""
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 3 * hidden, **(model or {})}
    base = recipes.PRESETS["small"]
    defaults = {"batch_size": 4, "device": "cpu", "dtype": "float32", "compile": "off", "out": "runs/memory"}
    return dataclasses.replace(
        base, model=base.model.replace(**shape), optim=dataclasses.replace(base.optim, optimizer=optimizer),
        float_start=0.0, ramp=0.0, wandb="off", **{**defaults, **changes},
    )  # fmt: skip


FLOAT = {"quantizer": "none"}
CONFIGURATIONS: dict[str, recipes.TrainConfig] = {
    "eager float adamw": configuration(model=FLOAT, optimizer="adamw"),
    "eager fake-quant adamw": configuration(4, product="float", optimizer="adamw"),
    "eager int8 muon": configuration(product="int8"),
    "eager int8 recompute loss_chunk": configuration(product="int8", recompute=True, loss_chunk=256, batch_size=8),
    "eager fake-quant 2 micro-batches": configuration(product="float", micro_batches=2),
    "eager float relu2 GQA untied": configuration(
        6, 640, model={**FLOAT, "hidden_act": "relu2", "num_attention_heads": 10, "num_key_value_heads": 2,
                       "tie_word_embeddings": False}, optimizer="adamw", batch_size=2,
    ),
    "compiled float adamw": configuration(model=FLOAT, optimizer="adamw", compile="on"),
    "compiled fake-quant muon": configuration(product="float", compile="on"),
    "compiled int8 adamw": configuration(product="int8", compile="on", optimizer="adamw"),
    "compiled int8 muon 2 micro-batches": configuration(product="int8", compile="on", micro_batches=2),
    "compiled int8 muon loss_chunk": configuration(product="int8", compile="on", loss_chunk=256),
    "compiled int8 256 x 4 muon": configuration(4, 256, product="int8", compile="on"),
    "compiled fake-quant 384 x 8 muon": configuration(
        8, 384, model={"num_attention_heads": 6, "num_key_value_heads": 6}, product="float", compile="on"
    ),
    "compiled float recompute": configuration(model=FLOAT, compile="on", recompute=True),
    "compiled int8 60 M adamw": configuration(11, 640, model={"num_attention_heads": 10, "num_key_value_heads": 10},
                                              product="int8", compile="on", optimizer="adamw"),
}  # fmt: skip


def measure(config: recipes.TrainConfig, steps: int = 3) -> dict[str, float]:
    """Bytes in a process that trains: `peak`, and what it held `before`; and the estimate's `total`."""
    command = [sys.executable, __file__, "--steps", str(steps), "--child", json.dumps(dataclasses.asdict(config))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def child(config: recipes.TrainConfig, steps: int) -> dict[str, float]:
    """Train for some steps in this process."""
    return_freed_blocks()
    torch.optim.AdamW([torch.zeros(1)])
    if config.compile == "on":
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8))
    before = process_memory("VmRSS") or 0.0
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, 1 << 17, dtype=np.uint16)
    data: Any = Mixture({"random": SimpleNamespace(split=lambda _: TokenArray([ids]))}, (1,))  # type: ignore[dict-item]
    tokenizer: Any = SimpleNamespace(vocab_size=config.model.vocab_size, adds_bos=False, encode=lambda *_, **__: [1])
    trainer.open_feed = lambda *_, window, batch_size, **__: TextFeed(
        data, tokenizer, None, window, batch_size=batch_size
    )
    run = trainer.prepare(config)
    found = estimate(run.workload)
    if run.workload.stays_in_heap:
        return_freed_blocks(MAPPED_BLOCK_COMPILED)
    for _ in range(steps - 1):
        run.step()
    codes = weight_codes(run.model)  # which a step is surrounded by when statistics are due
    reset_peak_memory()
    run.step()
    weight_statistics(run.model, codes, run.world)
    run.batches.close()
    return {
        "parameters": run.model.num_parameters(), "before": before * 1e6, "peak": (process_memory() or 0.0) * 1e6,
        "total": found.total,
    }  # fmt: skip


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.child:
        print(json.dumps(child(recipes.TrainConfig.from_dict(json.loads(options.child)), options.steps)))
        return
    rows = []
    print(f"{'':<36} parameters   peak MB  estimate    ratio   net ratio")
    for name, config in CONFIGURATIONS.items():
        if options.only not in name:
            continue
        row = measure(config, options.steps)
        ratio = row["total"] / row["peak"]
        net = (row["total"] - row["before"]) / (row["peak"] - row["before"])
        rows.append({"name": name, **row, "ratio": round(ratio, 3), "net_ratio": round(net, 3)})
        print(
            f"{name:<36} {row['parameters']:>10,.0f} {row['peak'] / 1e6:>9,.0f} {row['total'] / 1e6:>9,.0f} "
            f"{ratio:>8.3f} {net:>11.3f}", flush=True,
        )  # fmt: skip
    if not options.only:
        RESULTS.parent.mkdir(exist_ok=True)
        write_atomic(RESULTS, json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
