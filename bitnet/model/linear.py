"""BitLinear, its packed inference form, and the two functions that bring them into anybody's model.

    model = replace_linear(model)      nn.Linear -> BitLinear: same parameters, same state_dict, trains quantized
    ...                                train as always
    model = pack(model)                BitLinear -> PackedLinear: 2-bit codes and one scale, inference only

The arithmetic is in `bitnet/kernels/reference.py`. BitLinear does not normalize its input; a model trained from
scratch wants an RMSNorm before every projection (see `transformer.py`).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitnet import kernels
from bitnet.quant import packed_width, unpack_codes
from bitnet.quant.packing import pack_codes
from bitnet.quant.ternary import group_means, scale_of_columns

ModuleFilter = Callable[[str, nn.Linear], bool]


class BitLinear(nn.Linear):
    """Drop-in `nn.Linear` whose weights and activations are quantized in the forward pass.

    Takes x `[.., in_features]` of any float dtype and returns `[.., out_features]`. The parameters stay latent floats
    (its `state_dict` is a Linear's) and get straight-through gradients. `quantizer` is `ternary` (BitNet b1.58),
    `ternary-g64` or `ternary-g128` (the same with a float16 scale for each 64 or 128 columns of a row), `binary` (1-bit
    BitNet), `int8` or `int4` (ordinary QAT), or `none`, which is exactly `nn.Linear`; all but `none` quantize
    activations to INT8 per token. Source: arXiv 2402.17764, arXiv 2310.11453.

    `product(x, weight, bias, quantizer)` is what the layer computes. Whoever trains it may set another one that stands
    for the same layer (`kernels.training_product`): no quantization yet, a part of it, or int8 on codes made once a
    step.
    """

    product: kernels.Product = staticmethod(kernels.fake_quant_linear)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quantizer: str = "ternary",
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.quantizer = kernels.check_quantizer(quantizer)

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantizer: str = "ternary") -> "BitLinear":
        """A BitLinear that shares the parameters of `linear`: no copy, so ties and optimizers keep working."""
        has_bias = linear.bias is not None
        # On the meta device: parameters that are replaced at once are never made.
        layer = cls(linear.in_features, linear.out_features, has_bias, device="meta", quantizer=quantizer)
        layer.weight = linear.weight
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias, self.quantizer)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantizer={self.quantizer}"


def check_codes(packed: Tensor, bits: int) -> None:
    """Raise ValueError for bytes of a file that are no codes: the pattern 3 of 2 bits, which means no weight."""
    if bits == 2 and not packed.is_meta and bool((packed & (packed >> 1) & 0x55).any()):
        raise ValueError("its packed weight holds the pattern 3, which is no ternary code; the file is damaged")


def stray_dtypes(module: nn.Module, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """What is wrong with the dtypes of tensors to be loaded into a module's buffers, whose dtypes are a format."""
    for name, buffer in module.named_buffers(recurse=False):
        given = state.get(prefix + name)
        if isinstance(given, Tensor) and given.dtype != buffer.dtype:
            yield f"{prefix}{name} is {given.dtype} and must be {buffer.dtype}"


def scale_form(quantizer: str, rows: int, columns: int) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of the scale of packed weights."""
    if quantizer in kernels.GROUP_SIZES:
        return (rows, -(-columns // kernels.GROUP_SIZES[quantizer])), torch.float16
    return (1 if kernels.PACKED_BITS[quantizer] == 2 else rows, 1), torch.float32


class _Packed(nn.Module):
    bits: int
    packed_weight: Tensor
    weight_scale: Tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        errors = args[-1]
        wrong = list(stray_dtypes(self, state_dict, prefix))
        errors += wrong
        packed = state_dict.get(f"{prefix}packed_weight")
        if isinstance(packed, Tensor) and not wrong:
            try:
                check_codes(packed, self.bits)
            except ValueError as error:
                errors.append(f"{prefix.removesuffix('.')}: {error}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Packed":
        # model.half() and model.to(bfloat16) cast every float buffer; a rounded scale would be a different weight.
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.packed_weight.device)
        return self


class PackedLinear(_Packed):
    """Inference form of BitLinear: packed integer codes, their scale, int8 activations, integer product.

    Buffers: `packed_weight` uint8 `[N, packed_width(K, bits)]` with 2 bits for ternary and binary, 4 and 8 for the
    others (drawn in `bitnet/quant/packing.py`); `weight_scale` float32 `[1, 1]` or `[N, 1]`, or of groups float16
    `[N, ceil(K / group_size)]`, whose dtype stays when the model is cast. `bias` is a frozen parameter or None. No
    gradient flows through it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quantizer: str = "ternary",
    ) -> None:
        super().__init__()
        if kernels.check_quantizer(quantizer) == "none":
            raise ValueError("the quantizer 'none' has no packed form; keep the BitLinear or nn.Linear as it is")
        self.in_features, self.out_features, self.quantizer = in_features, out_features, quantizer
        self.bits = kernels.PACKED_BITS[quantizer]
        self.group_size = kernels.GROUP_SIZES.get(quantizer)
        width = packed_width(in_features, self.bits)
        self.register_buffer("packed_weight", torch.zeros(out_features, width, dtype=torch.uint8, device=device))
        shape, scale_dtype = scale_form(quantizer, out_features, in_features)
        self.register_buffer("weight_scale", torch.ones(shape, dtype=scale_dtype, device=device))
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantizer: str) -> "PackedLinear":
        """Quantize the latent weights of a Linear once and keep the codes and scale of that one quantization."""
        layer = cls(linear.in_features, linear.out_features, False, device="meta", quantizer=quantizer)
        with torch.no_grad():
            codes, scale = kernels.quantize_weight(linear.weight, quantizer)
            layer.packed_weight = pack_codes(codes, layer.bits)
            layer.weight_scale = scale.to(layer.weight_scale.dtype)  # exact
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return layer.train(linear.training)

    def codes(self) -> Tensor:
        """The integer weights, int8 `[out_features, in_features]`."""
        return unpack_codes(self.packed_weight, self.bits, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.packed_linear(
            x,
            self.packed_weight,
            self.weight_scale,
            self.bias,
            bits=self.bits,
            in_features=self.in_features,
            group_size=self.group_size,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quantizer={self.quantizer}, bits={self.bits}"
        )


class PackedEmbedding(_Packed):
    """INT8 form of an embedding table, which may also serve as the output head: a code a value, a scale a row.

    Buffers: `packed_weight` uint8 `[V, packed_width(C, 8)]` (drawn in `bitnet/quant/packing.py`) and `weight_scale`
    float32 `[V, 1]`. `forward(ids)` looks rows up in float32; `project(h)` is the product with the whole table.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, 8
        width = packed_width(embedding_dim, 8)
        self.register_buffer("packed_weight", torch.zeros(num_embeddings, width, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.ones(num_embeddings, 1, dtype=torch.float32, device=device))

    @classmethod
    def from_weight(cls, weight: Tensor) -> "PackedEmbedding":
        """Quantize a table `[V, C]`, absmax per row."""
        rows, columns = weight.shape
        table = cls(rows, columns, device="meta")
        codes, table.weight_scale = kernels.quantize_weight(weight.detach(), "int8")
        table.packed_weight = pack_codes(codes, 8)
        return table

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.packed_weight[ids.flatten()]
        values = unpack_codes(rows, 8, self.embedding_dim) * self.weight_scale[ids.flatten()]
        return values.view(*ids.shape, self.embedding_dim)

    def project(self, h: Tensor) -> Tensor:
        """Logits `[.., V]` of hidden states `[.., C]`, quantized per token to INT8."""
        return kernels.packed_linear(
            h, self.packed_weight, self.weight_scale, None, bits=8, in_features=self.embedding_dim
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits=8"


def codes_and_scale(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Codes int8 `[N, K]` and float32 scale of a BitLinear or PackedLinear, from the one quantization that it computes
    with: `[1, 1]`, `[N, 1]` or, of groups, `[N, ceil(K / group_size)]`."""
    if isinstance(module, PackedLinear):
        return module.codes(), module.weight_scale.float()
    assert isinstance(module, BitLinear)
    with torch.no_grad():
        return kernels.quantize_weight(module.weight, module.quantizer)


def latent_weight(codes: Tensor, scale: Tensor, quantizer: str) -> Tensor:
    """A float32 weight `[N, K]` that the quantizer turns into these very codes and scale again.

    Absmean of codes * s is s times their share of non-zeros, so the latents of ternary codes are divided by that share.
    """
    magnitude = codes.abs().double()
    if quantizer == "ternary":
        scale = scale / magnitude.mean().clamp(min=1e-5).float()
    elif group := kernels.GROUP_SIZES.get(quantizer):
        scale = scale / group_means(magnitude, group).clamp(min=1e-5).float()
    return kernels.dequantize_weight(codes, scale, quantizer)


def ternary_latent(weight: Tensor, quantizer: str) -> Tensor | None:
    """`latent_weight` of a float weight `[N, K]` that is ternary already, with the scales of this quantizer's groups or
    of the whole matrix; None for any other."""
    size = kernels.GROUP_SIZES.get(quantizer, 0)
    magnitude = weight.detach().float().abs()
    if size:
        padded = nn.functional.pad(magnitude, (0, -weight.shape[1] % size))
        scale = padded.view(len(weight), -1, size).amax(2)
        of_each = scale_of_columns(scale, size, weight.shape[1])
    else:
        scale = of_each = magnitude.amax().view(1, 1)
    if not bool(((magnitude == 0) | (magnitude == of_each)).all()):
        return None
    return latent_weight(weight.detach().sign().to(torch.int8), scale, quantizer)


def replace_linear(model: nn.Module, filter: ModuleFilter | None = None, *, quantizer: str = "ternary") -> nn.Module:
    """Swap the `nn.Linear` modules of any model for BitLinear, in place, and return the model.

    `filter(name, linear)` says which to swap. Without one, every Linear is swapped but those that stay in high
    precision in BitNet: a module called `lm_head`, and a Linear whose weight is tied to an Embedding. Subclasses of
    nn.Linear are left alone, since their owners may read the weight instead of calling the module, and so are matrices
    of other layers (attention's in_proj, LSTM, convolutions): without a filter, one warning names what stays float. The
    parameters are shared, not copied; hooks on a replaced module are not carried over. Raises ValueError where there is
    nothing to swap, so that no model trains in float unnoticed.
    """
    kernels.check_quantizer(quantizer)
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def keep_in_high_precision(name: str, linear: nn.Linear) -> bool:
        return name.rpartition(".")[2] == "lm_head" or id(linear.weight) in tied

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        # The weight of a Linear under the older weight_norm is no parameter but made anew by a hook.
        if type(module) is not nn.Linear or "weight" not in module._parameters:
            return None
        wanted = filter(name, module) if filter else not keep_in_high_precision(name, module)
        return BitLinear.from_linear(module, quantizer) if wanted else None

    model, count = _swap(model, convert)
    if not count:
        kinds = sorted({type(module).__name__ for module in model.modules() if not any(module.children())})
        raise ValueError(
            f"replace_linear found no nn.Linear to swap in {type(model).__name__} (its leaf modules: "
            f"{', '.join(kinds)}); check the filter, and convert look-alikes such as transformers' Conv1D first"
        )
    left = [] if filter else _left_in_float(model, keep_in_high_precision)
    if left:
        parts = (f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for kind, names in left)
        warnings.warn(
            f"replace_linear leaves matrices in float: {'; '.join(parts)}. Turn them into plain nn.Linear modules "
            "first, or give a filter if this is meant",
            stacklevel=2,
        )
    return model


def _left_in_float(model: nn.Module, meant: ModuleFilter) -> list[tuple[str, list[str]]]:
    """Kinds and names of modules with float matrices of their own that no BitLinear replaced; without embeddings, norms
    and what is `meant` to stay."""
    found: dict[str, list[str]] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        # The matrices of torch's parametrizations stand in modules below the layer that they belong to.
        owner = name.partition(".parametrizations.")[0].removesuffix(".parametrizations")
        kind = type(modules[owner]).__name__
        matrices = [
            each
            for each, parameter in module.named_parameters(recurse=False)
            if isinstance(parameter, nn.parameter.UninitializedParameter)
            or (parameter.is_floating_point() and parameter.ndim >= 2)
        ]
        if not matrices or isinstance(module, (BitLinear, nn.Embedding, nn.EmbeddingBag)) or "Norm" in kind:
            continue
        if isinstance(module, nn.Linear) and meant(name, module):
            continue
        names = found.setdefault(kind, [])
        if owner not in names:
            names.append(owner or matrices[0])
    return list(found.items())


def pack(model: nn.Module) -> nn.Module:
    """Turn every BitLinear of a trained model into its packed inference form, in place, and return the model.

    Ternary and binary weights take 2 bits each, int4 and int8 take 4 and 8; layers with the quantizer `none` stay as
    they are. Raises ValueError where the model has no BitLinear, and for weights that are no finite numbers.
    """
    if not any(isinstance(module, BitLinear) for module in model.modules()):
        raise ValueError(f"pack found no BitLinear in {type(model).__name__}; call replace_linear and train it first")

    def convert(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, BitLinear) or module.quantizer == "none":
            return None
        packed = PackedLinear.from_linear(module, module.quantizer)
        if not packed.weight_scale.is_meta and not packed.weight_scale.isfinite().all():
            raise ValueError(
                f"{name or 'the layer'} has weights that are NaN, infinite or too large; did its training diverge?"
            )
        return packed

    return _swap(model, convert)[0]


def bit_linears(model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """Names and modules of the model's BitLinear layers."""
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            yield name, module


def _swap(model: nn.Module, convert: Callable[[str, nn.Module], nn.Module | None]) -> tuple[nn.Module, int]:
    """Replace modules by `convert(name, module)` where it returns one; a module used in two places stays one module.
    Returns the model (another object only if it was itself replaced) and how many were replaced."""
    # All replacements are made before any is put in place, so that a module with two names becomes one module.
    replaced: dict[nn.Module, nn.Module] = {}
    hooked = []
    for name, module in model.named_modules():
        new = convert(name, module)
        if new is not None:
            replaced[module] = new
            if any(
                getattr(module, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")
            ):
                hooked.append(name)
    if hooked:
        warnings.warn(
            f"hooks on {', '.join(hooked[:3])}{', ...' * (len(hooked) > 3)} are gone with the modules that were "
            "replaced; register them again",
            stacklevel=3,
        )
    if model in replaced:
        return replaced[model], 1
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a module's second name
            if child in replaced:
                setattr(parent, name, replaced[child])
    new_modules = set(replaced.values())
    for module in model.modules():
        encoder = isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
        if encoder and not new_modules.isdisjoint(module.modules()):
            _disable_fused_path(module)
    return model, len(replaced)


def _disable_fused_path(encoder: Any) -> None:
    # In eval mode torch's encoder reads linear1.weight itself and never calls the module, which would run the latent
    # weights in float. These flags are conditions that it checks first: the layer's, and the encoder's for padding.
    if isinstance(encoder, nn.TransformerEncoderLayer):
        encoder.activation_relu_or_gelu = 0
    else:
        encoder.use_nested_tensor = False
