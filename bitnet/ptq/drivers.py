"""How each kind of method quantizes the projections of a model: one driver each.

Floats          16-bit floats, FP8                       NF4         4-bit NormalFloat
RoundToNearest  integers in groups, no calibration       GPTQ        the same, by their effect on the output
AWQ             the same, channels scaled before         GGUF        block types and mixtures
DynamicInt8     INT8 activations, a scale a token        StaticInt8  INT8 activations, calibrated scales
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from bitnet.console import progress_bar
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.linear import BitLinear, PackedLinear
from bitnet.model.quantized import StaticInt8Linear, replace_module
from bitnet.model.weight_only import BlockEmbedding, BlockLinear, FloatEmbedding, FloatLinear, GroupLinear, NF4Linear
from bitnet.ptq.walk import STAGES, Maxima, MeanSquares, Moments, SplitHessian, Stage, fold, projection, walk
from bitnet.quant import PerTensor
from bitnet.quant.awq import awq_scale, clip_quantize
from bitnet.quant.blocks import TYPES as BLOCKS
from bitnet.quant.blocks import mixtures
from bitnet.quant.calibration import Observer, calibrate
from bitnet.quant.gptq import choose_damping, gptq_quantize
from bitnet.quant.grouped import TERNARY, Grid, QuantizedWeight, round_to_nearest
from bitnet.quant.smoothquant import smooth_scale
from bitnet.storage.gguf.names import projection_names, table_names
from bitnet.storage.json_files import require_finite

NF4_BLOCK = 64
TOKENS_PER_CHANNEL = 4  # below which GPTQ fits noise more than anything else
GGUF_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NamedLinears = Sequence[tuple[str, BitLinear]]


@dataclass(frozen=True)
class Options:
    """What `quantize_model` takes beside the method; each concerns the methods it names."""

    group_size: int = 128
    """Input channels that share a scale (rtn, awq, gptq, hqq, autoround, ptqtp, mixed); -1: all of a row."""
    symmetric: bool = False
    """Without zero points (rtn, awq, gptq, autoround, mixed)."""
    algorithm: str = "refined"
    """gptq: refined or original."""
    damping: float | None = None
    """gptq: share of the Hessian's mean diagonal that is added to it. Unless given, what does best on a held-out fifth
    of the calibration tokens (refined), or the paper's 0.01 (original)."""
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
    outlier_threshold: float = 6.0
    """llm-int8: input channels that reach it are kept in 16 bits."""
    double_quant: bool = True
    """nf4: scales in 8 bits."""
    embeddings: str = "float32"
    """Embedding and head: float32, float16, bfloat16 or int8; the 16-bit methods take their own type."""
    compatible: bool = False
    """gguf: ggml's own bytes instead of the better search."""
    importance: Mapping[str, Tensor] | None = None
    """gguf: `measure_importance` of this model on the calibration ids, where it is known."""
    version: int = 1
    """Convention for zero points in the GPTQ layout (rtn, awq, gptq)."""
    tuning_steps: int = 200
    """autoround: steps of each block."""
    target_bits: float | None = None
    """mixed: bits of a weight with its scales, if not those of the method's name."""
    unused: Tensor | None = None
    """mixed: rows of the head that are never drawn, int64 `[U]`; they have no share of its predictions."""
    batch_size: int = 8
    """Calibration sequences at a time."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        require_finite(self)


def projections(model: nn.Module) -> list[tuple[str, BitLinear]]:
    """The layers to be quantized, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BitLinear)]


@dataclass(frozen=True)
class Driver:
    """One kind of method. The defaults are those of methods that look at one weight at a time."""

    family: ClassVar[str] = "weight-only"
    """Under which the comparison shows the method."""
    calibration: ClassVar[Literal["none", "optional", "required"]] = "none"
    """Whether token ids are looked at."""
    heeds: ClassVar[frozenset[str]] = frozenset()
    """Fields of the command's options that change what it does."""

    def check(self, linears: NamedLinears, options: Options) -> None:
        """Raise ValueError for projections that the method cannot take, before an hour of work."""

    def check_tokens(self, count: int, config: ModelConfig) -> None:
        """Warn about too few calibration tokens."""

    def embeddings(self, options: Options) -> str:
        """Type of embedding and head."""
        return options.embeddings

    def quantize(self, model: BitNetForCausalLM, title: str, ids: Tensor | None, options: Options) -> None:
        """Replace every projection of a float model; `title` stands at the progress bar, `ids` are int64 `[B, T]`."""
        for name, linear in progress_bar(projections(model), title, enabled=options.progress, leave=False):
            replace_module(model, name, self.convert(linear, options))

    def convert(self, linear: nn.Linear, options: Options) -> nn.Module:
        """The quantized form of one projection."""
        raise NotImplementedError


