"""The command line of training: --preset, --size, --like or --resume give a configuration, other options a field of it.

arguments = parse(["--preset", "small", "--data.corpus", "my_texts/"])
arguments.config, arguments.resume
"""

import argparse
import dataclasses
import operator
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bitnet.kernels import TERNARY_QUANTIZERS
from bitnet.storage.gguf.read import holds_ternary
from bitnet.storage.json_files import load_record
from bitnet.storage.safetensors import CONFIG, MODEL
from bitnet.storage.source import open_source
from bitnet.training.checkpoint import has_checkpoint
from bitnet.training.config import PRESETS, TrainConfig
from bitnet.training.help import help_text
from bitnet.training.sizes import SIZES

# The words of other projects: Hugging Face's TrainingArguments, nanochat, nanoGPT.
ELSEWHERE = {
    "adam-beta1": "--optim.beta1",
    "adam-beta2": "--optim.beta2",
    "batch": "--batch-size",
    "bf16": "--dtype bfloat16",
    "block-size": "--context",
    "dataset": "--data.corpus",
    "dataset-name": "--data.corpus",
    "depth": "--model.num-hidden-layers",
    "device-batch-size": "--batch-size, the whole step's, which --micro-batches cuts",
    "embedding-lr": "--optim.lr-rest",
    "epochs": "--steps, each of batch size x context tokens; --estimate tells how many tokens those are",
    "eval-steps": "--eval-every",
    "fp16": "--dtype bfloat16",
    "grad-clip": "--optim.grad-clip",
    "gradient-accumulation-steps": "--micro-batches, into which --batch-size is cut",
    "gradient-checkpointing": "--recompute",
    "learning-rate": "--optim.lr",
    "logging-steps": "--log-every",
    "lr-scheduler-type": "--optim.decay",
    "matrix-lr": "--optim.lr",
    "max-grad-norm": "--optim.grad-clip",
    "max-iters": "--steps",
    "max-seq-len": "--context",
    "max-seq-length": "--context",
    "max-steps": "--steps",
    "model-name-or-path": "--init",
    "n-embd": "--model.hidden-size",
    "n-head": "--model.num-attention-heads",
    "n-layer": "--model.num-hidden-layers",
    "num-iterations": "--steps",
    "num-train-epochs": "--steps, each of batch size x context tokens; --estimate tells how many tokens those are",
    "out-dir": "--out",
    "output-dir": "--out",
    "per-device-train-batch-size": "--batch-size, the whole step's on all processes, which --micro-batches cuts",
    "report-to": "--wandb",
    "resume-from-checkpoint": "--resume RUN",
    "run-name": "--out",
    "save-steps": "--eval-every; each validation also saves",
    "save-total-limit": "--keep-last",
    "seq-len": "--context",
    "sequence-length": "--context",
    "tokenizer-name": "--data.tokenizer",
    "torch-compile": "--compile on",
    "total-batch-size": "--batch-size, in sequences",
    "train-file": "--data.corpus",
    "warmup-iters": "--optim.warmup-steps",
}

STARTS = ("--preset", "--size", "--like")
"""What a new run may start from, one of them."""


class Arguments(NamedTuple):
    """What a command line asks for."""

    config: TrainConfig
    resume: bool = False
    estimate: int | None = None
    """Train nothing; say what the run would take on this many processes."""
    presets: bool = False
    """Train nothing; print the presets."""


