"""What a training run is made from: every option of train.py, and the presets that give them values."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from bitnet.data.feed import DataConfig
from bitnet.files import JsonObject
from bitnet.kernels import GROUP_SIZES, cuts_off
from bitnet.machine import MAX_THREADS, int8_pays
from bitnet.model import PRESETS as MODELS
from bitnet.model import ModelConfig
from bitnet.storage.json_files import checked, require_finite
from bitnet.training.optimizer import OptimConfig
from bitnet.training.pace import Pace, check_pace, decided, place
from bitnet.training.processes import Strategy, World
from bitnet.training.workload import Workload

Remedy = Literal["stop", "skip", "rewind"]
MOST_LAYERS = 4096
# What a configuration cannot mean, and what would end in an abort or never: threads that no system starts, ...
LARGEST = {
    "threads": MAX_THREADS, "batch_size": 2**20, "steps": 2**40, "keep_last": 1000, "minutes": 1e6, "max_minutes": 1e6,
    "timeout_minutes": 1e6,
}  # fmt: skip

RAMPS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "square": lambda x: x * x,
    "root": math.sqrt,
    "soft": lambda x: x,
}
"""Strength of the quantizers by the share of the ramp that is done; from 0 at 0 to 1 at 1."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a BitNet b1.58 language model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    out: str = "runs/run"
    """Folder of the run."""
    steps: int = 1000
    """Optimizer steps."""
    minutes: float | None = None
    """Choose the number of steps, and of tokens to validate on, so that both take about this long on this machine, and
    change the number on the way where it becomes slower or faster; the last validation is on all held-out tokens where
    that is at most a fifth of the time. Too short for 10 steps is refused."""
    pace: Pace = ()
    """Written by --minutes: from which steps on how many there were to be in all. A resumed run repeats it."""
    context: int | None = None
    """Tokens in a training sequence; the model's max_position_embeddings unless given."""
    batch_size: int = 16
    """Sequences in an optimizer step."""
    micro_batches: int = 1
    """Forward and backward passes that a process's part of a step is cut into, to save memory (gradient accumulation).
    """
    parallel: Strategy = "auto"
    """With torchrun: ddp (every process has the whole model; auto) or fsdp (parameters, gradients, moments sharded)."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """With --parallel fsdp: the type in which gradients are sent and added over processes. bfloat16 is half the bytes,
    and rounds them to 8 bits."""
    timeout_minutes: float = 30.0
    """End the program where a step takes longer than this, or a process waits as long for another one."""
    float_start: float = 0.0
    """Share of the steps trained without quantization before going ternary (0.2 to 0.4 in published long runs)."""
    ramp: float = 0.0
    """Share of the steps, behind those of float_start, over which the quantizers fade in; 0 switches at once."""
    ramp_shape: Literal["linear", "cosine", "square", "root", "soft"] = "linear"
    """How the strength rises over the ramp's share x: x, (1 - cos pi x) / 2, x^2 or sqrt x. soft: as linear, and
    ternary weights (of other quantizers there is none) are not a mixture of float and quantized ones but their codes'
    mean at a temperature that falls."""
    init: str | None = None
    """Start from the weights, shape, tokenizer and chat template of this run, Hugging Face folder or GGUF file:
    fine-tuning, and with another model.quantizer than its own, conversion."""
    lora: int | None = None
    """Train LoRA adapters of this rank beside the projections of --init's model, which stays packed (ternary, NF4, any
    GGUF type) and frozen. --preset lora has rates for them."""
    lora_alpha: float | None = None
    """Factor of the adapters, divided by their rank; twice the rank unless given."""
    layer_steps: int = 0
    """Before the first step, bring each layer of --init's float model alone, quantized, to what it says in float, by so
    many steps: the layer-wise start of a conversion, of which --preset convert is made. 0 for none."""
    layer_tokens: int = 16384
    """Of the training data that the layer-wise start sees, again and again; a fifth is held out."""
    layer_rate: float = 0.003
    """Largest step of a weight in it, as a share of its matrix's mean magnitude."""
    teacher: str | None = None
    """Learn from this model too, which has the same tokenizer: a run, Hugging Face folder or GGUF file, best a float
    one. It runs beside every step."""
    teacher_weight: float = 0.5
    """Share of the loss that is the divergence from the teacher's distribution; the rest is the labels'."""
    teacher_temperature: float = 1.0
    """What logits are divided by in that divergence; above 1 small probabilities count for more."""
    eval_every: int = 200
    """Steps between validations; each one also writes a checkpoint."""
    on_nan: Remedy = "stop"
    """What to do where the loss or the gradient is no finite number: stop; skip the update; or rewind to the last
    checkpoint and go on with other batches."""
    on_spike: Literal["off"] | Remedy = "off"
    """The same for a spike: a perplexity or a gradient norm `spike_factor` times the median of the last 64 steps."""
    spike_factor: float = 8.0
    max_minutes: float | None = None
    """Save and stop before this much time has passed since the start of the program, as on SIGTERM."""
    keep_last: int = 2
    """Newest checkpoints that stay, beside the best one; a damaged last one costs the steps since the one before."""
    async_save: Literal["auto", "on", "off"] = "auto"
    """Write checkpoints beside the training, from a copy in memory of weights and moments; auto with fsdp."""
    eval_tokens: int | None = 65536
    """Tokens of the periodic validation; the last one goes on over the whole split, once all is written."""
    sample_every: int = 400
    """Steps between samples of text; 0 for none. A sharded model (fsdp) gives none."""
    sample_prompt: str = ""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; auto takes bfloat16 where the hardware multiplies it faster.
    Parameters, norms, residual stream and optimizer stay float32."""
    product: Literal["auto", "float", "int8", "int8-all"] = "auto"
    """Forward product of quantized layers in float32 on a CPU: float multiplies dequantized operands; int8 is exact,
    quantizes weights once a step and keeps activations as int8; int8-all rounds gradients to int8 for the backward's
    products too; auto is int8 where the processor multiplies int8. Behind --float-start and --ramp, which multiply
    floats."""
    recompute: bool = False
    """Keep only the input of each layer for the backward, and compute the rest again: a third more time."""
    loss_chunk: int = 0
    """Tokens whose logits are in memory at a time; 0 for those of a micro-batch."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto where a C++ compiler is found."""
    graphs: bool = False
    """On one GPU, replay forward and backward of a micro-batch as one CUDA graph: for small models and batches, whose
    kernels take less time than their launches. Not run on a GPU yet."""
    threads: int | None = None
    """CPU threads; torch's default unless given."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto (online if logged in, else off), online, offline or off; online without a network is offline."""

    def __post_init__(self) -> None:
        require_finite(self)
        self.check_adapters()
        for name in (
            "steps",
            "batch_size",
            "micro_batches",
            "eval_every",
            "keep_last",
            "log_every",
            "context",
            "threads",
            "eval_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name in ("sample_every", "loss_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 for none, or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2^63 - 1")
        for name, most in LARGEST.items():
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; more than {most:,} helps nobody")
        if self.model.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"{self.model.num_hidden_layers} layers are more than any model has; check the number")
        if self.batch_size % self.micro_batches:
            raise ValueError(f"micro_batches {self.micro_batches} does not divide batch_size {self.batch_size}")
        if self.init is None:  # else the model is that of --init, which is not opened yet
            self.check_window()
        for name in ("minutes", "max_minutes", "timeout_minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if not 0 <= self.data.prefetch <= 1024:
            raise ValueError(f"data.prefetch is {self.data.prefetch}; give 0 or more micro-batches, at most 1,024")
        if self.spike_factor <= 1:
            raise ValueError(f"spike_factor is {self.spike_factor}; it multiplies what is usual, so it must be above 1")
        if self.reduce_dtype != "float32" and self.parallel != "fsdp":
            raise ValueError(
                f"reduce_dtype {self.reduce_dtype} is of gradients of shards (--parallel fsdp); leave it out"
            )
        check_pace(self.pace, self.steps)
        self.check_start()
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"teacher_weight is {self.teacher_weight}; it is a share of the loss, from 0 to 1")
        if not 0 < self.teacher_temperature <= 1000:
            raise ValueError(
                f"teacher_temperature is {self.teacher_temperature}; it must be above 0, and more than 1,000 leaves "
                "nothing of the teacher's distribution"
            )
        if not 0 <= self.float_start < 1:
            raise ValueError(f"float_start is {self.float_start}; it is a share of the steps, from 0 to below 1")
        if self.ramp < 0 or self.float_start + self.ramp > 1:
            raise ValueError(
                f"ramp is {self.ramp}; it is a share of the steps, at most what float_start {self.float_start} leaves"
            )

    def check_window(self) -> None:
        """Raise ValueError where the windows have more tokens than the model has positions."""
        positions = self.model.max_position_embeddings
        if self.window > positions:
            remedy = "raise --model.max-position-embeddings or " if self.init is None else ""
            raise ValueError(f"context {self.window} is longer than the model's {positions} positions; {remedy}lower "
                             "--context")  # fmt: skip

    @property
    def window(self) -> int:
        """Tokens in a training sequence."""
        return self.context or self.model.max_position_embeddings

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of gradients on their way between shards."""
        return torch.bfloat16 if self.reduce_dtype == "bfloat16" else torch.float32

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.window

    def absolute(self) -> "TrainConfig":
        """The same with paths that do not depend on the current folder; a name on the hub is none."""
        teacher, init = (
            str(Path(path).absolute()) if path and Path(path).exists() else path for path in (self.teacher, self.init)
        )
        return replace(self, data=self.data.absolute(), teacher=teacher, init=init)

    @property
    def alpha(self) -> float:
        """Of the adapters."""
        return 2.0 * (self.lora or 0) if self.lora_alpha is None else self.lora_alpha

    def check_adapters(self) -> None:
        """Raise ValueError for what adapters do not go with."""
        if self.lora is None:
            if self.lora_alpha is not None:
                raise ValueError(f"lora_alpha is {self.lora_alpha} and there are no adapters; give --lora RANK too")
            return
        if not 1 <= self.lora <= 4096:
            raise ValueError(f"lora is {self.lora}; it is the rank of the adapters, from 1 to 4,096")
        if not 0 < self.alpha <= 1e4:
            raise ValueError(f"lora_alpha is {self.lora_alpha}; it must be above 0 and at most 10,000")
        wrong = {
            "--init, the model that they stand on": self.init is None,
            "--float-start 0 and --ramp 0, since what stays frozen fades into nothing": self.float_start or self.ramp,
            "--optim.optimizer adamw (--preset lora has rates)": self.optim.optimizer != "adamw",
            "--compile auto or off, since packed products are not compiled": self.compile == "on",
            "no --teacher": self.teacher is not None,
            "one process": self.parallel == "fsdp",
        }
        for wanted, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"adapters (--lora {self.lora}) want {wanted}")

    def check_start(self) -> None:
        """Raise ValueError for a layer-wise start that cannot be, or would be undone."""
        if not 0 <= self.layer_steps <= 1_000_000:
            raise ValueError(f"layer_steps is {self.layer_steps}; it must be from 0 (no layer-wise start) to 1,000,000")
        if not 1 <= self.layer_tokens <= 2**30:
            raise ValueError(f"layer_tokens is {self.layer_tokens}; it must be from 1 to 2^30")
        if not 0 < self.layer_rate <= 1:
            raise ValueError(f"layer_rate is {self.layer_rate}; it is a share of a weight, above 0 and at most 1")
        wrong = {
            "--float-start 0 and --ramp 0, since its latents say nothing without the quantizers": self.float_start
            or self.ramp,
            "another quantizer than none": self.model.quantizer == "none",
            "no --lora, which trains no weights": self.lora is not None,
            "--parallel auto or ddp": self.parallel == "fsdp",
        }
        for wanted, is_wrong in wrong.items():
            if self.layer_steps and is_wrong:
                raise ValueError(f"a layer-wise start (layer_steps {self.layer_steps}) wants {wanted}")

    def place(self, step: int) -> tuple[float, int]:
        """Where a step stands in every schedule: at which place of how many."""
        return place(step, self.steps, self.pace)

    def paced(self, step: int, total: int) -> "TrainConfig":
        """The same with `total` steps, and schedules that go on from where they are at `step`."""
        return replace(self, steps=total, pace=decided(self.pace, self.steps, step, total))

    def check_processes(self, processes: int) -> None:
        """Raise ValueError unless each process gets as many sequences of each micro-batch."""
        if self.batch_size % (self.micro_batches * processes):
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared by {processes} processes with micro_batches "
                f"{self.micro_batches} each; make it a multiple of {self.micro_batches * processes}"
            )

    def quantizer_strength(self, step: int) -> float:
        """How much of the quantizers a step runs: 0 in the 16-bit warm start, then rising over the ramp to 1, the model
        that a checkpoint becomes."""
        if self.model.quantizer == "none" or step >= self.steps:  # which rounding in `place` could leave a part out of
            return 1.0
        at, steps = self.place(step)
        behind, ramp = at - int(self.float_start * steps), int(self.ramp * steps)
        return 0.0 if behind < 0 else RAMPS[self.ramp_shape](min(1.0, (behind + 1) / (ramp + 1)))

    @property
    def switch(self) -> tuple[int, int] | None:
        """The steps at which the quantizers begin to count and from which they count in full; None where they do all
        along."""
        if self.model.quantizer == "none" or not (self.float_start or self.ramp):
            return None
        strengths = [self.quantizer_strength(step) for step in range(self.steps)] if self.pace else []
        if strengths:
            return sum(s == 0 for s in strengths), sum(s < 1 for s in strengths)
        begin = int(self.float_start * self.steps)
        return begin, begin + int(self.ramp * self.steps)

    def moved_switch(self, before: "TrainConfig", step: int) -> str | None:
        """What to say to somebody who goes on at this step with a run that had another configuration, where the switch
        to quantized weights is another step now; None where it is not."""
        if self.switch == before.switch:
            return None

        def words(switch: tuple[int, int] | None) -> str:
            return "the beginning" if switch is None else f"step {switch[1]}"

        moved = (
            f"weights are quantized in full from {words(self.switch)} on, and were to be from {words(before.switch)} on"
        )
        if self.switch is not None and before.quantizer_strength(step) == 1 > self.quantizer_strength(step):
            moved += f"; the run is at step {step} and goes back to float ones until then"
        return f"{moved} (a share of the steps: --float-start and --ramp)"

    @property
    def rounds_gradients(self) -> bool:
        """Whether the backward of quantized layers multiplies int8 too."""
        return self.product == "int8-all"

    def multiplies_int8(self, device: torch.device, dtype: torch.dtype, strategy: str) -> bool:
        """Whether quantized layers multiply int8 codes; shards travel as codes and arrive as floats. Raises ValueError
        where `product` asks for int8 and this device, type or quantizer has none."""
        asked = self.product.startswith("int8")
        if self.model.quantizer in GROUP_SIZES:
            if asked:
                raise ValueError(
                    f"product {self.product} sums whole rows, and {self.model.quantizer} has a scale for each group of "
                    "columns; leave product out"
                )
            return False
        if cuts_off(self.model.quantizer, gradients=self.rounds_gradients):
            if asked:
                raise ValueError(
                    f"product {self.product} would cut off sums of 8-bit codes at 16 bits on this processor, which has "
                    "no VNNI; leave product out"
                )
            return False
        if asked and (self.model.quantizer == "none" or strategy == "fsdp"):
            floats = "shards arrive as floats" if strategy == "fsdp" else "the model is a float one"
            raise ValueError(f"product {self.product} multiplies codes, and {floats}; take auto")
        return int8_pays(self.product, device, dtype) and strategy != "fsdp"

    def check_graphs(self, device: torch.device, strategy: str, borders: bool) -> None:
        """Raise ValueError where `graphs` is asked for and steps cannot be one."""
        if not self.graphs:
            return
        for wrong, where in (
            (device.type != "cuda", f"on {device}"),
            (strategy != "none", f"of several processes ({strategy})"),
            (self.recompute, "with recompute"),
            (self.lora is not None, "of adapters (lora)"),
            (borders, "where attention keeps to documents or conversations"),
        ):
            if wrong:
                raise ValueError(f"graphs replays the steps of one GPU, and not {where}; give --no-graphs")

    def saves_in_background(self, strategy: str) -> bool:
        """Whether checkpoints are written while the steps go on."""
        return self.async_save == "on" or (self.async_save == "auto" and strategy == "fsdp")

    def workload(
        self,
        device: torch.device,
        dtype: torch.dtype,
        world: World,
        *,
        compiled: bool,
        teacher: ModelConfig | None = None,
        frozen: int = 0,
    ) -> Workload:
        """What the memory and time of a step depend on; `teacher` is the shape of the model to learn from, `frozen` the
        bytes of the model that adapters stand on. Raises ValueError for a batch that they can't share."""
        self.check_processes(world.size)
        int8 = self.multiplies_int8(device, dtype, world.strategy)
        return Workload(
            self.model,
            sequences=self.batch_size // (self.micro_batches * world.size),
            window=self.window,
            optimizer=self.optim.optimizer,
            dtype=dtype,
            device=device.type,
            int8=int8 and self.model.quantizer != "none" and not self.lora,
            int8_gradients=self.rounds_gradients,
            lora=self.lora or 0,
            frozen=frozen,
            compiled=compiled,
            recompute=self.recompute,
            loss_chunk=self.loss_chunk,
            masked=self.data.document_mask or self.data.chat is not None,
            micro_batches=self.micro_batches,
            strategy=world.strategy,
            processes=world.size,
            reduced=self.gradient_dtype.itemsize,
            float_start=self.float_start > 0,
            ramp=self.ramp > 0,
            timed=self.minutes is not None,
            async_save=self.saves_in_background(world.strategy),
            teacher=teacher,
            tempered=self.teacher_temperature != 1,
            layer_steps=self.layer_steps,
            layer_tokens=self.layer_tokens,
        )

    @classmethod
    def from_dict(cls, values: JsonObject) -> "TrainConfig":
        """Inverse of `dataclasses.asdict`, through JSON too. Raises ValueError naming the field that is wrong."""
        return checked(cls, values, "configuration")


