"""Train a BitNet b1.58 language model: data, model, optimizer, loop, from top to bottom.

    python train.py --preset demo --minutes 5            a small model on public-domain speeches, no download
    python train.py --preset small --data.corpus my.txt  your own text
    python train.py --resume runs/demo                   go on where a run was stopped
    python train.py --like runs/demo --model.quantizer none --optim.lr 5e-3 --out runs/demo-float     its float twin
    python train.py --like runs/demo --init runs/demo-float --ramp 0.5 --out runs/demo-converted      float to ternary
    python train.py --preset chat --init runs/demo --data.chat chats.jsonl            conversations: answers count
    torchrun --nproc-per-node 4 train.py --preset small --parallel fsdp                               several processes

Every option and preset is in bitnet/training/config.py, and everything about a run in its folder (see
bitnet/training/checkpoint.py). Batches are a pure function of seed and step, and nothing else in a step is
random, so a resumed run repeats the uninterrupted one bit for bit; on another number of processes
(bitnet/training/sharding.py) it sees the same data and follows the same curve, up to the order of float sums.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bitnet.data.batches import BatchSampler, Prefetcher
from bitnet.data.chats import ChatSampler, TokenizedChats, chat_texts, fingerprint_of, name_of, tokenize_chats
from bitnet.data.corpus import mixed, open_corpora
from bitnet.data.mixture import Mixture, document_borders, tokenize_mixture
from bitnet.evaluation.loss import Evaluation, evaluate_chats, evaluate_mixture
from bitnet.files import write_atomic
from bitnet.inference.generation import SamplingConfig, generate, limit_new_tokens
from bitnet.kernels import training_product
from bitnet.machine import compile_model, eager, int8_pays, pick_device, pick_dtype, return_freed_blocks
from bitnet.model import BitNetForCausalLM, bit_linears
from bitnet.storage.folders import CONFIG, INDEX, STATE, folder_of
from bitnet.storage.safetensors import CheckpointError, load_json
from bitnet.storage.source import open_source
from bitnet.tokenizer import (
    BaseTokenizer,
    ChatTemplate,
    Tokenizer,
    find_chat_template,
    load_tokenizer,
    train_tokenizer,
)
from bitnet.tokenizer.chat import PLAIN_TEMPLATE
from bitnet.training.checkpoint import consolidate, load_training_tensors, newest_good, save_checkpoint
from bitnet.training.config import TrainConfig, check_shares, estimate_wanted, parse, saves_beside, workload
from bitnet.training.estimate import estimate_run, memory_warning
from bitnet.training.memory import Workload, estimate
from bitnet.training.optimizer import Optimizer, clip_gradients
from bitnet.training.processes import World, exit_process, local_device, replicate, start, stop
from bitnet.training.reporter import Tracker
from bitnet.training.sharding import prepare_gathers, shard, shard_like
from bitnet.training.weight_stats import weight_codes, weight_statistics

# -------------------------------------------------------------------------------------------------------------- data


def prepare_data(config: TrainConfig, tokenizer: BaseTokenizer | None) -> tuple[Mixture, BaseTokenizer]:
    """Open the corpora, load or train the tokenizer, and tokenize, each only if it was not done before."""
    corpora, weights = open_corpora(config.data.corpus, max_bytes=config.data.max_bytes)
    if tokenizer is None:
        together = mixed(list(corpora.values()), weights)
        tokenizer = chosen_tokenizer(config, together.name, together.fingerprint(), together.documents)
    data = config.data
    return tokenize_mixture(corpora, weights, tokenizer, data.cache, val_fraction=data.val_fraction), tokenizer


def prepare_chats(
    path: str, config: TrainConfig, tokenizer: BaseTokenizer | None, template: ChatTemplate | None
) -> tuple[TokenizedChats, BaseTokenizer, ChatTemplate]:
    """The same for conversations, by the model's chat template or, where it has none, the plain one."""
    if tokenizer is None:
        tokenizer = chosen_tokenizer(config, name_of(path), fingerprint_of(path), lambda: chat_texts(path))
    template = template or ChatTemplate(PLAIN_TEMPLATE, tokenizer, "the plain chat template")
    data = config.data
    return tokenize_chats(path, template, data.cache, val_fraction=data.val_fraction), tokenizer, template


