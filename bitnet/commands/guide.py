"""A page that shows what quantization does: on the numbers of "A Visual Guide to Quantization" and on a model of yours.

    bitnet guide                                   the demo's run, runs/demo, as guide.html
    bitnet guide model.gguf --out model.html       any model with its float weights
    bitnet guide runs/float --qat runs/int4        minima of two runs of one shape, instead of two tiny models

One file that needs no network and no other file. Unless --qat is given, two tiny models are trained for the picture of
wide and narrow minima, which takes less than a minute.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    model: Annotated[Path, tyro.conf.arg(metavar="MODEL"), tyro.conf.Positional] = Path("runs/demo")
    """A run of train.py, or a model of any format that has its float weights."""
    out: Path = Path("guide.html")
    qat: Path | None = None
    """A run of MODEL's shape that was trained quantized: minima of these two are measured, on MODEL's held-out text."""


def run(options: Options) -> None:
    """Write the page."""
    from bitnet.console import say, stage
    from bitnet.files import check_writable, write_atomic
    from bitnet.pages.guide.guide import guide
    from bitnet.pages.guide.minima import measure_runs, measure_tiny
    from bitnet.pages.guide.subject import open_subject

    if not options.model.exists():
        raise ValueError(f"{options.model} does not exist; train the demo with make demo, or name a model")
    check_writable(options.out)
    subject = open_subject(options.model)
    stage("minima")
    minima = measure_runs(options.model, options.qat) if options.qat else measure_tiny()
    stage("figures")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, guide(subject, minima))
    say(f"written   {options.out}")
