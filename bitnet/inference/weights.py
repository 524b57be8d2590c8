"""Where an engine's weights come from: the modules of a model, or a packed folder, as rows for the native kernels.

`stored(module)` says how a module's weight lies in memory (`bitnet/kernels/cpu/matrices.py`) and reads it in pieces, so
that no more than one piece is in memory beside the engine. `activations` is "int8" or "int16", which formats with
groups take by groups, or "float", exact to the format's definition, or "auto" (`_activations`). BitNet layers and W8A8
say themselves what their activations are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from bitnet.kernels import GROUP_SIZES, PACKED_BITS, quantize_weight
from bitnet.kernels.cpu import native
from bitnet.kernels.cpu.matrices import Form, NativeMatrix, Piece, ternary_groups, ternary_piece, unsigned
from bitnet.model import BitNetForCausalLM, PackedEmbedding, PackedLinear
from bitnet.model.compound import AffineLinear, OutlierInt8Linear, ScaledBlockLinear, TritPlanesLinear
from bitnet.model.linear import BitLinear, scale_form
from bitnet.model.quantized import StaticInt8Linear
from bitnet.model.weight_only import BlockLinear, FloatEmbedding, FloatLinear, GroupLinear, NF4Linear
from bitnet.quant.blocks import READ_ONLY, block_type, fp4, iquants
from bitnet.quant.blocks.levels import LEVELS
from bitnet.quant.gptq_layout import unpack_gptq, unpack_words
from bitnet.quant.nf4 import DoubleQuantized, nf4_codebook
from bitnet.quant.packing import pack_codes, packed_width

ACTIVATIONS = ("int8", "int16", "float")
EMBEDDINGS = ("int8", "float16")
TABLES = ("model.embed_tokens", "lm_head")
PIECE = 2**22
"""Weights that are read at a time."""
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Stored:
    """A weight `[rows, form.inputs]` that is read when it is wanted: `read(first, last)` gives rows."""

    form: Form
    rows: int
    read: Callable[[int, int], Piece]
    bias: Tensor | None = None

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        """All rows: the first row of each piece, a multiple of 32, and the piece."""
        each = max(32, PIECE // max(self.form.columns, 1) // 32 * 32)
        for first in range(0, self.rows, each):
            yield first, self.read(first, min(first + each, self.rows))


def matrix_of(weight: Stored) -> NativeMatrix:
    """A weight in memory of its own."""
    matrix = NativeMatrix(weight.form, weight.rows)
    for first, piece in weight.pieces():
        matrix.write(piece, first)
    if weight.bias is not None:
        matrix.write_bias(weight.bias)
    return matrix


class Weights(Protocol):
    """The tensors of one model by their names in the torch model."""

    def matrix(self, name: str, rows: int, columns: int) -> Stored: ...

    def vector(self, name: str, size: int) -> Tensor: ...


class ModuleWeights:
    """The weights of a torch model. `codec` is the layout of per-tensor ternary ones, None for the fastest. Raises
    ValueError for modules that the kernels do not know."""

    def __init__(
        self, model: BitNetForCausalLM, activations: str, embeddings: str | None, codec: str | None = None
    ) -> None:
        self.model, self.activations, self.embeddings, self.codec = model, activations, embeddings, codec

    def matrix(self, name: str, rows: int, columns: int) -> Stored:
        module = self.model.get_submodule(name)
        if self.embeddings is not None and name in TABLES:
            return table_of(module, self.embeddings)
        found = stored(module, self.activations)
        if self.codec and found.form.kind == "none" and found.form.codec in ("base3", "two_bit"):
            found = replace(found, form=replace(found.form, codec=self.codec))
        if (found.rows, found.form.inputs) != (rows, columns):
            raise ValueError(
                f"{name} is {found.rows} x {found.form.inputs} and the configuration says {rows} x {columns}"
            )
        return found

    def vector(self, name: str, size: int) -> Tensor:
        return self.model.get_parameter(name)


class LaterLayers:
    """The weights of a model without its first layers."""

    def __init__(self, weights: Weights, first: int) -> None:
        self.weights, self.first = weights, first

    def matrix(self, name: str, rows: int, columns: int) -> Stored:
        return self.weights.matrix(self._renamed(name), rows, columns)

    def vector(self, name: str, size: int) -> Tensor:
        return self.weights.vector(self._renamed(name), size)

    def _renamed(self, name: str) -> str:
        prefix = "model.layers."
        if not name.startswith(prefix):
            return name
        index, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{int(index) + self.first}.{rest}"


class PackedWeights:
    """The tensors of a packed folder, of which `tensor(name, *shape)` reads one and checks its shape."""

    def __init__(
        self, tensor: Callable[..., Tensor], names: set[str], quantizer: str, embeddings: str = "int8"
    ) -> None:
        self.tensor, self.names, self.quantizer, self.embeddings = tensor, names, quantizer, embeddings

    def matrix(self, name: str, rows: int, columns: int) -> Stored:
        if name in TABLES and f"{name}.weight" in self.names:
            return float_table(self.tensor(f"{name}.weight", rows, columns), self.embeddings)
        if name in TABLES and self.embeddings != "int8":
            raise ValueError(
                f"{name} is INT8 in the file, so embeddings {self.embeddings!r} are not there; leave it out"
            )
        quantizer = "int8" if name in TABLES else self.quantizer
        bits = PACKED_BITS[quantizer]
        packed = self.tensor(f"{name}.packed_weight", rows, packed_width(columns, bits))
        scale = self.tensor(f"{name}.weight_scale", *scale_form(quantizer, rows, columns)[0])
        bias = self.tensor(f"{name}.bias", rows) if f"{name}.bias" in self.names else None
        return of_packed(packed, scale, bits, columns, bias, GROUP_SIZES.get(quantizer))

    def vector(self, name: str, size: int) -> Tensor:
        return self.tensor(name, size)


def table_of(module: nn.Module, embeddings: str) -> Stored:
    """An embedding or head as `EMBEDDINGS` says. Raises ValueError for one that is not float any more."""
    if type(module) in (nn.Linear, nn.Embedding, FloatLinear, FloatEmbedding):
        weight = module.stored if isinstance(module, FloatLinear) else module.get_parameter("weight")
        return float_table(weight, embeddings)
    if isinstance(module, (PackedLinear, PackedEmbedding)) and embeddings == "int8":
        return stored(module)
    raise ValueError(f"embedding and head are stored as {type(module).__name__}, not in floats; leave embeddings out")


def float_table(weight: Tensor, embeddings: str) -> Stored:
    """A float embedding or head: "int8" with a scale a row, "float16" as 16 bits: bfloat16 where that is exact."""
    weight = weight.detach()
    if embeddings == "int8":
        codes, scale = quantize_weight(weight.float(), "int8")
        return of_packed(pack_codes(codes, 8), scale, 8, weight.shape[1])
    if weight.dtype == torch.float32:
        exact = torch.equal(weight.bfloat16().float(), weight)
        weight = weight.bfloat16() if exact else weight.half()
    if not all(end.isfinite() for end in weight.aminmax()):
        raise ValueError("the embedding does not fit float16; leave embeddings out")
    return of_floats(weight)


def unknown_layers(model: nn.Module) -> list[str]:
    """Kinds of a model's layers that the native kernels do not know, by name."""
    return sorted({type(module).__name__ for module in model.modules() if isinstance(module, OutlierInt8Linear)})


