"""Models of Hugging Face's transformers as oracles: of our shape, with our weights, our logits and our greedy text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.kernels.reference import quantize_activations
from bitnet.model import BitNetForCausalLM, ModelConfig
from tests import oracles

TINY = ModelConfig(
    vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
)  # fmt: skip
SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "relu2": {"hidden_act": "relu2"},
    "untied": {"tie_word_embeddings": False},
    "theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-3},
    "head_dim 16": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "head_dim 2": {"num_attention_heads": 16, "num_key_value_heads": 8},
    "head_dim given": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    "llama": {"sub_norm": False},
    "llama, wide heads": {"sub_norm": False, "head_dim": 24},
    "llama, narrow heads": {"sub_norm": False, "head_dim": 6, "tie_word_embeddings": False},
    "llama, rotary factors": {"sub_norm": False, "rope_factors": (1.0, 1.5, 3.0, 8.0), "rope_theta": 50.0},
    "qwen2": {"sub_norm": False, "qkv_bias": True},
    "qwen3": {"sub_norm": False, "qk_norm": True, "head_dim": 24, "tie_word_embeddings": False},
}


def class_of(config: ModelConfig) -> str:
    """The class of a configuration, without its ending ForCausalLM."""
    return "BitNet" if config.sub_norm else "Qwen3" if config.qk_norm else "Qwen2" if config.qkv_bias else "Llama"


def oracle(transformers, config: ModelConfig) -> nn.Module:
    """Their model of the same shape, of the class that has its parts. Dense, in evaluation mode."""
    kind = class_of(config)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_factors:
        table, length = list(config.rope_factors), config.max_position_embeddings
        rope |= {"rope_type": "longrope", "short_factor": table, "long_factor": table, "attention_factor": 1.0}
        rope["original_max_position_embeddings"] = length
    theirs = getattr(transformers, f"{kind}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_width,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        hidden_act=config.hidden_act,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters=rope,
        bos_token_id=None,
        eos_token_id=None,
        attention_bias=False,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(theirs).eval()


def load_into(theirs: nn.Module, ours: BitNetForCausalLM) -> None:
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if ours.config.tie_word_embeddings else [])
    theirs.tie_weights()


def load(transformers: Any, folder: Path) -> nn.Module:
    oracles.require("accelerate")  # transformers wants it for quantized models
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # They leave embedding and norms of a packed bfloat16 file as they are, and then fail to multiply two dtypes.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model


def assert_same_logits(ours: BitNetForCausalLM, theirs: nn.Module, ids: Tensor, flips: float = 0.25) -> None:
    """Logits within 1e-5 in every row of ids in which both quantized the activations to the same codes.

    They multiply by 127 / absmax where we divide by absmax / 127, and their float sums round differently, so now and
    then a value on a border gets the next code. Such a row differs by what that code is worth; at most a share of
    `flips` of the rows may, and only a little.
    """
    codes: dict[str, list[Tensor]] = {}

    def record(name: str, quantize: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        return lambda module, inputs: codes.setdefault(name, []).append(quantize(inputs[0]))

    def theirs_quantize(x: Tensor) -> Tensor:
        return (x * (127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5))).round().to(torch.int8)

    quantized = ours.config.quantizer != "none"
    hooks = []
    for name, module in ours.named_modules():
        if quantized and name.endswith("_proj"):
            hooks.append(module.register_forward_pre_hook(record(name, lambda x: quantize_activations(x)[0])))
            other = theirs.get_submodule(name)
            assert "BitLinear" in type(other).__name__
            hooks.append(other.register_forward_pre_hook(record(name, theirs_quantize)))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits, expected = ours(ids), theirs(ids).logits
    for hook in hooks:
        hook.remove()
    assert len(codes) == (7 * ours.config.num_hidden_layers if quantized else 0)
    assert logits.std() > 0.3
    same = torch.ones(len(ids), dtype=torch.bool)
    for first, second in codes.values():
        same &= (first == second).flatten(1).all(1)
    assert same.float().mean() >= (1 - flips if quantized else 1)
    torch.testing.assert_close(logits[same], expected[same], rtol=0, atol=1e-5)
    assert (logits - expected).norm() < 0.02 * expected.norm()


def greedy(model: Any, ids: Tensor, count: int) -> Tensor:
    cache = model.new_cache(len(ids), ids.shape[1] + count)
    new = [ids]
    with torch.no_grad():
        for _ in range(count):
            new.append(model(new[-1], cache, last_only=True)[:, -1:].argmax(-1))
    return torch.cat(new, 1)


def assert_same_text(ours: Any, theirs: nn.Module, ids: Tensor) -> None:
    """64 greedy tokens are the same, of our model or an engine."""
    with torch.compiler.set_stance("force_eager"):
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
    assert expected.shape[1] == ids.shape[1] + 64
    assert torch.equal(greedy(ours, ids, 64), expected)
