"""One step of training: the products of the layers, micro-batches, clipping, and the update of the weights.

    trainer = Trainer(config, world, device, dtype, feed, model, optimizer, progress)
    result = trainer.step()
    if result.fault:
        trainer.recover(result.fault)

Nothing in a step is random, and its batch is a pure function of its number, so a run that is resumed repeats the
uninterrupted one bit for bit.
"""

import contextlib
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from bitnet import kernels
from bitnet.console import progress_bar
from bitnet.data.batches import Prefetcher
from bitnet.data.feed import Feed
from bitnet.evaluation.loss import Evaluation, evaluate_up_to
from bitnet.inference.generation import generate, limit_new_tokens
from bitnet.inference.options import DEFAULTS
from bitnet.machine import eager
from bitnet.model import BitNetForCausalLM, bit_linears
from bitnet.training import checkpoint
from bitnet.training.checkpoint import Progress
from bitnet.training.config import TrainConfig
from bitnet.training.faults import HISTORY, Fault, find_fault, require_gradients, stop_if_hopeless
from bitnet.training.graphs import GraphedBackward
from bitnet.training.memory import estimate
from bitnet.training.optimizer import Optimizer, clip_gradients
from bitnet.training.pace import Clock
from bitnet.training.processes import World, replicate
from bitnet.training.sharding import prepare_gathers
from bitnet.training.teacher import Teacher
from bitnet.training.workload import Workload

MIN_STEPS = 10
"""Fewer steps train nothing, and are no answer to --minutes."""


@dataclass(frozen=True)
class StepResult:
    """What a step has found. With a fault the weights are those before the step."""

    loss: float
    """Mean over the labels of the step, nats; with a teacher, of both terms."""
    norm: float
    """Of the gradient, before clipping."""
    lr: float
    fault: Fault | None


