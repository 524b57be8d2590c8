"""Hugging Face folders in the layout of GPTQ checkpoints: qweight, qzeros, scales and g_idx for each projection.

For models whose projections are all `GroupLinear` (GPTQ, AWQ and plain rounding in groups), which keep these very
tensors (`bitnet/quant/grouped.py`), and for those trained ternary with scales of groups, whose codes and float16 scales
the layout holds exactly; who reads it leaves activations in floats. `quantization_config` says what they are: bits,
group_size, desc_act, sym, and checkpoint_format "gptq" (zero points stored minus one) or "gptq_v2".
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from bitnet.files import new_folder, write_atomic
from bitnet.kernels import GROUP_SIZES
from bitnet.model import BitLinear, BitNetForCausalLM, PackedEmbedding, PackedLinear
from bitnet.model.linear import codes_and_scale
from bitnet.model.lora import dense_weight
from bitnet.model.transformer import check_finite
from bitnet.model.weight_only import GroupLinear, WeightOnlyLayer
from bitnet.quant.grouped import QuantizedWeight, group_index
from bitnet.storage.folders import CONFIG, MODEL
from bitnet.storage.hf.card import CARD, Origin, model_card
from bitnet.storage.hf.write import check_class, config_of, special_ids
from bitnet.storage.safetensors import save_tensors


def write(
    model: BitNetForCausalLM, folder: Path, tokenizer_files: Mapping[str, bytes], *, origin: Origin | None = None
) -> None:
    """Write the folder, whole or not at all; `origin` is what the model card says of the training.

    Raises ValueError, with the reason and the alternative, for a model that is not quantized in groups or whose layers
    the layout cannot hold, and OSError, also for a folder that exists.
    """
    check_finite(model)
    layers = {name: _of_groups(module) for name, module in model.named_modules() if name.endswith("_proj")}
    other = [name for name, module in layers.items() if not isinstance(module, GroupLinear)]
    if other:
        raise ValueError(
            f"{other[0]} is no group-quantized layer; quantize with a gptq, awq or rtn method first: "
            "bitnet quantize IN OUT --method gptq-4"
        )
    groups = [module for module in layers.values() if isinstance(module, GroupLinear)]
    scaled = [name for name, module in zip(layers, groups, strict=True) if module.input_scale is not None]
    if scaled:
        raise ValueError(
            f"{scaled[0]} divides its input by AWQ's scales, for which GPTQ's layout has no place; use gptq-4"
        )
    # A group that is a whole row (-1) has a size too, by which it fits layers with several of that size in a row.
    sizes = {module.in_features if module.group_size == -1 else module.group_size for module in groups}
    size = sizes.pop() if len(sizes) == 1 else None
    kinds = {(module.bits, size or module.group_size, module.version) for module in groups}
    if len(kinds) > 1:
        raise ValueError(f"the layers differ in bits, group size or version ({sorted(kinds)}); the layout names one")
    check_class(model.config)
    bits, group_size, version = kinds.pop()
    trained = model.config.quantizer in GROUP_SIZES
    config = config_of(model, "master") | special_ids(tokenizer_files)
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": any(not _in_order(module.g_idx) for module in groups),
        "sym": all(map(_symmetric, groups)),
        "true_sequential": True,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    with new_folder(folder, "GPTQ folder") as temporary:
        save_tensors(temporary / MODEL, _tensors(model, layers))
        write_atomic(temporary / CONFIG, json.dumps(config, indent=1))
        made = "as trained; activations here stay floats" if trained else "quantized after training"
        weights = f"INT{bits} codes in groups of {group_size}, {made} (GPTQ's layout)"
        card = model_card(model.config, weights, origin, package="the packages optimum and gptqmodel", readable=False)
        write_atomic(temporary / CARD, card)
        for name, content in tokenizer_files.items():
            write_atomic(temporary / name, content)


def _of_groups(module: nn.Module) -> nn.Module:
    """The layer of GPTQ's layout for a projection that was trained with scales of groups; any other as it is."""
    size = GROUP_SIZES.get(getattr(module, "quantizer", ""))
    if size is None or not isinstance(module, (BitLinear, PackedLinear)):
        return module
    codes, scale = codes_and_scale(module)
    zero = torch.ones_like(scale, dtype=torch.int32)
    weight = QuantizedWeight((codes + 1).to(torch.uint8), scale.half(), zero, group_index(codes.shape[1], size), 2)
    return GroupLinear.from_quantized(weight, module.bias, ternary=True)


def _tensors(model: BitNetForCausalLM, layers: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """What is written: the layers' tensors, and the others of the model, tables of few bits as the floats they stand
    for."""
    kinds = (PackedEmbedding, PackedLinear, WeightOnlyLayer)
    tables = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    replaced = {*layers, *tables}
    tensors = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] not in replaced}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    for name in tables.keys() - layers.keys():
        tensors[f"{name}.weight"] = dense_weight(tables[name])
    return tensors


def _in_order(g_idx: torch.Tensor) -> bool:
    return bool((g_idx[1:] >= g_idx[:-1]).all())


def _symmetric(module: GroupLinear) -> bool:
    """Whether the zero point is the middle of the codes everywhere."""
    return bool((module.quantized().zero_point == 2 ** (module.bits - 1)).all())