def stored(module: nn.Module, activations: str = "int8") -> Stored:
    """A module's weight. Raises ValueError for one that the kernels do not know."""
    if isinstance(module, (PackedLinear, PackedEmbedding)):
        codes, row_scale = module.packed_weight, module.weight_scale
        if isinstance(module, PackedEmbedding):
            return of_packed(codes, row_scale, 8, module.embedding_dim)
        return of_packed(codes, row_scale, module.bits, module.in_features, module.bias, module.group_size)
    if isinstance(module, FloatLinear):
        scale = module.scale if module.dtype == "float8" else None
        return of_floats(module.stored, module.bias, scale, module.dtype)
    if isinstance(module, BlockLinear):
        found = of_blocks(module.data, module.block_type, module.in_features, activations, module.bias)
        return _times(found, module.tensor_scale) if isinstance(module, ScaledBlockLinear) else found
    if isinstance(module, GroupLinear):
        return _of_groups(module, activations)
    if isinstance(module, AffineLinear):
        return _of_affine(module, activations)
    if isinstance(module, TritPlanesLinear):
        return _of_planes(module, activations)
    if isinstance(module, NF4Linear):
        return _of_nf4(module)
    if isinstance(module, StaticInt8Linear):
        return _of_static(module)
    if isinstance(module, BitLinear) and module.quantizer != "none":
        raise ValueError("the model holds latent weights that are not packed; call model.pack() first")
    if type(module) in (nn.Linear, nn.Embedding, BitLinear):
        return of_floats(module.get_parameter("weight"), getattr(module, "bias", None))
    raise ValueError(f"the native kernels do not know {type(module).__name__}; run the model in torch")


