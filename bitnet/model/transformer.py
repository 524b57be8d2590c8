"""The decoder-only BitNet b1.58 transformer, whole.

    h = embed(ids)
    per layer   h += o_proj(attn_sub_norm(attention(input_layernorm(h))))
                h += down_proj(ffn_sub_norm(act(gate_proj(n)) * up_proj(n))),  n = post_attention_layernorm(h)
    logits = lm_head(norm(h))

The seven projections of a layer are BitLinear; embedding, lm_head, norms, softmax and the residual stream are not
quantized. The norms stand outside BitLinear, as in microsoft/bitnet-b1.58-2B-4T, and module names are Hugging Face's,
so a checkpoint's tensor names are those of transformers' BitNetForCausalLM. The configuration also expresses the
float models that are compared and converted: without sub-norms, Llama's and Mistral's; with biases behind q, k and v,
Qwen2's; with an RMSNorm of every head of q and k, Qwen3's.

Letters: B batch, T new tokens, S cached length, C hidden_size, H query heads, G key/value heads, D head_dim,
F intermediate_size, V vocab_size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitnet.model.config import ModelConfig
from bitnet.model.kv_cache import KVCache
from bitnet.model.linear import BitLinear, PackedEmbedding, PackedLinear, pack
from bitnet.model.loss import Taught, chunked_loss, cross_entropy, next_token_loss
from bitnet.model.quantized_cache import Cache, QuantizedKVCache


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension; statistics in float32, output in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 `[max_position_embeddings, D]`, of `position * theta^(-2i/D) / rope_factors[i]`; the
    two halves repeat the same angles, since the rotation pairs dimension i with i + D/2 (the NEOX order)."""
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float32) / config.head_width
    frequencies = config.rope_theta**-exponents
    if config.rope_factors:
        frequencies = frequencies / torch.tensor(config.rope_factors)
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x `[B, heads, T, D]` by the angles of its positions; cos and sin are `[T, D]`."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def document_mask(documents: Tensor) -> Tensor:
    """Which tokens each one sees, bool `[B, 1, T, T]`: those of its own document (int64 `[B, T]`), up to itself.

    Positions are not counted anew in each document, which changes nothing inside one: a rotary score depends only on
    the distance of two tokens.
    """
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_width
        self.q_proj = _projection(config, "self_attn.q_proj")
        self.k_proj = _projection(config, "self_attn.k_proj")
        self.v_proj = _projection(config, "self_attn.v_proj")
        self.o_proj = _projection(config, "self_attn.o_proj")
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        width = self.o_proj.in_features
        self.attn_sub_norm = RMSNorm(width, config.rms_norm_eps) if config.sub_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            rearrange(projection(x), "b t (heads d) -> b heads t d", d=self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
            k, v = k.to(q.dtype), v.to(q.dtype)
        T, total = q.shape[2], k.shape[2]
        if 1 < T < total:  # new tokens behind cached ones: row t sees the S cached positions and the first t + 1 new
            mask = torch.ones(T, total, dtype=torch.bool, device=q.device).tril(total - T)
        grouped = q.shape[1] != k.shape[1]
        if grouped and mask is not None and q.device.type == "cuda":
            # Of torch's fused kernels none takes a mask together with shared heads, and the unfused one stores all
            # scores, in training until the backward pass.
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
            grouped = False
        causal = mask is None and T == total > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return self.o_proj(self.attn_sub_norm(rearrange(out, "b heads t d -> b t (heads d)")))


class MLP(nn.Module):
    """Gated feed-forward layer: `down(norm(act(gate(x)) * up(x)))`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = _projection(config, "mlp.gate_proj")
        self.up_proj = _projection(config, "mlp.up_proj")
        self.down_proj = _projection(config, "mlp.down_proj")
        self.ffn_sub_norm = RMSNorm(config.intermediate_size, config.rms_norm_eps) if config.sub_norm else nn.Identity()
        self.hidden_act = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = F.silu(gate) if self.hidden_act == "silu" else F.relu(gate).square()
        return self.down_proj(self.ffn_sub_norm(gate * self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, mask: Tensor | None = None) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, cache, mask)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    """Embedding, layers and final norm: token ids `[B, T]` to hidden states `[B, T, C]`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # keep only the layers' inputs for the backward, and run each layer again there
        shape, table = (config.vocab_size, config.hidden_size), (config.max_position_embeddings, config.head_width)
        # To draw or count on the meta device torch imports its compiler, 150 MB.
        on_meta = torch.get_default_device().type == "meta"
        embedding = nn.Embedding.from_pretrained(torch.empty(shape), freeze=False) if on_meta else nn.Embedding(*shape)
        self.embed_tokens: Any = embedding
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        cos, sin = (torch.empty(table), torch.empty(table)) if on_meta else rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:  # model.half() casts buffers too, and rounded angles are other positions
            cos, sin = rope_tables(self.config)
            self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self

    def forward(self, input_ids: Tensor, cache: Cache | None = None, documents: Tensor | None = None) -> Tensor:
        start = cache.length if cache is not None else 0
        end = start + input_ids.shape[1]
        if end > self.config.max_position_embeddings:
            raise ValueError(
                f"{end} tokens are more than the model's {self.config.max_position_embeddings} positions; "
                "shorten the input, or train with a larger max_position_embeddings"
            )
        h = self.embed_tokens(input_ids)
        cos, sin = self.cos[start:end], self.sin[start:end]
        assert cache is None or documents is None  # cached tokens belong to one document
        mask = None if documents is None else document_mask(documents)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(layer, h, cos, sin, cache, mask, use_reentrant=False)
            else:
                h = layer(h, cos, sin, cache, mask)
        if cache is not None:
            cache.advance(end - start)
        return self.norm(h)


class BitNetForCausalLM(nn.Module):
    """The language model: `model` (the decoder) and `lm_head`, which is the embedding again when they are tied."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head: Any = None  # pack() puts other modules in the place of these two
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, False)
        self.loss_chunk = 0  # tokens whose logits are in memory at a time; 0 for all
        self.cache_bits: int | None = None  # of keys and values in new_cache(): 8 or 4, or floats
        self.document_ids: Callable[[Tensor], Tensor] | None = None  # of token ids; loss() attends inside a document
        self.next_token_loss = next_token_loss  # an attribute, so that compile_model can replace it
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, cache: Cache | None = None, *, last_only: bool = False) -> Tensor:
        """Logits `[B, T, V]` of token ids int64 `[B, T]`, or `[B, 1, V]` of the last position with `last_only`.

        With a cache, the tokens continue the ones it holds and are added to it. Raises ValueError for more positions
        than the model has.
        """
        h = self.model(input_ids, cache)
        return self._logits(h[:, -1:] if last_only else h)

    def _logits(self, h: Tensor) -> Tensor:
        if self.lm_head is not None:
            return self.lm_head(h)
        table = self.model.embed_tokens
        return table.project(h) if isinstance(table, PackedEmbedding) else F.linear(h, table.weight)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        reduction: str = "mean",
        documents: Tensor | None = None,
        taught: Taught | None = None,
        unused: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in nats of ids and labels int64 `[B, T]`, where label t is the token that follows id t and
        -100 does not count: the mean, or `[B, T]` with reduction "none"; beside it the distance from what a teacher
        says of the same ids, where that is given. Attention does not cross the borders of documents where they are
        given, as `document_ids` gives them, or that attribute is set. `unused`: rows of the head, int64 `[U]`,
        that have no share of the softmax (`drawable_logits`)."""
        h = self.states(input_ids, documents)
        loss: Any = self.next_token_loss
        head = None if self.head_is_packed else self.head_weight
        if head is None:
            assert taught is None
            loss = self._packed_loss
        if self.loss_chunk and labels.numel() > self.loss_chunk:
            return chunked_loss(loss, h, head, labels, reduction, self.loss_chunk, taught, unused)
        return loss(h, head, labels, reduction, taught, unused)

    def _packed_loss(
        self, h: Tensor, head: None, labels: Tensor, reduction: str, taught: None, unused: Tensor | None
    ) -> Tensor:
        return cross_entropy(self._logits(h), labels, reduction, unused)

    def states(self, input_ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """What the head multiplies, `[B, T, C]`, of ids and documents as `loss` takes them."""
        if documents is None and self.document_ids:
            documents = self.document_ids(input_ids)
        return self.model(input_ids, documents=documents)

    def pack(self, *, embeddings: bool = True) -> "BitNetForCausalLM":
        """The inference form, in place: 2-bit projections and, with `embeddings`, INT8 embedding and head (one table
        where they are tied).

        With `embeddings` no float matrix is left but the norms, and the native engine
        (`bitnet/inference/cpu_engine.py`) runs exactly this model; without, the logits are the trained model's. What is
        packed already stays as it is, so a second call packs the embeddings of a model that came without. In a float
        twin only embedding and head become INT8. Raises ValueError for weights that are NaN or infinite.
        """
        check_finite(self)
        if embeddings and not self.head_is_packed:
            if self.lm_head is not None:
                self.lm_head = PackedLinear.from_linear(self.lm_head, "int8")
            self.model.embed_tokens = PackedEmbedding.from_weight(self.model.embed_tokens.weight)
        if any(isinstance(module, BitLinear) for module in self.modules()):
            pack(self)
        return self

    @classmethod
    def from_tensors(
        cls, config: ModelConfig, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module] | None = None
    ) -> "BitNetForCausalLM":
        """The model whose state_dict `tensors` is, in evaluation mode; shares the tensors, on their device.

        A matrix with a `packed_weight` becomes the packed layer that `pack()` would have made of it. `modules` stand in
        the place of those of their names, on the meta device: the layers of weights that were quantized after training.
        Raises ValueError for tensors that are missing, left over or of another shape, and for modules that the model
        has no place for.
        """
        if config.num_hidden_layers > len(tensors):  # before as many modules are made
            raise ValueError(f"{config.num_hidden_layers} layers and only {len(tensors)} tensors")
        with torch.device("meta"):
            model = cls(config)
            places = dict(model.named_modules())
            for name, module in (_packed_modules(places, tensors) | dict(modules or {})).items():
                parent, _, child = name.rpartition(".")
                if name not in places:
                    raise ValueError(f"the model has no place for a module {name}")
                setattr(places[parent], child, module)
        try:
            model.load_state_dict(dict(tensors), assign=True)
        except RuntimeError as error:  # torch's, for names and shapes
            raise ValueError(str(error)) from error
        device = model.device
        model.model.cos, model.model.sin = (table.to(device) for table in rope_tables(config))
        return model.eval()

    @property
    def is_packed(self) -> bool:
        """Whether the projections are packed codes; embedding and head may still be float."""
        return any(isinstance(module, PackedLinear) for module in self.model.layers.modules())

    @property
    def head_is_packed(self) -> bool:
        """Whether embedding and output head are INT8."""
        return isinstance(self.model.embed_tokens, PackedEmbedding)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache on the model's device, in its dtype or in `cache_bits`."""
        if self.cache_bits is not None:
            return QuantizedKVCache(self.config, batch_size, max_length, self.device, bits=self.cache_bits)
        return KVCache(self.config, batch_size, max_length, self.device, self.model.norm.weight.dtype)

    def weight_bytes(self) -> int:
        """Bytes of weights that one decoding step has to read, as they are stored: a packed layer's codes and scales.

        An embedding that is not tied to the head is left out: a step reads B rows of it. This is what the stored
        formats need; a kernel that unpacks into memory moves more.
        """
        total = sum(tensor.nbytes for tensor in self.state_dict().values())  # no cos and sin: they are not persistent
        if self.lm_head is not None:
            total -= sum(tensor.nbytes for tensor in self.model.embed_tokens.state_dict().values())
        return total

    @property
    def head_weight(self) -> Tensor:
        """The float output matrix `[V, C]`."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Trainable and frozen parameters, tied ones once; without the embedding table and lm_head if asked."""
        total = sum(p.numel() for p in self.parameters())
        if not embeddings:
            total -= self.model.embed_tokens.weight.numel()
            total -= 0 if self.lm_head is None else self.lm_head.weight.numel()
        return total


def _packed_modules(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Empty layers for the matrices of a model that `tensors` hold as packed codes, by name."""
    packed: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if f"{name}.packed_weight" not in tensors:
            continue
        if isinstance(module, nn.Embedding):
            packed[name] = PackedEmbedding(module.num_embeddings, module.embedding_dim)
        elif isinstance(module, nn.Linear):
            quantizer = module.quantizer if isinstance(module, BitLinear) else "int8"  # of the head
            if quantizer != "none":
                bias = module.bias is not None
                packed[name] = PackedLinear(module.in_features, module.out_features, bias, quantizer=quantizer)
    return packed


def _projection(config: ModelConfig, name: str) -> Any:
    # Any, because pack() puts a PackedLinear in its place.
    out_features, in_features = config.projections()[name]
    return BitLinear(in_features, out_features, bias=name in config.biases(), quantizer=config.quantizer)


def check_finite(model: nn.Module) -> None:
    """Raise ValueError for a parameter with NaN or infinity in it, before something is made of it."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise ValueError(
                f"{name.removesuffix('.weight')} has NaN or infinite weights; did the model's training diverge?"
            )
