"""torch.compile of a model in training, where it works: tried on something small before."""

import contextlib
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.kernels import fake_quant_linear, reference, requested_backend
from bitnet.machine import has_compiler
from bitnet.model import BitNetForCausalLM
from bitnet.quant import straight_through as rule


def compile_model(model: BitNetForCausalLM, mode: str = "auto") -> bool:
    """torch.compile the layers and the loss of a model in place; returns whether it was done.

    Layer by layer, since the layers are alike and one compilation serves all of them. `auto` compiles where torch can
    (on a CPU it needs a C++ compiler), `on` raises ValueError where it can't, `off` does nothing.
    """
    if mode == "off":
        return False
    reason = compile_failure(model.device, model.config.quantizer)
    if reason:
        if mode == "on":
            raise ValueError(
                f"torch.compile does not work here: {reason}; use --compile off, or install what is missing"
            )
        print(f"note: not compiled, so training is slower: {reason}", file=sys.stderr)
        return False
    for layer in model.model.layers:
        layer.compile()
    model.next_token_loss = torch.compile(model.next_token_loss)  # on a CPU 3x the speed of eager, in less memory
    return True


def compile_failure(device: torch.device, quantizer: str = "ternary") -> str | None:
    """Why torch.compile does not work on this device, or None where it does: found out by compiling something small,
    which also starts up the compiler that the model is about to need, and by the gradients of a quantized product that
    is captured, which a torch may lose without a word. That is done once: torch's cache keeps that they were right."""
    if not has_compiler(device):
        return "no C++ compiler was found (g++ or clang++)"
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        right = _found_right(device, quantizer)
        if right.exists():
            return None
        captured = _gradients(torch.compile(fake_quant_linear, backend="aot_eager"), quantizer, device)
    except Exception as error:  # whatever a toolchain can do wrong: missing headers, libraries, permissions
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    eager = _gradients(fake_quant_linear, quantizer, device)
    if any(not torch.allclose(*pair, rtol=1e-3) for pair in zip(captured, eager, strict=True)):
        return f"torch {torch.__version__} gives a compiled quantized product other gradients than an eager one"
    with contextlib.suppress(OSError):
        right.touch()
    return None


def _found_right(device: torch.device, quantizer: str) -> Path:
    """The file that is there once this torch gave right gradients of this product here."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # which loads the compiler

    tried = (torch.__version__, device.type, quantizer, requested_backend())
    sources = [Path(module.__file__ or "").read_bytes() for module in (reference, rule)]
    return Path(cache_dir(), f"bitnet-gradients-{hashlib.sha256(repr((tried, sources)).encode()).hexdigest()[:16]}")


def _gradients(product: Any, quantizer: str, device: torch.device) -> tuple[Tensor, ...]:
    """Of x `[4, 8]` and weight `[4, 8]`; 0 where none reaches one of them."""
    x, weight = (torch.linspace(-1, 1, 32, device=device).view(4, 8).requires_grad_() for _ in range(2))
    loss = product(x, weight, None, quantizer).square().sum() + 0 * (x.sum() + weight.sum())
    return torch.autograd.grad(loss, (x, weight))
