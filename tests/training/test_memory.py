"""The memory estimate against what autograd keeps and a process that trains; sizes that only fit on meta."""

import dataclasses
import itertools
import re
import sys
from functools import partial
from typing import Any

import pytest
import torch

import train as trainer
from benchmarks import train_memory
from bitnet import machine
from bitnet.data.mixture import document_ids
from bitnet.kernels import Int8Product
from bitnet.machine import return_freed_blocks
from bitnet.model import PRESETS, BitNetForCausalLM, ModelConfig, bit_linears
from bitnet.training import estimate as estimate_module
from bitnet.training.estimate import disk_bytes, flops_per_token, memory_warning, product_seconds
from bitnet.training.memory import estimate, meta_model, projection_parameters, saved_bytes
from bitnet.training.optimizer import OptimConfig, Optimizer
from bitnet.training.saved import storages_saved
from bitnet.training.teacher import Teacher
from bitnet.training.workload import Workload
from tests.builders import save_run, tiny_model

SHAPES = {
    "grouped": {"num_key_value_heads": 2, "intermediate_size": 80},
    "relu2": {"num_key_value_heads": 4, "hidden_act": "relu2", "head_dim": 24, "intermediate_size": 56},
    "plain": {"num_key_value_heads": 4, "sub_norm": False, "tie_word_embeddings": False, "intermediate_size": 96},
    "heads": {"num_key_value_heads": 2, "sub_norm": False, "qk_norm": True, "intermediate_size": 80},
    "biases": {"num_key_value_heads": 2, "sub_norm": False, "qkv_bias": True, "intermediate_size": 80},
}


def workload(shape: str, quantizer: str, **options: Any) -> Workload:
    model = ModelConfig(
        vocab_size=104, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32,
        quantizer=quantizer, **SHAPES[shape],
    )  # fmt: skip
    return Workload(model, sequences=3, window=16, **options)


def kept_by_autograd(work: Workload) -> int:
    """Bytes of every storage that a forward pass saves and that is not there anyway."""
    torch.manual_seed(0)
    model = BitNetForCausalLM(work.model)
    model.model.recompute, model.loss_chunk = work.recompute, work.loss_chunk
    layers = [layer for _, layer in bit_linears(model)]
    if work.int8:
        for layer in layers:
            layer.product = Int8Product(layer.weight, layer.quantizer)
    ids = torch.randint(90, (work.sequences, work.window + 1))
    input_ids, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    autocast = torch.autocast("cpu", dtype=work.dtype, enabled=work.dtype != torch.float32)
    if work.masked:
        model.document_ids = partial(document_ids, start=1, end=None)
    taught = None
    if work.teacher:
        with autocast:
            taught = Teacher(BitNetForCausalLM(work.teacher), 0.3, 2.0 if work.tempered else 1.0, work.dtype)(input_ids)
    own = [] if taught is None else [taught.head]
    with storages_saved(model, input_ids, labels, *own) as kept, autocast:
        loss = model.loss(input_ids, labels, taught=taught)
    loss.backward()  # which the saved tensors have to last for
    return sum(kept.values())


PRODUCTS = [
    ("none", torch.float32, False), ("ternary", torch.float32, False), ("ternary", torch.float32, True),
    ("int4", torch.float32, False), ("none", torch.bfloat16, False), ("ternary", torch.bfloat16, False),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "product"), list(itertools.product(SHAPES, PRODUCTS)))
