"""The standard mixtures of llama.cpp: which matrix of which layer gets which block type.

A mixture has a base type and spends more bits where an error costs most: on the values, on the second matrix of the
feed-forward layers, on some layers (`_more_bits`: the first and the last eighth, and every third between), and on the
head, which is the embedding where the two are tied. A row that the blocks of its type don't fill takes the type that
`FALLBACK` names, or F16.

Source: llama_tensor_get_type in llama.cpp's llama-quant.cpp, without its rules for mixtures of experts and Falcon.
"""

import re
from collections.abc import Mapping

from bitnet.quant.blocks import FALLBACK, TYPES

_PLAIN = ("Q2_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0")
_SIZED = ("Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M")
_IQ = ("IQ3_S", "IQ3_XXS", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
BASE = {name: name for name in (*_PLAIN, *_IQ)} | {name: name[:-2] for name in _SIZED}
BASE |= {"IQ3_M": "IQ3_S", "IQ3_XS": "IQ3_S", "IQ2_M": "IQ2_S"}
"""Name of a mixture (small, medium, large) to the type of most of its tensors."""
LOW = ("IQ2_M", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""Mixtures below 3 bits, with rules of their own."""
LAYERS_OF_70B = 80  # eight query heads share a key there: values are few, and llama.cpp gives them more


def tensor_types(
    mixture: str, shapes: Mapping[str, tuple[int, ...]], *, has_importance: bool = False
) -> dict[str, str]:
    """The type of every matrix of a model.

    shapes: (rows, columns) by GGUF name, `blk.0.attn_v.weight`, `token_embd.weight` and so on, without norms.
    `has_importance`: whether there is an importance matrix. Types are those of `TYPES`, and F16. Raises ValueError for
    an unknown mixture.
    """
    if mixture not in BASE:
        raise ValueError(f"the mixture {mixture!r} is unknown; choose one of {', '.join(BASE)}")
    layers = 1 + max((_layer(name) for name in shapes), default=-1)
    # Query heads for each key head, from the rows of the projections.
    keys = shapes.get("blk.0.attn_k.weight", (1, 0))[0]
    shared = shapes.get("blk.0.attn_q.weight", (0, 0))[0] // keys if keys else 1
    return {
        name: _fitting(_wanted(mixture, name, layers, shared, has_importance, shapes), columns)
        for name, (_, columns) in shapes.items()
    }


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _wanted(
    mixture: str, name: str, layers: int, shared: int, has_importance: bool, shapes: Mapping[str, tuple[int, ...]]
) -> str:
    base, layer, columns = BASE[mixture], _layer(name), shapes[name][1]
    if name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in shapes):
        if base == "Q8_0" or columns % TYPES[base].block_size:
            return "Q8_0"
        return "Q5_K" if mixture in (*LOW, "IQ3_XXS") else "Q6_K"
    if name == "token_embd.weight":
        if mixture in ("IQ2_M", "IQ3_XXS"):
            return "IQ3_S"
        return "Q2_K" if mixture in LOW else "Q4_K" if base in ("TQ1_0", "TQ2_0") else base
    if mixture in LOW:
        return _low(mixture, name, layer < layers // 8, shared)
    if name.endswith("attn_v.weight"):
        wanted = _values(mixture, layer, layers, shared, has_importance)
        return "Q5_K" if layers == LAYERS_OF_70B and wanted in ("Q3_K", "Q4_K") else wanted
    if name.endswith("ffn_down.weight"):
        return _down(mixture, layer, layers, has_importance)
    if name.endswith("attn_output.weight"):
        more = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_XXS": "IQ3_S", "IQ3_M": "Q4_K"}
        return more.get(mixture, base)
    if name.endswith(("attn_q.weight", "attn_k.weight")):
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mixture, base)
    if mixture == "IQ3_XS" and layers // 8 <= layer < 7 * layers // 8:  # gate and up
        return "IQ3_XXS"
    return base


def _low(mixture: str, name: str, early: bool, shared: int) -> str:
    more = "IQ3_S" if mixture == "IQ2_M" else "Q2_K"
    if name.endswith("attn_v.weight"):
        return "Q4_K" if shared >= 4 else more
    if name.endswith("ffn_down.weight") and early:
        return more
    if name.endswith("attn_output.weight"):
        return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_M": "IQ3_S"}.get(mixture, BASE[mixture])
    return BASE[mixture]


def _values(mixture: str, layer: int, layers: int, shared: int, has_importance: bool) -> str:
    base = BASE[mixture]
    match mixture:
        case "Q2_K":
            return "Q4_K" if shared >= 4 else "Q3_K"
        case "Q2_K_S":
            return "Q4_K" if shared >= 4 else base
        case "Q3_K_M":
            return "Q5_K" if layer < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "IQ3_M":
            return "Q4_K"
        case "IQ3_S" | "IQ3_XS" | "IQ3_XXS" if shared >= 4:
            return "Q4_K"
        case "IQ3_XXS":
            return base if has_importance else "IQ3_S"
        case "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if shared >= 4 else base
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if _more_bits(layer, layers) else base
        case "Q4_K_S":
            return "Q5_K" if layer < 4 else base
    return base


def _down(mixture: str, layer: int, layers: int, has_importance: bool) -> str:
    base, early = BASE[mixture], layer < layers // 8
    match mixture:
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S":
            return "Q4_K" if early else base
        case "Q3_K_M":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if _more_bits(layer, layers) else base
        case "Q4_K_S":
            return "Q5_K" if early else base
        case "IQ3_M":
            return "Q4_K" if early else base
        case "IQ3_XXS" if not has_importance:
            return "Q4_K" if early else "Q3_K"
        case "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if early and not has_importance else base
        case "Q4_0" | "Q5_0":  # their first layers go astray with an importance matrix
            return base.replace("_0", "_1") if early and has_importance else base
    return base


def _fitting(kind: str, columns: int) -> str:
    if columns % TYPES[kind].block_size:
        kind = FALLBACK.get(kind, "F16")
    return "F16" if kind != "F16" and columns % TYPES[kind].block_size else kind