def of_packed(
    packed: Tensor,
    scale: Tensor,
    bits: int,
    columns: int,
    bias: Tensor | None = None,
    group_size: int | None = None,
) -> Stored:
    """Rows of `bitnet/quant/packing.py`, a scale `[1, 1]` or `[N, 1]`, or `[N, G]` of groups of `group_size` columns;
    activations INT8 with a scale a token."""

    def read(first: int, last: int) -> Piece:
        if group_size is not None:
            return ternary_piece(packed[first:last], scale[first:last], columns)
        return Piece(packed[first:last], scale=scale if scale.numel() == 1 else scale[first:last], bits=bits)

    form = Form(columns, native.codec_of(bits, columns)) if group_size is None else ternary_groups(columns, group_size)
    return Stored(form, len(packed), read, bias)


def of_floats(
    weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None, dtype: str | None = None
) -> Stored:
    """A float matrix `[N, K]`, with a scale `[N, 1]` where there is one."""
    weight = weight.detach()
    form = Form(weight.shape[1], dtype or DTYPES[weight.dtype], "float")

    def read(first: int, last: int) -> Piece:
        return Piece(weight[first:last], scale=None if scale is None else scale[first:last])

    return Stored(form, len(weight), read, bias)


# Codec, kind, columns of a group, code of the weight 0.
_BLOCKS = {
    "Q4_0": ("four_bit", "half", 32, 8),
    "Q4_1": ("four_bit", "half_min", 32, 0),
    "Q5_0": ("five_bit", "half", 32, 16),
    "Q5_1": ("five_bit", "half_min", 32, 0),
    "Q8_0": ("eight_bit", "half", 32, 128),
    "IQ4_NL": ("levels", "half", 32, 127),
    "IQ4_XS": ("levels", "super", 32, 127),
    "IQ3_S": ("levels", "super", 32, 15),
    "IQ3_XXS": ("levels", "super", 32, 62),
    "IQ2_S": ("levels", "super", 16, 43),
    "IQ2_XS": ("levels", "super", 16, 43),
    "IQ2_XXS": ("levels", "super", 32, 43),
    "IQ1_M": ("levels", "super", 16, 9),
    "IQ1_S": ("levels", "super", 32, 9),
    "Q2_K": ("two_bit", "nibbles", 16, 0),
    "Q3_K": ("three_bit", "super", 16, 4),
    "Q4_K": ("four_bit", "super_min", 32, 0),
    "Q5_K": ("five_bit", "super_min", 32, 0),
    "Q6_K": ("six_bit", "super", 16, 32),
    "TQ1_0": ("base3", "half", 256, 1),
    "TQ2_0": ("two_bit", "half", 256, 1),
    "Q2_0": ("two_bit", "half", 64, 1),
    "PQ2_0": ("two_bit", "half", 128, 1),
    "Q1_0": ("one_bit", "half_min", 128, 0),
    "MXFP4": ("levels", "half", 32, 12),
    "NVFP4": ("levels", "half", 16, 12),
}


