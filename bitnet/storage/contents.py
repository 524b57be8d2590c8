"""What a model file holds, read without building the model: tensors, types, bits a weight, scales, sparsity."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.files import JsonObject
from bitnet.kernels import PACKED_BITS, TERNARY_QUANTIZERS, quantize_weight
from bitnet.model import ModelConfig
from bitnet.quant import packed_width, unpack_codes
from bitnet.quant.blocks.ternary import SIZES
from bitnet.quant.blocks.ternary import unpack_rows as unpack_blocks
from bitnet.storage.checksums import read_sums
from bitnet.storage.gguf.container import GGUFFile, TensorInfo
from bitnet.storage.gguf.read import FLOATS, TERNARY, dequantize, read_ternary
from bitnet.storage.hf.read import PACKED_ROWS, unpack_rows
from bitnet.storage.safetensors import Tensors, open_tensors
from bitnet.storage.source import Source, open_source

BINS = 17


Loader = Callable[[], tuple[Tensor, float | None]]


@dataclass(frozen=True)
class Entry:
    """One tensor: `nbytes` with its scales; `load` returns integer codes or float values, and the scale if there is
    one for the whole tensor; `ternary` says that its codes are worth reading for scale and zeros."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    load: Loader
    ternary: bool = False

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass
class Contents:
    """A file or folder: what it is, what it says of itself, and its tensors."""

    kind: str
    about: JsonObject
    entries: list[Entry] = field(default_factory=list)


@contextmanager
def open_contents(path: Path, which: str = "best") -> Iterator[Contents]:
    """The contents of a file or folder, tensors unread. Raises ValueError for anything that is no model."""
    if path.is_file():
        if which != "best":
            raise ValueError(f"checkpoint {which} is of a run folder, and {path} is a file; leave it out")
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            yield _with_sums(_gguf(GGUFFile(path)), None)
            return
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} begins with {magic!r}; give a .gguf or .safetensors file, or a model's folder")
        with open_tensors(path) as tensors:
            yield _entries(Contents("safetensors", dict(tensors.metadata())), tensors, None, None)
        return
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a .gguf or .safetensors file, or a model's folder")
    source = open_source(path, which=which)
    if source.file is not None:
        yield _with_sums(_gguf(source.file), None)
        return
    with source.tensors() as tensors:
        yield _with_sums(_folder(source, tensors), read_sums(source.path))


def _with_sums(contents: Contents, sums: Mapping[str, str] | None) -> Contents:
    """Say whether it can be told that the weights are what was written."""
    contents.about["sums"] = "none" if sums is None else f"of {len(sums)} files, compared when they are read"
    return contents


def _gguf(file: GGUFFile) -> Contents:
    def load(info: TensorInfo) -> tuple[Tensor, float | None]:
        if len(info.shape) == 2 and info.name.endswith(".weight"):
            found = read_ternary(file, info.name.removesuffix(".weight"))
            if found is not None:
                return unpack_codes(found[0], 2, info.shape[1]), found[1]
            if info.type in SIZES:  # with scales of groups
                return unpack_blocks(torch.from_numpy(file.data(info.name)).view(info.shape[0], -1), info.type)[0], None
        return dequantize(file, info.name), None

    contents = Contents(f"GGUF version {file.version}", {})
    for key, value in file.metadata.items():
        contents.about[key] = f"{len(value)} values" if isinstance(value, list) and len(value) > 8 else value
    for info in file.tensors.values():
        stem = info.name.removesuffix(".weight")
        scale = file.tensors.get(f"{stem}.scale")
        # Shown with the weight that it belongs to.
        if info.name.endswith(".scale") and f"{info.name.removesuffix('.scale')}.weight" in file.tensors:
            continue
        nbytes = info.nbytes + (scale.nbytes if scale is not None else 0)
        ternary = info.type in TERNARY or (info.type in FLOATS and scale is not None)
        contents.entries.append(
            Entry(info.name, info.type, info.shape, nbytes, lambda i=info: load(i), ternary)  # type: ignore[misc]
        )
    return contents


