"""Models of any shape with random weights, packed or in floats, made in a moment."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitnet.files import JsonObject
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.quant import packed_width
from bitnet.storage.gguf import write
from bitnet.storage.gguf.container import TensorToWrite, tensor_bytes, write_file
from bitnet.storage.gguf.names import norm_names, projection_names, table_names

GATE_CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=160,
    intermediate_size=288,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.1,
)
"""Of the small model whose logits an engine must give before it is timed."""
LOGIT_STD = 3.0
"""Of random models: top-p 0.95 then keeps some 2 % of the vocabulary; with flat logits it sorts nearly all of it."""


def random_tensors(config: ModelConfig) -> Callable[[str], Tensor]:
    """Tensors of a packed ternary model by name, for `Engine`: random codes, in every layer the same ones."""
    C, shapes, norms = config.hidden_size, config.projections(), config.norms()
    generator = torch.Generator().manual_seed(0)
    # A byte is four fields of 0, 1 or 2.
    bytes_of_codes = (torch.cartesian_prod(*[torch.arange(3)] * 4) @ torch.tensor([1, 4, 16, 64])).to(torch.uint8)
    size = max(N * packed_width(K, 2) for N, K in shapes.values())
    codes = bytes_of_codes[torch.randint(81, (size,), generator=generator)]

    def tensor(name: str) -> Tensor:
        path, _, kind = name.rpartition(".")
        module = path.split(".", 3)[-1]  # inside a layer
        if kind == "bias":
            return torch.zeros(config.biases()[module])
        if module in shapes:
            N, K = shapes[module]
            return torch.full((1, 1), 0.02) if kind == "weight_scale" else codes[: N * packed_width(K, 2)].view(N, -1)
        if kind == "weight_scale":  # embedding or head; uniform bytes have a standard deviation of 74
            return torch.full((config.vocab_size, 1), LOGIT_STD / math.sqrt(C) / 74)
        if kind == "packed_weight":
            return torch.randint(256, (config.vocab_size, packed_width(C, 8)), dtype=torch.uint8, generator=generator)
        return torch.ones(norms.get(module, C))

    return tensor


def float_twin(config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> BitNetForCausalLM:
    """A float model of this shape, filled from one tile of random numbers: drawing all of them would take minutes."""
    tile = torch.empty(2**20 + 7).normal_(generator=torch.Generator().manual_seed(0))  # a prime: no two rows are alike
    tile = tile.to(device)
    tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in config.tensor_shapes().items()}
    for name, tensor in tensors.items():
        is_table = "embed_tokens" in name or "lm_head" in name
        scaled = (tile * (LOGIT_STD / math.sqrt(config.hidden_size) if is_table else 0.02)).to(dtype)
        for part in tensor.view(-1).split(len(tile)):
            part.copy_(scaled[: len(part)] if tensor.dim() > 1 else torch.ones(1))
    return BitNetForCausalLM.from_tensors(config.replace(quantizer="none"), tensors)


def ternary_weights(config: ModelConfig) -> int:
    """Weights of all projections."""
    return config.num_hidden_layers * sum(N * K for N, K in config.projections().values())


def write_random_gguf(path: Path, config: ModelConfig, kind: str, words: JsonObject | None = None) -> None:
    """Write a GGUF file of a type or mixture with random weights, in a moment: the rows of a matrix repeat 64 different
    ones. Ternary where the configuration is. words: the metadata of a vocabulary (`tokenizer.*`); none unless given."""
    arch, types = write.architecture(config, kind), write.tensor_types(config, kind)
    shapes, ternary = config.tensor_shapes(), config.quantizer != "none"
    generator = torch.Generator().manual_seed(0)
    tiles: dict[tuple[str, int, bool], np.ndarray] = {}

    def matrix(type: str, rows: int, columns: int, codes: bool) -> np.ndarray:
        key = type, columns, codes
        if key not in tiles and codes:
            tile = torch.randint(-1, 2, (64, columns), generator=generator, dtype=torch.int8)
            tiles[key] = bytes_of(write.encode_ternary(tile, 0.02, type, inside=not write.scale_beside(arch, type)))
        elif key not in tiles:
            tiles[key] = bytes_of(write.encode(torch.randn(64, columns, generator=generator) * 0.02, type))
        return np.resize(tiles[key], tensor_bytes(type, (rows, columns)))

    def tensors() -> Iterator[TensorToWrite]:
        for ours, theirs in (*table_names(config), *projection_names(config)):
            (rows, columns), type = shapes[f"{ours}.weight"], types[theirs]
            codes = ternary and ours.endswith("_proj")
            yield TensorToWrite(f"{theirs}.weight", (rows, columns), type, partial(matrix, type, rows, columns, codes))
            if codes and write.scale_beside(arch, type):
                yield TensorToWrite(f"{theirs}.scale", (1,), "F32", partial(bytes_of, torch.full((1,), 0.02)))
        for ours, theirs in norm_names(config):
            ones = torch.ones(shapes[f"{ours}.weight"])
            yield TensorToWrite(f"{theirs}.weight", tuple(ones.shape), "F32", partial(bytes_of, ones))

    metadata = write.metadata_of(config, arch, kind, "random")
    write_file(path, metadata | (words or {"tokenizer.ggml.model": "none"}), tensors())


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, uint8 in one dimension."""
    return tensor.contiguous().view(torch.uint8).flatten().numpy()
