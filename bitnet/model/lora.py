"""LoRA: a trained difference of low rank beside the frozen, packed weight of every projection.

    y = base(x) + (x A^T) (s B)^T        A [r, K], B [N, r], s = alpha / r; B begins at 0

The base keeps its codes (ternary, NF4, any type of GGUF) and is multiplied as it is without an adapter, activations
quantized where it quantizes them; the adapter takes x in floats, and its part is added before anything else happens to
y. The gradient of the base with respect to x is that of its dequantized weight, straight through, which is made anew in
the backward and kept by nobody. Sources: arXiv 2106.09685 (LoRA), 2305.14314 (QLoRA).

Letters: N out_features, K in_features, r rank.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet import kernels
from bitnet.model.linear import BitLinear, PackedEmbedding, PackedLinear, codes_and_scale
from bitnet.model.transformer import BitNetForCausalLM
from bitnet.model.weight_only import FloatLinear, StoredLayer, WeightOnlyLayer
from bitnet.quant.packing import pack_codes, unpack_codes

Matrices = Mapping[str, tuple[Tensor, Tensor]]
"""By the name of a projection: A float32 `[r, K]` and s B float32 `[N, r]`."""

NO_GRADIENT = "is no base for adapters; give ternary, NF4, weight-only or float weights"


def dense_weight(layer: nn.Module) -> Tensor:
    """The float32 weight `[N, K]` by which a layer multiplies its input. Raises ValueError for a layer that no gradient
    passes through."""
    if isinstance(layer, PackedEmbedding):
        return unpack_codes(layer.packed_weight, 8, layer.embedding_dim) * layer.weight_scale
    if isinstance(layer, PackedLinear) or (isinstance(layer, BitLinear) and layer.quantizer != "none"):
        return kernels.dequantize_weight(*codes_and_scale(layer), layer.quantizer)
    if isinstance(layer, WeightOnlyLayer):
        return layer.weight
    if isinstance(layer, nn.Linear):
        return layer.weight.detach().float()
    raise ValueError(f"{type(layer).__name__} {NO_GRADIENT}")


class _Frozen(torch.autograd.Function):
    # It takes y instead of making it, for the reason that `bitnet/quant/straight_through.py` gives.
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ dense_weight(ctx.layer).to(grads[0].dtype), None, None


def _frozen(x: Tensor, layer: nn.Module) -> Tensor:
    """What a layer that does not train makes of x, with the gradient of its dequantized weight."""
    with torch.no_grad():
        y = layer.project(x) if isinstance(layer, PackedEmbedding) else layer(x)
    return _Frozen.apply(x, y, layer)


class FrozenHead(nn.Module):
    """An INT8 output head through which the gradient passes; it shares the table of a tied embedding."""

    def __init__(self, layer: PackedLinear | PackedEmbedding) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor) -> Tensor:
        return _frozen(h, self.layer)


class LoRALinear(nn.Module):
    """A frozen layer and its adapter, as at the top of this file. `lora_A` float32 `[r, K]`, `lora_B` `[N, r]`."""

    def __init__(self, base: nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = base.out_features, base.in_features
        assert isinstance(rows, int)
        assert isinstance(columns, int)
        self.base, self.scaling = base, alpha / rank
        self.in_features, self.out_features = columns, rows
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(rank, columns)), nn.Parameter(torch.zeros(rows, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = _frozen(x, self.base)
        own = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B * self.scaling)
        return (y + own).to(y.dtype)  # of a model in 16 bits too, whose adapter stays float32


def projections(model: BitNetForCausalLM) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers of a model's projections, adapters left out."""
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            yield name, module.base if isinstance(module, LoRALinear) else module


def attach(model: BitNetForCausalLM, adapters: Matrices) -> None:
    """Put adapters beside the projections of these names, in place of those that are there. Raises ValueError for a
    projection that the model does not have, and for another shape."""
    layers = dict(projections(model))
    check_matrices(adapters, {name: (layer.out_features, layer.in_features) for name, layer in layers.items()})
    detach(model)
    for name, (down, up) in adapters.items():
        layer = LoRALinear(layers[name], len(down), len(down))
        with torch.no_grad():
            layer.lora_A.copy_(down)
            layer.lora_B.copy_(up)
        _replace(model, name, layer.requires_grad_(False).to(model.device).train(model.training))


