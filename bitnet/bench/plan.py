"""What a benchmark measures: its options, checked and filled in."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from bitnet.bench.options import Options
from bitnet.bench.random_models import ternary_weights
from bitnet.console import stage
from bitnet.kernels import native_wanted
from bitnet.kernels.cpu import native
from bitnet.machine import DTYPES, MAX_THREADS, available_memory
from bitnet.model import PRESETS, ModelConfig
from bitnet.storage.source import Source, open_source


class Peer(NamedTuple):
    name: str
    binary: str
    model: str


@dataclass(frozen=True)
class Plan:
    """The options, checked and filled in. `isas` is ("reference",) without the native engine, `source` holds
    the model, None for a random one, `twins` the dtypes of the float twins."""

    options: Options
    name: str
    source: Source | None
    config: ModelConfig
    threads: tuple[int, ...]
    isas: tuple[str, ...]
    prompt: int
    new: int
    peers: tuple[Peer, ...]
    twins: tuple[str, ...]

    @property
    def native(self) -> bool:
        return self.isas != ("reference",)


def fitting_twins(config: ModelConfig) -> tuple[str, ...]:
    """dtypes of the float twins that memory holds. Raises ValueError where it holds none."""
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    available, fitting = available_memory(), list[str]()
    for dtype in ("float32", "bfloat16"):
        need = (ternary_weights(config) + tables) * DTYPES[dtype].itemsize
        if need <= 0.8 * available:
            fitting.append(dtype)
            continue
        message = f"the {dtype} twin takes {need / 1e9:.2f} GB, above 80 % of the {available / 1e9:.2f} GB available"
        if dtype == "bfloat16":
            raise ValueError(f"{message}; choose a smaller --preset, or leave --twins out")
        stage(f"note: {message}, and is left out")
    return tuple(fitting)


def parse_peer(text: str) -> Peer:
    """A peer from NAME=BINARY:MODEL. Raises ValueError for another form and for files that don't exist."""
    name, _, rest = text.partition("=")
    binary, _, model = rest.rpartition(":")
    if not (name and binary and model):
        raise ValueError(f"--peer {text} is not NAME=BINARY:MODEL, e.g. ik=build/bin/llama-bench:2b.gguf")
    if missing := [path for path in (binary, model) if not (Path(path).exists() or shutil.which(path))]:
        raise ValueError(f"--peer {name}: {' and '.join(missing)} cannot be found")
    return Peer(name, str(Path(shutil.which(binary) or binary).absolute()), model)


def pick_model(options: Options) -> tuple[str, Source | None, ModelConfig]:
    """Name, what holds it (None for a random model) and shape. Raises ValueError for one that cannot be run."""
    if options.model is None:
        name = options.preset or ("tiny" if options.quick else "2b-4t")
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return name, None, PRESETS[name]
    if options.preset is not None:
        raise ValueError(f"{options.model} has its own shape; leave out --preset {options.preset}")
    source = open_source(options.model)
    config = source.model().config if source.kind == "gguf" else source.config  # its weights tell the quantizer
    if config.quantizer == "none" and options.kernels:
        raise ValueError(
            f"--kernels times the products of ternary weights, which {options.model} has not; leave it out"
        )
    return str(options.model), source, config


def make_plan(options: Options) -> Plan:
    """Check the options and fill in what depends on model and machine. Raises ValueError, naming what is wrong."""
    for option in ("threads", "batch", "prompt", "new", "repeat"):
        value, empty = getattr(options, option), 1 if option == "threads" else 0
        if value is not None and min(value if isinstance(value, tuple) else (value,), default=empty) < 1:
            raise ValueError(f"--{option} is {value}; give at least 1")
    if max(options.threads, default=1) > MAX_THREADS:
        raise ValueError(f"--threads is {options.threads}; give at most {MAX_THREADS}")
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise ValueError(f"--json {options.json} is a folder or in one that does not exist; give a file to write")
    name, source, config = pick_model(options)
    isas: tuple[str, ...] = ("reference",)
    if options.isa or native_wanted(torch.device("cpu")):
        isas = ()
        for isa in options.isa or (native.kernels().name.decode(),):
            with native.use_instruction_set(isa):  # raises where it isn't there
                isas = (*isas, native.kernels().name.decode())
    new = options.new or (8 if options.quick else 64)
    room = config.max_position_embeddings - new - 1  # one token more is drawn behind the prompt
    prompt = options.prompt or max(1, min(32 if options.quick else 512, room))
    if prompt > room:
        raise ValueError(
            f"--prompt {prompt} and --new {new} exceed {name}'s {config.max_position_embeddings} positions"
        )
    return Plan(
        options=options,
        name=name,
        source=source,
        config=config,
        threads=options.threads or (torch.get_num_threads(),),
        isas=isas,
        prompt=prompt,
        new=new,
        peers=tuple(map(parse_peer, options.peer)),
        twins=fitting_twins(config) if options.twins else (),
    )