@dataclass(frozen=True)
class Floats(Driver):
    """Shorter floats: float16, bfloat16, or float8 with a scale a row."""

    dtype: str

    @property
    def sixteen_bit(self) -> bool:
        return self.dtype != "float8"

    def embeddings(self, options: Options) -> str:
        return self.dtype if self.sixteen_bit else options.embeddings

    def convert(self, linear: nn.Linear, options: Options) -> nn.Module:
        return FloatLinear.from_linear(linear, self.dtype)


@dataclass(frozen=True)
class NF4(Driver):
    """4-bit NormalFloat in blocks."""

    def check(self, linears: NamedLinears, options: Options) -> None:
        if odd := [name for name, linear in linears if linear.in_features % NF4_BLOCK]:
            raise ValueError(f"NF4 takes blocks of {NF4_BLOCK}, which do not divide the input channels of {odd[0]}")

    def convert(self, linear: nn.Linear, options: Options) -> nn.Module:
        return NF4Linear.from_linear(linear, block_size=NF4_BLOCK, double_quant=options.double_quant)


@dataclass(frozen=True)
class DynamicInt8(Driver):
    """Integer weights a row and INT8 activations a token: int8 or int4."""

    family = "weights and activations"
    quantizer: str

    def convert(self, linear: nn.Linear, options: Options) -> nn.Module:
        return PackedLinear.from_linear(linear, self.quantizer)


@dataclass(frozen=True)
class Grouped(Driver):
    """Integer weights in groups of input channels, in the layout of GPTQ checkpoints."""

    heeds = frozenset({"group_size", "symmetric"})
    bits: int
    ternary: bool = False

    def grid(self, options: Options) -> Grid:
        return TERNARY if self.ternary else Grid(self.bits, options.symmetric)

    def check(self, linears: NamedLinears, options: Options) -> None:
        if self.ternary and options.symmetric:
            raise ValueError("codes -1, 0 and 1 are symmetric by themselves; leave --symmetric out")
        # Codes share 32-bit words; 3-bit codes fill three of them with 32.
        step = 32 if self.bits == 3 else 32 // self.bits
        for name, linear in linears:
            size = linear.in_features if options.group_size == -1 else options.group_size
            if size < 1 or linear.in_features % size:
                raise ValueError(
                    f"group_size {options.group_size} does not divide the {linear.in_features} input channels of "
                    f"{name}; choose a divisor, or -1 for whole rows"
                )
            if linear.in_features % step or linear.out_features % step:
                raise ValueError(
                    f"{name} is {linear.out_features} x {linear.in_features}; the GPTQ layout in {self.bits} bits "
                    f"wants multiples of {step}"
                )


@dataclass(frozen=True)
class RoundToNearest(Grouped):
    """Each weight to the nearest value of its group."""

    def convert(self, linear: nn.Linear, options: Options) -> nn.Module:
        return group_linear(linear, round_to_nearest(linear.weight, self.grid(options), options.group_size), options)