def check_matrices(adapters: Matrices, shapes: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise ValueError for adapters of other projections or shapes than a model's."""
    for name, (down, up) in adapters.items():
        if name not in shapes:
            raise ValueError(f"the adapter has matrices for {name}, which the model does not have")
        rows, columns = shapes[name]
        if not (down.ndim == up.ndim == 2 and (*up.shape, *down.shape) == (rows, len(down), len(down), columns)):
            raise ValueError(
                f"the adapter of {name} is {list(up.shape)} times {list(down.shape)}, and the weight is "
                f"{rows} x {columns}"
            )


def detach(model: BitNetForCausalLM) -> None:
    """Take the adapters out, in place: the model is the base again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            _replace(model, name, module.base)


def make_trainable(model: BitNetForCausalLM, rank: int, alpha: float) -> None:
    """Freeze a model, in place, and give every projection an adapter that changes nothing yet, A drawn from torch's
    generator (Kaiming, as in the paper's code).

    The `state_dict` is the adapters' alone from then on, and so is what `load_state_dict` asks for. Raises ValueError
    for layers that no gradient passes through, and for a rank that does not fit.
    """
    model.requires_grad_(False)
    for name, layer in projections(model):
        if not isinstance(layer, (PackedLinear, WeightOnlyLayer, nn.Linear)):
            raise ValueError(f"{name}: {type(layer).__name__} {NO_GRADIENT}")
        rows, columns = layer.out_features, layer.in_features
        if not 1 <= rank <= min(rows, columns):  # more would train no more
            raise ValueError(
                f"a rank of {rank} does not fit a weight of {rows} x {columns}; give 1 to {min(rows, columns)}"
            )
        adapter = LoRALinear(layer, rank, alpha)
        nn.init.kaiming_uniform_(adapter.lora_A, a=math.sqrt(5))
        _replace(model, name, adapter.to(model.device))
    if model.head_is_packed:
        model.lm_head = FrozenHead(model.model.embed_tokens if model.lm_head is None else model.lm_head)
    model._register_state_dict_hook(_only_adapters)
    model.register_load_state_dict_post_hook(_base_is_not_missing)


def _only_adapters(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> dict[str, Tensor]:
    for name in [name for name in state if not _is_adapter(name)]:
        del state[name]
    return state


def _base_is_not_missing(model: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if _is_adapter(name)]


def _is_adapter(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def matrices_of(state: Mapping[str, Tensor], alpha: float) -> dict[str, tuple[Tensor, Tensor]]:
    """The matrices of a state_dict of adapters. Raises ValueError where one of a pair is missing, or is no matrix."""
    found = {}
    for name in {name.rpartition(".")[0] for name in state}:
        if {f"{name}.lora_A", f"{name}.lora_B"} - state.keys():
            raise ValueError(f"the adapter of {name} has one matrix where two belong together")
        down, up = state[f"{name}.lora_A"].detach().float(), state[f"{name}.lora_B"].detach().float()
        if down.ndim != 2 or not down.numel():
            raise ValueError(f"lora_A of {name} is {list(down.shape)}; it must be [rank, columns of the weight]")
        found[name] = (down, up * (alpha / len(down)))
    return dict(sorted(found.items()))


def fingerprint(model: BitNetForCausalLM) -> str:
    """A sum of what adapters stand on: the projections as they are stored, and the norms. The same for a run, the
    packed folder made from it and any file that holds the same codes and scales."""
    total = hashlib.sha256()

    def add(name: str, *tensors: Tensor) -> None:
        total.update(name.encode())
        for tensor in tensors:
            total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())

    for name, layer in projections(model):
        if isinstance(layer, PackedLinear):
            add(name, layer.packed_weight, layer.weight_scale)
        elif isinstance(layer, BitLinear) and layer.quantizer != "none":
            with torch.no_grad():
                codes, scale = codes_and_scale(layer)
                packed = PackedLinear(1, 1, quantizer=layer.quantizer)
                add(name, pack_codes(codes, packed.bits), scale.to(packed.weight_scale.dtype))
        elif isinstance(layer, FloatLinear) and layer.dtype != "float8":
            add(name, layer.weight)
        elif isinstance(layer, StoredLayer):
            add(name + repr(layer.description()), *(buffer for _, buffer in sorted(layer.named_buffers())))
        else:
            add(name, layer.weight.detach().float())  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            add(name, parameter.detach().float())
    return total.hexdigest()


@torch.no_grad()
def merge(model: BitNetForCausalLM, adapters: Matrices) -> tuple[BitNetForCausalLM, float]:
    """The model whose weights are base and adapter together, and how much of the adapters that lost.

    Of a base that is not trained for few bits it is a float model, and the loss 0 (float32 rounds the sums). Of a
    ternary one, or INT8 or INT4, each sum goes to the nearest codes of the base's scale, and the scale to their least
    squares; the loss is the norm of what is left over, as a part of the norm of the adapters' weights.
    """
    layers = dict(projections(model))
    quantizer = model.config.quantizer
    attach(model, adapters)  # checks them
    detach(model)
    tensors: dict[str, Tensor] = {}
    lost = changed = 0.0
    for name, layer in layers.items():
        weight = dense_weight(layer)
        if name in adapters:
            down, up = (part.to(weight.device) for part in adapters[name])
            change = up @ down
            weight, changed = weight + change, changed + float(change.double().square().sum())
        if quantizer == "none":
            tensors[f"{name}.weight"] = weight
        else:
            codes, scale = codes_and_scale(layer)
            if name in adapters:
                codes, scale = _nearest(weight, scale, quantizer)
                merged = kernels.dequantize_weight(codes, scale, quantizer)
                lost += float((weight - merged).double().square().sum())
            bits = kernels.PACKED_BITS[quantizer]
            dtype = torch.float16 if quantizer in kernels.GROUP_SIZES else torch.float32
            tensors |= {f"{name}.packed_weight": pack_codes(codes, bits), f"{name}.weight_scale": scale.to(dtype)}
        bias = getattr(layer, "bias", None)
        if bias is not None:
            tensors[f"{name}.bias"] = bias.detach().float()
    for name, module in (("model.embed_tokens", model.model.embed_tokens), ("lm_head", model.lm_head)):
        if isinstance(module, (PackedEmbedding, PackedLinear)):
            tensors[f"{name}.weight"] = dense_weight(module)
        elif module is not None:
            tensors[f"{name}.weight"] = module.weight.detach().float()
    tensors |= {n: p.detach().float() for n, p in model.named_parameters() if n.endswith("norm.weight")}
    return BitNetForCausalLM.from_tensors(model.config, tensors), math.sqrt(lost / changed) if changed else 0.0


def _nearest(weight: Tensor, scale: Tensor, quantizer: str) -> tuple[Tensor, Tensor]:
    """Codes of a weight by a scale that is given, and the scale of the smallest squared error for them."""
    ones = torch.ones_like(weight, dtype=torch.int8)
    limit = 1 if kernels.PACKED_BITS[quantizer] == 2 else 2 ** (kernels.PACKED_BITS[quantizer] - 1) - 1
    each = kernels.dequantize_weight(ones, scale, quantizer)
    codes = (weight / each).round().clamp(-limit, limit)
    if quantizer == "binary":
        codes = torch.where(weight >= 0, 1.0, -1.0)
    products, squares = weight * codes, codes.square()
    if size := kernels.GROUP_SIZES.get(quantizer):
        padding = (0, -weight.shape[1] % size)
        products, squares = (F.pad(t, padding).view(len(t), -1, size).sum(2) for t in (products, squares))
        found = torch.where(squares > 0, products / squares.clamp(min=1), scale).half().float()
    elif scale.numel() == 1:
        found = (products.double().sum() / squares.double().sum().clamp(min=1)).float().view(1, 1)
        found = torch.where(squares.any(), found, scale)  # of zeros alone any scale is right, but 0
    else:
        found = torch.where(
            squares.sum(1, keepdim=True) > 0,
            products.sum(1, keepdim=True) / squares.sum(1, keepdim=True).clamp(min=1),
            scale,
        )
    return codes.to(torch.int8), found


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
