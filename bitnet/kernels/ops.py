"""The native kernels as torch operators, for whatever looks at a program instead of only running it.

A kernel that is called by ctypes is invisible to torch: a trace would record the empty tensor that the kernel fills,
and vmap hands over memory that is not what it seems. `is_eager(x)` says that nobody is looking, which is nearly always
so. Elsewhere (torch.jit.trace, make_fx, functorch, dispatch modes, tensor subclasses) the same kernel runs as an
operator of torch's dispatcher, with shapes for fake tensors and a rule for vmap. torch.compile and torch.export take
the reference, whose plain operators they fuse and write down.

Products of packed weights have no derivative: eager calls cut the graph, and transforms that ask for one are refused.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bitnet.kernels import cpu, reference, triton
from bitnet.kernels.cpu import blocks as native_blocks
from bitnet.quant import blocks

_PLAIN = (Tensor, torch.nn.Parameter)
# Asked at every product, so without a search for their names.
_modes, _trace = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_transform = torch._C._functorch.peek_interpreter_stack


def is_eager(x: Tensor) -> bool:
    """Whether a call on x does nothing but compute: its memory is its values, and no trace, transform or mode listens,
    torch.compile aside, for which the reference was chosen."""
    return torch.compiler.is_compiling() or (
        type(x) in _PLAIN
        and forward_ad._current_level < 0
        and not _modes()
        and _trace() is None
        and _transform() is None
        and not x.is_neg()
    )


def constant(x: Tensor) -> Tensor:
    """x without its gradient. Raises NotImplementedError where torch.func or forward-mode AD asks for a derivative with
    respect to it, which would come out as 0."""
    if not is_eager(x):
        inner = x
        while True:
            tracked = torch._C._functorch.is_gradtrackingtensor(inner)
            if (tracked and inner.requires_grad) or _has_tangent(inner):
                raise NotImplementedError(
                    "packed and INT8 layers have no derivative; take it before pack(), where layers are BitLinear, or "
                    "detach() their input"
                )
            if not torch._C._functorch.is_functorch_wrapped_tensor(inner):
                break
            inner = torch._C._functorch.get_unwrapped(inner)
    return x.detach()


def _has_tangent(x: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


@torch.library.custom_op("bitnet::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    group_size: int | None = None,
) -> Tensor:
    """See `reference.packed_linear`."""
    return _backend(x).packed_linear(x, packed, scale, bias, bits=bits, in_features=in_features, group_size=group_size)


@torch.library.custom_op("bitnet::packed_matmul", mutates_args=())
def packed_matmul(codes: Tensor, packed: Tensor, bits: int, in_features: int) -> Tensor:
    """See `reference.packed_matmul`."""
    return _backend(codes).packed_matmul(codes, packed, bits=bits, in_features=in_features)


@torch.library.custom_op("bitnet::dequantize_blocks", mutates_args=())
def dequantize_blocks(data: Tensor, kind: str) -> Tensor:
    """See `bitnet.quant.blocks.dequantize_blocks`."""
    native = data.device.type == "cpu" and native_blocks.available()
    return native_blocks.dequantize(data, kind) if native else blocks.dequantize_blocks(data, kind)


def _backend(x: Tensor) -> Any:
    # A program that was written down may be run on another machine, and on another device.
    if x.device.type == "cuda" and triton.available():
        return triton
    return cpu if x.device.type == "cpu" and cpu.available() else reference


@packed_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    group_size: int | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@packed_matmul.register_fake
def _(codes: Tensor, packed: Tensor, bits: int, in_features: int) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], packed.shape[0], dtype=torch.int32)


@dequantize_blocks.register_fake
def _(data: Tensor, kind: str) -> Tensor:
    found = blocks.block_type(kind)
    return data.new_empty(data.shape[0], data.shape[1] // found.bytes * found.block_size, dtype=torch.float32)


def _each(op: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    """One call for each entry of a batch."""
    pairs = list(zip(args, in_dims, strict=True))
    calls = ([arg if dim is None else arg.select(dim, i) for arg, dim in pairs] for i in range(info.batch_size))
    return torch.stack([op(*call) for call in calls]), 0


def _of_tokens(op: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    """A batch of activations is a product of more tokens; one of weights is as many products."""
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        return _each(op, info, in_dims, *args)
    return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0


packed_linear.register_vmap(lambda info, in_dims, *args: _of_tokens(packed_linear, info, in_dims, *args))
packed_matmul.register_vmap(lambda info, in_dims, *args: _of_tokens(packed_matmul, info, in_dims, *args))
dequantize_blocks.register_vmap(lambda info, in_dims, *args: _each(dequantize_blocks, info, in_dims, *args))