def _paper_recipe(model: str, lr: float, lr_second: float) -> TrainConfig:
    # Training Tips, table 2: 375 warm-up steps, weight decay 0.1 then 0, sequences of 2048 tokens, 1 M tokens a step.
    optim = OptimConfig(lr=lr, lr_second=lr_second, warmup_steps=375)
    return TrainConfig(
        model=MODELS[model], optim=optim, context=2048, batch_size=512, micro_batches=64, steps=100_000,
        eval_every=1000, data=DataConfig(corpus="fineweb-edu"), out=f"runs/{model}",
    )  # fmt: skip


# For runs of minutes to hours; AdamW with the papers' rates needs far more steps to leave its first plateau.
SHORT_RUN = OptimConfig(optimizer="muon", lr=1e-2, lr_rest=3e-2, warmup_steps=30)

PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        model=MODELS["tiny"], steps=200, batch_size=8, eval_every=100, sample_every=0, out="runs/tiny",
        optim=OptimConfig(warmup_steps=10),
    ),
    # Tuned on 1.2 M tokens of speeches and of code: dev/LOG.md has the attempts, docs/results.md the ramps.
    "demo": TrainConfig(
        model=MODELS["demo"], optim=SHORT_RUN, batch_size=8, float_start=0.2, ramp=0.6, out="runs/demo",
    ),
    "small": TrainConfig(
        model=MODELS["small"], optim=SHORT_RUN, steps=5000, float_start=0.2, ramp=0.6, out="runs/small",
    ),
    # With --init and --data.chat, which give the model and what to say.
    "chat": TrainConfig(
        optim=OptimConfig(optimizer="muon", lr=5e-3, lr_rest=5e-3, warmup_steps=20), steps=500, eval_every=100,
        out="runs/chat",
    ),
    # With --init, a float model, and --teacher, best the same one: docs/converting.md has how it was chosen.
    "convert": TrainConfig(
        model=ModelConfig(quantizer="ternary-g64"), layer_steps=40, context=256, batch_size=8,
        optim=OptimConfig(optimizer="muon", lr=1e-3, lr_rest=1e-4, warmup_steps=20, weight_decay=0.0), steps=500,
        teacher_weight=0.9, eval_every=100, eval_tokens=16384, sample_every=0, out="runs/converted",
    ),
    # With --init and --lora.
    "lora": TrainConfig(
        optim=OptimConfig(lr=2e-3, warmup_steps=20), steps=500, eval_every=100, out="runs/lora",
    ),
    "125m": TrainConfig(
        model=MODELS["125m"], data=DataConfig(corpus="fineweb-edu"), steps=20_000, batch_size=256, micro_batches=16,
        optim=OptimConfig(lr=2e-3, lr_second=1.4e-3, warmup_steps=375), eval_every=500, out="runs/125m",
    ),
    "700m": _paper_recipe("700m", 1.5e-3, 1e-3),
    "1.3b": _paper_recipe("1.3b", 1.2e-3, 8e-4),
    "3b": _paper_recipe("3b", 1.2e-3, 8e-4),
    "2b-4t": _paper_recipe("2b-4t", 1.2e-3, 8e-4),
}  # fmt: skip
