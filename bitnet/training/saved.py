"""What autograd keeps of a forward pass for the backward, measured: the other side of the estimate in memory.py."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bitnet.kernels import Int8Product
from bitnet.model import BitNetForCausalLM, bit_linears


@contextmanager
def storages_saved(model: BitNetForCausalLM, *inputs: Tensor) -> Iterator[dict[int, int]]:
    """Bytes, by address, of each storage that autograd keeps for the backward from the forward within the block; those
    of the model, of its quantized weights and of the inputs are left out. What `memory.saved_bytes` predicts."""
    own = [*model.parameters(), *model.buffers(), *inputs]
    products = [layer.product for _, layer in bit_linears(model)]
    own += [t for product in products if isinstance(product, Int8Product) for t in (product.codes, product.scale)]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
