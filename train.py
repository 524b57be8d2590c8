"""Train a BitNet b1.58 language model: config, processes, data, model, optimizer, loop, from top to bottom.

    python train.py --preset demo --minutes 5            a small model on public-domain speeches, no download
    python train.py --preset small --data.corpus my.txt  your own text
    python train.py --resume runs/demo                   go on where a run was stopped
    python train.py --like runs/demo --model.quantizer none --optim.lr 5e-3 --out runs/demo-float     its float twin
    python train.py --like runs/demo --init runs/demo-float --ramp 0.5 --out runs/demo-converted      float to ternary
    python train.py --preset convert --init MODEL --teacher MODEL --out runs/mine        a float model becomes ternary
    python train.py --like runs/demo --teacher runs/demo-float --out runs/demo-taught    the float twin teaches it
    python train.py --preset lora --init runs/demo --lora 8 --data.corpus my.txt      adapters on a frozen, packed model
    python train.py --preset chat --init runs/demo --data.chat chats.jsonl            conversations: answers count
    torchrun --nproc-per-node 4 train.py --preset small --parallel fsdp                               several processes

Every option and preset is in bitnet/training/config.py, and everything about a run in its folder (see
bitnet/training/checkpoint.py). Batches are a pure function of seed and step, and nothing else in a step is random, so a
resumed run repeats the uninterrupted one bit for bit; on another number of processes (bitnet/training/processes.py) it
sees the same data and follows the same curve, up to the order of float sums.
"""

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bitnet.__main__ import execute
from bitnet.console import error, only_for_looking, say, warn
from bitnet.data.feed import open_feed
from bitnet.files import write_atomic
from bitnet.inference.generation import limit_new_tokens
from bitnet.machine import MAPPED_BLOCK_COMPILED, pick_device, pick_dtype, return_freed_blocks
from bitnet.model import BitNetForCausalLM
from bitnet.storage.json_files import load_record
from bitnet.storage.source import open_source
from bitnet.tokenizer import find_chat_template, load_tokenizer
from bitnet.training import checkpoint
from bitnet.training.adapters import Base, write_adapter
from bitnet.training.arguments import Arguments
from bitnet.training.arguments import parse as parse  # by which `execute` reads the command line
from bitnet.training.checkpoint import Progress
from bitnet.training.compiling import compile_model
from bitnet.training.config import TrainConfig
from bitnet.training.estimate import estimate_run, memory_warning, preset_table
from bitnet.training.faults import Diverged, watchdog
from bitnet.training.layerwise import LayerwiseStart, check_start
from bitnet.training.memory import estimate
from bitnet.training.optimizer import Optimizer
from bitnet.training.processes import World, exit_process, local_device, start, stop
from bitnet.training.reporter import Reporter
from bitnet.training.saver import Saver
from bitnet.training.sharding import shard, shard_like
from bitnet.training.step import Trainer
from bitnet.training.teacher import Teacher
from bitnet.training.weight_stats import weight_codes, weight_statistics


def train(config: TrainConfig, resume: bool = False) -> Trainer:
    """Run to the last step, or to the first SIGINT or SIGTERM, which saves and stops behind the running step, or behind
    the last one ends the validation on everything.

    Under torchrun every process calls it, and the first one prints and writes. Raises ValueError for a configuration
    that cannot run, OSError for a disk that is full at the end, Diverged for a loss that is no number any more.
    """
    started = time.perf_counter()
    return_freed_blocks()
    world = start(config.parallel, local_device(pick_device(config.device)), config.timeout_minutes)
    try:
        with (
            contextlib.nullcontext() if world.is_first else contextlib.redirect_stdout(None),
            checkpoint.alone_in(Path(config.out), world),
        ):
            trainer = prepare(config, resume, world)
            if trainer.workload.stays_in_heap:
                return_freed_blocks(MAPPED_BLOCK_COMPILED)
            with contextlib.closing(trainer.batches):
                carry_out(trainer, started)
            return trainer
    finally:
        stop()


