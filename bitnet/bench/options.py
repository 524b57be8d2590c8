"""The options of the benchmark. Imports no torch, so that --help is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Options:
    """Speeds of prefill and decoding on this CPU, beside the machine's limits, float twins and other engines."""

    model: tyro.conf.Positional[Path | None] = None
    """A model that generate.py takes; without one, a random model of --preset."""
    preset: str | None = None
    """Shape of a random model: 2b-4t unless given (tiny with --quick)."""
    threads: tuple[int, ...] = ()
    """One or several numbers of CPU threads; torch's own choice unless given."""
    batch: tuple[int, ...] = (1,)
    """One or several numbers of texts at once; decoding counts the tokens of all."""
    prompt: int | None = None
    """Tokens of the prompt: 512 unless given (32 with --quick), or what fits the model."""
    new: int | None = None
    """Decoding steps: 64 unless given (8 with --quick)."""
    cache: Literal["float32", "float16", "int8"] = "float32"
    """Of keys and values in the native engine."""
    activations: Literal["int8", "int16", "float"] | None = None
    """In the native engine, of weights with group scales: int8 by groups, int16 by groups (by itself, for integer
    codes of at most 6 bits), or float, exact to the format."""
    isa: tuple[str, ...] = ()
    """One or several instruction sets; the one in force unless given."""
    repeat: int = 3
    """Rounds of every measurement."""
    kernels: bool = False
    """Also time the products alone, at the shapes of the model."""
    twins: bool = False
    """Also time float32 and bfloat16 torch models of the same shape."""
    peer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=BINARY:MODEL, a llama-bench and its model, to run in turn with ours; may be given several times."""
    json: Path | None = None
    """Write all results into this file."""
    device: str = "cpu"
    """cuda measures the Triton kernels, the GPU engine and training instead (bitnet/bench/gpu.py), of --preset or of
    two shapes; of the other options --json and --quick count."""
    quick: bool = False
    """A few seconds, to see that everything works: the numbers are no measurements."""
