"""The methods of post-training quantization by name, their options, and what can be refused before the work."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.model import BitNetForCausalLM
from bitnet.model.linear import BitLinear
from bitnet.model.weight_only import (
    nominal_bits,
)
from bitnet.ptq.walk import STAGES
from bitnet.quant.blocks import TYPES as BLOCKS

MIN_CALIBRATION_TOKENS = 128
NF4_BLOCK = 64
BLOCK_TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "Q3_K", "Q2_K")
MIXTURES = ("Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K_S")


@dataclass(frozen=True)
class Method:
    """One entry of `METHODS`."""

    description: str
    bits: float
    """Nominal bits of a weight."""
    needs_calibration: bool = False
    int8_activations: bool = False


@dataclass(frozen=True)
class Options:
    """What `quantize_model` takes beside the method; each concerns the methods it names."""

    group_size: int = 128
    """Input channels that share a scale (rtn, awq, gptq); -1: all of a row."""
    symmetric: bool = False
    """Without zero points (rtn, awq, gptq)."""
    algorithm: str = "refined"
    """gptq: refined or original."""
    damping: float | None = None
    """gptq: share of the Hessian's mean diagonal that is added to it."""
    act_order: bool = True
    """gptq: largest activations first."""
    clip: bool = True
    """awq: search clip ranges."""
    alpha: float = 0.5
    """smoothquant: migration strength."""
    calibration: str = "mse"
    """w8a8-static, smoothquant: minmax, percentile, mse or entropy."""
    activations: str = "static"
    """smoothquant: static, or dynamic (a scale a token)."""
    double_quant: bool = True
    """nf4: scales in 8 bits."""
    embeddings: str = "float32"
    """Embedding and head: float32, float16, bfloat16 or int8; the 16-bit methods take their own type."""
    compatible: bool = False
    """gguf: ggml's own bytes instead of the better search."""
    version: int = 1
    """Convention for zero points in the GPTQ layout (rtn, awq, gptq)."""
    batch_size: int = 8
    """Calibration sequences at a time."""
    progress: bool = True
    """Show a progress bar."""


METHODS: dict[str, Method] = {
    "fp16": Method("16-bit floats", 16),
    "bf16": Method("16-bit brain floats", 16),
    "fp8": Method("FP8 E4M3 weights, a scale a row", 8),
    "nf4": Method("4-bit NormalFloat weights (QLoRA)", 4),
    **{f"rtn-int{b}": Method(f"INT{b} weights in groups, rounded to nearest", b) for b in (8, 4, 3, 2)},
    "w8a8-dynamic": Method("INT8 weights a row, INT8 activations a token", 8, int8_activations=True),
    "w4a8-dynamic": Method("INT4 weights a row, INT8 activations a token", 4, int8_activations=True),
    "w8a8-static": Method("INT8 weights a row, INT8 activations by calibrated scales", 8, True, True),
    "smoothquant": Method("W8A8 with outliers moved into the weights", 8, True, True),
    "awq": Method("INT4 weights in groups, channels scaled by their activations", 4, True),
    **{f"gptq-{b}": Method(f"GPTQ: INT{b} weights in groups", b, True) for b in (8, 4, 3, 2)},
    "gptq-ternary": Method("GPTQ on the ternary grid, in groups", 2, True),
    **{f"gguf-{name.lower()}": Method(f"GGUF blocks {name}", nominal_bits(name)) for name in BLOCK_TYPES},
    **{
        f"gguf-{name.lower()}": Method(f"GGUF mixture {name}, embedding and head included", nominal_bits(name))
        for name in MIXTURES
    },
}


def named_projections(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            yield name, module


def float_projections(model: BitNetForCausalLM) -> list[tuple[str, Any]]:
    linears = list(named_projections(model))
    count = sum(len(names) for names in STAGES) * len(model.model.layers)
    if len(linears) != count or not isinstance(model.model.embed_tokens, nn.Embedding):
        raise ValueError("the model is packed or quantized already; quantize the float model it was made from")
    trained = {linear.quantizer for _, linear in linears} - {"none"}
    if trained:
        raise ValueError(
            f"the model was trained with {', '.join(sorted(trained))} weights, which are quantized by pack(); "
            "post-training quantization takes a float model (quantizer none)"
        )
    return linears


def check_ids(model: BitNetForCausalLM, method: str, ids: Tensor | None) -> None:
    if ids is None:
        raise ValueError(f"{method} needs calibration text; give calibration_ids, int64 [B, T]")
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise ValueError(f"calibration_ids are {ids.dtype} {list(ids.shape)}; give int64 [B, T]")
    if ids.numel() < MIN_CALIBRATION_TOKENS:
        raise ValueError(
            f"the calibration text has {ids.numel()} tokens; give at least {MIN_CALIBRATION_TOKENS}, better 10,000"
        )
    longest, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if ids.shape[1] > longest:
        raise ValueError(f"calibration sequences have {ids.shape[1]} tokens and the model takes {longest}; cut them")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(f"calibration ids reach {int(ids.max())} and the vocabulary ends at {vocabulary - 1}")
    if method.startswith("gptq") and ids.numel() < model.config.intermediate_size:
        warnings.warn(
            f"{ids.numel()} calibration tokens are fewer than the {model.config.intermediate_size} channels of a "
            "layer, so GPTQ fits noise; give more text",
            RuntimeWarning,
            stacklevel=3,
        )


def check_options(method: str, options: Options, linears: list[tuple[str, Any]]) -> None:
    """Everything that can be refused before an hour of work."""
    if options.embeddings not in ("float32", "float16", "bfloat16", "int8"):
        raise ValueError(f"embeddings {options.embeddings!r} are unknown; choose float32, float16, bfloat16 or int8")
    if options.activations not in ("static", "dynamic"):
        raise ValueError(f"activations {options.activations!r} are unknown; choose static or dynamic")
    for name, linear in linears:
        if not linear.weight.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite weights; was the model's training diverging?")
    if method == "nf4" and (odd := [name for name, linear in linears if linear.in_features % NF4_BLOCK]):
        raise ValueError(f"NF4 takes blocks of {NF4_BLOCK}, which do not divide the input channels of {odd[0]}")
    if method.startswith("gguf") and (kind := method.removeprefix("gguf-").upper()) in BLOCKS:
        size = BLOCKS[kind].block_size
        if odd := [name for name, linear in linears if linear.in_features % size]:
            raise ValueError(f"{kind} has blocks of {size}, which do not divide the input channels of {odd[0]}")
    if method.partition("-")[0] not in ("rtn", "awq", "gptq"):
        return
    bits = int(METHODS[method].bits)
    for name, linear in linears:
        size = linear.in_features if options.group_size == -1 else options.group_size
        if size < 1 or linear.in_features % size:
            raise ValueError(
                f"group_size {options.group_size} does not divide the {linear.in_features} input channels of {name}; "
                "choose a divisor, or -1 for whole rows"
            )
        step = 32 if bits == 3 else 32 // bits
        if linear.in_features % step or linear.out_features % step:
            raise ValueError(
                f"{name} is {linear.out_features} x {linear.in_features}; the GPTQ layout in {bits} bits wants "
                f"multiples of {step}"
            )
