"""The memory estimate against what autograd keeps and a process that trains; sizes that only fit on meta."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch

from bitnet import memory
from bitnet.memory import Workload
from bitnet.model import BitNetForCausalLM, ModelConfig, bit_linears
from bitnet.model.transformer import document_ids

SHAPES = {
    "grouped": {"num_key_value_heads": 2, "intermediate_size": 80},
    "relu2": {"num_key_value_heads": 4, "hidden_act": "relu2", "head_dim": 24, "intermediate_size": 56},
    "plain": {"num_key_value_heads": 4, "sub_norm": False, "tie_word_embeddings": False, "intermediate_size": 96},
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
            layer.quantize_for_step()
    ids = torch.randint(work.model.vocab_size, (work.sequences, work.window + 1))
    input_ids, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    there = [*model.parameters(), *model.buffers(), input_ids, labels]
    there += [t for layer in layers for t in (layer.step_codes, layer.step_scale) if t is not None]
    known = {tensor.untyped_storage().data_ptr() for tensor in there}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    autocast = torch.autocast("cpu", dtype=work.dtype, enabled=work.dtype != torch.float32)
    if work.masked:
        model.document_ids = partial(document_ids, start=1, end=None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        loss = model.loss(input_ids, labels)
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
    assert memory.saved_bytes(work) == kept_by_autograd(work)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "recompute"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_so_is_what_a_mask_of_documents_adds(shape, dtype, recompute):
    work = workload(shape, "ternary", dtype=dtype, recompute=recompute, masked=True)
    assert memory.saved_bytes(work) == kept_by_autograd(work)
