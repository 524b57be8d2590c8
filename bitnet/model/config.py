"""The shape of a model, under Hugging Face's field names, and the presets.

The sizes named after the paper are arXiv 2402.17764's (with MHA, SwiGLU); `2b-4t` is microsoft/bitnet-b1.58-2B-4T.
Every preset but `tiny` keeps hidden_size and intermediate_size multiples of 256 where its source does, so that the
packed layout and the block formats of other engines need no padding.
"""

import dataclasses
import math
from dataclasses import dataclass

from bitnet.kernels import check_quantizer

ACTIVATIONS = ("silu", "relu2")
MAX_MATRIX_VALUES = 2**40
"""Weights of one matrix: far more than there are, and far from where their bytes overflow 64 bits."""
MAX_ROPE_VALUES = 2**25
"""Positions times head_dim: the one size that no tensor bounds. A 128k context with heads of 128 is half of it."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of one model. Raises ValueError for a combination that cannot be built."""

    vocab_size: int = 32000
    """Number of token ids; a training run takes it from its tokenizer."""
    hidden_size: int = 512
    """Width C of the residual stream."""
    intermediate_size: int = 1536
    """Width F of the feed-forward layer."""
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    """Heads that keep keys and values; fewer than num_attention_heads is grouped-query attention."""
    head_dim: int | None = None
    """Width D of a head; hidden_size / num_attention_heads unless given."""
    max_position_embeddings: int = 2048
    """Longest sequence the model accepts, in tokens."""
    rope_theta: float = 10000.0
    rope_factors: tuple[float, ...] = ()
    """Divisors of the head_dim / 2 rotary frequencies, the fastest first, as in Llama 3.1; empty for plain ones."""
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    """Gate activation of the feed-forward layer: silu or relu2 (squared ReLU)."""
    sub_norm: bool = True
    """RMSNorm before o_proj and down_proj (attn_sub_norm, ffn_sub_norm), as in BitNet b1.58 2B-4T."""
    qkv_bias: bool = False
    """A bias behind q_proj, k_proj and v_proj, as in Qwen2."""
    qk_norm: bool = False
    """RMSNorm of every head of q and k before they are rotated (q_norm, k_norm), as in Qwen3."""
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    quantizer: str = "ternary"
    """Weight quantizer of every projection: ternary, ternary-g64 or ternary-g128 (a scale for each 64 or 128 columns),
    binary, int8, int4 or none (the float twin)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_factors", _factors(self.rope_factors))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if field.name == "rope_factors":
                continue
            of_kind = isinstance(value, kind) or (kind is float and isinstance(value, int))  # type: ignore[arg-type]
            if not of_kind or isinstance(value, bool) != (kind is bool):  # a bool is an int to Python
                raise ValueError(f"{field.name} is {value!r}; it must be of type {getattr(kind, '__name__', kind)}")
        check_quantizer(self.quantizer)
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value < 2**31:
                raise ValueError(f"{field.name} is {value}; it must be at least 1 and below 2^31")
            if isinstance(value, float) and not 0 < value < math.inf:
                raise ValueError(f"{field.name} is {value}; it must be above 0 and finite")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}; "
                "choose a divisor or give head_dim"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}; choose a divisor"
            )
        if self.head_width % 2:
            raise ValueError(f"head_dim {self.head_width} is odd; rotary embedding rotates pairs, choose an even one")
        if self.rope_factors and len(self.rope_factors) != self.head_width // 2:
            raise ValueError(
                f"there are {len(self.rope_factors)} rope_factors for heads of {self.head_width}; give one for each "
                f"pair of dimensions, {self.head_width // 2}"
            )
        widest = max(self.vocab_size, self.intermediate_size, self.num_attention_heads * self.head_width)
        if widest * self.hidden_size > MAX_MATRIX_VALUES:
            raise ValueError(
                f"a matrix would be {widest:,} x {self.hidden_size:,}, which nothing holds; check the sizes"
            )
        if self.max_position_embeddings * self.head_width > MAX_ROPE_VALUES:
            raise ValueError(
                f"max_position_embeddings {self.max_position_embeddings} would take a table of "
                f"{8 * self.max_position_embeddings * self.head_width:,} bytes; lower it to the length that you need"
            )

    @property
    def head_width(self) -> int:
        """Width D of a head: `head_dim`, or hidden_size / num_attention_heads where that is None."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def projections(self) -> dict[str, tuple[int, int]]:
        """The seven matrices of a layer: names inside it, `(out_features, in_features)` each, in the order of use."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = (heads * self.head_width for heads in (self.num_attention_heads, self.num_key_value_heads))
        return {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def biases(self) -> dict[str, int]:
        """The biases of a layer: names of their projections inside it, and widths."""
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") if self.qkv_bias else ()
        return {name: self.projections()[name][0] for name in names}

    def norms(self) -> dict[str, int]:
        """The norms of a layer: names inside it, and widths."""
        inner = {name: columns for name, (_, columns) in self.projections().items()}
        sub_norms = {"self_attn.attn_sub_norm": inner["self_attn.o_proj"], "mlp.ffn_sub_norm": inner["mlp.down_proj"]}
        outer = {"input_layernorm": self.hidden_size, "post_attention_layernorm": self.hidden_size}
        heads = dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), self.head_width)
        return outer | (heads if self.qk_norm else {}) | (sub_norms if self.sub_norm else {})

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The state_dict of the float model: names and shapes, without the model."""
        table = (self.vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
        layer: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in self.projections().items()}
        layer |= {f"{name}.weight": (width,) for name, width in self.norms().items()}
        layer |= {f"{name}.bias": (width,) for name, width in self.biases().items()}
        for index in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        return shapes if self.tie_word_embeddings else shapes | {"lm_head.weight": table}

    def replace(self, **changes: object) -> "ModelConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> "ModelConfig":
        """Inverse of `dataclasses.asdict`. Raises ValueError for fields that do not exist."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown model fields {', '.join(unknown)}; was this written by a newer version?")
        return cls(**values)  # type: ignore[arg-type]


def _factors(values: object) -> tuple[float, ...]:
    """Rotary factors as a tuple; JSON has lists."""
    if not isinstance(values, (tuple, list)):
        raise ValueError(f"rope_factors is {values!r:.60}; it must be a list of numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"rope_factors has {value!r:.60}; they must be numbers above 0 and finite")
    return tuple(map(float, values))


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int | None = None) -> ModelConfig:
    """The numbers of a preset in one line; as many heads of keys and values as of queries unless given."""
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
    )


PRESETS: dict[str, ModelConfig] = {
    "tiny": _shape(64, 128, 2, 4, kv_heads=2).replace(vocab_size=512, max_position_embeddings=128),
    "demo": _shape(256, 768, 4, 4).replace(vocab_size=4096, max_position_embeddings=256),
    "small": ModelConfig(vocab_size=8192, max_position_embeddings=512),
    "125m": _shape(768, 2048, 12, 12),
    "700m": _shape(1536, 4096, 24, 16),
    "1.3b": _shape(2048, 5460, 24, 32),
    "3b": _shape(3200, 8640, 26, 32),
    "2b-4t": _shape(2560, 6912, 30, 20, kv_heads=5).replace(
        vocab_size=128256,
        head_dim=128,
        max_position_embeddings=4096,
        rope_theta=500000.0,
        hidden_act="relu2",
    ),
}
