"""GGUF files, in, with their weights as they are stored: every matrix a view of the mapped file.

`read.read_model` makes ternary codes or floats of a file. Here blocks stay blocks and 16-bit floats stay 16-bit floats,
for an engine that repacks them (`bitnet/inference/weights.py`): nothing is read before it is wanted.
"""

import torch
from torch import Tensor, nn

from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.compound import ScaledBlockLinear
from bitnet.model.weight_only import BlockEmbedding, BlockLinear, FloatEmbedding, FloatLinear
from bitnet.quant.blocks import READ_ONLY, TYPES
from bitnet.storage.gguf.container import GGUFFile
from bitnet.storage.gguf.names import bias_names, norm_names, projection_names, rotary_rows, table_names
from bitnet.storage.gguf.read import FLOATS, dequantize, factor_of

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_stored(file: GGUFFile, config: ModelConfig) -> BitNetForCausalLM | None:
    """The model of a file with `BlockLinear` and `FloatLinear` layers, in evaluation mode, or None where a tensor is of
    a type without such a layer or a float one has a factor beside it. `config` is of `read_config`."""
    names = [*projection_names(config), *table_names(config)]
    for _, theirs in names:
        kind, scaled = file.tensors[f"{theirs}.weight"].type, f"{theirs}.scale" in file.tensors
        if scaled if kind in FLOATS else kind not in TYPES and kind not in READ_ONLY:
            return None
    tensors: dict[str, Tensor] = {}
    modules: dict[str, nn.Module] = {}
    biases = dict(bias_names(config))
    for name, theirs in names:
        info = file.tensors[f"{theirs}.weight"]
        rows, columns = info.shape
        data = torch.from_numpy(file.data(info.name))
        table = name == "model.embed_tokens"
        layer: BlockLinear | FloatLinear
        with torch.device("meta"):
            if info.type in FLOATS:
                form = FloatEmbedding if table else FloatLinear
                layer = form(columns, rows, name in biases, dtype=_DTYPES[info.type])
            else:
                scaled = f"{theirs}.scale" in file.tensors
                block = BlockEmbedding if table else ScaledBlockLinear if scaled else BlockLinear
                layer = block(columns, rows, name in biases, block_type=info.type)
        stored = data.view(FLOATS[info.type]).view(rows, columns) if info.type in FLOATS else data.view(rows, -1)
        field = "stored" if info.type in FLOATS else "data"
        modules[name] = layer
        tensors[f"{name}.{field}"] = rotary_rows(config, file.architecture, name, stored, inverse=True)
        if isinstance(layer, ScaledBlockLinear):
            tensors[f"{name}.tensor_scale"] = factor_of(file, theirs).view(1)
        if name in biases:
            bias = dequantize(file, f"{biases[name]}.bias")
            tensors[f"{name}.bias"] = rotary_rows(config, file.architecture, name, bias, inverse=True)
    tensors |= {f"{name}.weight": dequantize(file, f"{theirs}.weight") for name, theirs in norm_names(config)}
    return BitNetForCausalLM.from_tensors(config, tensors, modules)
