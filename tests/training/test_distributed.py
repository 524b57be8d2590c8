"""Several processes on gloo: the loss curve of one process, checkpoints that change their number, ranks that hang."""

import contextlib
import dataclasses
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import train as trainer
from bitnet.data.feed import open_feed
from bitnet.kernels import reference
from bitnet.model import BitLinear
from bitnet.storage.folders import resolve
from bitnet.storage.source import open_source
from bitnet.training import config as recipes
from bitnet.training.compiling import compile_failure
from bitnet.training.processes import World, _own_part, start
from bitnet.training.reporter import read_metrics
from bitnet.training.sharding import GatheredCodes, LatentWeight, shard_like
from bitnet.training.shards import read_shards, read_whole, write_shards
from tests.builders import SMALL, configuration, losses, tensors, torchrun
from tests.forked import Forked
from tests.training.distributed_worker import gradients, muon_steps

LONG = bool(os.environ.get("BITNET_LONG"))  # also what takes minutes


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A corpus of twenty words in any order."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne") for b in ("ra", "su", "to", "vi", "we")]
    folder = tmp_path_factory.mktemp("corpus") / "words"
    folder.mkdir()
    for part in range(40):
        picks = torch.randint(len(vocabulary), (300,), generator=generator).tolist()
        (folder / f"{part:02}.txt").write_text(" ".join(vocabulary[i] for i in picks) + "\n")
    return folder


def curve(tmp_path: Path, words: Path, **changes) -> recipes.TrainConfig:
    """A run long enough that curves could part."""
    defaults = {"optim": recipes.OptimConfig(lr=5e-4, warmup_steps=2), "steps": 30, "batch_size": 8, "eval_every": 30}
    return configuration(tmp_path, words, **{**defaults, **changes})


def nudged(config: recipes.TrainConfig, towards: float) -> recipes.TrainConfig:
    """A run whose first weights are each moved to the next float towards infinity or minus infinity."""
    run = trainer.prepare(config)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.copy_(parameter.nextafter(torch.full_like(parameter, towards)))
    with contextlib.closing(run.batches):
        trainer.carry_out(run, time.perf_counter())
    return run.config


def difference(found: recipes.TrainConfig, expected: recipes.TrainConfig) -> torch.Tensor:
    """Relative difference of two curves, step by step."""
    return (losses(found) / losses(expected) - 1).abs()


