"""A trained run as packed weights, for inference only.

    python -m bitnet.export runs/demo demo-packed

`packed` writes 2-bit projections and an INT8 embedding (which is also the head where they are tied) with their scales,
the configuration and the tokenizer: a ninth of the demo's float32 checkpoint, and the numbers that `generate.py`
computes with anyway. Nothing ternary is quantized twice: codes and scales come from one quantization of the latent
weights.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Options:
    """Write a trained run in another form."""

    run: tyro.conf.Positional[Path]
    """A run folder of train.py, or one checkpoint of it."""
    out: tyro.conf.Positional[Path]
    """The folder to write; it must not exist."""
    to: Literal["packed"] = "packed"
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint of a run folder."""


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m bitnet.export", args=argv)
    from bitnet.checkpoint import MODEL, TOKENIZER, load_model, resolve, save_packed

    try:
        folder = resolve(options.run, options.checkpoint)
        model = load_model(folder)
        if model.config.quantizer == "none":
            raise ValueError(f"{options.run} is a float model, which has no packed form")
        save_packed(options.out, model.pack(), (folder / TOKENIZER).read_bytes())
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    before, after = ((path / MODEL).stat().st_size for path in (folder, options.out))
    print(f"{options.out}: {after / 1e6:.2f} MB, {before / after:.1f}x smaller than {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
