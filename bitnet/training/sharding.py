"""Training on shards of a model (FSDP2): every process has 1 / W of each parameter, gradient and moment, and a layer is
gathered when it is needed.

What travels when a sharded layer is gathered is what its product reads, not the latent floats:

    ternary, binary     2-bit codes; the scale is known everywhere, from one collective a step for all layers:
                        local sums of |W| (and of W) -> all_reduce -> gamma = max(sum / size, 1e-5)
    int4, int8, groups  codes and scales of rows, which no other process has a part in
    quantizer off       the weight in the type of the product
    fading, or rows that W does not divide          latent float32, quantized after the gather

Each is exact: the gathered W~ is what one process would compute, but for the order in which the sums of |W| are added
(in float64 here, so that it does not depend on W). The gradient of W~ goes to the latent shards unchanged, which is the
straight-through rule.

Letters: W processes, N out_features, K in_features.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

from bitnet import kernels
from bitnet.kernels import PACKED_BITS, dequantize_weight, quantize_weight
from bitnet.model import BitLinear, BitNetForCausalLM, bit_linears
from bitnet.quant import pack_codes, unpack_codes
from bitnet.quant.affine import SCALE_EPS
from bitnet.training.processes import World

ONE_SCALE = ("ternary", "binary")
"""Quantizers whose scale depends on the whole matrix."""


def shard(model: BitNetForCausalLM, device: torch.device, reduce_dtype: torch.dtype = torch.float32) -> None:
    """Cut a model's parameters into shards of rows, in place; every process must hold the same weights before.

    Embedding and norms travel in float32, as one process computes with them: autocast casts at the product. How the
    projections travel is what `prepare_gathers` decides for each step. `reduce_dtype`: of gradients on their way to the
    processes' mean, which then is in float32 again; bfloat16 is half the bytes, and rounds every process's part and
    their sums to 8 bits.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for _, layer in bit_linears(model):
        layer.weight = nn.Parameter(LatentWeight(layer.weight.detach()))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # FSDP2 gathers around forward(); training calls loss() instead.
    register_fsdp_forward_method(model, "loss")


class GatheredCodes:
    """The product of a sharded layer whose weight travels as integer codes: what arrives is W~ already.

    Attributes: `scale` float32 `[1, 1]` and `mean` float32 `[]` of the whole latent weight where every process needs
    them to make its 2-bit codes, else None.
    """

    def __init__(self, scale: Tensor | None = None, mean: Tensor | None = None) -> None:
        self.scale, self.mean = scale, mean

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: str) -> Tensor:
        return kernels.reference.quantized_weight_linear(x, weight, bias)


class GatheredFloat:
    """The product of a sharded layer that is not quantized, of a weight that travels in the product's type `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: str) -> Tensor:
        return kernels.float_linear(x, weight, bias, quantizer)


Metadata = tuple[str, int, int, Tensor | None]
"""What every process must know of a gathered weight: its quantizer or "float", bits, in_features, and the scale where
all have the same."""


class LatentWeight(Tensor):
    """A shard of a BitLinear's latent weight, which FSDP2 gathers through two of these methods.

    Every operation runs on the plain tensor inside; the results of those by which FSDP2 cuts and keeps a parameter are
    wrapped again.
    """

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> "LatentWeight":
        return Tensor._make_wrapper_subclass(
            cls,
            plain.size(),
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            layout=plain.layout,
            device=plain.device,
            requires_grad=plain.requires_grad,
        )

    def __init__(self, plain: Tensor) -> None:
        self.plain = plain

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LatentWeight({self.plain})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        args, kwargs = tree_map_only(cls, lambda t: t.plain, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return tree_map_only(Tensor, cls, result) if func in _KEEP else result

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["plain"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: object, size: object, stride: object) -> "LatentWeight":
        return LatentWeight(inner["plain"])

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: BitLinear,
        mp_policy: object,
    ) -> tuple[tuple[Tensor, ...], Metadata]:
        """What this process sends, and what every process needs to know to put it together."""
        with torch.no_grad():
            local, product = self.plain, module.product
            if not isinstance(product, GatheredCodes):
                # FSDP2 gathers parts of one size, so a process with fewer rows fills up; the rows that are too many are
                # cut off below.
                missing = -(-outer_size[0] // mesh.size()) - len(local)
                if missing:
                    local = nn.functional.pad(local, (0, 0, 0, missing))
                elif isinstance(product, GatheredFloat):
                    local = local.to(product.dtype)
                return (local.contiguous(),), ("float", 0, outer_size[1], None)
            bits = PACKED_BITS[module.quantizer]
            if module.quantizer in ONE_SCALE:
                codes = _two_bit_codes(local, module.quantizer, product)
                return (pack_codes(codes, 2, checked=False),), (module.quantizer, 2, outer_size[1], product.scale)
            codes, scale = quantize_weight(local, module.quantizer)
            return (pack_codes(codes, bits, checked=False), scale), (module.quantizer, bits, outer_size[1], None)

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Metadata, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight as its product reads it, float32 `[N, K]`; into `out` from the second time on."""
        kind, bits, in_features, scale = metadata
        with torch.no_grad():
            if kind == "float":
                weight = outputs[0].float()
                weight = weight.clone() if weight is outputs[0] else weight
            else:
                codes = unpack_codes(outputs[0], bits, in_features)
                weight = dequantize_weight(codes, outputs[1] if scale is None else scale, kind)
            if out is None:
                return weight, (weight,)
            with torch.autograd._unsafe_preserve_version_counter(out):  # the same values, for the backward
                out.copy_(weight[: len(out)])
        return None