@pytest.mark.parametrize(("recompute", "loss_chunk"), [(False, 0), (True, 0), (False, 20), (True, 48)])
def test_what_autograd_keeps_is_predicted_to_the_byte(shape, product, recompute, loss_chunk):
    quantizer, dtype, int8 = product
    work = workload(shape, quantizer, dtype=dtype, int8=int8, recompute=recompute, loss_chunk=loss_chunk)
    assert saved_bytes(work) == kept_by_autograd(work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_chunk", [0, 20])
@pytest.mark.parametrize(("tempered", "rows"), [(False, 104), (True, 104), (False, 96)])
def test_so_is_what_a_teacher_adds(dtype, loss_chunk, tempered, rows):
    teacher = workload("plain", "none").model.replace(hidden_size=48, vocab_size=rows)
    work = workload("grouped", "ternary", dtype=dtype, loss_chunk=loss_chunk, teacher=teacher, tempered=tempered)
    assert saved_bytes(work) == kept_by_autograd(work)
    held = sum(t.nbytes for t in BitNetForCausalLM(teacher).parameters())
    assert dtype == torch.bfloat16 or estimate(work).parts["teacher"] == held


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "recompute"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_so_is_what_a_mask_of_documents_adds(shape, dtype, recompute):
    work = workload(shape, "ternary", dtype=dtype, recompute=recompute, masked=True)
    assert saved_bytes(work) == kept_by_autograd(work)


# V C + C + L (C (2Q + 2K + 3F) + 2C + Q + F), worked out apart from the code; 2b-4t's is Hugging Face's number too.
PARAMETERS = {
    "tiny": 107_200, "demo": 4_462_848, "small": 31_482_368, "125m": 109_563_648, "700m": 728_839_680,
    "1.3b": 1_273_579_488, "3b": 3_324_381_440, "2b-4t": 2_412_820_480,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_built_and_estimated_without_memory(name):
    config = PRESETS[name]
    model = meta_model(config)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model.num_parameters() == PARAMETERS[name]
    found = estimate(Workload(config, 1, config.max_position_embeddings))
    assert found.parts["parameters"] == 4 * PARAMETERS[name]
    matrices = sum(layer.weight.numel() for _, layer in bit_linears(model))
    assert matrices == config.num_hidden_layers * projection_parameters(config)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_and_checkpoints_have_the_size_of_the_real_ones(optimizer):
    work = workload("grouped", "ternary", optimizer=optimizer)
    torch.manual_seed(0)
    model = BitNetForCausalLM(work.model)
    optimizers = Optimizer(model, OptimConfig(optimizer=optimizer))
    ids = torch.randint(work.model.vocab_size, (1, 9))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    optimizers.step()
    moments = sum(tensor.nbytes for tensor in optimizers.state().values() if tensor.ndim)
    assert estimate(work).parts["optimizer moments"] == moments
    parameters = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert disk_bytes(work.model, optimizer) == parameters + moments


def test_each_option_that_saves_memory_lowers_the_estimate():
    work = Workload(PRESETS["125m"], 16, 2048)
    total = estimate(work).total
    for option in (
        {"sequences": 8, "micro_batches": 2}, {"recompute": True}, {"loss_chunk": 1024}, {"int8": True},
        {"compiled": True}, {"optimizer": "muon"}, {"dtype": torch.bfloat16}, {"strategy": "fsdp", "processes": 4},
    ):  # fmt: skip
        assert estimate(dataclasses.replace(work, **option)).total < total, option
    for option in ({"masked": True}, {"timed": True}, {"teacher": PRESETS["125m"]}):
        assert estimate(dataclasses.replace(work, **option)).total > total, option


def test_a_float_start_counts_where_it_takes_more_than_the_quantized_model():
    work = Workload(PRESETS["125m"], 16, 2048, int8=True)
    twin = dataclasses.replace(work, model=work.model.replace(quantizer="none"), int8=False)
    assert estimate(work).total < estimate(twin).total
    found = estimate(dataclasses.replace(work, float_start=True))
    assert found.total == estimate(twin).total
    assert not found.parts["int8 codes of the weights"]


def test_gaps_are_a_heaps_alone():
    work = Workload(PRESETS["tiny"], 4, 128, compiled=True)
    assert estimate(work).parts["gaps in the heap"] > 0
    for other in ({"device": "cuda"}, {"compiled": False}, {"sequences": 4096}):
        assert estimate(dataclasses.replace(work, **other)).parts["gaps in the heap"] == 0, other


@pytest.mark.parametrize(
    ("options", "products"), [({}, 0), ({"int8": True}, 1), ({"int8": True, "int8_gradients": True}, 3)]
)
def test_the_time_is_that_of_the_products_that_a_step_does(monkeypatch, options, products):
    counted = []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: counted.append((a.dtype, b.dtype)))
    monkeypatch.setattr(estimate_module, "seconds", lambda function, device: function() is None)
    work = Workload(PRESETS["tiny"], 4, 128, **options)
    took = product_seconds(64, 32, 16, work, torch.device("cpu"), work.int8)
    assert took == products  # a product of codes counts one second here, one of floats none
    assert counted == [(torch.int8, torch.int8)] * products


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
def test_a_process_that_trains_takes_what_was_estimated():
    config = train_memory.CONFIGURATIONS["eager fake-quant adamw"]  # the others are the benchmark's
    model = config.model.replace(num_hidden_layers=3, hidden_size=384, intermediate_size=1024, num_attention_heads=6,
                                 num_key_value_heads=6)  # fmt: skip
    found = train_memory.measure(dataclasses.replace(config, model=model, batch_size=4, threads=1), steps=2)
    assert found["parameters"] > 8e6
    assert found["total"] == pytest.approx(found["peak"], rel=0.1)
    assert found["total"] - found["before"] == pytest.approx(found["peak"] - found["before"], rel=0.1)


@pytest.mark.parametrize("processes", ["", "2"])
def test_the_command_reports_and_touches_nothing(tmp_path, monkeypatch, capsys, processes):
    monkeypatch.chdir(tmp_path)
    argv = ["--preset", "tiny", "--device", "cpu", "--compile", "off", "--data.corpus", "nowhere.txt", "--estimate"]
    assert trainer.main([*argv, *([processes] if processes else []), "--steps", "50"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"parameters  107,200, of which 73,728 in the projections", out)
    assert "50 steps of 1,024 = 51,200" in out
    for word in ("optimizer moments", "total", "FLOPs", "a checkpoint", "tokens/s"):
        assert word in out
    assert ("communication" in out) == bool(processes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--data.tokenizer", "--teacher"])
def test_the_vocabulary_is_that_of_the_tokenizer_to_be(tmp_path, monkeypatch, capsys, tokenizer, option):
    monkeypatch.setattr(estimate_module, "seconds", lambda function, device, budget=0.1: 1e-3)
    run = save_run(tmp_path / "run", tiny_model(vocab_size=600), tokenizer)
    given = tmp_path / "t.model"
    tokenizer.save(given)
    argv = ["--preset", "tiny", "--model.vocab-size", "999", option, str(run if option == "--teacher" else given)]
    assert trainer.main([*argv, "--device", "cpu", "--estimate"]) == 0
    assert f"parameters  {107_200 + 64 * (tokenizer.vocab_size - 512):,}," in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--estimate", "0"], ["--estimate", "3"], ["--estimate", "--device", "nonsense"]])
def test_the_command_refuses_what_no_run_could_be(argv, capsys):
    assert trainer.main(["--preset", "tiny", *argv]) == 2
    assert re.search("at least 1|batch_size 8 cannot be shared by 3|nonsense", capsys.readouterr().err)


def test_flops_are_six_a_parameter_and_the_attention():
    config = PRESETS["700m"]
    multiplied = 24 * 1536 * (4 * 1536 + 3 * 4096) + 32000 * 1536
    assert flops_per_token(config, 2048) == 6 * multiplied + 6 * 24 * 2048 * 1536
    assert flops_per_token(config, 2048, recompute=True) * 3 == flops_per_token(config, 2048) * 4


def test_too_much_memory_is_a_warning_with_remedies(monkeypatch):
    work = Workload(PRESETS["tiny"], 4, 128)
    found = estimate(work)
    cpu = torch.device("cpu")
    assert memory_warning(found, work, cpu) is None
    monkeypatch.setattr(estimate_module, "available_memory", lambda: 1e6)
    warning = memory_warning(found, work, cpu)
    assert warning
    for remedy in ("--micro-batches", "--recompute", "--loss-chunk", "--parallel fsdp"):
        assert remedy in warning
    frugal = dataclasses.replace(work, sequences=1, recompute=True, loss_chunk=64, strategy="fsdp", processes=2)
    assert "would lower" not in (memory_warning(found, frugal, cpu) or "would lower")


def test_freed_blocks_are_the_environments_choice_first(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: pytest.fail("mallopt was called"))
    return_freed_blocks()