@dataclass(frozen=True)
class GPTQ(Grouped):
    """Block by block in the order of the computation, each projection on the quantized output of those before it."""

    calibration = "required"
    heeds = Grouped.heeds | {"algorithm"}

    def check_tokens(self, count: int, config: ModelConfig) -> None:
        channels = max(config.intermediate_size, config.hidden_size, config.num_attention_heads * config.head_width)
        if count < TOKENS_PER_CHANNEL * channels:
            warnings.warn(
                f"{count} calibration tokens are fewer than {TOKENS_PER_CHANNEL} for each of the {channels} channels "
                f"of a layer, so GPTQ learns little more than rounding would; give {TOKENS_PER_CHANNEL * channels:,}",
                RuntimeWarning,
                stacklevel=4,
            )

    def quantize(self, model: BitNetForCausalLM, title: str, ids: Tensor | None, options: Options) -> None:
        assert ids is not None
        for number, step in enumerate(walk(model, ids, title, options.batch_size, options.progress)):
            for names in STAGES:
                # Observed anew for each stage: its inputs depend on the projections that were just quantized.
                seen, driver = step.observe([names], SplitHessian)[names], self.of(number, names)
                hessian, damping = driver.settle([projection(step.layer, name) for name in names], seen, options)
                for name in names:
                    module = driver.fit(projection(step.layer, name), hessian, damping, options)
                    replace_module(step.layer, name, module)

    def of(self, layer: int, names: Stage) -> "GPTQ":
        """What quantizes these projections of a layer."""
        return self

    def settle(
        self, linears: list[nn.Linear], seen: SplitHessian, options: Options
    ) -> tuple[Tensor | None, float | None]:
        """Hessian and damping for layers that share an input; no Hessian where rounding to nearest does better."""
        damping = options.damping
        if damping is not None or options.algorithm != "refined" or not seen.held_out.tokens:
            return seen.matrix(), damping
        damping = choose_damping(
            torch.cat([linear.weight for linear in linears]),
            seen.fitted.matrix(),
            seen.held_out.matrix(),
            self.grid(options),
            group_size=options.group_size,
            act_order=options.act_order,
        )
        # With the damping that does best on what it has not seen, all inputs are fitted.
        return (None if damping is None else seen.matrix()), damping

    def fit(self, linear: nn.Linear, hessian: Tensor | None, damping: float | None, options: Options) -> nn.Module:
        """The quantized form of one projection, without a Hessian by rounding to nearest."""
        grid = self.grid(options)
        if hessian is None:
            quantized = round_to_nearest(linear.weight, grid, options.group_size)
        else:
            quantized = gptq_quantize(
                linear.weight,
                hessian,
                grid,
                group_size=options.group_size,
                damping=damping,
                act_order=options.act_order,
                algorithm=options.algorithm,
            )
        return group_linear(linear, quantized, options, ternary=grid.ternary)


@dataclass(frozen=True)
class AWQ(Grouped):
    """Channels scaled by their activations before rounding, calibrated on the float model."""

    calibration = "required"

    def quantize(self, model: BitNetForCausalLM, title: str, ids: Tensor | None, options: Options) -> None:
        assert ids is not None
        grid = self.grid(options)
        for step in walk(model, ids, title, options.batch_size, options.progress, sequential=False):
            layer, statistics = step.layer, step.observe(STAGES, Moments)
            hessians: dict[tuple[str, ...], Tensor] = {}
            input_scales: dict[tuple[str, ...], Tensor | None] = {}
            # All factors are folded before anything is rounded, since folding changes the weights of earlier stages.
            for names in STAGES:
                linears = [projection(layer, name) for name in names]
                seen = statistics[names]
                hessian = seen.hessian.matrix()
                weights = [linear.weight for linear in linears]
                scale, _ = awq_scale(weights, seen.magnitude(), hessian, grid, options.group_size)
                # 1 / s goes into what produces the input; where nothing can take it, the layer divides its input
                # itself.
                input_scales[names] = None if fold(layer, names, scale) else scale
                for linear in linears:
                    linear.weight.mul_(scale)
                # The layer's input is x / s from now on, so H = X X^T is divided by s on both sides.
                hessians[names] = hessian / torch.outer(scale, scale)
            for names in STAGES:
                for name in names:
                    linear = projection(layer, name)
                    # The product of queries and keys is too sensitive to their largest values, says the published code.
                    if options.clip and name not in ("self_attn.q_proj", "self_attn.k_proj"):
                        quantized = clip_quantize(linear.weight, hessians[names], grid, options.group_size)
                    else:
                        quantized = round_to_nearest(linear.weight, grid, options.group_size)
                    module = group_linear(linear, quantized, options, input_scale=input_scales[names])
                    replace_module(layer, name, module)


@dataclass(frozen=True)
class StaticInt8(Driver):
    """INT8 weights and activations, the activations by calibrated scales; with `smooth`, outliers of the activations
    are moved into the weights first (SmoothQuant)."""

    family = "weights and activations"
    calibration = "required"
    heeds = frozenset({"calibration"})
    smooth: bool = False

    def quantize(self, model: BitNetForCausalLM, title: str, ids: Tensor | None, options: Options) -> None:
        assert ids is not None
        if self.smooth:
            self._move_outliers(model, ids, options)
            if options.activations == "dynamic":
                return DynamicInt8("int8").quantize(model, title, ids, options)
        for step in walk(model, ids, title, options.batch_size, options.progress, sequential=False):
            for names, observer in step.observe(STAGES, _histogram).items():
                scale, zero_point = calibrate(observer, options.calibration, symmetric=False)
                for name in names:
                    module = StaticInt8Linear.from_linear(projection(step.layer, name), scale, zero_point)
                    replace_module(step.layer, name, module)

    def _move_outliers(self, model: BitNetForCausalLM, ids: Tensor, options: Options) -> None:
        for step in walk(model, ids, "smoothing", options.batch_size, options.progress, sequential=False):
            statistics = step.observe(STAGES, Maxima)
            for names in STAGES:
                linears = [projection(step.layer, name) for name in names]
                scale = smooth_scale([linear.weight for linear in linears], statistics[names].absmax, options.alpha)
                if fold(step.layer, names, scale):
                    for linear in linears:
                        linear.weight.mul_(scale)


