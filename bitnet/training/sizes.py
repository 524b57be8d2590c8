"""One dial: `--size` gives shape, batch, rates and tokens of a run, from rules.

    shape      C x L of the table below, heads of 64, F = 3 C; GPT-2's two for 125m and 350m (F near 8/3 C, as in Llama)
    tokens     20 a parameter (arXiv 2203.15556); with --minutes, what the time allows
    batch      up to 30m the demo's and small's, of minutes and hours on a CPU; above, tokens of a step are
               0.292 X^0.3271 of all FLOPs X = 6 P tokens (arXiv 2401.02954), to the nearest power of 2
    rates      matrices 8e-3 sqrt(256 / C), by Muon; embeddings and norms 3 times as much, by AdamW
    quantizer  ternary; a fifth of the steps in 16 bit, a ramp over three fifths

What that rests on. The rate at C = 256: of the runs in benchmarks/results/recipe the least of a parabola through the
losses at 5e-3, 1e-2 and 2e-2 (one seed) lies at 6.2e-3 (speeches) and 1.0e-2 (code) with a ramp, at 5.5e-3 and 9.7e-3
without. How it changes with the width is not measured: there are two sizes, and at C = 128 the three losses of a row
differ by at most 0.6 %, the least at either end but once, which neither shows the square root nor speaks against it. It
is the literature's: Muon's update has the spectral norm 0.2 lr sqrt(max(N, K)) here, and outputs that change as much at
every width ask for one that does not grow (arXiv 2310.17813). 125m and 350m rest on literature alone and were never
trained here.
"""

import math
from dataclasses import replace

from bitnet.data.feed import DataConfig
from bitnet.model import PRESETS as MODELS
from bitnet.model import ModelConfig
from bitnet.training.config import PRESETS, TrainConfig

TOKENS_PER_PARAMETER = 20
RATE, WIDTH, REST = 8e-3, 256, 3.0
"""Rate of matrices at a width, and that of the rest as a multiple of it."""
MICRO_BATCH = 16
"""Sequences, of the sizes for a GPU."""

SHAPES: dict[str, ModelConfig] = {
    "5m": MODELS["demo"],
    "30m": MODELS["small"],
    "125m": MODELS["125m"],
    "350m": ModelConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16
    ),
}
LOCAL = {"5m": PRESETS["demo"], "30m": PRESETS["small"]}
"""Those that a CPU trains, with the presets whose batch they take."""


def parameters(model: ModelConfig) -> int:
    """Of the model, embedding included."""
    return sum(math.prod(shape) for shape in model.tensor_shapes().values())


def rate(model: ModelConfig) -> float:
    """Peak rate of the matrices, to two digits."""
    return float(f"{RATE * math.sqrt(WIDTH / model.hidden_size):.2g}")


def batch_tokens(count: int, tokens: int) -> int:
    """Tokens of a step for a model of so many parameters that sees so many tokens: a power of 2."""
    return int(2 ** round(math.log2(0.292 * (6.0 * count * tokens) ** 0.3271)))


def sized(name: str) -> TrainConfig:
    """The run of a size of `SHAPES`."""
    model = SHAPES[name]
    count = parameters(model)
    tokens = TOKENS_PER_PARAMETER * count
    lr = rate(model)
    base = LOCAL.get(name)
    if base is None:
        sequences = batch_tokens(count, tokens) // model.max_position_embeddings
        optim = replace(PRESETS["small"].optim, warmup_steps=375)  # as in the papers' long runs
        base = replace(
            PRESETS["small"], model=model, data=DataConfig(corpus="fineweb-edu"), optim=optim, batch_size=sequences,
            micro_batches=sequences // MICRO_BATCH, eval_every=500,
        )  # fmt: skip
    return replace(
        base, optim=replace(base.optim, lr=lr, lr_rest=float(f"{REST * lr:.2g}")),
        steps=tokens // base.tokens_per_step, out=f"runs/{name}",
    )  # fmt: skip


SIZES = {name: sized(name) for name in SHAPES}