def of_blocks(data: Tensor, kind: str, columns: int, activations: str, bias: Tensor | None = None) -> Stored:
    """Rows of GGUF blocks, uint8 `[N, row bytes]`."""
    codec, groups, group, center = _BLOCKS[kind]
    levels = tuple(value + center for value in _values_of(kind)) if codec == "levels" else ()
    form = Form(columns, codec, _activations(activations, codec), groups, group, center, levels)

    def read(first: int, last: int) -> Piece:
        if kind in READ_ONLY:
            codes, scale, of_row = fp4.unpack(data[first:last], kind)
            return Piece(codes, [scale], scale=of_row)
        if kind in iquants.BITS:
            vectors, unit = iquants.entries(data[first:last].reshape(-1, block_type(kind).bytes), kind)
            rows = last - first
            factors, d = (2 * vectors.scales + 1).to(torch.int8).view(rows, -1), vectors.scale.view(rows, -1)
            return Piece(vectors.index.view(rows, -1), [factors], [d], scale=torch.full((1,), unit))
        # d (2 c - 1) of Q1_0 is 2 (d c - d / 2).
        return Piece(data[first:last], scale=torch.full((1,), 2.0) if kind == "Q1_0" else None, blocks=kind)

    return Stored(form, len(data), read, bias)


def _values_of(kind: str) -> tuple[int, ...]:
    """The integers that 16 codes stand for, in units of a group's scale."""
    if kind in iquants.BITS:
        return iquants.ENTRIES[kind]
    # The values of 4-bit floats are halves.
    return LEVELS if kind in ("IQ4_NL", "IQ4_XS") else tuple(int(2 * value) for value in fp4.VALUES)


def _activations(name: str, codec: str) -> str:
    """Of a Form. "auto" is INT16 for codes of at most 6 bits, and floats for the others, as fast with them."""
    if name == "auto":
        name = "float" if codec in ("eight_bit", "levels") else "int16"
    return {"int8": "group", "int16": "int16", "float": "float"}[name]