def parse(arguments: Sequence[str], prog: str = "train.py") -> Arguments:
    """Read a command line. Raises ValueError, or CheckpointError for a run that cannot be read; --help exits."""
    check_words(arguments)
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    base = first.add_mutually_exclusive_group()
    # No default here, since argparse takes a value that is the default for one that was not given.
    base.add_argument("--preset", choices=PRESETS)
    base.add_argument("--size", choices=SIZES)
    base.add_argument("--like", metavar="RUN")
    base.add_argument("--resume", metavar="RUN")
    first.add_argument("--out")
    first.add_argument("--estimate", nargs="?", const=1, type=int, metavar="N")
    first.add_argument("--presets", action="store_true")
    first.add_argument("-h", "--help", action="store_true")
    resolved = _resolve_auto(arguments)
    known, rest = first.parse_known_args(resolved)
    default = SIZES[known.size] if known.size else PRESETS[known.preset or "demo"]
    source = known.resume or known.like
    if source:
        default = load_record(Path(source) / CONFIG, TrainConfig)
        # A run trained "for 5 minutes" knows by now how many steps that was, unless it was stopped before the first.
        changes = {"out": source} if known.resume else {"pace": (), "minutes": None}
        default = dataclasses.replace(default, **changes)
    if known.help:
        print(help_text(prog, default, shutil.get_terminal_size().columns), end="")
        raise SystemExit(0)
    if known.out is not None:
        rest = ["--out", known.out, *rest]
    import tyro  # here, since a machine without it can train from Python

    config = tyro.cli(TrainConfig, prog=prog, default=default, args=rest)
    if known.resume and resolved != list(arguments):  # auto: a tokenizer has decided on the vocabulary since
        model = config.model.replace(vocab_size=default.model.vocab_size)
        config = dataclasses.replace(config, model=model, minutes=default.minutes)  # and the minutes on the steps
    if known.resume:
        if (Path(source) / MODEL).is_file():
            raise ValueError(f"{source} is a checkpoint; --resume takes its run folder")
        if (config.out, config.model) != (default.out, default.model):
            raise ValueError("--resume goes on with the same model in the same folder; use --like to start another run")
        if resolved == list(arguments) and has_checkpoint(Path(source)):
            check_resumed(config, default, source)
    elif config.init:
        check_shape(config, default)
        if known.preset == "chat" and not any(word.startswith("--model.quantizer") for word in rest):
            config = dataclasses.replace(config, model=config.model.replace(quantizer=trained_as(config.init)))
    check_owners(config, default)
    if known.preset == "lora" and config.lora is None and known.estimate is None:
        raise ValueError("--preset lora has the rates of adapters; give --lora RANK, and --init MODEL")
    if known.preset == "chat" and config.data.chat is None and known.estimate is None:
        raise ValueError("--preset chat trains on conversations; give --data.chat FILE, and --init MODEL")
    if known.preset == "chat" and config.init is None and known.estimate is None:
        raise ValueError("--preset chat goes on with a model that was trained on text; give --init MODEL")
    return Arguments(config, known.resume is not None, known.estimate, known.presets)


def check_resumed(config: TrainConfig, default: TrainConfig, run: str) -> None:
    """Raise ValueError for an option that says how a run begins, and is another one than where the run began."""
    config = config.absolute()
    for name, counts in (
        ("init", config.lora is None),  # adapters stand on it
        ("lora", True),
        ("lora_alpha", True),  # by which what was learned is multiplied
        ("data.tokenizer", True),
        ("layer_steps", config.layer_steps > 0),  # 0 allows what a start does not, as --parallel fsdp
        ("layer_tokens", True),
        ("layer_rate", True),
    ):
        value = operator.attrgetter(name)(config)
        if counts and value != operator.attrgetter(name)(default):
            raise ValueError(
                f"--resume goes on from the checkpoint of {run}, and nothing of --{name.replace('_', '-')} {value} "
                "would be used; leave it out, or use --like to start another run"
            )


def check_shape(config: TrainConfig, default: TrainConfig) -> None:
    """Raise ValueError for a field of the model that was given beside --init and is another there; with adapters the
    quantizer is one. Raises as `open_source` does."""
    given = {name for name in vars(config.model) if getattr(config.model, name) != getattr(default.model, name)}
    given -= {"vocab_size"} if config.lora else {"vocab_size", "quantizer"}  # a tokenizer decides on its vocabulary
    found = open_source(str(config.init)).config if given else config.model
    for name in sorted(given):
        wanted, there = getattr(config.model, name), getattr(found, name)
        if wanted != there:
            raise ValueError(
                f"--model.{name.replace('_', '-')} {wanted} is not what {config.init} has ({there}), and the model of "
                "--init stays as it is; leave it out"
            )


