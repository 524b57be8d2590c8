"""One step of training: the products of the layers, micro-batches, clipping, and the update of the weights.

    trainer = Trainer(config, world, device, dtype, feed, model, optimizer, progress)
    result = trainer.step()
    if result.fault:
        trainer.recover(result.fault)

Nothing in a step is random, and its batch is a pure function of its number, so a run that is resumed repeats the
uninterrupted one bit for bit.
"""

import contextlib
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from bitnet import kernels
from bitnet.data.batches import Prefetcher
from bitnet.data.feed import Feed
from bitnet.evaluation.loss import Evaluation, evaluate_feed
from bitnet.inference.generation import generate, limit_new_tokens
from bitnet.inference.options import DEFAULTS
from bitnet.machine import eager
from bitnet.model import BitNetForCausalLM, bit_linears
from bitnet.training import checkpoint
from bitnet.training.checkpoint import Progress
from bitnet.training.config import TrainConfig
from bitnet.training.faults import HISTORY, Fault, find_fault, stop_if_hopeless
from bitnet.training.memory import Workload, estimate
from bitnet.training.optimizer import Optimizer, clip_gradients
from bitnet.training.processes import World, replicate
from bitnet.training.sharding import prepare_gathers


@dataclass(frozen=True)
class StepResult:
    """What a step has found. With a fault the weights are those before the step."""

    loss: float
    """Mean over the labels of the step, nats."""
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
        *,
        compiled: bool = False,
    ) -> None:
        self.config, self.world, self.device, self.dtype = config, world, device, dtype
        self.feed, self.model, self.optimizer, self.progress = feed, model, optimizer, progress
        self.compiled = compiled
        self.stop_signal: int | None = None
        """A signal that this process, or any other one, was sent: the step that runs is the last one."""
        self.batches = Prefetcher(self._micro_batch, config.data.prefetch)
        self._replica: Any = replicate(model, device) if world.strategy == "ddp" else None

    def step(self) -> StepResult:
        """Set the products, accumulate the gradient, clip it, and update the weights, unless something is wrong."""
        progress, config = self.progress, self.config
        self.set_products()
        lr = self.optimizer.set_schedule(progress.step, config.steps)
        loss = self._mean_over_processes(self.forward_backward(progress.step + progress.data_shift))
        norm = clip_gradients(list(self.model.parameters()), config.optim.grad_clip)
        fault = find_fault(loss, norm, progress.history, config)
        if fault:
            self.model.zero_grad(set_to_none=True)
        else:
            self.optimizer.step()
            progress.step += 1
            progress.faults = 0
            progress.history = [*progress.history[1 - HISTORY :], (loss, norm)]
        return StepResult(loss, norm, lr, fault)

    def set_products(self) -> None:
        """Give every layer the product of the next step, and of a validation before it: float in the warm start, a
        part of the quantizers in the ramp, then the quantized product that the checkpoint's model has."""
        share = self.config.quantizer_strength(self.progress.step)
        # A tensor, so that compiled layers are not compiled again at every step of the ramp.
        strength = torch.tensor(share, device=self.device) if 0 < share < 1 else share
        int8 = self.config.multiplies_int8(self.device, self.dtype, self.world.strategy)
        for _, layer in bit_linears(self.model):
            layer.product = kernels.training_product(layer.product, layer.weight, layer.quantizer, strength, int8=int8)
        if self.world.strategy == "fsdp":
            prepare_gathers(self.model, self.world, self.dtype)

    def forward_backward(self, batch: int) -> float:
        """Accumulate the gradient of the loss over the micro-batches of a batch. Returns this process's part of the
        loss, of which the processes' mean is the loss."""
        losses, parts = list[Tensor](), self.config.micro_batches
        loss_of: Any = self._replica or self.model.loss
        for part in range(parts):
            input_ids, labels, *documents = (
                tensor.to(self.device, non_blocking=True) for tensor in self.batches[batch * parts + part]
            )
            last = part == parts - 1
            # DDP averages gradients at the end of a backward: once a step is enough.
            with contextlib.nullcontext() if last or not self._replica else self._replica.no_sync():
                with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                    loss = loss_of(input_ids, labels, "mean", *documents) / parts
                    loss = loss * self.feed.loss_weight(batch, *self._part(part))
                loss.backward()
            losses.append(loss.detach())
        return sum(map(float, losses))  # waits for a GPU once, when all of the step is on its way

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
        both = torch.tensor([loss, float(self.stop_signal or 0)], dtype=torch.float64, device=self.device)
        total, signum = self.world.sum(both).tolist()
        if signum and self.stop_signal is None:
            self.stop_signal = signal.SIGTERM
        return total / self.world.size

    def recover(self, fault: Fault, say: Callable[[str, TextIO], None]) -> None:
        """Skip a bad step, or go back to the last checkpoint and on with the batches behind the bad one. Raises
        Diverged where that is not wanted or has not helped."""
        progress, folder = self.progress, self.folder
        progress.faults += 1
        rewind = fault.remedy == "rewind" and checkpoint.has_checkpoint(folder)
        stop_if_hopeless(fault, progress.faults, progress.step, self.config, saved=rewind)
        remedy = "rewinding" if rewind else "the update is skipped"
        say(f"warning: step {progress.step}: {fault.what}; {remedy}", sys.stderr)
        if not rewind:
            progress.step += 1
            return
        self.optimizer = Optimizer(self.model, self.config.optim)
        saved = checkpoint.newest_checkpoint(folder, self.world)
        self.progress = checkpoint.restore(
            saved, self.config, self.feed.fingerprint, self.model, self.optimizer, self.device
        )
        self.progress.data_shift = progress.step + progress.data_shift + 1 - self.progress.step
        self.progress.faults, self.progress.best_loss = progress.faults, progress.best_loss

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.config.out)

    @property
    def workload(self) -> Workload:
        """What the memory of a step depends on."""
        return self.config.workload(self.device, self.dtype, self.world, compiled=self.compiled)

    def describe(self) -> str:
        """What is trained, on what and where, in a few lines."""
        model, world = self.model, self.world
        return (
            f"model     {model.num_parameters():,} parameters ({model.num_parameters(embeddings=False):,} without "
            f"embeddings), quantizer {self.config.model.quantizer}\n"
            f"data      {self.feed.describe()}\n"
            f"compute   {self.device}, {str(self.dtype).removeprefix('torch.')}, "
            f"{'compiled' if self.compiled else 'not compiled'}, {torch.get_num_threads()} threads"
            + (f", {world.size} processes ({world.strategy})" if world.strategy != "none" else "")
            + f"\nmemory    {estimate(self.workload).summary()}"
        )

    def steps_within(self, minutes: float) -> int:
        """How many more steps fit into this time, from a few timed ones, whose updates are undone again."""
        start_step = self.progress.step
        weights = {name: self._aside(value) for name, value in self.model.state_dict().items()}
        moments = {name: self._aside(value) for name, value in self.optimizer.state().items()}
        times = []
        for trial in range(7):
            start = time.perf_counter()
            self.step()
            if trial >= 2:  # the first ones compile, and touch memory for the first time
                times.append(time.perf_counter() - start)
        self.progress.step = start_step
        self.model.load_state_dict(weights)
        self.optimizer = Optimizer(self.model, self.config.optim)
        self.optimizer.load_state(moments)
        # The rest of the time goes to validation, checkpoints and samples.
        return self.world.broadcast(max(1, int(minutes * 60 * 0.93 / statistics.median(times))))

    def _aside(self, tensor: Tensor) -> Tensor:
        """A copy, of whole tensors in main memory: a GPU that training fills has no room for a second state."""
        return tensor.clone() if self.world.strategy == "fsdp" else tensor.to("cpu", copy=True)

    def validate(self, *, whole: bool) -> Evaluation:
        """Loss on the held-out part of the data, whole or its first `eval_tokens`."""
        self.set_products()
        config = self.config
        return evaluate_feed(
            self.model,
            self.feed,
            max_tokens=None if whole else config.eval_tokens,
            batch_size=config.batch_size // config.micro_batches,
            dtype=self.dtype,
        )

    def sample(self, tokens: int = 60) -> str:
        """A short continuation of the sample prompt."""
        prompt, tokenizer = self.feed.prompt(self.config.sample_prompt), self.feed.tokenizer
        self.set_products()
        with eager():
            new = generate(
                self.model,
                torch.tensor([prompt], device=self.device),
                max_new_tokens=limit_new_tokens(self.config.model, len(prompt), tokens),
                sampling=DEFAULTS,
                seed=0,
                eos_id=tokenizer.eos_ids,
                vocab_size=tokenizer.vocab_size,
            )
            return tokenizer.decode([*prompt, *(int(row[0]) for row in new)])
