"""Hugging Face folders, in, with their weights as they are stored: 16-bit floats, and the codes of GPTQ and AWQ.

`read.read_model` makes float32 of floats and knows ternary codes. Here a float matrix is a `FloatLinear` of the file's
dtype and a group-quantized one a `GroupLinear`, in either case a view of the mapped file where that is possible, for an
engine that repacks it (`bitnet/inference/weights.py`).

    quant_method   tensors of a projection                               understood
    gptq           qweight, qzeros, scales, g_idx: quant/gptq_layout.py  2, 3, 4, 8 bits, any group size and order
    awq            qweight int32 [K, N / 8], qzeros [G, N / 8], scales   4 bits, version gemm: AutoAWQ's

Nibble i of an AWQ word holds column (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight, and a zero point is stored as it is.
Projections without a qweight are floats, as modules_to_not_convert says; embedding and head always are.

Letters: N out_features, K in_features, G groups.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.weight_only import FloatEmbedding, FloatLinear, GroupLinear
from bitnet.quant.gptq_layout import pack_words, unpack_words
from bitnet.storage.hf.config import GroupScheme
from bitnet.storage.hf.read import check_names, inventory
from bitnet.storage.safetensors import FLOATS, Tensors, open_tensors

_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_stored(folder: Path, config: ModelConfig, scheme: GroupScheme | None = None) -> BitNetForCausalLM:
    """The model of a folder of floats or, with a scheme, of groups, in evaluation mode; its norms and biases are
    float32. Raises ValueError for what is damaged or does not fit the configuration."""
    with open_tensors(folder) as tensors:
        config, source = inventory(config, tensors)
        shapes = config.tensor_shapes()
        projections = [name.removesuffix(".weight") for name in shapes if name.endswith("_proj.weight")]
        grouped = {module for module in projections if scheme and f"{module}.qweight" in source}
        floats = [name for name in shapes if name.removesuffix(".weight") not in grouped]
        expected = {*floats, *(f"{module}.{part}" for module in grouped for part in ("qweight", "qzeros", "scales"))}
        expected |= {f"{module}.g_idx" for module in grouped if f"{module}.g_idx" in source}
        expected |= {bias for module in grouped if (bias := f"{module}.bias") in source and not _counts(tensors, bias)}
        check_names(tensors, scheme.method if scheme else "dense", set(source), expected)
        for name in floats:  # all headers before the first tensor is read
            tensors.check(source[name], shapes[name], FLOATS)
        state: dict[str, Tensor] = {}
        modules: dict[str, nn.Module] = {}
        for name, shape in shapes.items():
            module = name.rpartition(".")[0]
            if len(shape) == 1:
                state[name] = tensors.read(source[name]).to(torch.float32, copy=True)
                continue
            biased = f"{module}.bias" in shapes
            if scheme and module in grouped:
                modules[module], parts = _group_layer(tensors, module, shape, scheme, biased)
            else:
                form = FloatEmbedding if module == "model.embed_tokens" else FloatLinear
                dtype = _DTYPES[tensors.kind(source[name])]
                with torch.device("meta"):
                    modules[module] = form(shape[1], shape[0], biased, dtype=dtype)
                parts = {"stored": tensors.read(source[name]).to(getattr(torch, dtype))}
            state |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return BitNetForCausalLM.from_tensors(config, state, modules)


def _counts(tensors: Tensors, bias: str) -> bool:
    """Whether a bias is one. AutoGPTQ gave every layer a bias, of zeros where the model has none."""
    return bool(tensors.read(bias).count_nonzero())


def _group_layer(
    tensors: Tensors, module: str, shape: tuple[int, ...], scheme: GroupScheme, biased: bool
) -> tuple[GroupLinear, dict[str, Tensor]]:
    rows, columns = shape
    size = columns if scheme.group_size == -1 else scheme.group_size
    groups, bits = -(-columns // size), scheme.bits
    awq, period = scheme.method == "awq", 32 if bits == 3 else 32 // bits
    if rows % period or columns % period:
        raise ValueError(f"{tensors.path}: {module} is {rows} x {columns}, which does not fill words of {bits} bits")
    qweight = [columns, rows // period] if awq else [columns * bits // 32, rows]
    tensors.check(f"{module}.qweight", qweight, ["I32"])
    tensors.check(f"{module}.qzeros", [groups, rows * bits // 32], ["I32"])
    tensors.check(f"{module}.scales", [groups, rows], FLOATS)
    parts = {name: tensors.read(f"{module}.{name}") for name in ("qweight", "qzeros", "scales")}
    scales = parts["scales"].half()
    if not torch.equal(scales.to(parts["scales"].dtype), parts["scales"]) or not scales.isfinite().all():
        raise ValueError(f"{tensors.path}: {module}.scales do not fit float16; quantize again with float16 scales")
    parts["scales"] = scales
    if awq:
        parts["qweight"] = pack_words(unpack_awq(parts["qweight"]), 4)
        parts["qzeros"] = pack_words(unpack_awq(parts["qzeros"]).t(), 4).t().contiguous()
    elif scheme.version == 1 and int(unpack_words(parts["qzeros"].t(), bits).max()) == 2**bits - 1:
        raise ValueError(
            f"{tensors.path}: {module} has a zero point of 0 minus 1, of which readers make 0 or {2**bits}; save the "
            "model again as gptq_v2"
        )
    if f"{module}.g_idx" in tensors.names:
        tensors.check(f"{module}.g_idx", [columns], ["I32"])
        parts["g_idx"] = tensors.read(f"{module}.g_idx")
        if not 0 <= int(parts["g_idx"].min()) <= int(parts["g_idx"].max()) < groups:
            raise ValueError(f"{tensors.path}: {module}.g_idx names groups beyond the {groups} that there are")
    else:
        parts["g_idx"] = torch.arange(columns, dtype=torch.int32) // size
    with torch.device("meta"):
        layer = GroupLinear(columns, rows, biased, bits=bits, group_size=scheme.group_size, version=scheme.version)
    return layer, parts


def unpack_awq(words: Tensor) -> Tensor:
    """AWQ's words int32 `[R, C / 8]` as codes uint8 `[R, C]`."""
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for nibble, column in enumerate(_AWQ_ORDER):
        codes[..., column] = (words >> 4 * nibble) & 15
    return codes.flatten(1)