def prepare(config: TrainConfig, resume: bool = False, world: World | None = None) -> Trainer:
    """Everything in front of the first step: nothing is written yet but tokenized data. Raises as `train` does."""
    # The run: a new one, or the newest checkpoint of one that has begun.
    world = world or World()
    config.check_processes(world.size)
    folder = Path(config.out)
    begun = checkpoint.has_checkpoint(folder)
    # A layer-wise start that was stopped has layers, and no checkpoint yet.
    saved = checkpoint.newest_checkpoint(folder, world) if resume and (begun or not config.layer_steps) else None
    if saved and not config.lora:
        checkpoint.check_model(saved, config.model)
    if not resume and begun:
        raise ValueError(
            f"{folder} already holds a run; continue it with --resume {folder}, choose another --out, "
            "or delete the folder"
        )

    if not begun and (folder / checkpoint.CONFIG).exists():
        try:
            load_record(folder / checkpoint.CONFIG, TrainConfig)
        except ValueError as error:
            raise ValueError(
                f"{folder} has a {checkpoint.CONFIG} that no run has written ({error}), and it would be overwritten; "
                "choose another --out"
            ) from error

    if config.pace and config.pace[-1][1] != config.steps:  # other steps were asked for, and a schedule over them
        config = dataclasses.replace(config, pace=())

    # The machine.
    if config.threads:
        torch.set_num_threads(config.threads)
    device = local_device(pick_device(config.device))
    dtype = pick_dtype(config.dtype, device)
    config.multiplies_int8(device, dtype, world.strategy)  # refuses an int8 that this device cannot do

    # The model that training starts from, if there is one, gives shape, weights, tokenizer and chat template.
    tokenizer, template, weights = None, None, None
    base = Base.open(config, saved, world) if config.lora else None
    if base:
        config = dataclasses.replace(config, model=base.model.config)
    if saved:
        tokenizer = load_tokenizer(saved, own=True)
        template = find_chat_template(saved, tokenizer)
    elif base:
        tokenizer, template = base.source.tokenizer, base.source.chat_template
    elif config.init:
        source = open_source(config.init)
        tokenizer, template, given = source.tokenizer, source.chat_template, source.latent(config.model.quantizer)
        check_start(config, given.config, world)
        weights = given.state_dict()
        config = dataclasses.replace(config, model=given.config.replace(quantizer=config.model.quantizer))
    elif config.layer_steps:
        raise ValueError(f"a layer-wise start (layer_steps {config.layer_steps}) begins with --init, a float model")
    elif config.teacher and not config.data.tokenizer:
        tokenizer = open_source(config.teacher).tokenizer
    config.check_window()

    # The feed: texts or conversations in tokens. The first process makes what the others find.
    with world.first_alone("the preparation of the data"):
        feed = open_feed(
            config.data, tokenizer, template, window=config.window, vocab_size=config.model.vocab_size,
            batch_size=config.batch_size, seed=config.seed,
        )  # fmt: skip
    config.check_graphs(device, world.strategy, feed.has_borders)
    config = config.absolute()  # whoever resumes may stand in another folder
    if not saved and weights is None and not base:  # a tokenizer that was given or trained decides on the vocabulary
        config = dataclasses.replace(config, model=config.model.replace(vocab_size=feed.tokenizer.vocab_size))
    limit_new_tokens(config.model, len(feed.prompt(config.sample_prompt)), 1)  # refuses a prompt that is too long

    # The model to learn from, which each process has whole.
    teacher = Teacher.open(config, feed, device, dtype) if config.teacher else None
    if teacher:
        teacher.model.document_ids = feed.document_ids

    # The model. Every process makes the same one, and of a sharded one keeps its part.
    torch.manual_seed(config.seed)
    with torch.device(device):
        model = base.with_adapters(device) if base else BitNetForCausalLM(config.model)
    model.model.recompute, model.loss_chunk = config.recompute, config.loss_chunk
    model.document_ids = feed.document_ids
    if world.strategy == "fsdp":
        shard(model, device, config.gradient_dtype)

    # The optimizer, with moments for what this process has of the model.
    optimizer = Optimizer(model, config.optim)

    # Weights, moments and progress from the checkpoint, or weights from the other model.
    progress = Progress()
    if saved:
        progress = checkpoint.restore(
            saved, config, feed.fingerprint, teacher.fingerprint if teacher else None, model, optimizer, device
        )
    elif weights:
        own = model.state_dict()
        model.load_state_dict({name: shard_like(own[name], value) for name, value in weights.items()})

    # The step, compiled unless there is none left.
    finished = progress.step == config.steps and not config.minutes
    compiled = not finished and not base and compile_model(model, config.compile)
    if compiled and teacher:
        compile_model(teacher.model, config.compile)
    return Trainer(
        config, world, device, dtype, feed, model, optimizer, progress, teacher, compiled=compiled,
        files=base.files() if base else None,
    )  # fmt: skip