def _folder(source: Source, tensors: Tensors) -> Contents:
    if source.form in ("gptq", "awq"):
        return _quantized(Contents(f"Hugging Face model, {source.form}", source.settings), tensors, source)
    if source.kind == "hf":
        return _entries(
            Contents(f"Hugging Face model, {source.form}", source.settings), tensors, source.config, source.form
        )
    about = dataclasses.asdict(source.config)
    if source.kind == "quantized":
        return _quantized(Contents("quantized model", about), tensors, source)
    return _entries(Contents("packed model" if source.kind == "packed" else "run", about), tensors, source.config, None)


def _entries(contents: Contents, tensors: Tensors, config: ModelConfig | None, form: str | None) -> Contents:
    """Add the tensors of safetensors files: of our folders with a configuration, of Hugging Face's with a form too."""
    names = sorted(tensors.names, key=_natural)
    for name in names:
        stem, _, last = name.rpartition(".")
        scale = f"{stem}.weight_scale"
        # Shown with the codes that it belongs to.
        if last == "weight_scale" and {f"{stem}.packed_weight", f"{stem}.weight"} & tensors.names:
            continue
        shape, nbytes = tuple(tensors.shape(name)), tensors.nbytes(name)
        type, load, ternary = tensors.kind(name), _floats(tensors, name), False
        if scale in tensors.names and last in ("packed_weight", "weight"):
            nbytes += tensors.nbytes(scale)
            if last == "packed_weight" and config is not None:
                type, shape, load, ternary = _packed(tensors, stem, config) or (type, shape, load, ternary)
            elif form in ("packed", "packed-inverse"):
                type, shape, load, ternary = _hugging_face(tensors, stem, form)
        elif (
            config is not None
            and config.quantizer in TERNARY_QUANTIZERS
            and ".layers." in name
            and name.endswith("_proj.weight")
        ):
            type, load, ternary = f"{type}, {config.quantizer} in use", _latent(tensors, name, config.quantizer), True
        contents.entries.append(Entry(name, type, shape, nbytes, load, ternary))
    return contents


def _quantized(contents: Contents, tensors: Tensors, source: Source) -> Contents:
    """Add the tensors of `bitnet/storage/folders.py` or of GPTQ and AWQ: all that belong to a projection are shown as
    one."""
    quantization = source.settings.get("quantization")
    method = str(quantization.get("method", "quantized")) if isinstance(quantization, dict) else "quantized"
    method = source.form or method
    if source.kind == "quantized":
        contents.about["method"] = method
    shapes = {name.removesuffix(".weight"): shape for name, shape in source.config.tensor_shapes().items()}
    stems = [name for name in shapes if name.endswith("_proj")]
    parts = {stem: [n for n in tensors.names if n.startswith(f"{stem}.")] for stem in stems}
    claimed = {name for names in parts.values() for name in names}
    for name in sorted(tensors.names - claimed | {stem for stem, names in parts.items() if names}, key=_natural):
        names = parts.get(name, [name])
        shape = shapes[name] if name in parts else tuple(tensors.shape(name))
        largest = max(names, key=lambda n: tensors.nbytes(n))
        kind, nbytes = method if name in parts else tensors.kind(name), sum(tensors.nbytes(n) for n in names)
        contents.entries.append(Entry(name, kind, shape, nbytes, _floats(tensors, largest)))
    return contents


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _floats(tensors: Tensors, name: str) -> Loader:
    return lambda: (tensors.read(name), None)


def _latent(tensors: Tensors, name: str, quantizer: str) -> Loader:
    def load() -> tuple[Tensor, float | None]:
        codes, scale = quantize_weight(tensors.read(name), quantizer)
        return codes, float(scale) if scale.numel() == 1 else None

    return load


def _packed(tensors: Tensors, stem: str, config: ModelConfig) -> tuple[str, tuple[int, ...], Loader, bool] | None:
    """A matrix in our own layout (`bitnet/quant/packing.py`), or None where its width is of another one."""
    rows, width = tensors.shape(f"{stem}.packed_weight")
    columns = config.projections().get(stem.split(".", 3)[-1], (0, config.hidden_size))[1]
    likely = PACKED_BITS.get(config.quantizer, 8) if ".layers." in stem else 8
    bits = next((bits for bits in (likely, 8, 4, 2) if packed_width(columns, bits) == width), None)
    if bits is None:
        return None

    def load() -> tuple[Tensor, float | None]:
        codes, scale = (
            unpack_codes(tensors.read(f"{stem}.packed_weight"), bits, columns),
            tensors.read(f"{stem}.weight_scale"),
        )
        return codes, float(scale) if scale.numel() == 1 else None

    return f"{bits} bit packed", (rows, columns), load, bits == 2