def trained_as(path: str) -> str:
    """The quantizer of a model, as fine-tuning keeps it. Raises as `open_source` does."""
    source = open_source(path)
    return "ternary" if source.file is not None and holds_ternary(source.file) else source.config.quantizer


def check_owners(config: TrainConfig, default: TrainConfig) -> None:
    """Raise ValueError for an option that has no effect without another one, or beside it."""
    optim = config.optim

    def given(name: str) -> str:
        value = operator.attrgetter(name)(config)
        return f"--{name.replace('_', '-')} {value}" if value != operator.attrgetter(name)(default) else ""

    for names, there, owner in (
        (("teacher_weight", "teacher_temperature"), config.teacher, "--teacher"),
        (("layer_tokens", "layer_rate"), config.layer_steps, "--layer-steps"),
        (("ramp_shape",), config.ramp, "--ramp"),
        (("spike_factor",), config.on_spike != "off", "--on-spike"),
        (("optim.second_from", "optim.weight_decay_second"), optim.lr_second, "--optim.lr-second"),
        (("optim.lr_min_ratio",), optim.decay != "constant", "a decay of the rate (--optim.decay)"),
        (("sample_prompt",), config.sample_every, "--sample-every"),
    ):
        for name in names:
            if not there and (option := given(name)):
                raise ValueError(f"{option} has no effect without {owner}; give that too, or leave it out")
    shape, quantizer = config.ramp_shape, config.model.quantizer
    if shape == "soft" != default.ramp_shape and quantizer not in TERNARY_QUANTIZERS:
        raise ValueError(f"--ramp-shape soft is of ternary codes, and the quantizer is {quantizer}; give linear")
    for beside, there, owner in (
        (("data.corpus", "data.max_bytes", "data.document_mask"), config.data.chat, "--data.chat"),
        (("data.tokenizer",), config.init, "--init, whose tokenizer the model knows"),
        (("optim.lr_rest", "optim.weight_decay", "optim.weight_decay_second", "product"), config.lora, "--lora"),
        (
            ("float_start", "ramp"),
            config.model.quantizer == "none" and config.float_start + config.ramp,
            "--model.quantizer none",
        ),
    ):
        for name in beside:
            if there and (option := given(name)):
                raise ValueError(f"{option} has no effect beside {owner}; leave it out")
    if config.minutes and config.steps != default.steps:
        raise ValueError(
            f"--minutes {config.minutes:g} chooses the number of steps, and --steps {config.steps} gives it; leave "
            "one out"
        )


def check_words(arguments: Sequence[str]) -> None:
    """Raise ValueError for an option of another project, with its name here."""
    for argument in arguments:
        word = argument.removeprefix("--").partition("=")[0].lower().replace("_", "-")
        if argument.startswith("--") and word in ELSEWHERE:
            raise ValueError(f"{argument.partition('=')[0]} is unknown; here it is {ELSEWHERE[word]}")


def _resolve_auto(arguments: Sequence[str]) -> list[str]:
    """`--resume auto` is `--resume OUT` where that run has begun, which takes the place of what began it, and
    nothing where it has not: the same command line starts a run and goes on with it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--resume", "--out", *STARTS):
        first.add_argument(name)
    known, rest = first.parse_known_args(arguments)
    if known.resume != "auto":
        return list(arguments)
    if known.out is None:
        raise ValueError("--resume auto goes on with the run in --out, or begins it; give --out")
    if has_checkpoint(Path(known.out)):
        return ["--resume", known.out, *rest]
    given = {name: getattr(known, name.removeprefix("--")) for name in STARTS}
    start = [word for name, value in given.items() if value is not None for word in (name, value)]
    return [*start, "--out", known.out, *rest]
