"""The --help of training: the options that matter first, then the others in groups, with the values of the preset."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union

from bitnet.training.config import PRESETS, TrainConfig
from bitnet.training.sizes import SIZES

INTRODUCTION = """\
Train a BitNet b1.58 language model, or go on with a run.

  {prog} --preset demo --minutes 5               a small model on public-domain speeches, no download
  {prog} --preset small --data.corpus my.txt     your own text
  {prog} --size 30m --data.corpus my.txt --minutes 60     a size and a time
  {prog} --resume runs/demo                      go on where a run was stopped
  {prog} --preset 700m --estimate                what it would take; trains nothing
  {prog} --presets                               the presets, with parameters, tokens, memory and hours
  torchrun --nproc-per-node 4 train.py --preset small --parallel fsdp    several processes
"""
# Options that are no fields of the configuration.
COMMAND = {
    "preset": (f"{{{','.join(PRESETS)}}}", "Start from this preset.", "demo"),
    "size": (f"{{{','.join(SIZES)}}}", "Start from the run of this size: shape, batch, rates and tokens by rules.", ""),
    "like": ("RUN", "Start from the configuration of another run, not from its weights.", ""),
    "resume": ("RUN", "Go on with this run; auto: with --out's, if it has begun.", ""),
    "estimate": ("[N]", "Train nothing; print the tokens, memory, disk and time of the run, on N processes.", ""),
    "presets": ("", "Train nothing; print a table of the presets.", ""),
}
FIRST = (
    "preset", "resume", "data.corpus", "out", "minutes", "steps", "batch_size", "model.quantizer", "optim.lr", "init",
)  # fmt: skip
GROUPS = {
    "run": (
        "preset", "size", "like", "resume", "estimate", "presets", "out", "init", "lora", "lora_alpha", "layer_steps",
        "layer_tokens", "layer_rate", "steps", "minutes", "pace", "max_minutes", "context", "batch_size", "float_start",
        "ramp", "ramp_shape", "teacher", "teacher_weight", "teacher_temperature", "seed", "log_every", "sample_every",
        "sample_prompt", "wandb",
    ),
    "model": ("model",),
    "data": ("data",),
    "optimizer": ("optim",),
    "checkpoints": ("eval_every", "eval_tokens", "keep_last", "async_save"),
    "hardware": (
        "device", "dtype", "product", "compile", "graphs", "threads", "micro_batches", "recompute", "loss_chunk",
        "parallel", "reduce_dtype",
    ),
    "faults": ("on_nan", "on_spike", "spike_factor", "timeout_minutes"),
}  # fmt: skip
INDENT = 34


def help_text(prog: str, config: TrainConfig, width: int) -> str:
    """Everything that --help prints; the values in brackets are those of this configuration."""
    entries = {**COMMAND, **dict(_fields(config, ""))}
    lines = [f"usage: {prog} [OPTIONS]\n", INTRODUCTION.format(prog=prog), "what matters first"]
    lines += [_entry(name, entries[name], width) for name in FIRST]
    for group, names in GROUPS.items():
        members = [e for e in entries if e not in FIRST and (e in names or e.partition(".")[0] in names)]
        lines += [f"\n{group}", *(_entry(name, entries[name], width) for name in members)]
    return "\n".join(lines) + "\n"


def _fields(config: Any, prefix: str) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Name, form of the value, text and present value of every field, those of the parts after their names."""
    types, texts = typing.get_type_hints(type(config)), _texts(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{field.name}.")
        else:
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
            yield prefix + field.name, (_form(types[field.name]), texts.get(field.name, ""), shown)


def _entry(name: str, entry: tuple[str, str, str], width: int) -> str:
    form, text, value = entry
    option = name.replace("_", "-")
    head = f"  --{option} / --{_negated(option)}" if form == "BOOL" else f"  --{option} {form}".rstrip()
    shown = f" [{value}]" if value not in ("", "None") else ""
    body = textwrap.wrap(text + shown, max(30, min(width, 120) - INDENT)) or [""]
    if len(head) > INDENT - 2:
        return "\n".join([head, *(" " * INDENT + line for line in body)])
    return "\n".join([head.ljust(INDENT) + body[0], *(" " * INDENT + line for line in body[1:])]).rstrip()


def _negated(option: str) -> str:
    """The option that switches a bool off: tyro's --data.no-document-mask."""
    part, dot, last = option.rpartition(".")
    return f"{part}{dot}no-{last}"


def _form(kind: Any) -> str:
    """How the value of an option is written."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"{{{','.join(parts)}}}"
    if origin in (Union, UnionType):
        forms = [_form(part) for part in parts if part is not NoneType]
        if all(form.startswith("{") for form in forms):
            return "{" + ",".join(form[1:-1] for form in forms) + "}"
        return forms[-1]
    if origin is tuple:
        return f"{_form(parts[0])} ..."
    return {"str": "TEXT", "int": "N", "float": "X", "bool": "BOOL"}[kind.__name__]


def _texts(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    return {
        before.target.id: " ".join(after.value.value.split())
        for before, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }  # fmt: skip