def test_two_and_four_processes_follow_the_curve_of_one(tmp_path, words):
    base = curve(tmp_path, words)
    twin = dataclasses.replace(base, model=base.model.replace(quantizer="none"))
    muon = recipes.OptimConfig(optimizer="muon", lr=5e-4, warmup_steps=2)
    fading = dataclasses.replace(base, float_start=0.2, ramp=0.2, steps=20, optim=muon)

    def named(config: recipes.TrainConfig, name: str, **changes) -> recipes.TrainConfig:
        return dataclasses.replace(config, out=str(tmp_path / name), **changes)

    one = {
        name: trainer.train(named(config, f"one-{name}")).config
        for name, config in (("ternary", base), ("float", twin), ("fading", fading))
    }
    # What one process makes of another order of its sums, and of other last bits of its weights: a code that flips
    # stays flipped, and no more can be asked of several processes.
    parts = {n: trainer.train(named(base, f"parts-{n}", micro_batches=n)).config for n in (2, 4)}
    others = [*parts.values(), *(nudged(named(base, f"nudged{sign}"), float(sign)) for sign in ("inf", "-inf"))]
    noise = max(float(difference(other, one["ternary"]).max()) for other in others)
    assert 0 < noise < 5e-3

    two = [
        named(base, "ddp", parallel="ddp"),
        named(base, "fsdp", parallel="fsdp", sample_every=20),
        named(twin, "float", parallel="fsdp"),
        named(fading, "fading", parallel="fsdp"),
    ]
    result = torchrun(2, tmp_path, [{"config": dataclasses.asdict(c)} for c in two])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("training  30 steps") == 3  # the first process alone prints

    # Two processes' checkpoint, resumed by four (sharded), by one, and by one from the converted form.
    half = dataclasses.replace(two[1], out=str(tmp_path / "half"), steps=36)
    for copy in (half.out, str(tmp_path / "alone")):
        shutil.copytree(two[1].out, copy)
    four = [named(base, "fsdp-4", parallel="fsdp")]
    if LONG:
        four += [
            named(base, "ddp-4", parallel="ddp", micro_batches=2),
            named(twin, "float-4", parallel="ddp"),
        ]
    jobs = [{"config": dataclasses.asdict(c)} for c in four] + [{"config": dataclasses.asdict(half), "resume": True}]
    result = torchrun(4, tmp_path, jobs)
    assert result.returncode == 0, result.stderr

    # Sums of two parts are the same in either order, so here not a bit may differ.
    assert torch.equal(losses(two[0]), losses(parts[2]))
    for config in (two[0], two[1], *four[:2]):
        error = difference(config, one["ternary"])
        assert float(error[:5].max()) < 1e-5, error
        assert float(error.max()) < 4 * noise, (error, noise)
        assert float(losses(config)[-1]) < 0.97 * float(losses(config)[0])
    # Without codes nothing flips: the order of float32 sums is all there is.
    for config in (two[2], *four[2:]):
        assert float(difference(config, one["float"]).max()) < 16 * torch.finfo(torch.float32).eps
    assert float(difference(two[3], one["fading"]).max()) < 5e-3

    # The safetensors form of a sharded run is the model of one process.
    whole = open_source(resolve(two[1].out)).model().state_dict()
    for name, value in open_source(resolve(one["ternary"].out)).model().state_dict().items():
        assert whole[name].shape == value.shape
        assert float((whole[name] - value).norm() / value.norm()) < 0.05, name

    alone = trainer.train(
        dataclasses.replace(two[1], out=str(tmp_path / "alone"), steps=36, parallel="auto"), resume=True
    )
    ends = [losses(dataclasses.replace(alone.config, out=out))[30:] for out in (half.out, alone.config.out)]
    assert float((ends[0] / ends[1] - 1).abs().max()) < 1e-3, ends


@pytest.mark.parametrize("processes", [2, 3])
def test_muon_of_shards_has_the_numbers_of_one_process(tmp_path, words, processes):
    base = curve(tmp_path, words, optim=recipes.OptimConfig(optimizer="muon", lr=1e-2, warmup_steps=2))
    config = dataclasses.replace(base, model=base.model.replace(intermediate_size=91))  # which they do not divide
    path = tmp_path / "weights.pt"
    result = torchrun(processes, tmp_path, [{"config": dataclasses.asdict(config), "muon": str(path)}])
    assert result.returncode == 0, result.stderr
    found, expected = torch.load(path, weights_only=True), muon_steps(config, World())
    assert found.keys() == expected.keys()
    matrices = [name for name in expected if "_proj.weight" in name]
    assert len(matrices) == 2 * 7 * config.model.num_hidden_layers
    for name in matrices:  # the rest is AdamW's
        assert torch.equal(found[name], expected[name]), name


