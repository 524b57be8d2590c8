"""Quantize a float model after training, by any method of `bitnet/ptq/methods.py`.

    bitnet quantize runs/demo-float demo-gptq --method gptq-4
    bitnet quantize model.gguf model-awq --method awq --text my_texts/ --group-size 64
    bitnet quantize --list

IN is anything that generate.py takes and that holds float weights. OUT is a folder that generate.py, `bitnet compare`
and `bitnet export` take. Methods that look at activations are calibrated on the training part of a corpus: a run's own,
or the one of --text.
"""

import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Options:
    source: Annotated[str | None, tyro.conf.arg(metavar="IN"), tyro.conf.Positional] = None
    """A run, a folder or a file of a float model."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="OUT"), tyro.conf.Positional] = None
    """The folder to write; it must not exist."""
    method: str | None = None
    """One of --list."""
    list: bool = False
    """Print the methods and end."""
    text: str | None = None
    """Corpus for calibration, as in train.py; a run's own unless given. GGUF types that need none weigh their errors by
    it where it is given."""
    calibration_tokens: int = 16384
    context: int | None = None
    """Tokens in a calibration sequence; the training context of a run, at most 512 for other models."""
    group_size: int = 128
    """Input channels that share a scale (rtn, awq, gptq, hqq, autoround, ptqtp, mixed); -1: all of a row."""
    symmetric: bool = False
    """Without zero points (rtn, awq, gptq, autoround, mixed)."""
    algorithm: Literal["refined", "original"] = "refined"
    """gptq: the better one, or the published one step by step."""
    calibration: Literal["minmax", "percentile", "mse", "entropy"] = "mse"
    """Of activation ranges (w8a8-static, smoothquant)."""
    tuning_steps: int = 200
    """autoround: steps of each block."""
    target_bits: float | None = None
    """mixed: bits of a weight with its scales, if not those of the method's name."""
    outlier_threshold: float = 6.0
    """llm-int8: input channels that reach it in the calibration text are kept in 16 bits."""
    compatible: bool = False
    """GGUF types: ggml's own bytes instead of the better search."""


def run(options: Options) -> None:
    from bitnet import console
    from bitnet.files import check_writable
    from bitnet.model.quantized import model_bits
    from bitnet.ptq import drivers
    from bitnet.ptq.methods import METHODS, quantize_model

    if options.list:
        rows = [
            [name, f"{method.bits:.2f} bits", method.description + ", calibrated" * method.needs_calibration]
            for name, method in METHODS.items()
        ]
        print(console.table(rows, right=[1]))
        return
    if options.source is None or options.out is None or options.method is None:
        raise ValueError("give a model, a folder to write and --method; bitnet quantize --list has the names")
    if options.method not in METHODS:
        raise ValueError(f"method {options.method!r} is unknown; choose one of {', '.join(METHODS)}")
    check(options)
    if os.path.lexists(options.out):  # before the work, not behind it
        raise ValueError(f"{options.out} already exists; choose another name or delete it")
    check_writable(options.out)

    from bitnet.evaluation.loss import unused_rows
    from bitnet.evaluation.texts import calibration_sequences, open_text
    from bitnet.storage.folders import save_quantized
    from bitnet.storage.source import open_source

    source = open_source(options.source)
    model = source.model()
    if model.is_packed:
        raise ValueError(f"{options.source} is packed; quantize the float model it was made from")
    tokenizer_files = source.tokenizer_files()  # what is wrong with them is said before the work
    ids = unused = None
    if calibrates(options):
        feed = open_text(source, options.text, options.context)
        ids = calibration_sequences(feed.mixture, feed.window, options.calibration_tokens)
        unused = unused_rows(feed.tokenizer, model.config.vocab_size)
    start = time.perf_counter()
    chosen = drivers.Options(
        group_size=options.group_size,
        symmetric=options.symmetric,
        algorithm=options.algorithm,
        calibration=options.calibration,
        tuning_steps=options.tuning_steps,
        target_bits=options.target_bits,
        unused=unused,
        version=2 if options.algorithm == "original" else 1,  # whose zero points may be 0, which version 1 can't hold
        outlier_threshold=options.outlier_threshold,
        compatible=options.compatible,
    )
    model = quantize_model(model, options.method, ids, chosen)
    seconds = time.perf_counter() - start
    save_quantized(model, options.out, options.method, tokenizer_files)
    nominal, stored = model_bits(model)
    size = sum(file.stat().st_size for file in options.out.iterdir()) / 1e6
    print(f"{options.out}: {size:.2f} MB, {stored:.2f} bits a weight ({nominal:g} without scales), {seconds:.1f} s")


def calibrates(options: Options) -> bool:
    """Whether a text is read."""
    from bitnet.ptq.methods import METHODS

    driver = METHODS[str(options.method)].driver
    return driver.calibration == "required" or (driver.calibration == "optional" and options.text is not None)


def check(options: Options) -> None:
    """Raise ValueError for an option that was given and changes nothing in what the method does."""
    from bitnet.ptq.methods import METHODS

    heeded = METHODS[str(options.method)].driver.heeds | {"source", "out", "method", "list"}
    heeded |= {"text", "calibration_tokens", "context"} if calibrates(options) else set()
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in heeded and value != field.default:
            raise ValueError(
                f"--{field.name.replace('_', '-')} {value} has no effect on {options.method}; leave it out"
            )
