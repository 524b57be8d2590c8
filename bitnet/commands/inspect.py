"""What is in a model file: architecture, tensors, types, bits a weight, scales, sparsity.

    bitnet inspect model.gguf                         or a .safetensors file, or the folder of a run, a packed
    bitnet inspect runs/demo --json                   model or a Hugging Face model
    bitnet inspect model.gguf --histogram blk.0.attn_q.weight

Codes and scale that are stored in tensors of their own are shown as one tensor. `zeros` is the share of the weight 0 in
ternary tensors; of a run's latent weights it is what their quantization gives. Bits a weight count everything that a
tensor occupies, scales included.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from bitnet.console import table
from bitnet.files import JsonObject

BAR = 40


@dataclass(frozen=True)
class Options:
    file: tyro.conf.Positional[Path]
    """A .gguf or .safetensors file, or the folder of a run, a packed model or a Hugging Face model."""
    json: bool = False
    """Print one JSON object instead of text."""
    histogram: str | None = None
    """Print the distribution of one tensor's values, by its name."""
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint of a run folder."""


def run(options: Options) -> None:
    from bitnet.storage.contents import histogram, open_contents, report

    with open_contents(options.file, options.checkpoint) as contents:
        result = report(contents)
        if options.histogram is not None:
            entry = next((entry for entry in contents.entries if entry.name == options.histogram), None)
            if entry is None:
                raise ValueError(
                    f"{options.file} has no tensor {options.histogram!r}; run without --histogram for the names"
                )
            result["histogram"] = histogram(entry)
    if options.json:
        print(json.dumps(result, indent=1, allow_nan=False))
        return
    print_report(result)
    if options.histogram is not None:
        print_histogram(options.histogram, result["histogram"])


def print_report(result: JsonObject) -> None:
    print(
        f"{result['kind']}: {result['parameters']:,} parameters, {result['bytes']:,} bytes of tensors, "
        f"{result['bits_per_weight']:.2f} bits a weight"
    )
    if result["zeros"] is not None:
        print(f"{result['ternary_parameters']:,} parameters are ternary, {result['zeros']:.1%} of them 0")
    print(f"\n{table([(printable(key), _short(value)) for key, value in result['about'].items()])}\n")
    kinds = [("type", "tensors", "parameters", "bytes", "bits")]
    for kind, total in result["types"].items():
        bits = 8 * total["bytes"] / max(1, total["parameters"])
        kinds.append((kind, *(f"{total[key]:,}" for key in kinds[0][1:4]), f"{bits:.2f}"))
    print(f"{table(kinds)}\n")
    lines = [("tensor", "type", "shape", "bits", "scale", "zeros")]
    for row in result["tensors"]:
        scale, zeros = row.get("scale"), row.get("zeros")
        scale = f"{scale:.6g}" if isinstance(scale, float) else scale or ""
        shown = (scale, "" if zeros is None else f"{zeros:.1%}")
        shape = " x ".join(map(str, row["shape"]))
        lines.append((printable(row["name"]), row["type"], shape, f"{row['bits_per_weight']:.2f}", *shown))
    print(table(lines))


def print_histogram(name: str, bins: list[JsonObject]) -> None:
    total, most = sum(b["count"] for b in bins), max((b["count"] for b in bins), default=1)
    rows = []
    for b in bins:
        low, high = (end if isinstance(end, str) else f"{end:.5g}" for end in (b["low"], b["high"]))
        values = low if b["low"] == b["high"] else f"{low} to {high}"
        rows.append((values, f"{b['count']:,}", f"{b['count'] / total:.1%}", "#" * round(BAR * b["count"] / most)))
    print(f"\n{printable(name)}\n{table(rows)}")


def _short(value: object) -> str:
    text = printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 80 else f"{text[:77]}..."


def printable(text: str) -> str:
    """A stranger's text without what would steer the terminal: such characters escaped, as Python writes them."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