def test_gradients_in_bfloat16_are_the_rounded_sums_of_rounded_parts(tmp_path, words):
    base = curve(tmp_path, words, steps=1)
    base = dataclasses.replace(base, model=base.model.replace(quantizer="none"))  # whose scale knows no processes
    halves = dataclasses.replace(base, micro_batches=2)
    alone = trainer.prepare(halves)
    for parameter in alone.model.parameters():
        parameter.register_hook(lambda gradient: gradient.bfloat16().float())
    expected = {name: gradient.bfloat16().float() for name, gradient in gradients(alone).items()}
    alone.batches.close()
    path, sharded = tmp_path / "gradients.pt", dataclasses.replace(base, parallel="fsdp", reduce_dtype="bfloat16")
    result = torchrun(2, tmp_path, [{"config": dataclasses.asdict(sharded), "gradients": str(path)}])
    assert result.returncode == 0, result.stderr
    found = torch.load(path, weights_only=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any(), name
        assert torch.equal(found[name], value), name
    with pytest.raises(ValueError, match=r"reduce_dtype bfloat16 is of gradients of shards .*; leave it out"):
        dataclasses.replace(base, reduce_dtype="bfloat16")


@pytest.mark.skipif(not LONG, reason="set BITNET_LONG=1: two processes compile the model three times each")
def test_compiled_shards_follow_the_curve_of_eager_ones(tmp_path, words):
    if reason := compile_failure(torch.device("cpu")):
        pytest.skip(reason)
    base = curve(tmp_path, words, parallel="fsdp", steps=20, float_start=0.3, ramp=0.3)
    eager, compiled = (dataclasses.replace(base, out=str(tmp_path / mode), compile=mode) for mode in ("off", "on"))
    result = torchrun(2, tmp_path, [{"config": dataclasses.asdict(config)} for config in (eager, compiled)])
    assert result.returncode == 0, result.stderr
    assert ", compiled," in result.stdout
    error = difference(compiled, eager)
    assert float(error[:12].max()) < 16 * torch.finfo(torch.float32).eps, error  # in 16 bit, and while codes fade in
    assert float(error.max()) < 5e-3, error


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"] if LONG else ["fsdp"])
def test_torchrun_restarts_a_run_of_which_one_process_was_killed(tmp_path, words, strategy):
    arguments = [
        "train", *SMALL, "--parallel", strategy, "--steps", "24",
        "--data.corpus", str(words), "--eval-every", "10", "--eval-tokens", "64", "--batch-size", "2",
        "--log-every", "1", "--dtype", "float32", "--resume", "auto", "--out",
    ]  # fmt: skip
    straight = Forked(tmp_path, processes=2, command=[*arguments, "straight"]).wait()
    assert straight.returncode == 0, straight.stderr
    broken = Forked(tmp_path, restarts=1, command=[*arguments, "broken"]).wait()
    assert broken.returncode == 0, broken.stderr
    assert broken.stdout.count("training  24 steps") == 2  # started again
    assert broken.stdout.count("step      1/24") == 1  # and gone on with
    assert resolve(tmp_path / "broken").name == "step-00000024"
    expected, found = tensors(tmp_path / "straight"), tensors(tmp_path / "broken")
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # two processes add the same two parts whenever they are started
        assert torch.equal(value, found[name]), name
    rows = [
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("straight", "broken")
    ]
    assert len(rows[0]) == 24
    assert rows[0] == rows[1]


def test_each_start_has_a_part_of_the_store_of_its_own():
    store = torch.distributed.HashStore()

    def begin(ranks: range) -> list:
        with ThreadPoolExecutor(len(ranks)) as pool:
            return list(pool.map(lambda rank: _own_part(store, rank, 3, 5), ranks))

    parts = []
    for value in ("first", "second"):  # the second one finds what the first one has left
        stores = begin(range(3))
        assert not stores[0].check(["address"])
        stores[0].set("address", value)
        assert [other.get("address") for other in stores] == [value.encode()] * 3
        parts.append(stores[0])
    assert parts[0].get("address") == b"first"
    with pytest.raises(RuntimeError, match=r"process 0 waited in vain for others at the start: \[1, 2\]"):
        _own_part(store, 0, 3, 0.1)
    with pytest.raises(RuntimeError, match=r"process 2 waited in vain for others at the start: \[0\]"):
        _own_part(store, 2, 3, 0.1)


def test_a_hung_process_ends_the_run(tmp_path, words):
    config = curve(tmp_path, words, out=str(tmp_path / "run"), steps=5, parallel="ddp", timeout_minutes=4 / 60)
    open_feed(config.data, None, None, window=config.window, vocab_size=config.model.vocab_size)
    result = torchrun(2, tmp_path, [{"config": dataclasses.asdict(config), "hang": 1}])
    assert result.returncode != 0
    # The last where the machine is so slow that the start alone takes these seconds.
    assert re.search("[Tt]imeout|[Tt]imed out|waited in vain for others at", result.stderr), result.stderr


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_a_signal_that_one_process_got_stops_all_at_one_step(tmp_path, words):
    """Its own signal alone would have it leave between two steps, and the others wait in the next one."""
    base = curve(tmp_path, words, steps=4, eval_every=4, eval_tokens=1, timeout_minutes=10 / 60)
    open_feed(base.data, None, None, window=base.window, vocab_size=base.model.vocab_size)
    at = {"ddp": 2, "fsdp": 2, "ddp-last": 4, "fsdp-last": 4}
    runs = {name: dataclasses.replace(base, out=str(tmp_path / name), parallel=name.partition("-")[0]) for name in at}
    jobs = [{"config": dataclasses.asdict(config), "signal": at[name]} for name, config in runs.items()]
    result = torchrun(2, tmp_path, jobs)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("stopped at step 3 of 4") == 2  # the one in which the others were told
    assert result.stdout.count("stopped in the validation on everything") == 2
    for name, config in runs.items():
        rows = read_metrics(Path(config.out) / "metrics.jsonl")
        assert [row["step"] for row in rows if "val_loss" in row] == [4] * (at[name] == 4)
        assert not any("whole_val_loss" in row for row in rows)
        assert (Path(config.out) / "checkpoints" / f"step-{3 if at[name] == 2 else 4:08d}").is_dir()


def test_one_process_needs_no_group():
    world = start("auto", torch.device("cpu"), 1)
    assert world == World()
    values = torch.arange(3.0)
    assert torch.equal(world.sum(values.clone()), values)
    assert world.broadcast("x") == "x"
    world.barrier("nothing")
    assert torch.equal(shard_like(torch.zeros(3), values), values)
    with pytest.raises(ValueError, match="torchrun"):
        start("fsdp", torch.device("cpu"), 1)


def test_processes_that_cannot_share_a_batch_are_refused(tmp_path, words):
    config = curve(tmp_path, words, batch_size=8, micro_batches=2)
    with pytest.raises(ValueError, match=r"batch_size 8 cannot be shared by 3 processes.*multiple of 6"):
        trainer.prepare(config, world=World(0, 3, "ddp"))


def test_damaged_shards_are_explained(tmp_path):
    tensors = {"model.a": torch.arange(6.0).view(2, 3), "optimizer.a.step": torch.tensor(3.0)}
    write_shards(tmp_path / "shards", tensors)
    assert torch.equal(read_whole(tmp_path / "shards", "model.")["a"], tensors["model.a"])
    assert float(read_whole(tmp_path / "shards", "optimizer.")["a.step"]) == 3
    with pytest.raises(ValueError, match=r"cannot be read.*another checkpoint"):
        read_shards(tmp_path / "shards", {"model.b": torch.zeros(2)})
    (tmp_path / "shards" / "index.json").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot be read.*another checkpoint"):
        read_whole(tmp_path / "shards", "model.")


@pytest.mark.parametrize("quantizer", ["ternary-g64", "ternary-g128", "int8", "int4"])
def test_rows_travel_as_codes_with_scales_of_their_own(quantizer: str) -> None:
    """What two processes gather of a weight is what one would compute."""

    class Mesh:
        def size(self) -> int:
            return 2

    weight, layer = torch.randn(8, 200), BitLinear(200, 8, False, quantizer=quantizer)
    layer.product = GatheredCodes()
    parts = [LatentWeight(part) for part in weight.split(4)]
    sent = [part.fsdp_pre_all_gather(Mesh(), torch.Size((8, 200)), (200, 1), layer, None) for part in parts]
    gathered = tuple(torch.cat(tensors) for tensors in zip(*(each[0] for each in sent), strict=True))
    whole, _ = parts[0].fsdp_post_all_gather(gathered, sent[0][1], torch.float32)
    assert torch.equal(whole, reference.fake_quantize_weight(weight, quantizer))
