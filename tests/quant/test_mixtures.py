"""Mixtures of block types: which tensor gets which, as llama.cpp chooses."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet.kernels import blocks
from bitnet.quant.blocks import (
    FALLBACK,
    TYPES,
    mixtures,
)
from bitnet.storage.gguf.container import GGUFFile, TensorToWrite, write_file
from bitnet.storage.gguf.write import FILE_TYPES
from tests.oracles import llama
from tests.quant.builders import noise

pytestmark = pytest.mark.usefixtures("poisoned_memory")
KINDS = list(TYPES)


def shapes_of(hidden: int, ffn: int, layers: int, queries_per_key: int, tied: bool) -> dict[str, tuple[int, int]]:
    keys = hidden // queries_per_key
    shapes = {"token_embd.weight": (64, hidden)} | ({} if tied else {"output.weight": (64, hidden)})
    for layer in range(layers):
        sizes = {
            "attn_q": (hidden, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden),
            "attn_output": (hidden, hidden), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in sizes.items()}
    return shapes


def test_q4_k_m_of_a_7b_model():
    types = mixtures.tensor_types("Q4_K_M", shapes_of(4096, 11008, 32, 1, tied=False))
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for name in ("attn_v", "ffn_down"):
        assert [i for i in range(32) if types[f"blk.{i}.{name}.weight"] == "Q6_K"] == more
    assert types["output.weight"] == "Q6_K"
    assert {types[f"blk.0.{name}.weight"] for name in ("attn_q", "attn_k", "attn_output", "ffn_up")} == {"Q4_K"}


def test_an_importance_matrix_changes_the_first_layers_of_q4_0():
    shapes = shapes_of(256, 256, 16, 1, tied=True)
    plain, important = (mixtures.tensor_types("Q4_0", shapes, has_importance=given) for given in (False, True))
    changed = {name: important[name] for name in shapes if plain[name] != important[name]}
    assert changed == {f"blk.{layer}.ffn_down.weight": "Q4_1" for layer in range(2)}


def test_an_unknown_mixture_is_refused():
    with pytest.raises(ValueError, match="'Q4_K_XXL' is unknown; choose one of Q2_K"):
        mixtures.tensor_types("Q4_K_XXL", {})


@pytest.mark.parametrize(("mixture", "hidden", "ffn", "expected"), [
    ("Q4_K_M", 256, 288, {"Q4_K", "Q6_K", "Q5_0", "Q8_0"}), ("Q3_K_L", 256, 264, {"Q3_K", "Q5_K", "Q6_K", "F16"}),
    ("Q2_K", 288, 256, {"Q4_0", "Q3_K", "Q8_0"}),
])  # fmt: skip
def test_rows_that_blocks_do_not_fill_fall_back(mixture, hidden, ffn, expected):
    shapes = shapes_of(hidden, ffn, 9, 1, tied=True)
    types = mixtures.tensor_types(mixture, shapes)
    assert set(types.values()) == expected
    for name, kind in types.items():
        assert kind == "F16" or shapes[name][1] % TYPES[kind].block_size == 0
    assert set(FALLBACK) == {kind for kind in KINDS if TYPES[kind].block_size == 256}


@functools.cache
def float_tensors(shapes: tuple[tuple[str, tuple[int, int]], ...]) -> dict[str, Tensor]:
    return {name: 0.02 * noise(*shape, seed=i) for i, (name, shape) in enumerate(shapes)}


def float_file(path: Path, shapes: dict[str, tuple[int, int]], layers: int, heads: int, keys: int) -> dict[str, Tensor]:
    """A llama model of random weights, without a vocabulary, in F32."""
    tensors = dict(float_tensors(tuple(shapes.items())))
    hidden = shapes["token_embd.weight"][1]
    norms = ["output_norm.weight", *(f"blk.{i}.{n}_norm.weight" for i in range(layers) for n in ("attn", "ffn"))]
    values = {
        "general.architecture": "llama", "llama.context_length": 64, "llama.embedding_length": hidden,
        "llama.block_count": layers, "llama.feed_forward_length": shapes["blk.0.ffn_up.weight"][0],
        "llama.attention.head_count": heads, "llama.attention.head_count_kv": keys,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": 64, "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip
    entries = [
        TensorToWrite(n, tuple(t.shape), "F32", lambda t=t: t.view(torch.uint8).numpy()) for n, t in tensors.items()
    ]
    entries += [TensorToWrite(n, (hidden,), "F32", lambda: torch.ones(hidden).view(torch.uint8).numpy()) for n in norms]
    write_file(path, values, entries)
    return tensors


NEED_IMPORTANCE = ("Q2_K_S", "IQ3_XS", "IQ3_XXS", *mixtures.LOW)


@pytest.mark.parametrize("mixture", [name for name in mixtures.BASE if name not in NEED_IMPORTANCE])
@pytest.mark.parametrize(("hidden", "ffn", "layers", "heads", "keys", "tied"), [
    (256, 288, 9, 4, 1, True), (128, 256, 17, 4, 2, False),
])  # fmt: skip
def test_llama_cpp_makes_the_same_file_of_a_mixture(tmp_path, mixture, hidden, ffn, layers, heads, keys, tied):
    """The types of every matrix, and for the first layer the bytes."""
    shapes = shapes_of(hidden, ffn, layers, heads // keys, tied)
    same_file(tmp_path, mixture, shapes, layers, heads, keys)


# Two are enough for the importance to be the same; the rules of the others take minutes.
@pytest.mark.parametrize("mixture", NEED_IMPORTANCE if os.environ.get("BITNET_LONG") == "1" else ["IQ3_XXS", "IQ2_M"])
@pytest.mark.parametrize(("heads", "keys", "tied"), [(4, 1, True), (4, 2, False)])
def test_llama_cpp_makes_the_same_file_of_a_mixture_by_importance(tmp_path, mixture, heads, keys, tied):
    shapes = shapes_of(256, 256, 9, heads // keys, tied)
    importance = {name: noise(1, shape[1], 5)[0] ** 2 for name, shape in shapes.items() if name.startswith("blk.")}
    same_file(tmp_path, mixture, shapes, 9, heads, keys, importance)


def same_file(
    folder: Path, mixture: str, shapes: Any, layers: int, heads: int, keys: int, importance: Any = None
) -> None:
    llama.library()
    tensors = float_file(folder / "float.gguf", shapes, layers, heads, keys)
    arrays = importance and {name: weights.numpy() for name, weights in importance.items()}
    llama.quantize(folder / "float.gguf", folder / "theirs.gguf", FILE_TYPES[mixture], arrays)
    theirs = GGUFFile(folder / "theirs.gguf")
    found = mixtures.tensor_types(mixture, shapes, has_importance=importance is not None)
    assert found == {name: theirs.tensors[name].type for name in shapes}
    for name in [name for name in shapes if not name.startswith("blk.") or name.startswith("blk.0.")]:
        kind = theirs.tensors[name].type
        if kind in TYPES:
            data = blocks.quantize(tensors[name], kind, (importance or {}).get(name), compatible=True)
            assert data.flatten().tolist() == theirs.data(name).tolist(), name