@dataclass(frozen=True)
class GGUF(Driver):
    """A block type, or a mixture of them that takes embedding and head too. Calibration text weighs the errors."""

    family = "gguf"
    calibration: ClassVar[Literal["none", "optional", "required"]] = "optional"
    heeds = frozenset({"compatible"})
    kind: str

    @property
    def is_mixture(self) -> bool:
        return self.kind not in BLOCKS

    def check(self, linears: NamedLinears, options: Options) -> None:
        if self.is_mixture:
            return
        size = BLOCKS[self.kind].block_size
        if odd := [name for name, linear in linears if linear.in_features % size]:
            raise ValueError(f"{self.kind} has blocks of {size}, which do not divide the input channels of {odd[0]}")

    def quantize(self, model: BitNetForCausalLM, title: str, ids: Tensor | None, options: Options) -> None:
        importance = options.importance or {}
        if options.importance is None and ids is not None:
            importance = measure_importance(model, ids, options)
        types = list(self.types(model.config).items())
        for name, kind in progress_bar(types, title, enabled=options.progress, leave=False):
            matrix = model.get_submodule(name)
            if isinstance(matrix, nn.Embedding):
                module: nn.Module = stored_table(matrix, kind, options.compatible)
            elif kind in GGUF_FLOATS:
                module = FloatLinear.from_linear(projection(model, name), GGUF_FLOATS[kind])
            else:
                linear, weights = projection(model, name), importance.get(name)
                module = BlockLinear.from_linear(linear, kind, weights, compatible=options.compatible)
            replace_module(model, name, module)

    def types(self, config: ModelConfig) -> dict[str, str]:
        """The type of each projection and, in a mixture, of embedding and head, by our names of the modules."""
        if not self.is_mixture:
            return {ours: self.kind for ours, _ in projection_names(config)}
        shapes, names = config.tensor_shapes(), [*projection_names(config), *table_names(config)]
        types = mixtures.tensor_types(
            self.kind, {f"{theirs}.weight": shapes[f"{ours}.weight"] for ours, theirs in names}
        )
        return {ours: types[f"{theirs}.weight"] for ours, theirs in names}


@dataclass(frozen=True)
class ImportantGGUF(GGUF):
    """A type or mixture that is no use without the importance of the columns."""

    calibration = "required"


@torch.no_grad()
def measure_importance(model: BitNetForCausalLM, ids: Tensor, options: Options) -> dict[str, Tensor]:
    """Mean square of each input channel of a float model, float32 `[K]`, by the projection's name; of `options` those
    that say how calibration runs."""
    found: dict[str, Tensor] = {}
    steps = walk(model, ids, "importance", options.batch_size, options.progress, sequential=False)
    for number, step in enumerate(steps):
        for names, seen in step.observe(STAGES, MeanSquares).items():
            found |= {f"model.layers.{number}.{name}": seen.mean() for name in names}
    return found


def stored_table(table: nn.Embedding, kind: str, compatible: bool = False) -> nn.Module:
    """An embedding in a block type, or a float by our name or GGUF's."""
    matrix = nn.Linear(table.embedding_dim, table.num_embeddings, bias=False, device="meta").eval()
    matrix.weight = table.weight
    if kind in BLOCKS:
        return BlockEmbedding.from_linear(matrix, kind, compatible=compatible)
    return FloatEmbedding.from_linear(matrix, GGUF_FLOATS.get(kind, kind))


def _histogram(in_features: int, device: torch.device) -> Observer:
    return Observer(PerTensor())


def group_linear(
    linear: nn.Linear,
    quantized: QuantizedWeight,
    options: Options,
    input_scale: Tensor | None = None,
    ternary: bool = False,
) -> GroupLinear:
    return GroupLinear.from_quantized(
        quantized, linear.bias, version=options.version, input_scale=input_scale, ternary=ternary
    )