def carry_out(trainer: Trainer, started: float) -> None:
    """Describe the run, and train to its end. `started` is the `time.perf_counter()` that `max_minutes` count from."""
    config, world = trainer.config, trainer.world
    print(trainer.describe())
    work = trainer.workload
    warning = memory_warning(estimate(work), work, trainer.device, in_use=True)
    if warning and world.is_first:
        say(f"warning: {warning}", sys.stderr)
    if trainer.progress.step == config.steps and not config.minutes:
        finish(trainer)  # where its end was interrupted behind the last checkpoint
        print(f"{config.out} is finished: {config.steps} of {config.steps} steps; more with --steps or --minutes")
        return

    # A conversion begins layer by layer.
    if config.layer_steps and not checkpoint.has_checkpoint(trainer.folder) and not start_layers(trainer, started):
        return

    # Minutes become steps.
    if config.minutes:
        print("timing a few steps" + (" (the first one compiles)" if trainer.compiled else ""), flush=True)
        spent = trainer.progress.seconds / 60 if not trainer.progress.step else 0.0  # on the layers
        config = trainer.config = trainer.plan(config.minutes, spent)
    epochs = ", ".join(f"{n:.2f}" for n in trainer.feed.epochs(config.steps).values())
    print(
        f"training  {config.steps:,} steps of {config.tokens_per_step:,} tokens = "
        f"{config.steps * config.tokens_per_step:,} tokens ({epochs} epochs) to {config.out}"
    )

    # From here on the run is on disk.
    if world.is_first:
        if moved := _moved_switch(trainer):
            warn(moved)
        trainer.folder.mkdir(parents=True, exist_ok=True)
        write_config(trainer)
    with (
        contextlib.closing(Reporter(config, step=trainer.progress.step, silent=not world.is_first)) as reporter,
        contextlib.closing(Saver(trainer)) as saver,
        stop_on_signals(trainer),
    ):
        loop(trainer, reporter, saver, started)


def finish(trainer: Trainer) -> None:
    """What a run leaves beside its checkpoints, once it has the last one."""
    if trainer.config.lora:
        print(f"adapters  of the best checkpoint are in {write_adapter(trainer.folder)}")
    # Of a sharded run what generate.py and the exports read.
    checkpoint.consolidate_run(trainer.folder, trainer.world)


def start_layers(trainer: Trainer, started: float) -> bool:
    """The layer-wise start, a validation, and a checkpoint before the first step; False where it was stopped, and is
    gone on with."""
    config = trainer.config
    trainer.folder.mkdir(parents=True, exist_ok=True)
    write_config(trainer)
    start = LayerwiseStart(trainer)

    def stop(longest: float) -> bool:
        if config.max_minutes and config.max_minutes * 60 < time.perf_counter() - started + 2 * longest:
            trainer.stop_signal = signal.SIGTERM
        return trainer.stop_signal is not None

    with stop_on_signals(trainer), contextlib.closing(Saver(trainer)) as saver:
        if not start.run(say, stop):
            print(
                f"stopped in the layer-wise start, behind layer {len(start.found.errors)} of "
                f"{config.model.num_hidden_layers}; go on with: python train.py --resume {config.out}"
            )
            return False
        result = trainer.validate(whole=False)
        say(f"layers    validation loss {result.loss:.4f}  perplexity {result.perplexity:.2f}")
        trainer.progress.seconds = start.found.seconds
        trainer.is_best(result)
        saver.save(best=True, must=True)
        start.remove()
    return True


def write_config(trainer: Trainer) -> None:
    """The run's config.json, from which it is resumed."""
    write_atomic(trainer.folder / checkpoint.CONFIG, json.dumps(dataclasses.asdict(trainer.config), indent=1))


def _moved_switch(trainer: Trainer) -> str | None:
    """What to say where a run that goes on becomes quantized at another step than was planned."""
    path = trainer.folder / checkpoint.CONFIG
    if not trainer.progress.step or not path.exists():
        return None
    return trainer.config.moved_switch(load_record(path, TrainConfig), trainer.progress.step)


