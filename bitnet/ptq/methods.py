"""Post-training quantization of a whole float model, by name.

    model = quantize_model(model, "gptq-4", calibration_ids, Options(group_size=64))

The projections are quantized; embedding, head and norms stay float, but in the GGUF mixtures and the 16-bit formats.
Calibrated methods go through the model block by block. For GPTQ each block is calibrated on the quantized output of the
earlier ones, and within a block in the order of the computation (q k v, o, gate up, down), each on the quantized output
of the one before ("true sequential"). The others are calibrated on the float model.

A quantized model is saved as its state_dict and `describe_quantized`, plain JSON, from which `build_quantized` makes
the modules to load it into (`bitnet/model/quantized.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitnet.model import BitNetForCausalLM
from bitnet.model.linear import BitLinear, PackedEmbedding, PackedLinear
from bitnet.model.transformer import check_finite
from bitnet.model.weight_only import FloatLinear, nominal_bits
from bitnet.ptq.drivers import (
    AWQ,
    GGUF,
    GPTQ,
    NF4,
    Driver,
    DynamicInt8,
    Floats,
    ImportantGGUF,
    Options,
    RoundToNearest,
    StaticInt8,
    projections,
    stored_table,
)
from bitnet.ptq.formats import FP4, FP4GPTQ, HQQ, PTQTP, OutlierInt8
from bitnet.ptq.mixture import Mixture
from bitnet.ptq.rotation import rotate
from bitnet.ptq.tuning import AutoRound
from bitnet.ptq.walk import STAGES

MIN_CALIBRATION_TOKENS = 128
BLOCK_TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K",
    "Q2_0", "Q1_0",
)  # fmt: skip
IMPORTANT_TYPES = ("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""Those for which llama-quantize wants an importance matrix."""
MIXTURES = ("Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "IQ3_M", "Q3_K_S", "Q2_K_S")
IMPORTANT_MIXTURES = ("IQ3_XS", "IQ2_M")


@dataclass(frozen=True)
class Method:
    """One entry of `METHODS`."""

    description: str
    bits: float
    """Nominal bits of a weight."""
    driver: Driver
    """What does it."""
    rotated: bool = False
    """Whether the model is rotated first (`bitnet/ptq/rotation.py`)."""

    @property
    def needs_calibration(self) -> bool:
        return self.driver.calibration == "required"

    @property
    def family(self) -> str:
        """float, weight-only, weights and activations, or gguf."""
        return "float" if self.bits >= 16 else self.driver.family

    @property
    def int8_activations(self) -> bool:
        return self.family == "weights and activations"


METHODS: dict[str, Method] = {
    "fp16": Method("16-bit floats", 16, Floats("float16")),
    "bf16": Method("16-bit brain floats", 16, Floats("bfloat16")),
    "fp8": Method("FP8 E4M3 weights, a scale a row", 8, Floats("float8")),
    "nf4": Method("4-bit NormalFloat weights (QLoRA)", 4, NF4()),
    **{
        f"rtn-int{bits}": Method(f"INT{bits} weights in groups, rounded to nearest", bits, RoundToNearest(bits))
        for bits in (8, 4, 3, 2)
    },
    "w8a8-dynamic": Method("INT8 weights a row, INT8 activations a token", 8, DynamicInt8("int8")),
    "w4a8-dynamic": Method("INT4 weights a row, INT8 activations a token", 4, DynamicInt8("int4")),
    "w8a8-static": Method("INT8 weights a row, INT8 activations by calibrated scales", 8, StaticInt8()),
    "smoothquant": Method("W8A8 with outliers moved into the weights", 8, StaticInt8(smooth=True)),
    "awq": Method("INT4 weights in groups, channels scaled by their activations", 4, AWQ(4)),
    **{f"gptq-{bits}": Method(f"GPTQ: INT{bits} weights in groups", bits, GPTQ(bits)) for bits in (8, 4, 3, 2)},
    "gptq-ternary": Method("GPTQ on the ternary grid, in groups", 2, GPTQ(2, ternary=True)),
    **{
        f"hqq-{bits}": Method(f"HQQ: INT{bits} weights in groups, real minima, no calibration", bits, HQQ(bits))
        for bits in (8, 4, 3, 2)
    },
    **{
        f"autoround-{bits}": Method(f"AutoRound: INT{bits} weights in groups, learned rounding", bits, AutoRound(bits))
        for bits in (4, 3, 2)
    },
    "autoround-ternary": Method("AutoRound on the ternary grid, block by block", 2, AutoRound(2, ternary=True)),
    "ptqtp": Method("PTQTP: the sum of two ternary planes, 2 bits each", 4, PTQTP(2, ternary=True)),
    "mxfp4": Method("MXFP4: 4-bit floats, a power of 2 for 32", 4, FP4("MXFP4")),
    "nvfp4": Method("NVFP4: 4-bit floats, an FP8 scale for 16", 4, FP4("NVFP4")),
    "gptq-mxfp4": Method("GPTQ on MXFP4", 4, FP4GPTQ(4, kind="MXFP4")),
    "gptq-nvfp4": Method("GPTQ on NVFP4", 4, FP4GPTQ(4, kind="NVFP4")),
    "llm-int8": Method("LLM.int8(): W8A8, outlier channels in 16 bits", 8, OutlierInt8()),
    "rotated-rtn-int4": Method("rotated, then INT4 rounded to nearest", 4, RoundToNearest(4), rotated=True),
    "rotated-rtn-int3": Method("rotated, then INT3 rounded to nearest", 3, RoundToNearest(3), rotated=True),
    "rotated-gptq-4": Method("rotated, then GPTQ in INT4", 4, GPTQ(4), rotated=True),
    "rotated-gptq-3": Method("rotated, then GPTQ in INT3", 3, GPTQ(3), rotated=True),
    "rotated-w4a8": Method("rotated, then INT4 weights a row, INT8 activations", 4, DynamicInt8("int4"), rotated=True),
    **{
        f"mixed-{bits}": Method(f"GPTQ in 2 to 8 bits by sensitivity, {bits} stored", bits, Mixture(3, target=bits))
        for bits in (3, 4, 5)
    },
    **{f"gguf-{name.lower()}": Method(f"GGUF blocks {name}", nominal_bits(name), GGUF(name)) for name in BLOCK_TYPES},
    **{
        f"gguf-{name.lower()}": Method(f"GGUF blocks {name}, by importance", nominal_bits(name), ImportantGGUF(name))
        for name in IMPORTANT_TYPES
    },
    **{
        f"gguf-{name.lower()}": Method(
            f"GGUF mixture {name}, embedding and head included", nominal_bits(name), GGUF(name)
        )
        for name in MIXTURES
    },
    **{
        f"gguf-{name.lower()}": Method(
            f"GGUF mixture {name}, by importance, embedding and head included", nominal_bits(name), ImportantGGUF(name)
        )
        for name in IMPORTANT_MIXTURES
    },
}


def quantize_model(
    model: BitNetForCausalLM, name: str, calibration_ids: Tensor | None = None, options: Options | None = None
) -> BitNetForCausalLM:
    """Quantize a float model in place and return it, in evaluation mode.

    name: a key of `METHODS`; calibration_ids: token ids int64 `[B, T]`, for the methods that need them. Raises
    ValueError for an unknown method, a model that is not float or already quantized, a group size that does not divide,
    NaN weights, and calibration ids that are missing, too few or not ids.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    driver, options = METHODS[name].driver, options or Options()
    linears = float_projections(model)
    wanted = driver.calibration == "required" or (driver.calibration == "optional" and calibration_ids is not None)
    if wanted:
        check_ids(model, name, calibration_ids)
    check_finite(model)
    check_options(options)
    driver.check(linears, options)
    with torch.no_grad():
        if METHODS[name].rotated:
            rotate(model)
        driver.quantize(model.eval(), name, calibration_ids, options)
        _convert_embeddings(model, driver.embeddings(options))
    return model


def _convert_embeddings(model: BitNetForCausalLM, dtype: str) -> None:
    table = model.model.embed_tokens
    if dtype == "float32" or not isinstance(table, nn.Embedding):
        return
    if dtype == "int8":
        model.model.embed_tokens = PackedEmbedding.from_weight(table.weight)
        head: nn.Module | None = model.lm_head and PackedLinear.from_linear(model.lm_head, "int8")
    else:
        model.model.embed_tokens = stored_table(table, dtype)
        head = model.lm_head and FloatLinear.from_linear(model.lm_head, dtype)
    model.lm_head = head


def float_projections(model: BitNetForCausalLM) -> list[tuple[str, BitLinear]]:
    """The projections of a float model, by name. Raises ValueError for a model of another kind."""
    linears = projections(model)
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


def check_ids(model: BitNetForCausalLM, name: str, ids: Tensor | None) -> None:
    """Raise ValueError for calibration ids that the method cannot use."""
    if ids is None:
        raise ValueError(f"{name} needs calibration text; give calibration_ids, int64 [B, T]")
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
    METHODS[name].driver.check_tokens(ids.numel(), model.config)


def check_options(options: Options) -> None:
    """Raise ValueError for what no method can take."""
    if options.embeddings not in ("float32", "float16", "bfloat16", "int8"):
        raise ValueError(f"embeddings {options.embeddings!r} are unknown; choose float32, float16, bfloat16 or int8")
    if options.activations not in ("static", "dynamic"):
        raise ValueError(f"activations {options.activations!r} are unknown; choose static or dynamic")
    if options.tuning_steps < 1:
        raise ValueError(f"tuning_steps is {options.tuning_steps}; autoround needs 1 or more (200 are usual)")
    if not options.outlier_threshold > 0:
        raise ValueError(f"outlier_threshold is {options.outlier_threshold}; give a magnitude above 0 (6 is usual)")