_aten = torch.ops.aten
_KEEP = {
    _aten.detach.default,
    _aten.empty_like.default,
    _aten.new_zeros.default,
    _aten.slice.Tensor,
    _aten.copy_.default,
    _aten.view.default,
    _aten.as_strided.default,
    _aten._to_copy.default,
    _aten._pin_memory.default,
    _aten.clone.default,
    _aten.split.Tensor,
}


def without_wrapper(tensor: Tensor) -> Tensor:
    """The plain tensor behind a LatentWeight; any other as it is."""
    return tensor.plain if isinstance(tensor, LatentWeight) else tensor


def local_part(parameter: Tensor) -> Tensor:
    """What this process has of a sharded tensor, as a plain one that shares its memory; of others all."""
    from torch.distributed.tensor import DTensor

    return without_wrapper(parameter.to_local()) if isinstance(parameter, DTensor) else parameter


def _two_bit_codes(local: Tensor, quantizer: str, product: GatheredCodes) -> Tensor:
    assert product.scale is not None
    assert product.mean is not None
    if quantizer == "ternary":
        return (local.float() / product.scale).round().clamp(-1, 1).to(torch.int8)
    return torch.where(local.float() >= product.mean, 1, -1).to(torch.int8)


@torch.no_grad()
def prepare_gathers(model: BitNetForCausalLM, world: World, dtype: torch.dtype) -> None:
    """Choose how the weights travel to the products that the layers have, of type `dtype`, and bring up to date what
    that needs. To be called after every change of weights or products."""
    layers = [layer for _, layer in bit_linears(model)]
    for layer in layers:
        if layer.out_features % world.size:
            continue  # latent floats travel, and are quantized by the layer's product
        if layer.quantizer == "none" or layer.product is kernels.float_linear:
            layer.product = GatheredFloat(dtype)
        elif layer.product is kernels.fake_quant_linear:
            layer.product = GatheredCodes()
    _forget_gathers(model, [type(layer.product) for layer in layers])
    two_bit = [
        (layer, layer.product)
        for layer in layers
        if isinstance(layer.product, GatheredCodes) and layer.quantizer in ONE_SCALE
    ]
    if not two_bit:
        return
    # In float64, one layer after the other: together they would take twice the weights' memory.
    shards = (local_part(layer.weight) for layer, _ in two_bit)
    sums = torch.stack([
        torch.stack([local.abs().sum(dtype=torch.float64), local.sum(dtype=torch.float64)]) for local in shards
    ])  # fmt: skip
    for (layer, product), (absolute, plain) in zip(two_bit, world.sum(sums), strict=True):
        scale, product.mean = (
            (total / (layer.out_features * layer.in_features)).float() for total in (absolute, plain)
        )
        product.scale = (scale.clamp(min=SCALE_EPS) if layer.quantizer == "ternary" else scale).view(1, 1)


def _forget_gathers(model: BitNetForCausalLM, form: list[type]) -> None:
    # FSDP2 keeps the buffers of its first gather for all later ones, and other codes have another size.
    if getattr(model, "_gather_form", form) != form:
        for module in model.modules():
            group = getattr(getattr(module, "_get_fsdp_state", lambda: None)(), "_fsdp_param_group", None)
            if group is not None:
                if not group.is_sharded:
                    group.reshard()
                for parameter in group.fsdp_params:
                    if hasattr(parameter._sharded_local_tensor, "fsdp_pre_all_gather"):
                        parameter.all_gather_outputs = []
    model._gather_form = form  # type: ignore[assignment]


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must ask for it."""
    return without_wrapper(tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor


def shard_like(parameter: Tensor, full: Tensor) -> Tensor:
    """A whole tensor, which every process holds, cut as `parameter` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    full = full.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(full, DTensor) or full.ndim == 0:
        return full
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
