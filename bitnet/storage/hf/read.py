"""Hugging Face folders, in: the model that transformers would load from one, in our classes.

A folder is config.json and model.safetensors, or shards of it under model.safetensors.index.json. What is understood:

    form             quantization_config              weights of the projections
    dense            none                             floats, used as they are (BitNet, Llama, Mistral, Qwen2, Qwen3)
    master           autobitlinear, online            latent floats, quantized in the forward pass
    packed           autobitlinear, offline           codes, and weight_scale = scale        (bitnet-b1.58-2B-4T)
    packed-inverse   bitlinear                        codes, and weight_scale = 1 / scale    (Falcon-E, HF1BitLLM)
    gptq, awq        quant_method gptq or awq         codes of 2 to 8 bits in groups: stored.py

    A bias of the form packed is stored as bias / scale: there transformers multiplies it with the scale as well.

`linear_class` defaults to bitlinear, so the meaning of weight_scale (shape [1]) turns over with one word of the
configuration. The codes of a matrix [N, K] are uint8 [N / 4, K], by quarters of the rows: with c = q + 1, R = N / 4,

    byte [r, k], bit 7 .. 0    | c[3R + r, k] | c[2R + r, k] | c[R + r, k] | c[r, k] |

An offline folder may also hold the codes as floats [N, K]. Codes and scales go into PackedLinear as they are; nothing
ternary is quantized again. Embedding and head stay float: `pack()` makes them INT8 for the native engine.

Not understood, and refused with the reason: other architectures, biases elsewhere than in Qwen2, sliding windows,
rotary positions but plain ones and Llama 3.1's, norms inside the linear layers, and pickled weights, which could run
code. Folders are not trusted: shards are plain names inside the folder, every shape is checked against the files'
headers before anything of that size is made, and no code of the folder is run. Source: transformers' models (bitnet,
llama, mistral, qwen2, qwen3), integrations/bitnet.py.

Letters: N out_features, K in_features.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.quant import pack_codes
from bitnet.storage.hf.config import Form
from bitnet.storage.safetensors import CONFIG, FLOATS, Tensors, open_tensors

PACKED_ROWS = 4  # rows that share a byte
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def download(name: str) -> Path:
    """The local copy of a model named owner/name on the hub, downloaded if need be. Raises ValueError where there is
    none."""
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) or ".." in name:
        raise ValueError(f"{name} is not a folder, nor a hub name like owner/model; give the folder with {CONFIG}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{name} is not a folder, and downloading from the hub needs: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is not a folder and could not be downloaded from the hub ({str(error).splitlines()[0]}); check "
            "the name and the connection, or give a local folder"
        ) from error


def unpack_rows(packed: Tensor) -> Tensor:
    """Codes int8 `[N, K]` of uint8 `[N / 4, K]`, drawn at the top of this file. A pattern of no code becomes 2."""
    return torch.cat([((packed >> 2 * quarter) & 3) for quarter in range(PACKED_ROWS)]).view(torch.int8) - 1


def pack_rows(codes: Tensor) -> Tensor:
    """Inverse of `unpack_rows`: int8 `[N, K]` in [-1, 1], N a multiple of 4, to uint8 `[N / 4, K]`."""
    quarters = (codes + 1).to(torch.uint8).chunk(PACKED_ROWS)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def read_model(folder: Path, config: ModelConfig, form: Form) -> BitNetForCausalLM:
    """The model of a folder, in evaluation mode, its floats in float32; what `parse_config` gives of its config.json.

    The packed forms give a packed model with float embedding and head. Raises ValueError for what is damaged or does
    not fit the configuration.
    """
    with open_tensors(folder) as tensors:
        return _build(config, form, tensors)


def inventory(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, dict[str, str]]:
    """The configuration as the tensors have it, and the name in the files of each tensor that says something. Raises
    ValueError for more layers than tensors."""
    if config.num_hidden_layers > len(tensors.names):
        raise ValueError(
            f"{tensors.path}: {CONFIG} says {config.num_hidden_layers} layers and there are only "
            f"{len(tensors.names)} tensors"
        )
    config, renamed, ignored = _tied(config, tensors)
    return config, {renamed.get(name, name): name for name in tensors.names - ignored}


def check_names(tensors: Tensors, form: Form, found: set[str], expected: set[str]) -> None:
    """Raise ValueError unless the tensors are exactly those that are expected."""
    if missing := sorted(expected - found):
        raise ValueError(f"{tensors.path} lacks {len(missing)} tensors of its {CONFIG}, {missing[0]} among them")
    if form == "dense" and any(name.endswith(".weight_scale") for name in found):
        raise ValueError(f"{tensors.path} holds packed weights, and its {CONFIG} has no quantization_config for them")
    if left := sorted(found - expected):
        raise ValueError(
            f"{tensors.path} has {len(left)} tensors that this architecture ({form}) has no place for, such as "
            f"{left[0]}; leaving them out would change the model"
        )


def _build(config: ModelConfig, form: Form, tensors: Tensors) -> BitNetForCausalLM:
    config, source = inventory(config, tensors)
    shapes = {name: list(shape) for name, shape in config.tensor_shapes().items()}
    projections = [name for name in shapes if name.endswith("_proj.weight")]
    packed = {name: name.removesuffix(".weight") for name in projections} if form.startswith("packed") else {}
    expected = {*shapes, *(f"{module}.weight_scale" for module in packed.values())}
    check_names(tensors, form, set(source), expected)
    for name, shape in shapes.items():  # all headers before the first tensor is read
        if name in packed:
            _check_packed(tensors, packed[name], shape)
        else:
            tensors.check(source[name], shape, FLOATS)
    state: dict[str, Tensor] = {}
    for name in shapes:
        if name in packed:
            module = packed[name]
            state[f"{module}.packed_weight"], state[f"{module}.weight_scale"] = _ternary(tensors, module, form)
        elif form == "packed" and name.endswith(".bias"):  # behind its matrix
            scale = tensors.read(f"{name.removesuffix('.bias')}.weight_scale").double().view(1)
            state[name] = (tensors.read(source[name]).double() * scale).float()
        else:
            state[name] = tensors.read(source[name]).to(torch.float32, copy=True)
    return BitNetForCausalLM.from_tensors(config, state)


def _tied(config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, dict[str, str], set[str]]:
    """The configuration as the tensors have it, new names for tensors, and the ones that say nothing new.

    Like transformers: of a tied pair either may be stored, and two different matrices are not tied.
    """
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    ignored = {name for name in tensors.names if name.endswith(".rotary_emb.inv_freq")}  # of old LLaMA checkpoints
    if not config.tie_word_embeddings or head not in tensors.names:
        return config, {}, ignored
    if embedding not in tensors.names:
        return config, {head: embedding}, ignored
    shape = [config.vocab_size, config.hidden_size]
    for name in (embedding, head):
        tensors.check(name, shape, FLOATS)
    if torch.equal(tensors.read(embedding), tensors.read(head)):
        return config, {}, ignored | {head}
    return config.replace(tie_word_embeddings=False), {}, ignored


def _check_packed(tensors: Tensors, module: str, shape: list[int]) -> None:
    rows, columns = shape
    if tensors.kind(f"{module}.weight") == "U8":
        if rows % PACKED_ROWS:
            raise ValueError(f"{tensors.path}: {module} has {rows} rows, and four of them share a byte")
        shape = [rows // PACKED_ROWS, columns]
    tensors.check(f"{module}.weight", shape, (*FLOATS, "U8"))
    scale = f"{module}.weight_scale"
    if tensors.shape(scale) not in ([], [1], [1, 1]) or tensors.kind(scale) not in FLOATS:
        raise ValueError(f"{tensors.path}: {scale} is {tensors.kind(scale)} {tensors.shape(scale)}, not one float")


def _ternary(tensors: Tensors, module: str, form: Form) -> tuple[Tensor, Tensor]:
    """A projection's codes in our layout (`bitnet/quant/packing.py`) and its scale, float32 `[1, 1]`."""
    try:
        packed = pack_codes(read_codes(tensors.read(f"{module}.weight")), 2)
        return packed, read_scale(tensors.read(f"{module}.weight_scale"), form)
    except ValueError as error:
        raise ValueError(f"{tensors.path}: {module}: {error}") from error


def read_codes(weight: Tensor) -> Tensor:
    """Codes int8 `[N, K]` of a stored weight: uint8 `[N / 4, K]`, or floats `[N, K]`. Raises ValueError for others
    than -1, 0 and 1."""
    # Clamped first, so that a large float becomes no valid code by wrapping.
    codes = unpack_rows(weight) if weight.dtype == torch.uint8 else weight.float().clamp(-2, 2).to(torch.int8)
    fractions = weight.dtype != torch.uint8 and not torch.equal(codes.to(weight.dtype), weight)
    if fractions or (codes.numel() and int(codes.abs().max()) > 1):
        raise ValueError("its weight holds other codes than -1, 0 and 1; it is damaged")
    return codes


def read_scale(stored: Tensor, form: Form) -> Tensor:
    """The scale float32 `[1, 1]` of a weight_scale as the form stores it. Raises ValueError where it is none."""
    # In float64: 1 / (1 / scale) in float32 loses the last bit of some scales.
    scale = 1 / stored.double() if form == "packed-inverse" else stored.double()
    scale = scale.float().view(1, 1)
    if not (0 < float(scale) < float("inf")):
        raise ValueError(f"it has the scale {float(scale)}; it must be above 0 and finite")
    return scale
