"""A model's weights in the native kernels' memory: every matrix repacked once, in one block of memory.

What is multiplied together (q, k and v; gate and up) becomes one matrix where its parts lie alike, and otherwise one
matrix a part: mixtures of GGUF types give a layer's values more bits than its queries.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet.inference.weights import Stored, Weights
from bitnet.kernels.cpu import native
from bitnet.kernels.cpu.matrices import NativeMatrix, row_numbers
from bitnet.model import ModelConfig
from bitnet.model.lora import Matrices, check_matrices
from bitnet.model.transformer import rope_tables


@dataclass
class _Part:
    """Weights that share a matrix: each with its first row and the step of its blocks of 16 rows."""

    weights: list[tuple[Stored, int, int]]
    rows: int
    at: int
    """Of the projection's output."""

    @property
    def nbytes(self) -> int:
        return NativeMatrix.nbytes(self.weights[0][0].form, self.rows)


class _Place(NamedTuple):
    """Where the rows of a projection lie: in which part, from which row on, with which step of its blocks."""

    part: int
    at: int
    step: int


_TOGETHER = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",),
}  # fmt: skip
"""Projections that are multiplied together, by the field of `native.Layer`."""


class NativeModel:
    """The structs of `layout.h` for one model and the memory that they point to.

    `struct` is what a forward pass takes. Raises ValueError for weights that the kernels do not know.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.matrices: list[NativeMatrix] = []
        self._places: list[list[_Place]] = []
        self._adapters: list[Tensor] = []
        self._keep: list[Tensor] = []
        self.config = config
        self._tied = config.tie_word_embeddings
        C, V, shapes = config.hidden_size, config.vocab_size, config.projections()
        queries, keys = (native.round_up(shapes[f"self_attn.{name}_proj"][0], 16) for name in ("q", "k"))

        def read(prefix: str, *names: str) -> list[Stored]:
            return [weights.matrix(prefix + name, *shapes[name]) for name in names]

        table = weights.matrix("model.embed_tokens", V, C)
        head = table if config.tie_word_embeddings else weights.matrix("lm_head", V, C)
        plans = [[_Part([(head, 0, 1)], V, 0)]]
        if not config.tie_word_embeddings:
            plans.append([_Part([(table, 0, 1)], V, 0)])
        for index in range(config.num_hidden_layers):
            prefix = f"model.layers.{index}."
            qkv = read(prefix, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
            gate_up = read(prefix, "mlp.gate_proj", "mlp.up_proj")
            plans.append(_side_by_side(qkv, [0, queries, queries + keys]))
            plans.append(_single(*read(prefix, "self_attn.o_proj")))
            plans.append(_in_turn(gate_up))
            plans.append(_single(*read(prefix, "mlp.down_proj")))
        # One block, for huge pages; the largest tensors first, while nothing else is resident.
        self._arena = native.huge_pages(sum(part.nbytes for plan in plans for part in plan))
        self._used = 0
        made = [self._projection(plan) for plan in plans]

        layers = (native.Layer * config.num_hidden_layers)()
        norms = {
            "input_norm": "input_layernorm", "post_norm": "post_attention_layernorm",
            "attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm",
            "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
        }  # fmt: skip
        widths = config.norms()
        first = len(made) - 4 * len(layers)
        for index, layer in enumerate(layers):
            layer.qkv, layer.o, layer.gate_up, layer.down = made[first + 4 * index : first + 4 * index + 4]
            for field, name in norms.items():
                if name in widths:
                    setattr(layer, field, self._floats(weights, f"model.layers.{index}.{name}.weight", widths[name]))
        cos, sin = rope_tables(config)
        self._keep += [cos, sin]
        self.struct = native.Model(
            hidden=C,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_width,
            vocab=V,
            layers=config.num_hidden_layers,
            relu2=config.hidden_act == "relu2",
            eps=config.rms_norm_eps,
            layer=layers,
            norm=self._floats(weights, "model.norm.weight", C),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            head=made[0],
            embedding=made[0 if config.tie_word_embeddings else 1].part[0],
        )
        self._layers = layers

    def _projection(self, plan: list[_Part]) -> native.Projection:
        projection = native.Projection(parts=len(plan))
        self._places.append([_Place(i, at, step) for i, part in enumerate(plan) for _, at, step in part.weights])
        for index, part in enumerate(plan):
            form = part.weights[0][0].form
            memory = self._arena[self._used : self._used + part.nbytes]
            self._used += part.nbytes
            matrix = NativeMatrix(form, part.rows, memory)
            if any(weight.rows % 16 for weight, _, _ in part.weights):
                memory.zero_()  # gaps between the weights; their scale is 0
            for weight, at, step in part.weights:
                for first, piece in weight.pieces():
                    matrix.write(piece, at + first * step, step)
                if weight.bias is not None:
                    matrix.write_bias(weight.bias, at, step)
            self.matrices.append(matrix)
            projection.part[index] = matrix.struct
            projection.at[index], projection.rows[index] = part.at, part.rows
        return projection

    def attach(self, adapters: Matrices) -> None:
        """Add LoRA adapters to the products of these projections, in the place of those that are there; none takes them
        away. Not while a pass runs. Raises ValueError for projections or shapes that the model does not have."""
        shapes = {
            f"model.layers.{index}.{name}": shape
            for index in range(self.config.num_hidden_layers)
            for name, shape in self.config.projections().items()
        }
        check_matrices(adapters, shapes)
        first, kept = len(self._places) - 4 * len(self._layers), list[Tensor]()
        for index, layer in enumerate(self._layers):
            for number, (field, names) in enumerate(_TOGETHER.items()):
                places = self._places[first + 4 * index + number]
                pairs = [adapters.get(f"model.layers.{index}.{name}") for name in names]
                projection = getattr(layer, field)
                for part in range(projection.parts):
                    found = [(place, pair) for place, pair in zip(places, pairs, strict=True) if place.part == part]
                    kept += _attach(projection.part[part], [(place, pair) for place, pair in found if pair])
        self._adapters = kept

    def _floats(self, weights: Weights, name: str, size: int) -> int:
        # The C structs hold bare addresses, so `_keep` holds the tensors.
        value = weights.vector(name, size).detach().float().contiguous().clone()
        self._keep.append(value)
        return value.data_ptr()

    def activations(self) -> list[str]:
        """How the projections take their inputs, "float", "int16", "int8" or several."""
        layers = self.matrices[1 if self._tied else 2 :]
        kinds = {matrix.form.activations for matrix in layers}
        return sorted({kind if kind in ("float", "int16") else "int8" for kind in kinds})

    def weight_bytes(self) -> int:
        """Bytes of the weights that a step of decoding reads, as they lie in memory: not an embedding of its own."""
        read = self.matrices if self._tied else [self.matrices[0], *self.matrices[2:]]
        return sum(matrix.weight_bytes() for matrix in read) + sum(part.nbytes for part in self._adapters)


def _attach(matrix: native.Matrix, found: list[tuple[_Place, tuple[Tensor, Tensor]]]) -> list[Tensor]:
    """Point a matrix to the adapters of the weights in it, side by side; returns the memory that it points to."""
    matrix.down = matrix.up = None
    matrix.rank = sum(len(down) for _, (down, _) in found)
    if not matrix.rank:
        return []
    down = torch.zeros(matrix.rank, native.round_up(matrix.inputs, 16))
    up = torch.zeros(matrix.N, matrix.rank)
    at = 0
    for place, (each_down, each_up) in found:
        columns = slice(at, at + len(each_down))
        down[columns, : matrix.inputs] = each_down
        up[row_numbers(len(each_up), place.at, place.step), columns] = each_up
        at = columns.stop
    up = up.view(-1, 16, matrix.rank).transpose(1, 2).contiguous()
    matrix.down, matrix.up = down.data_ptr(), up.data_ptr()
    return [down, up]


def _single(weight: Stored) -> list[_Part]:
    return [_Part([(weight, 0, 1)], weight.rows, 0)]


def _side_by_side(weights: list[Stored], starts: list[int]) -> list[_Part]:
    """Neighbours of one form share a matrix."""
    parts: list[_Part] = []
    for weight, start in zip(weights, starts, strict=True):
        last = parts[-1] if parts else None
        if last is not None and last.weights[-1][0].form.fits(weight.form):
            last.weights.append((weight, start - last.at, 1))
            last.rows = start - last.at + weight.rows
        else:
            parts.append(_Part([(weight, 0, 1)], weight.rows, start))
    return parts


def _in_turn(weights: list[Stored]) -> list[_Part]:
    """Gate and up: their blocks of 16 rows in turn, or a matrix each."""
    gate, up = weights
    if gate.form.fits(up.form):
        return [_Part([(gate, 0, 2), (up, 16, 2)], 2 * native.round_up(gate.rows, 16), 0)]
    return [_Part([(weight, 0, 1)], weight.rows, 0) for weight in weights]