def chosen_tokenizer(
    config: TrainConfig, name: str, fingerprint: str, texts: Callable[[], Iterable[str]]
) -> BaseTokenizer:
    """The tokenizer of the configuration, or one trained on the texts, once."""
    if config.data.tokenizer:
        return load_tokenizer(config.data.tokenizer)
    path = Path(config.data.cache) / f"{name}-{fingerprint[:12]}-{config.model.vocab_size}.model"
    if not path.exists():
        print(f"training a tokenizer of {config.model.vocab_size} pieces on {name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(texts(), config.model.vocab_size).save(path)
    return Tokenizer.load(path)


# -------------------------------------------------------------------------------------------------------------- loop


class Diverged(RuntimeError):
    """The loss or the gradient is no number any more, or has jumped; the message says where and what to do."""


HISTORY = 64  # steps over which a spike is measured
MAX_FAULTS = 10  # skips or rewinds in a row, after which a run is beyond them


class Run:
    """A training run: everything that the loop touches, in the order in which it is made."""

    def __init__(self, config: TrainConfig, resume: bool, world: World | None = None) -> None:
        self.world = world = world or World()
        self.started = time.perf_counter()
        check_shares(config, world.size)
        self.folder = Path(config.out)
        saved = self._newest() if resume else None
        if not resume and (self.folder / "checkpoints" / INDEX).exists():
            raise ValueError(
                f"{self.folder} already holds a run; continue it with --resume {self.folder}, choose another --out, "
                "or delete the folder"
            )
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = local_device(pick_device(config.device))
        self.dtype = pick_dtype(config.dtype, self.device)
        self.int8 = int8_pays(config.product, self.device, self.dtype) and world.strategy != "fsdp"

        self.data: Mixture | TokenizedChats
        self.sampler: BatchSampler | ChatSampler
        self.template: ChatTemplate | None = None
        tokenizer, given = None, open_source(config.init) if config.init and not saved else None
        if saved:
            tokenizer = load_tokenizer(saved, own=True)
            self.template = find_chat_template(saved, tokenizer)
        elif given:
            tokenizer, self.template, start = given.tokenizer, given.chat_template, given.latent()
        if not world.is_first:  # the others find done what the first one does
            world.barrier("the preparation of the data")
        if config.data.chat:
            self.data, self.tokenizer, self.template = prepare_chats(config.data.chat, config, tokenizer, self.template)
        else:
            self.data, self.tokenizer = prepare_data(config, tokenizer)
        if world.is_first:
            world.barrier("the preparation of the data")
        if given:
            config = dataclasses.replace(config, model=start.config.replace(quantizer=config.model.quantizer))
        elif not saved:  # the vocabulary is the tokenizer's, which a given one decides
            config = dataclasses.replace(config, model=config.model.replace(vocab_size=self.tokenizer.vocab_size))
        self.config = config
        if isinstance(self.data, TokenizedChats):
            self.sampler = ChatSampler(self.data.rows("train", config.window), config.batch_size, config.seed)
        else:
            self.sampler = BatchSampler(
                self.data.split("train"), config.window, config.batch_size, config.seed, self.data.counts
            )

        self.batches = Prefetcher(self._micro_batch, config.data.prefetch)

        torch.manual_seed(config.seed)
        with torch.device(self.device):
            self.model = BitNetForCausalLM(config.model)
        self.model.model.recompute, self.model.loss_chunk = config.recompute, config.loss_chunk
        self.model.document_ids = document_borders(self.tokenizer) if config.data.document_mask else None
        if world.strategy == "fsdp":
            shard(self.model, self.device)
        self.optimizer = Optimizer(self.model, config.optim)
        self.step, self.best_loss, self.seconds = 0, math.inf, 0.0
        self.data_shift = 0  # batches that rewinds have jumped over
        self.faults = 0  # in a row
        self.history: list[tuple[float, float]] = []  # loss and gradient norm of the last good steps
        limit_new_tokens(config.model, len(self.prompt_ids()), 1)  # refuses a sample prompt that is too long
        if saved:
            self._load(saved)
        elif given:
            mine, weights = self.model.state_dict(), start.state_dict()
            self.model.load_state_dict({name: shard_like(mine[name], value) for name, value in weights.items()})
        self.finished = self.step == config.steps and not config.minutes
        self.compiled = not self.finished and compile_model(self.model, config.compile)
        self.saver: Any = None
        if saves_beside(config, world.strategy):
            from bitnet.training.shards import BackgroundSaver

            self.saver = BackgroundSaver(world, config.timeout_minutes)
        self.replica: Any = replicate(self.model, self.device) if world.strategy == "ddp" else None
        self.stop_signal: int | None = None

    def _newest(self) -> Path:
        found: Any = None
        if self.world.is_first:
            try:
                found = newest_good(self.folder)
            except CheckpointError as error:
                found = error
        found = self.world.broadcast(found)
        if isinstance(found, CheckpointError):
            raise found
        for line in found[1] if self.world.is_first else ():
            print(f"warning: {line}", file=sys.stderr)
        return found[0]

    def _load(self, saved: Path) -> None:
        state = load_json(saved / STATE)
        if state.get("data") != self.data.fingerprint:
            raise CheckpointError(
                f"the run was trained on data {state.get('data')}, and "
                f"{self.config.data.chat or self.config.data.corpus} gives "
                f"{self.data.fingerprint}: the corpus has changed. Restore it, or start a new run"
            )
        load_training_tensors(saved, self.model, self.optimizer, self.device)
        self.step, self.seconds = state["step"], state["seconds"]
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self.data_shift = state.get("data_shift", 0)
        self.history = [(loss, norm) for loss, norm in state.get("history", [])]
        if self.step > self.config.steps:
            raise ValueError(f"the run is at step {self.step} already; --steps {self.config.steps} is behind it")

    def _micro_batch(self, number: int) -> tuple[torch.Tensor, ...]:
        """What this process computes in the `number`-th of all its micro-batches; for a GPU in pinned memory."""
        parts = self.config.micro_batches
        step, part = divmod(number, parts)
        batch = self.sampler.batch(step, part * self.world.size + self.world.rank, parts * self.world.size)
        if self.device.type != "cuda":
            return batch
        with torch.cuda.device(self.device):  # of this thread too
            return tuple(tensor.pin_memory() for tensor in batch)

    def forward_backward(self, step: int) -> float:
        """Accumulate the gradient of a step's loss over its micro-batches; returns this process's part of the loss,
        of which the processes' mean is the loss."""
        total, parts = 0.0, self.config.micro_batches
        loss_of: Any = self.replica or self.model.loss
        for part in range(parts):
            index = part * self.world.size + self.world.rank
            batch = self.batches[step * parts + part]
            input_ids, labels, *documents = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            later = part < parts - 1 and self.replica is not None  # gradients travel once a step
            with self.replica.no_sync() if later and self.replica else contextlib.nullcontext():
                with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                    loss = loss_of(input_ids, labels, "mean", *documents) / parts
                    if isinstance(self.sampler, ChatSampler):  # of which not all parts have as many labels
                        loss = loss * self.sampler.weight(step, index, parts * self.world.size)
                loss.backward()
            total += float(loss.detach())
        return total

    @property
    def quantizer_strength(self) -> float:
        """How much of the quantizers the next step, and a validation before it, runs: 0 in the 16-bit warm start, then
        rising over the ramp to 1, the model that its checkpoint becomes."""
        if self.config.model.quantizer == "none":
            return 1.0
        behind = self.step - int(self.config.float_start * self.config.steps)
        ramp = int(self.config.ramp * self.config.steps)
        return 0.0 if behind < 0 else min(1.0, (behind + 1) / (ramp + 1))

    def _switch_quantizers(self) -> None:
        strength = self.quantizer_strength
        # A tensor, so that compiled layers are not compiled again at every step of the ramp.
        fading = torch.tensor(strength, device=self.device) if 0 < strength < 1 else None
        for _, layer in bit_linears(self.model):
            layer.product = training_product(
                layer.product, layer.weight, layer.quantizer, strength if fading is None else fading, int8=self.int8
            )
        if self.world.strategy == "fsdp":
            prepare_gathers(self.model, self.world, self.dtype)

    def train_step(self) -> tuple[float, float, float]:
        """One optimizer step. Returns loss, gradient norm and learning rate. A gradient that is not finite, or a spike,
        never touches the weights; raises Diverged where the configuration wants to stop there."""
        self._switch_quantizers()
        lr = self.optimizer.set_schedule(self.step, self.config.steps)
        loss = self._agree(self.forward_backward(self.step + self.data_shift))
        norm = clip_gradients(list(self.model.parameters()), self.config.optim.grad_clip)
        fault = self._fault(loss, norm)
        if fault:
            self._remedy(*fault)
            return loss, norm, lr
        self.optimizer.step()
        self.step += 1
        self.faults = 0
        self.history = [*self.history[1 - HISTORY :], (loss, norm)]
        return loss, norm, lr

    def _fault(self, loss: float, norm: float) -> tuple[str, str] | None:
        """What is wrong with a step, and the remedy that the configuration has for it."""
        config = self.config
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss} and the gradient norm {norm}", config.on_nan
        if config.on_spike == "off" or len(self.history) < HISTORY // 4:
            return None
        usual_loss, usual_norm = (statistics.median(column) for column in zip(*self.history, strict=True))
        if loss - usual_loss > math.log(config.spike_factor) or norm > config.spike_factor * usual_norm:
            return (
                f"the loss is {loss:.3f} and the gradient norm {norm:.3g}, usual are {usual_loss:.3f} and "
                f"{usual_norm:.3g}"
            ), config.on_spike
        return None

    def _remedy(self, what: str, remedy: str) -> None:
        """Skip a step or rewind. Raises Diverged where that is not wanted, or has not helped."""
        config, self.faults = self.config, self.faults + 1
        write(self.finish_save, must=False)
        saved = remedy == "rewind" and (self.folder / "checkpoints" / INDEX).exists()
        if remedy == "stop" or self.faults > MAX_FAULTS or (remedy == "rewind" and not saved):
            raise Diverged(
                f"step {self.step}: {what}"
                + (f", after {MAX_FAULTS} remedies in a row" if self.faults > MAX_FAULTS else "")
                + f". Checkpoints are untouched; go on from the last one (--resume {self.folder}), or begin anew if "
                f"there is none, with lower learning rates: --optim.lr {config.optim.lr / 2:g}"
                + (f" --optim.lr-rest {config.optim.lr_rest / 2:g}" if config.optim.lr_rest else "")
            )
        for parameter in self.model.parameters():
            parameter.grad = None
        say(f"warning: step {self.step}: {what}; {'rewinding' if saved else 'the update is skipped'}", sys.stderr)
        if not saved:
            self.step += 1
            return
        reached, faults, best = self.step + self.data_shift, self.faults, self.best_loss
        self.optimizer = Optimizer(self.model, config.optim)
        self._load(self._newest())
        self.data_shift, self.faults, self.best_loss = reached + 1 - self.step, faults, best

    def _agree(self, loss: float) -> float:
        """The loss over all processes; a signal that one of them got becomes everybody's."""
        if self.world.size == 1:
            return loss
        both = torch.tensor([loss, float(self.stop_signal or 0)], dtype=torch.float64, device=self.device)
        total, signum = self.world.sum(both).tolist()
        if signum and self.stop_signal is None:
            self.stop_signal = signal.SIGTERM
        return total / self.world.size

    def steps_for(self, minutes: float) -> int:
        """How many more steps fit, from timed steps that are undone again."""
        start_step = self.step
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        moments = {name: value.clone() for name, value in self.optimizer.state().items()}
        times = []
        for trial in range(7):
            start = time.perf_counter()
            self.train_step()
            if trial >= 2:  # compilation and first touches
                times.append(time.perf_counter() - start)
        self.step = start_step
        self.model.load_state_dict(weights)
        self.optimizer = Optimizer(self.model, self.config.optim)
        self.optimizer.load_state(moments)
        # The rest goes to validation, checkpoints and samples.
        return self.world.broadcast(max(1, int(minutes * 60 * 0.93 / statistics.median(times))))

    def validate(self, whole: bool) -> Evaluation:
        """Loss on the held-out documents or answers; the whole split or its first `eval_tokens`."""
        self._switch_quantizers()
        score: Any = evaluate_chats if isinstance(self.data, TokenizedChats) else evaluate_mixture
        return score(
            self.model, self.data, context=self.config.window, max_tokens=None if whole else self.config.eval_tokens,
            batch_size=self.config.batch_size // self.config.micro_batches, dtype=self.dtype,
        )  # fmt: skip

    @property
    def held_out_tokens(self) -> int:
        """Tokens that a validation of the whole split predicts."""
        if isinstance(self.data, TokenizedChats):
            return int(self.data.rows("val", self.config.window).counts.sum())
        return self.data.tokens("val") - len(self.data.corpora)  # the first token of a stream is no label

    def prompt_ids(self) -> list[int]:
        """Tokens of the sample prompt; of a held-out question, where conversations are learnt and none is given."""
        prompt, tokenizer = self.config.sample_prompt, self.tokenizer
        if isinstance(self.data, TokenizedChats) and self.template:
            rows = self.data.rows("val", self.config.window)
            return self.template.encode([{"role": "user", "content": prompt}]) if prompt else rows.prompt()
        return tokenizer.encode(prompt, bos=True) or [tokenizer.eos_id or 0]

    def sample(self, tokens: int = 60) -> str:
        """A short continuation of the sample prompt."""
        prompt, tokenizer = self.prompt_ids(), self.tokenizer
        self._switch_quantizers()
        with eager():
            new = generate(
                self.model, torch.tensor([prompt], device=self.device),
                max_new_tokens=limit_new_tokens(self.config.model, len(prompt), tokens),
                sampling=SamplingConfig(temperature=0.8, top_p=0.95), seed=0, eos_id=tokenizer.eos_ids,
                vocab_size=tokenizer.vocab_size,
            )  # fmt: skip
            return tokenizer.decode([*prompt, *(int(row[0]) for row in new)])

    def save(self, best: bool = False) -> None:
        """Write a checkpoint, or begin to. Raises OSError, with the earlier ones untouched."""
        sharded = self.world.strategy == "fsdp"
        if not (sharded or self.world.is_first):
            return
        save = functools.partial(
            save_checkpoint, self.folder,
            state={
                "step": self.step, "seconds": self.seconds,
                "best_loss": None if math.isinf(self.best_loss) else self.best_loss,
                "data": self.data.fingerprint, "data_shift": self.data_shift, "history": self.history,
            },
            config=dataclasses.asdict(self.config),
            tokenizer=self.tokenizer.files() | (self.template.files() if self.template else {}),
            best=best,
            keep=self.config.keep_last,
        )  # fmt: skip
        weights, moments = self.model.state_dict(), self.optimizer.state()
        if self.saver:
            self.saver.start(save, weights, moments)
        else:
            save(model=weights, optimizer_state=moments, world=self.world if sharded else None)

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written. Raises OSError where that failed."""
        if self.saver:
            self.saver.wait()

    def close(self) -> None:
        """End the threads."""
        self.batches.close()
        if self.saver:
            self.saver.close()

    def describe(self) -> str:
        """The run in a few lines."""
        config, model = self.config, self.model
        if isinstance(self.data, TokenizedChats):
            data = self.data.describe(config.window)
        else:
            shares = self.data.shares
            names = " + ".join(name if share == 1 else f"{share:.3g} {name}" for name, share in shares.items())
            data = (
                f"{names}: {self.data.tokens('train'):,} training and {self.data.tokens('val'):,} validation tokens, "
                f"{self.data.bytes_per_token('val'):.2f} bytes a token"
            )
        return (
            f"model     {model.num_parameters():,} parameters ({model.num_parameters(embeddings=False):,} without "
            f"embeddings), quantizer {config.model.quantizer}\n"
            f"data      {data}\n"
            f"compute   {self.device}, {str(self.dtype).removeprefix('torch.')}, "
            f"{'compiled' if self.compiled else 'not compiled'}, {torch.get_num_threads()} threads"
            + (f", {self.world.size} processes ({self.world.strategy})" if self.world.strategy != "none" else "")
            + f"\nmemory    {estimate(self.workload).summary()}"
        )

    @property
    def workload(self) -> Workload:
        """What the memory of a step depends on."""
        return workload(self.config, self.dtype, self.int8, self.compiled, self.world)


def train(config: TrainConfig, resume: bool = False) -> Run:
    """Run the loop to its end, or to the first SIGINT or SIGTERM, which saves and stops after the running step.

    Under torchrun every process runs it, and the first one prints and writes.
    """
    return_freed_blocks()
    world = start(config.parallel, local_device(pick_device(config.device)), config.timeout_minutes)
    try:
        with contextlib.nullcontext() if world.is_first else contextlib.redirect_stdout(None):
            return _train(config, resume, world)
    finally:
        stop()


def _train(config: TrainConfig, resume: bool, world: World) -> Run:
    run = Run(config, resume, world)
    with contextlib.closing(run):
        return _carry_out(run, world)


def _carry_out(run: Run, world: World) -> Run:
    print(run.describe())
    if warning := memory_warning(estimate(run.workload), run.workload, run.device, in_use=True):
        say(f"warning: {warning}", sys.stderr)
    if run.finished:
        print(f"{run.folder} is finished: {run.step} of {run.config.steps} steps; more with --steps or --minutes")
        return run
    if run.config.minutes:
        print("timing a few steps" + (" (the first one compiles)" if run.compiled else ""), flush=True)
        steps = run.step + run.steps_for(run.config.minutes)
        run.config = dataclasses.replace(run.config, steps=steps, minutes=None)
    config = run.config
    tokens_per_step = config.batch_size * config.window
    print(
        f"training  {config.steps:,} steps of {tokens_per_step:,} tokens = {config.steps * tokens_per_step:,} tokens "
        f"({', '.join(f'{n:.2f}' for n in run.sampler.epochs(config.steps).values())} epochs) to {run.folder}"
    )
    tracker: Tracker | None = None
    if world.is_first:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(run.folder / CONFIG, json.dumps(dataclasses.asdict(config), indent=1))
        tracker = Tracker(run.folder, dataclasses.asdict(config), config.wandb, resume_step=run.step)

    def request_stop(signum: int, frame: Any) -> None:
        run.stop_signal = signum
        signal.signal(signum, previous[signal.Signals(signum)])  # a second one ends the program at once

    previous = {s: signal.signal(s, request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    # Silent unless stderr is a terminal; the loop prints lines instead.
    bar = tqdm(
        total=config.steps, initial=run.step, unit="step", dynamic_ncols=True,
        disable=None if world.is_first else True,
    )  # fmt: skip
    try:
        loop(run, tracker, bar)
    finally:
        bar.close()
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        if tracker:
            tracker.close()
    if world.strategy == "fsdp" and run.step == config.steps:
        if world.is_first:  # what generate.py and the exports read
            for which in ("last", "best"):
                consolidate(folder_of(run.folder, which))
        world.barrier("the conversion of the last checkpoint")
    return run


@contextlib.contextmanager
def watchdog(minutes: float) -> Iterator[None]:
    """End the program, with the stack of every thread on stderr, if the block takes longer than this."""
    try:
        faulthandler.dump_traceback_later(minutes * 60, exit=True, file=sys.__stderr__ or 2)
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def loop(run: Run, tracker: Tracker | None, bar: tqdm) -> None:
    """Steps, with logging, validation, checkpoints and samples between them."""
    config, tokens_per_step = run.config, run.config.batch_size * run.config.window
    last_line, longest, longest_pause = time.perf_counter() - 1e9, 0.0, 0.0
    since, logged = time.perf_counter(), run.step  # of the last logged step, validation and samples left out
    while run.step < config.steps and run.stop_signal is None:
        start = time.perf_counter()
        before = run.step
        statistics_due = (run.step + 1) % config.eval_every == 0 or run.step + 1 == config.steps
        codes = weight_codes(run.model) if statistics_due else None
        with watchdog(config.timeout_minutes):
            loss, norm, lr = run.train_step()
        run.seconds += time.perf_counter() - start
        bar.update(run.step - before)
        if run.step != before + 1:  # rewound: what is logged again replaces what was
            since, logged = time.perf_counter(), run.step
            if tracker:
                tracker.rewind(run.step)
            continue
        longest = max(longest, time.perf_counter() - start)
        if codes is not None:
            weights = weight_statistics(run.model, codes, run.world)
            if tracker and weights:
                tracker.log(run.step, **weights)
        done = run.step == config.steps
        if (run.step % config.log_every == 0 or done) and math.isfinite(loss):
            rate = (run.step - logged) * tokens_per_step / (time.perf_counter() - since)
            since, logged = time.perf_counter(), run.step
            if tracker:
                tracker.log(
                    run.step, loss=loss, grad_norm=norm, lr=lr, tokens_per_second=round(rate), seconds=run.seconds
                )
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tok/s")
            if run.world.is_first and bar.disable and (done or time.perf_counter() - last_line > 10):
                last_line = time.perf_counter()
                eta = (config.steps - run.step) * tokens_per_step / rate
                clock = f"{int(eta // 60)}:{int(eta % 60):02d}"
                print(f"step {run.step:>6}/{config.steps}  loss {loss:.3f}  {rate:,.0f} tok/s  ETA {clock}")
        pause = time.perf_counter()
        if run.step % config.eval_every == 0 or done:
            validate_and_save(run, tracker)
        if config.sample_every and run.step % config.sample_every == 0 and not done:
            say("sample    " + " ".join(run.sample().split()))
        since += time.perf_counter() - pause
        longest_pause = max(longest_pause, time.perf_counter() - pause)
        if config.max_minutes and run.stop_signal is None:
            # Twice the longest step and pause (which saves), since the next ones may be longer.
            left = config.max_minutes * 60 - (time.perf_counter() - run.started) - 2 * (longest + longest_pause)
            run.stop_signal = run.world.broadcast(signal.SIGTERM if left < 0 else None)
    if run.step < config.steps:
        save_or_warn(run, best=False, must=True)
        if tracker:
            tracker.draw()
        print(f"stopped at step {run.step} of {config.steps}; go on with: python train.py --resume {run.folder}")


def validate_and_save(run: Run, tracker: Tracker | None) -> None:
    """Validate, write a checkpoint, and call it the best one if the loss over the same part of the split says so."""
    done = run.step == run.config.steps
    result = run.validate(whole=False)
    # A loss of the warm start or the ramp is not that of the quantized model which its checkpoint becomes.
    improved = run.quantizer_strength == 1 and result.loss < run.best_loss
    if improved:
        run.best_loss = result.loss
    whole = run.validate(whole=True) if done and result.tokens < run.held_out_tokens else None
    for prefix, part in (("val", result), ("whole_val", whole)):
        if part and tracker:
            tracker.log(
                run.step,
                **{
                    f"{prefix}_loss": part.loss,
                    f"{prefix}_perplexity": part.perplexity,
                    **({} if part.bits_per_byte is None else {f"{prefix}_bits_per_byte": part.bits_per_byte}),
                    **{f"{prefix}_loss/{name}": each.loss for name, each in part.corpora.items()},
                },
            )
            say(
                f"step {run.step:>6}/{run.config.steps}  {'whole ' if part is whole else ''}validation loss "
                f"{part.loss:.4f}  perplexity {part.perplexity:.2f}"
                + ("" if part.bits_per_byte is None else f"  bits/byte {part.bits_per_byte:.4f}")
                + "".join(f"  {name} {each.loss:.4f}" for name, each in part.corpora.items())
            )
    save_or_warn(run, best=improved, must=done)
    if tracker:
        tracker.draw()


def save_or_warn(run: Run, *, best: bool, must: bool) -> None:
    """Save; what fails in mid-run is a warning (the next save may succeed), at the end it is an error."""
    write(run.finish_save, must=False)  # of the checkpoint before
    write(functools.partial(run.save, best=best), must=must)
    if must:
        write(run.finish_save, must=True)


def write(action: Callable[[], None], *, must: bool) -> None:
    """Do what may find a full disk, which is a warning unless it must not happen."""
    try:
        action()
    except OSError as error:
        if must:
            raise
        say(f"warning: {error}; earlier checkpoints are intact and training goes on", file=sys.stderr)


def say(text: str, file: Any = None) -> None:
    """Print a line above the progress bar, from the process that prints."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(text, file=file)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    with contextlib.suppress(AttributeError):  # a pipe sees every line at once, and no character ends a run
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # type: ignore[union-attr]
    try:
        argv = sys.argv[1:] if argv is None else argv
        config, resume = parse(argv)
        processes = estimate_wanted(argv)
        if processes is not None:
            print(estimate_run(config, processes))
            return 0
        run = train(config, resume)
    except KeyboardInterrupt:
        print("interrupted before the first step, or twice", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, Diverged, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if run.stop_signal is not None and run.step < run.config.steps:
        return 128 + run.stop_signal
    print(f"{run.seconds / 60:.1f} minutes of training steps; write with it: python generate.py {run.folder}")
    return 0


if __name__ == "__main__":
    exit_process(main())