def loop(trainer: Trainer, reporter: Reporter, saver: Saver, started: float) -> None:
    """Steps, with statistics, validation, checkpoints and samples between them."""
    config, world = trainer.config, trainer.world
    longest_step, longest_pause = 0.0, 0.0
    while trainer.progress.step < config.steps and trainer.stop_signal is None:
        # How many steps there are to be, by the clock.
        if trainer.clock:
            config = keep_pace(trainer, reporter)

        # One step. A bad one is skipped, or the run goes back to a checkpoint.
        start, before = time.perf_counter(), trainer.progress.step
        due = (before + 1) % config.eval_every == 0 or before + 1 == config.steps
        codes = weight_codes(trainer.model) if due else None
        with watchdog(config.timeout_minutes):
            result = trainer.step()
            if result.fault:
                saver.wait()  # the checkpoint that is being written may be the one to go back to
                trainer.recover(result.fault, reporter.say)
        trainer.progress.seconds += time.perf_counter() - start
        step = trainer.progress.step
        if step != before + 1:
            reporter.rewind(step)
            continue
        longest_step = max(longest_step, time.perf_counter() - start)

        # What it did to the weights, and to the loss.
        if codes is not None and (statistics := weight_statistics(trainer.model, codes, world)):
            reporter.log(step, **statistics)
        reporter.step(step, result, trainer.progress.seconds)

        # Now and then a validation, a checkpoint, a sample.
        done = step == config.steps
        pause = time.perf_counter()
        with reporter.paused():
            if step % config.eval_every == 0 or done:
                everything = (None,) if done and trainer.validates_whole else ()
                results = trainer.evaluations(config.eval_tokens, *everything)
                part = next(results)
                reporter.validation(step, part)
                saver.save(best=trainer.is_best(part), must=done)
                if done:
                    finish(trainer)
                # On everything once all is written: it may take long, and a signal ends it.
                whole = part
                for whole in results:
                    if whole.tokens > part.tokens:
                        reporter.validation(step, whole, whole=True)
                trainer.cut = bool(everything) and whole is part
                reporter.draw()
            # Generation runs in inference mode, in which FSDP cannot gather a sharded layer.
            if config.sample_every and step % config.sample_every == 0 and not done and world.strategy != "fsdp":
                with only_for_looking("the sample"):
                    reporter.say("sample    " + " ".join(trainer.sample().split()))
        pause = time.perf_counter() - pause
        longest_pause = max(longest_pause, pause)
        if trainer.clock and step % config.eval_every == 0:
            trainer.clock.pause(pause)

        # No time left: twice the longest step and pause, since the next ones may be longer.
        if config.max_minutes and trainer.stop_signal is None:
            left = config.max_minutes * 60 - (time.perf_counter() - started) - 2 * (longest_step + longest_pause)
            trainer.stop_signal = world.broadcast(signal.SIGTERM if left < 0 else None)

    if trainer.cut:
        print(f"stopped in the validation on everything; all is written, and its loss is: bitnet evaluate {config.out}")
    if trainer.progress.step < config.steps:
        saver.save(best=False, must=True)
        reporter.draw()
        print(
            f"stopped at step {trainer.progress.step} of {config.steps}; go on with: "
            f"python train.py --resume {config.out}"
        )


def keep_pace(trainer: Trainer, reporter: Reporter) -> TrainConfig:
    """Change the number of steps where the run would end too late or too early; returns the configuration."""
    config, step, clock = trainer.config, trainer.progress.step, trainer.clock
    assert clock is not None
    total = trainer.world.broadcast(clock.decide(step, config.steps, config.eval_every, time.perf_counter()))
    if total is not None:
        reporter.say(f"step {step:>6}/{config.steps}  {total:,} steps in all will end in time")
        trainer.config = config.paced(step, total)
        reporter.follow(trainer.config)
        if trainer.world.is_first:
            write_config(trainer)
    return trainer.config


@contextlib.contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM inside the block end the run behind its running step, or in its last validation,
    and a second one the program at once."""

    def request_stop(signum: int, frame: Any) -> None:
        trainer.request_stop(signum)
        signal.signal(signum, previous[signal.Signals(signum)])

    previous = {s: signal.signal(s, request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def run(arguments: Arguments) -> int:
    """What a command line asks for; returns the exit code."""
    config = arguments.config
    if arguments.presets:
        print(preset_table())
        return 0
    if arguments.estimate is not None:
        print(estimate_run(config, arguments.estimate))
        return 0
    try:
        trainer = train(config, arguments.resume)
    except KeyboardInterrupt:
        say("interrupted before the first step, or twice", sys.stderr)
        raise
    except Diverged as diverged:
        error(diverged)
        return 1
    if trainer.stop_signal is not None and (trainer.cut or trainer.progress.step < trainer.config.steps):
        return 128 + trainer.stop_signal
    made, base = trainer.config.out, trainer.config.init
    model = f"{base} --lora {made}" if trainer.config.lora else made
    print(f"{trainer.progress.seconds / 60:.1f} minutes of training steps; write with it: python generate.py {model}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return execute(sys.modules[__name__], "train.py", arguments)


if __name__ == "__main__":
    exit_process(main())