def _of_groups(layer: GroupLinear, activations: str) -> Stored:
    """The layout of GPTQ checkpoints: columns in the order of their groups, each padded to what the kernels take."""
    codec = {2: "two_bit", 3: "three_bit", 4: "four_bit", 8: "eight_bit"}[layer.bits]
    group, order = _order(layer.g_idx, len(layer.scales))
    form = Form(
        layer.in_features,
        codec,
        _activations(activations, codec),
        "half_zero",
        group,
        order=order,
        divisor=layer.input_scale,
    )
    tensors = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    words = 32 // layer.bits if layer.bits != 3 else 32  # rows whose zero points fill whole words

    def read(first: int, last: int) -> Piece:
        until = -(-last // words) * words
        part = {
            "qweight": tensors["qweight"][:, first:until],
            "qzeros": tensors["qzeros"][:, first * layer.bits // 32 : until * layer.bits // 32],
            "scales": tensors["scales"][:, first:until],
            "g_idx": tensors["g_idx"],
        }
        weight = unpack_gptq(part, layer.bits, layer.version)
        zero, rows = weight.zero_point[: last - first], weight.codes[: last - first]
        if int(zero.max()) > 255:
            raise ValueError(f"a zero point of {int(zero.max())}; the native kernels hold 255, run the model in torch")
        return Piece(_in_order(rows, order), [weight.scale[: last - first].half(), zero.to(torch.uint8)])

    return Stored(form, layer.out_features, read, layer.bias)


def _order(g_idx: Tensor, groups: int) -> tuple[int, Tensor | None]:
    """Columns of a padded group, and the input that each padded column takes (int32, -1 for none); None: its own."""
    counts = torch.bincount(g_idx.long(), minlength=groups)
    longest = int(counts.max())
    group = 16 if longest <= 16 else -(-longest // 32) * 32
    order = torch.full((groups, group), -1, dtype=torch.int32)
    columns = torch.argsort(g_idx, stable=True)
    within = torch.arange(len(columns)) - (counts.cumsum(0) - counts)[g_idx[columns].long()]
    order[g_idx[columns].long(), within] = columns.to(torch.int32)
    order = order.flatten()
    inputs = torch.arange(len(g_idx), dtype=torch.int32)
    if torch.equal(order[: len(g_idx)], inputs) and (len(order) == len(g_idx) or groups == 1):
        return group, None
    return group, order


def _in_order(codes: Tensor, order: Tensor | None) -> Tensor:
    return codes if order is None else torch.where(order >= 0, codes[:, order.clamp(min=0).long()], 0)


def _of_affine(layer: AffineLinear, activations: str) -> Stored:
    groups = layer.scale.shape[1]
    group, order = _order(torch.arange(layer.in_features, dtype=torch.int32) // (layer.in_features // groups), groups)
    codec = {2: "two_bit", 3: "three_bit", 4: "four_bit", 8: "eight_bit"}[layer.bits]
    form = Form(layer.in_features, codec, _activations(activations, codec), "half_min", group, order=order)

    def read(first: int, last: int) -> Piece:
        codes = unpack_words(layer.qweight[:, first:last], layer.bits).t().contiguous()
        return Piece(_in_order(codes, order), [layer.scale[first:last], layer.minimum[first:last]])

    return Stored(form, layer.out_features, read, layer.bias)


def _of_planes(layer: TritPlanesLinear, activations: str) -> Stored:
    """Both planes as one matrix, whose columns take every input twice."""
    K, groups = layer.in_features, layer.scale.shape[2]
    g_idx = torch.arange(K, dtype=torch.int32) // (K // groups)
    group, of_plane = _order(g_idx, groups)
    each = torch.full((groups * group,), -1, dtype=torch.int32)
    each[:K] = torch.arange(K, dtype=torch.int32)
    each = each if of_plane is None else of_plane
    form = Form(K, "two_bit", _activations(activations, "two_bit"), "half", group, 1, order=torch.cat([each, each]))

    def read(first: int, last: int) -> Piece:
        planes = [unpack_words(plane[:, first:last], 2).t() for plane in layer.qweight]
        return Piece(
            torch.cat([_in_order(plane, each) for plane in planes], 1),
            [torch.cat([scale[first:last] for scale in layer.scale], 1)],
        )

    return Stored(form, layer.out_features, read, layer.bias)


def _times(weight: Stored, factor: Tensor) -> Stored:
    """A weight whose rows have scales, times one number."""

    def read(first: int, last: int) -> Piece:
        piece = weight.read(first, last)
        scale = torch.ones(1) if piece.scale is None else piece.scale
        return replace(piece, scale=scale * factor)

    return replace(weight, read=read)


def _of_nf4(layer: NF4Linear) -> Stored:
    values = tuple(nf4_codebook().tolist())
    form = Form(layer.in_features, "four_bit", "float", "float", layer.block_size, values=values)
    double = layer.double_quant
    scale = DoubleQuantized(layer.scale_codes, layer.scale, layer.scale_offset).dequantize() if double else layer.scale

    def read(first: int, last: int) -> Piece:
        return Piece(unsigned(layer.packed_weight[first:last], 4, layer.in_features), [scale[first:last].float()])

    return Stored(form, layer.out_features, read, layer.bias)


def _of_static(layer: StaticInt8Linear) -> Stored:
    scale, zero = float(layer.activation_scale), int(layer.activation_zero_point)
    form = Form(layer.in_features, "eight_bit", "static", x_scale=scale, x_zero=zero)
    # The zero point's part of each sum is known beforehand.
    bias = -zero * layer.weight_sum.double() * scale * layer.weight_scale.view(-1).double()
    bias = bias.float() if layer.bias is None else (bias + layer.bias.double()).float()

    def read(first: int, last: int) -> Piece:
        return Piece(layer.packed_weight[first:last], scale=layer.weight_scale[first:last])

    return Stored(form, layer.out_features, read, bias)
