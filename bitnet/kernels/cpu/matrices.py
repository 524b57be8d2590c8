"""Weight matrices of every format in the native kernels' memory: how one lies there, and writing rows into it.

    form = Form(inputs=2048, codec="four_bit", kind="half_min", group=32)      Q4_1, as layout.h draws it
    matrix = NativeMatrix(form, rows=512)
    matrix.write(Piece(codes, groups=[scale, minimum]))                        codes uint8 [512, 2048], halves [512, 64]
    y = linear(matrix, x)                                                      as the engine computes it

A format is a codec (bits of a code, or a float), what a group of columns has (`KINDS`), and how activations meet it.
Letters: N rows, K columns, G groups in a row, S super-blocks of 256 columns in a row.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitnet.kernels.cpu import native
from bitnet.quant.blocks import block_type
from bitnet.quant.packing import unpack_codes

CODECS = native.CODECS | {
    "one_bit": 9, "three_bit": 3, "five_bit": 5, "six_bit": 6, "levels": 7,
    "float8": 20, "float16": 21, "bfloat16": 22, "float32": 23,
}  # fmt: skip
KINDS = {
    "none": 0, "half": 1, "half_min": 2, "half_zero": 3, "float": 4, "super": 5, "super_min": 6, "nibbles": 7,
}  # fmt: skip
FLOATS = {
    "float8": torch.float8_e4m3fn,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
ACTIVATIONS = {"token": 0, "static": 1, "group": 2, "float": 3, "int16": 4}
SUPER_BLOCK = 256
_BITS = {"one_bit": 1, "two_bit": 2, "three_bit": 3, "four_bit": 4, "levels": 4, "five_bit": 5, "six_bit": 6}
_FLOAT8_UNIT = 2.0**8  # the kernels read E4M3 as half precision, whose exponent is biased by 8 more


@dataclass(frozen=True, eq=False)
class Form:
    """How a matrix lies in memory and what multiplies it. `kind` "none": a scale a row, activations a token."""

    inputs: int
    """K of the layer."""
    codec: str
    """A key of CODECS."""
    activations: str = "token"
    """A key of ACTIVATIONS: int8 with a scale a token, with a stored scale, with a scale a group; int16
    with a scale a group; or floats."""
    kind: str = "none"
    """A key of KINDS: what a group has."""
    group: int = 0
    """Columns of a group: 16, or a multiple of 32."""
    center: int = 0
    """The code of the weight 0, where groups have no minimum or zero point."""
    levels: tuple[int, ...] = ()
    """16 unsigned codes below 256 that the codec "levels" stands for."""
    values: tuple[float, ...] = ()
    """16 floats that 4-bit codes stand for; for float activations alone."""
    order: Tensor | None = None
    """int32: the input that each column takes, -1 for none. None: column k takes input k."""
    divisor: Tensor | None = None
    """float32 `[inputs]`: divides the input first."""
    x_scale: float = 1.0
    x_zero: int = 0

    def __post_init__(self) -> None:
        if self.kind != "none" and self.group != 16 and (self.group < 32 or self.group % 32):
            raise ValueError(f"a group of {self.group} columns; the kernels take 16 or a multiple of 32")

    @property
    def columns(self) -> int:
        """K as the codes have it."""
        return self.inputs if self.order is None else len(self.order)

    @property
    def padded(self) -> int:
        """K as it lies in memory."""
        step = SUPER_BLOCK if self.codec == "base3" else 32
        return self.columns if self.kind == "none" else native.round_up(self.columns, step)

    def fits(self, other: "Form") -> bool:
        """Whether rows of both can lie in one matrix."""
        mine, theirs = vars(self), vars(other)
        return all(_equal(mine[name], theirs[name]) for name in mine)

    def sizes(self, rows: int) -> tuple[int, int, int]:
        """Bytes of lines, groups and super-blocks, each a multiple of 64."""
        blocks = native.round_up(rows, 32) // 16
        if self.codec in FLOATS:
            return native.round_up(blocks * 16 * self.columns * FLOATS[self.codec].itemsize, 64), 0, 0
        if self.kind == "none":
            return native.Lines.size(rows, self.columns, self.codec), 0, 0
        lines = (
            self.padded // SUPER_BLOCK * 13 if self.codec == "base3" else self.padded // 32 * _BITS.get(self.codec, 8)
        )
        groups = blocks * -(-self.padded // self.group) * _GROUP_BYTES[self.kind]
        supers = blocks * -(-self.padded // SUPER_BLOCK) * _SUPER_BYTES.get(self.kind, 0)
        return blocks * lines * 64, native.round_up(groups, 64), native.round_up(supers, 64)


_GROUP_BYTES = {"half": 32, "half_min": 64, "half_zero": 48, "float": 64, "super": 16, "super_min": 32, "nibbles": 16}
_SUPER_BYTES = {"super": 32, "super_min": 64, "nibbles": 64}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # to copy bits whatever they mean


@dataclass
class Piece:
    """Some rows of a matrix in numbers.

    codes: uint8 `[n, columns]`; floats `[n, inputs]` of a float codec; of the kind "none", rows packed as
    `bitnet/quant/packing.py` draws them, of `bits`. groups, supers: what a group and a super-block have, in the order
    of layout.h, `[n, G]` and `[n, S]` of the dtypes there. scale: float32 of rows, `[n]` or `[1]`.
    """

    codes: Tensor
    groups: list[Tensor] = field(default_factory=list)
    supers: list[Tensor] = field(default_factory=list)
    scale: Tensor | None = None
    bits: int = 8
    blocks: str | None = None

    def __len__(self) -> int:
        return len(self.codes)


class NativeMatrix:
    """A matrix `[rows, form.columns]` in memory, which may be given: uint8 of `nbytes(form, rows)`. `struct` is what
    the kernels read."""

    def __init__(self, form: Form, rows: int, memory: Tensor | None = None) -> None:
        self.form, self.rows = form, rows
        sizes = form.sizes(rows)
        self.memory = native.huge_pages(sum(sizes)) if memory is None else memory
        self._lines, self._groups, self._supers = self.memory.split(sizes)
        padded = native.round_up(rows, 32)
        self.scale = torch.zeros(padded, dtype=torch.float32, device="cpu")
        self.bias: Tensor | None = None
        packed = form.kind == "none" and form.codec not in FLOATS
        self._packed = native.Lines(rows, form.columns, form.codec, self._lines) if packed else None
        if self._packed is not None:
            self.scale = self._packed.scale
        elif rows % 32:
            self.memory.zero_()  # rows that do not exist
        self._keep = [_pointed(form.levels, torch.uint8), _pointed(form.values, torch.float32)]
        self._keep += [form.order, form.divisor]
        per_block = len(self._lines) // (padded // 16 * 64) if form.codec not in FLOATS else 0
        self.struct = native.Matrix(
            self._lines.data_ptr(), self.scale.data_ptr(), None,
            *(part.data_ptr() if len(part) else None for part in (self._groups, self._supers)),
            *(None if kept is None else kept.data_ptr() for kept in self._keep), None, None,
            padded, form.columns, form.inputs, CODECS[form.codec], per_block, form.group, KINDS[form.kind], form.center,
            ACTIVATIONS[form.activations], form.x_scale, form.x_zero,
        )  # fmt: skip

    @staticmethod
    def nbytes(form: Form, rows: int) -> int:
        """Bytes of `memory`."""
        return sum(form.sizes(rows))

    def weight_bytes(self) -> int:
        """Bytes that a product reads."""
        return self.memory.nbytes + self.scale.nbytes

    def write(self, piece: Piece, at: int = 0, step: int = 1) -> None:
        """Write rows from row `at` on, a multiple of 16, taking every `step`-th block of 16 rows."""
        lib, form, rows = native.library(), self.form, len(piece)
        assert lib is not None
        scale = torch.ones(1) if piece.scale is None else piece.scale.detach().float().reshape(-1)
        if self._packed is not None:
            self._packed.fill(piece.codes, scale.view(-1, 1), piece.bits, at=at, step=step)
            return
        scale = scale * _FLOAT8_UNIT if form.codec == "float8" else scale
        index = row_numbers(rows, at, step)
        self.scale[index] = scale.expand(rows)
        if form.codec in FLOATS:
            rows_of = piece.codes.to(FLOATS[form.codec]).contiguous().view(_INTEGERS[FLOATS[form.codec].itemsize])
            lines = self._lines[: len(self.scale) * form.columns * rows_of.element_size()].view(rows_of.dtype)
            _interleave(rows_of, lines.view(-1, form.columns, 16), at, step)
            return
        codes = piece.codes.contiguous()
        if piece.blocks is not None:
            number, memory = block_type(piece.blocks).number, (self._lines, self._groups, self._supers)
            target = *(part.data_ptr() for part in memory), at, step, native.threads()
            failed = lib.bn_pack_blocks(codes.data_ptr(), rows, form.columns, number, *target)
            assert not failed, piece.blocks
            return
        if codes.shape[1] < form.padded:
            codes = torch.nn.functional.pad(codes, (0, form.padded - codes.shape[1]))
        target = self._lines.data_ptr(), CODECS[form.codec], at, step, native.threads()
        lib.bn_pack_codes(codes.data_ptr(), rows, form.padded, *target)
        self._write_fields(piece.groups, self._groups, form.group, at, step)
        self._write_fields(piece.supers, self._supers, SUPER_BLOCK, at, step)

    def _write_fields(self, parts: list[Tensor], memory: Tensor, each: int, at: int, step: int) -> None:
        """What every `each` columns of a row have, the parts of 16 rows one behind the other."""
        blocks, count = len(self.scale) // 16, -(-self.form.padded // each)
        sizes = [16 * part.element_size() for part in parts]
        table = memory[: blocks * count * sum(sizes)].view(blocks, count, sum(sizes))
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            if part.shape[1] < count:
                part = torch.nn.functional.pad(part, (0, count - part.shape[1]))
            rows = part.contiguous().view(_INTEGERS[part.element_size()])
            lines = torch.zeros(-(-len(rows) // 16), count, 16, dtype=rows.dtype)
            _interleave(rows, lines, 0, 1)
            last = at // 16 + (len(lines) - 1) * step + 1
            table[at // 16 : last : step, :, start : start + size] = lines.view(torch.uint8)
            start += size

    def write_bias(self, bias: Tensor, at: int = 0, step: int = 1) -> None:
        """Write the bias `[n]` of the rows that `write` would write."""
        if self.bias is None:
            self.bias = torch.zeros(len(self.scale))
            self.struct.bias = self.bias.data_ptr()
        self.bias[row_numbers(len(bias), at, step)] = bias.detach().float()


def ternary_groups(columns: int, group_size: int) -> Form:
    """The form of packed ternary rows with a float16 scale for each group of columns, and activations a token."""
    return Form(columns, "two_bit", "token", "half", group_size, center=1)


def ternary_piece(packed: Tensor, scale: Tensor, columns: int) -> Piece:
    """Rows of that form: packed uint8 (`bitnet/quant/packing.py`) and their scale `[n, G]`. Raises ValueError for bytes
    that are no ternary codes."""
    codes = unsigned(packed, 2, columns)
    if codes.numel() and int(codes.max()) > 2:
        raise ValueError("the packed weight holds the pattern 3, which is no ternary code; the file is damaged")
    return Piece(codes, [scale.detach().half()])


def linear(matrix: NativeMatrix, x: Tensor) -> Tensor:
    """`x @ W^T + bias` of float x `[.., inputs]`, float32, as the engine computes it."""
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    y = torch.empty(len(rows), matrix.rows)
    if len(rows):
        threads = native.threads()
        failed = native.kernels().linear(
            matrix.struct, rows.data_ptr(), len(rows), y.data_ptr(), matrix.rows, matrix.rows, threads
        )
        if failed:
            raise MemoryError(f"no memory for the scratch of a product of {len(rows)} tokens")
    return y.view(*x.shape[:-1], matrix.rows)


def unsigned(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Packed rows as unsigned codes uint8 `[n, columns]`."""
    return (unpack_codes(packed, bits, columns).to(torch.int16) + (1 if bits == 2 else 2 ** (bits - 1))).to(torch.uint8)


def _interleave(rows: Tensor, lines: Tensor, at: int, step: int) -> None:
    """Rows `[n, K]` into blocks of 16 side by side, `[blocks, K, 16]`."""
    whole = len(rows) // 16 * 16
    if whole:
        part = rows[:whole].view(-1, 16, rows.shape[1]).transpose(1, 2)
        lines[at // 16 : at // 16 + (whole // 16 - 1) * step + 1 : step] = part
    if whole < len(rows):
        lines[at // 16 + whole // 16 * step, :, : len(rows) - whole] = rows[whole:].t()


def row_numbers(count: int, at: int, step: int) -> Tensor:
    """The rows of a matrix that so many rows from row `at` on take, with a step of their blocks of 16."""
    n = torch.arange(count)
    return at + n // 16 * step * 16 + n % 16


def _pointed(numbers: tuple[float, ...], dtype: torch.dtype) -> Tensor | None:
    return torch.tensor(numbers, dtype=dtype) if numbers else None


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and a == b if not isinstance(a, Tensor) and not isinstance(b, Tensor) else False