def _hugging_face(tensors: Tensors, stem: str, form: str) -> tuple[str, tuple[int, ...], Loader, bool]:
    """A matrix in the layout of transformers' BitNet, or its codes as floats."""
    kind, shape = tensors.kind(f"{stem}.weight"), tensors.shape(f"{stem}.weight")

    def load() -> tuple[Tensor, float | None]:
        codes = tensors.read(f"{stem}.weight")
        scale = tensors.read(f"{stem}.weight_scale").double().flatten()[0]
        codes = unpack_rows(codes) if kind == "U8" else codes.to(torch.int8)
        return codes, float(scale if form == "packed" else 1 / scale)

    if kind == "U8":
        return "2 bit packed", (shape[0] * PACKED_ROWS, shape[1]), load, True
    return f"{kind} codes", tuple(shape), load, True


def report(contents: Contents) -> JsonObject:
    """Everything the command shows, as plain values: totals, types, tensors. What is no finite number in a file's
    settings and scales is "inf", "-inf" or "nan", as JSON has no such numbers."""
    rows: list[JsonObject] = []
    zeros = ternary = 0
    types: dict[str, dict[str, int]] = {}
    for entry in contents.entries:
        row = {
            "name": entry.name,
            "type": entry.type,
            "shape": list(entry.shape),
            "parameters": entry.parameters,
            "bytes": entry.nbytes,
            "bits_per_weight": 8 * entry.nbytes / entry.parameters if entry.parameters else 0.0,
        }
        total = types.setdefault(entry.type, {"tensors": 0, "parameters": 0, "bytes": 0})
        for key, amount in (("tensors", 1), ("parameters", entry.parameters), ("bytes", entry.nbytes)):
            total[key] += amount
        if entry.ternary:
            codes, scale = entry.load()
            if not codes.is_floating_point():
                count = int((codes == 0).sum())
                row |= {"scale": _named(scale), "zeros": count / max(1, codes.numel())}
                zeros, ternary = zeros + count, ternary + codes.numel()
        rows.append(row)
    parameters, nbytes = (sum(row[key] for row in rows) for key in ("parameters", "bytes"))
    return {
        "kind": contents.kind,
        "about": _named(contents.about),
        "parameters": parameters,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / max(1, parameters),
        "ternary_parameters": ternary,
        "zeros": zeros / ternary if ternary else None,
        "types": types,
        "tensors": rows,
    }


def _named(value: Any) -> Any:
    """The same with names for what is no finite number, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    return [_named(each) for each in value] if isinstance(value, list | tuple) else value


def histogram(entry: Entry) -> list[dict[str, float | str]]:
    """Counts of a tensor's values, for integer codes one a code, else in equal bins from the least to the greatest, and
    behind them those of "-inf", "inf" and "nan", as JSON has no such numbers. Raises ValueError for complex numbers."""
    values, _ = entry.load()
    if values.is_complex():
        raise ValueError(f"{entry.name} has complex numbers, which have no order")
    if not values.is_floating_point():
        found, counts = values.unique(return_counts=True)
        return [{"low": float(v), "high": float(v), "count": int(n)} for v, n in zip(found, counts, strict=True)]
    values = values.flatten() if values.dtype == torch.float64 else values.float().flatten()
    finite = values[values.isfinite()]
    bins: list[dict[str, float | str]] = []
    if finite.numel():
        low, high = float(finite.min()), float(finite.max())
        # A range that its bins multiply beyond the type is made smaller.
        part = 2.0**-8 if BINS * (high - low) > torch.finfo(values.dtype).max else 1.0
        counts = torch.tensor([finite.numel()])
        if low < high:
            counts = torch.histc(finite * part, BINS, low * part, high * part)
        ends = torch.linspace(low * part, high * part, len(counts) + 1, dtype=torch.float64)
        edges = [edge / part for edge in ends.tolist()]
        bins = [{"low": edges[i], "high": edges[i + 1], "count": int(n)} for i, n in enumerate(counts)]
    others = {"-inf": values == -torch.inf, "inf": values == torch.inf, "nan": values.isnan()}
    return bins + [{"low": name, "high": name, "count": int(of.sum())} for name, of in others.items() if of.any()]