class Trainer:
    """What a step works on, made by the paragraphs of train.py, and the step itself."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        device: torch.device,
        dtype: torch.dtype,
        feed: Feed,
        model: BitNetForCausalLM,
        optimizer: Optimizer,
        progress: Progress,
        teacher: Teacher | None = None,
        *,
        compiled: bool = False,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.config, self.world, self.device, self.dtype = config, world, device, dtype
        self.feed, self.model, self.optimizer, self.progress = feed, model, optimizer, progress
        self.teacher, self.compiled = teacher, compiled
        self.files = files or {}
        """What every checkpoint holds beside its tensors, by name."""
        self.validates_whole = True
        """Whether there is time for a last validation on all of the held-out data, where the others are on a part."""
        self.clock: Clock | None = None
        """Of a run that is to end in time."""
        self.signal: int | None = None
        """A signal that this process was sent."""
        self.stop_signal: int | None = None
        """A signal that this process or any other one was sent, once all of them know: the step that runs is the last
        one. They leave the loop together, so none looks at its own signal alone."""
        self.cut = False
        """The last validation on everything was, because of it."""
        self.batches = Prefetcher(self._micro_batch, config.data.prefetch)
        self._replica: Any = replicate(model, device) if world.strategy == "ddp" else None
        self._strength = torch.ones((), device=device)
        """Of the quantizers within the ramp: one tensor, so that layers are compiled, and captured, once for all of
        it."""
        self._graph = GraphedBackward(self._backward, list(model.parameters())) if config.graphs else None

    def step(self) -> StepResult:
        """Set the products, accumulate the gradient, clip it, and update the weights, unless something is wrong."""
        progress, config = self.progress, self.config
        self.set_products()
        at, steps = config.place(progress.step)
        lr = self.optimizer.set_schedule(progress.step, steps, at)
        mine = self.forward_backward(progress.step + progress.data_shift)
        clipped = clip_gradients(list(self.model.parameters()), config.optim.grad_clip)
        loss, norm = torch.stack([mine, clipped.double()]).tolist()  # waits for a GPU once, when all is on its way
        loss = self._mean_over_processes(loss)
        fault = find_fault(loss, norm, progress.history, config)
        if fault:
            self.model.zero_grad(set_to_none=True)
        else:
            require_gradients(self.optimizer.names, progress.step, compiled=self.compiled)
            self.optimizer.step()
            progress.step += 1
            if progress.step > progress.worst:
                progress.faults = 0
            progress.history = [*progress.history[1 - HISTORY :], (loss, norm)]
        return StepResult(loss, norm, lr, fault)

    def set_products(self) -> None:
        """Give every layer the product of the next step, and of a validation before it: float in the warm start, a
        part of the quantizers in the ramp, then the quantized product that the checkpoint's model has."""
        share = self.config.quantizer_strength(self.progress.step)
        strength = self._strength.fill_(share) if 0 < share < 1 else share
        int8 = self.config.multiplies_int8(self.device, self.dtype, self.world.strategy)
        gradients, soft = self.config.rounds_gradients, self.config.ramp_shape == "soft"
        for _, layer in bit_linears(self.model):
            layer.product = kernels.training_product(
                layer.product, layer.weight, layer.quantizer, strength, int8=int8, gradients=gradients, soft=soft
            )
        if self.world.strategy == "fsdp":
            prepare_gathers(self.model, self.world, self.dtype)

    def forward_backward(self, batch: int) -> Tensor:
        """Accumulate the gradient of the loss over the micro-batches of a batch. Returns this process's part of the
        loss, of which the processes' mean is the loss, float64 `[]`."""
        losses, parts = list[Tensor](), self.config.micro_batches
        for part in range(parts):
            tensors = [tensor.to(self.device, non_blocking=True) for tensor in self.batches[batch * parts + part]]
            weight = self.feed.loss_weight(batch, *self._part(part))
            if self._graph:
                share = self.config.quantizer_strength(self.progress.step)
                phase = share if share in (0, 1) else "ramp"
                losses.append(self._graph(phase, parts == 1, torch.full((), weight, device=self.device), *tensors))
                continue
            # DDP averages gradients at the end of a backward: once a step is enough.
            last = part == parts - 1
            with contextlib.nullcontext() if last or not self._replica else self._replica.no_sync():
                losses.append(self._backward(weight, *tensors))
        return torch.stack(losses).sum(dtype=torch.float64)

    def _backward(self, weight: float | Tensor, input_ids: Tensor, labels: Tensor, *documents: Tensor) -> Tensor:
        """Add a micro-batch's part, of this weight, to the gradient. Returns its part of the loss."""
        loss_of: Any = self._replica or self.model.loss
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            taught = self.teacher(input_ids, *documents) if self.teacher else None
            loss = loss_of(input_ids, labels, "mean", documents[0] if documents else None, taught)
            loss = loss / self.config.micro_batches * weight
        loss.backward()
        return loss.detach()

    def _part(self, micro_batch: int) -> tuple[int, int]:
        """Which of how many parts of a batch this process computes in a micro-batch."""
        return micro_batch * self.world.size + self.world.rank, self.config.micro_batches * self.world.size

    def _micro_batch(self, number: int) -> tuple[Tensor, ...]:
        """What this process computes in the `number`-th of all its micro-batches; for a GPU in pinned memory."""
        batch, micro_batch = divmod(number, self.config.micro_batches)
        tensors = self.feed.batch(batch, *self._part(micro_batch))
        if self.device.type != "cuda":
            return tensors
        with torch.cuda.device(self.device):  # the prefetcher's thread has a current device of its own
            return tuple(tensor.pin_memory() for tensor in tensors)

    def _mean_over_processes(self, loss: float) -> float:
        """The loss over all processes; a signal that one of them got becomes everybody's."""
        if self.world.size == 1:
            return loss
        both = torch.tensor([loss, float(self.signal or 0)], dtype=torch.float64, device=self.device)
        total, signum = self.world.sum(both).tolist()
        if signum and self.stop_signal is None:
            self.stop_signal = self.signal or signal.SIGTERM
        return total / self.world.size

    def stopping(self) -> bool:
        """Whether a process was sent a signal; every process must ask."""
        if self.stop_signal is None:
            self._mean_over_processes(0.0)
        return self.stop_signal is not None

    def request_stop(self, signum: int) -> None:
        """Take a signal of this process."""
        self.signal = signum
        if self.world.size == 1:
            self.stop_signal = signum

    def recover(self, fault: Fault, say: Callable[[str, TextIO], None]) -> None:
        """Skip a bad step, or go back to the last checkpoint and on with the batches behind the bad one. Raises
        Diverged where that is not wanted or has not helped."""
        progress, folder = self.progress, self.folder
        progress.faults += 1
        progress.worst = max(progress.worst, progress.step)
        # The first process says, since it writes.
        rewind = fault.remedy == "rewind" and self.world.broadcast(checkpoint.has_checkpoint(folder))
        stop_if_hopeless(fault, progress.faults, progress.step, self.config, saved=rewind)
        remedy = "rewinding" if rewind else "the update is skipped"
        say(f"warning: step {progress.step}: {fault.what}; {remedy}", sys.stderr)
        if not rewind:
            progress.step += 1
            return
        self.optimizer = Optimizer(self.model, self.config.optim)
        saved = checkpoint.newest_checkpoint(folder, self.world)
        teacher = self.teacher.fingerprint if self.teacher else None
        self.progress = checkpoint.restore(
            saved, self.config, self.feed.fingerprint, teacher, self.model, self.optimizer, self.device
        )
        self.progress.data_shift = progress.step + progress.data_shift + 1 - self.progress.step
        for name in ("faults", "worst", "best_loss", "best_tokens"):
            setattr(self.progress, name, getattr(progress, name))

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.config.out)

    @property
    def workload(self) -> Workload:
        """What the memory of a step depends on."""
        teacher = self.teacher.model.config if self.teacher else None
        tensors = [*self.model.parameters(), *self.model.buffers()] if self.config.lora else []
        frozen = sum(tensor.nbytes for tensor in tensors if not tensor.requires_grad)
        return self.config.workload(
            self.device, self.dtype, self.world, compiled=self.compiled, teacher=teacher, frozen=frozen
        )

    def describe(self) -> str:
        """What is trained, on what and where, in a few lines."""
        model, world = self.model, self.world
        trained = sum(parameter.numel() for parameter in self.optimizer.names)
        if self.config.lora:
            what = (
                f"{trained:,} parameters of adapters (rank {self.config.lora}), on {self.config.init}, which is frozen"
            )
        else:
            what = (
                f"{trained:,} parameters ({model.num_parameters(embeddings=False):,} without embeddings), quantizer "
                f"{self.config.model.quantizer}"
            )
        return (
            f"model     {what}\n"
            f"data      {self.feed.describe()}\n"
            f"compute   {self.device}, {str(self.dtype).removeprefix('torch.')}, "
            f"{'compiled' if self.compiled else 'not compiled'}, {torch.get_num_threads()} threads"
            + (f", {world.size} processes ({world.strategy})" if world.strategy != "none" else "")
            + (f"\n{self.teacher.describe()}" if self.teacher else "")
            + f"\nmemory    {estimate(self.workload).summary()}"
        )

    def plan(self, minutes: float, spent: float = 0.0) -> TrainConfig:
        """The configuration that spends this time, less the minutes that are `spent` already, on training and
        validation, from a few timed steps, whose updates are undone again; from then on `clock` tells whether it still
        does. Raises ValueError where it is too short for `MIN_STEPS` more steps."""
        config, start_step, history = self.config, self.progress.step, self.progress.history
        left = max(0.0, minutes - spent) * 60
        weights = {name: self._aside(value) for name, value in self.model.state_dict().items()}
        moments = {name: self._aside(value) for name, value in self.optimizer.state().items()}
        times, begun = list[float](), time.perf_counter()
        for _ in progress_bar(range(7), "timing steps", unit="step", enabled=self.world.is_first, leave=False):
            start = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - start)
            # The first ones compile, and touch memory for the first time; one that takes long does not need company.
            # Of several processes the first one's clock counts: a step of one alone would wait for the others.
            if len(times) > 2 and self.world.broadcast(time.perf_counter() - begun > 0.2 * left):
                break
        step = statistics.median(times[2:])
        self.progress.step, self.progress.history = start_step, history
        self.model.load_state_dict(weights)
        self.optimizer = Optimizer(self.model, config.optim)
        self.optimizer.load_state(moments)
        token = self._validation_seconds()
        step, token = self.world.broadcast((step, token))
        # No validation takes more than its share of the time; the rest goes to steps, checkpoints and samples.
        timing = self.world.broadcast(time.perf_counter() - begun)
        budget, held_out = left * 0.97 - timing, self.feed.held_out_tokens
        tokens = config.eval_tokens or held_out
        if tokens * token > 0.1 * budget:
            few = config.batch_size // config.micro_batches * config.window
            tokens = max(few, int(0.1 * budget / token))
        self.validates_whole = held_out * token <= 0.2 * budget
        last = held_out if self.validates_whole else min(tokens, held_out)
        pause = min(tokens, held_out) * token
        steps = int((budget - last * token) / (step + pause / config.eval_every))
        if steps < MIN_STEPS:
            needed = max(minutes, spent + (MIN_STEPS * step + last * token + timing) / 60 / 0.97 * 1.2)
            unit = 10.0 ** (math.floor(math.log10(needed)) - 1)
            asked = math.ceil(needed / unit) * unit  # two digits, rounded up
            layers = f", {spent:.2g} of which the layer-wise start took," if spent else ""
            raise ValueError(
                f"{minutes:g} minutes{layers} are time for {max(0, steps)} steps of {step:.2g} s here, and training "
                f"takes {MIN_STEPS} at least; give --minutes {asked:.2g} or more, a smaller model or batch, or a "
                "faster machine"
            )
        now = time.perf_counter()
        self.clock = Clock(now + budget, step, pause, last * token, left / 50)
        eval_tokens = None if tokens >= held_out and config.eval_tokens is None else tokens
        return replace(config, steps=start_step + steps, eval_tokens=eval_tokens, minutes=None, pace=())

    def _validation_seconds(self) -> float:
        """Seconds of validation a token."""
        seconds, result = 0.0, None
        for _ in range(2):  # the first one compiles
            start = time.perf_counter()
            result = next(self.evaluations(1, shown=False))  # a batch of each corpus
            seconds = time.perf_counter() - start
        assert result is not None
        return seconds / result.tokens

    def _aside(self, tensor: Tensor) -> Tensor:
        """A copy, of whole tensors in main memory: a GPU that training fills has no room for a second state."""
        return tensor.clone() if self.world.strategy == "fsdp" else tensor.to("cpu", copy=True)

    def validate(self, *, whole: bool) -> Evaluation:
        """Loss on the held-out part of the data, its first `eval_tokens` or the `whole`."""
        return next(self.evaluations(None if whole else self.config.eval_tokens))

    def evaluations(self, *limits: int | None, shown: bool = True) -> Iterator[Evaluation]:
        """Losses on the first so many tokens of the held-out data, None for all, in one pass that goes on when the next
        one is asked for, unless a signal came."""
        self.set_products()
        yield from evaluate_up_to(
            self.model,
            self.feed,
            limits,
            batch_size=self.config.batch_size // self.config.micro_batches,
            dtype=self.dtype,
            progress=shown and self.world.is_first,
            stop=self.stopping,
        )

    def is_best(self, result: Evaluation) -> bool:
        """Whether a validation is the best one yet, which it then is for those to come. The first one on another part
        of the text is, since its loss does not compare with the best."""
        progress = self.progress
        # A loss of the warm start or the ramp is not that of the quantized model which its checkpoint becomes.
        quantized = self.config.quantizer_strength(progress.step) == 1
        other = progress.best_tokens not in (0, result.tokens) and not math.isnan(result.loss)
        best = quantized and (result.loss < progress.best_loss or other)
        if best:
            progress.best_loss, progress.best_tokens = result.loss, result.tokens
        return best

    def sample(self, tokens: int = 60) -> str:
        """A short continuation of the sample prompt."""
        prompt, tokenizer = self.feed.prompt(self.config.sample_prompt), self.feed.tokenizer
        vocab_size, unused = tokenizer.drawable
        self.set_products()
        with eager():
            new = generate(
                self.model,
                torch.tensor([prompt], device=self.device),
                max_new_tokens=limit_new_tokens(self.config.model, len(prompt), tokens),
                sampling=DEFAULTS,
                seed=0,
                eos_id=tokenizer.eos_ids,
                vocab_size=vocab_size,
                unused=unused,
            )
            return tokenizer.decode([*prompt, *(int(row[0]) for row in new)])
