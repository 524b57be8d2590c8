"""A packed model as the Triton kernels run it: fused projections, a static cache, decoding in a CUDA graph.

    model = open_source(path).model().pack()            2-bit projections, INT8 embedding and head
    engine = GpuEngine.from_model(model, device="cuda")  the same weights, fused; the torch model can go
    cache = engine.new_cache(1, 512)
    logits = engine(ids, cache, last_only=True)

It is called like `BitNetForCausalLM`, the specification. Per layer:

    q, k, v = qkv(norm+quantize(h))        a = attention, rotation and cache in it
    h = h + o_proj(norm+quantize(a))       g = gate_up(norm+quantize(h))       h = h + down_proj(act+norm+quantize(g))

Attention of one token is one launch, of several a launch for rotation and cache and torch's attention. A projection is
two, quantization and product, or one where that is faster (`bitnet/kernels/triton/project.py`).

A step of one new token is captured in a CUDA graph once per batch size and cache capacity; the number of filled
positions lies on the device. Longer inputs have torch's attention. Of prompts up to 1,024 tokens, whose launches take
longer than their arithmetic, a graph is captured when their length, rounded up, comes for the second time in a cache's
buffers; others run eagerly.

The integer products are the reference's; between them `dtype` counts (float32 or bfloat16). Letters as in
`bitnet/model/transformer.py`.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet.console import progress_bar
from bitnet.inference.engine import NOT_FINITE, beyond_kernels, build_exactly, check_ids
from bitnet.kernels import PACKED_BITS
from bitnet.kernels import triton as backend
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.transformer import rope_tables
from bitnet.quant import packed_width

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_DTYPES = {**DTYPES, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_CAPACITY_STEP = 256
_KEPT_STORAGES = 4
"""Caches that nobody holds any more but that are kept, with their graphs, for the next text."""
_PROMPT_TOKENS = 1024
"""Of all sequences together, up to which the CPU's launches take longer than the kernels."""
_PROMPT_GRAPHS = 4
"""Kept for one cache's buffers, the newest; each holds memory of its own."""
_MASK_VALUES = 2**25
"""Of one mask of attention behind a cache."""


class _Graph:
    """What `_forward` does with T tokens a row, captured: `ids` `[B, T]` and `last`, the index of the position whose
    logits are wanted, go in."""

    def __init__(self, batch_size: int, tokens: int, device: torch.device) -> None:
        self.ids = torch.zeros(batch_size, tokens, dtype=torch.int64, device=device)
        self.last = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.empty(0, device=device)
        self.graph: Any = None

    def replay(self) -> Tensor:
        """Float32 `[B, 1, V]`, over which the next replay writes."""
        self.graph.replay()
        return self.logits


class _Storage:
    """Buffers of one cache and the graphs that were captured over them; outlives the cache and serves the next one."""

    def __init__(self, config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device):
        from bitnet.kernels.triton import attention

        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, config.head_width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        codes = dtype == torch.int8
        self.scales = torch.zeros(2, *shape[:-1], device=device) if codes else None  # float32, of keys and of values
        self.start = torch.zeros(1, dtype=torch.int32, device=device)  # positions that are filled
        self.parts = attention.AttentionParts(
            batch_size, config.num_attention_heads, config.num_key_value_heads, config.head_width, capacity, device
        )
        self.graphs: dict[int, _Graph | None] = {}  # by tokens a row, the newest last; None: seen once


class GpuCache:
    """Keys and values of all layers for up to `max_length` positions of `batch_size` sequences of one length."""

    def __init__(self, config: ModelConfig, storage: _Storage, max_length: int) -> None:
        self.config, self.storage, self.max_length = config, storage, max_length
        self.length = 0

    @property
    def batch_size(self) -> int:
        return self.storage.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the filled part, which one decoding step reads."""
        keys, scales = self.storage.keys, self.storage.scales
        filled = 2 * keys[:, :, :, : self.length].numel() * keys.element_size()
        return filled if scales is None else filled + 4 * scales[:, :, :, :, : self.length].numel()


class _Matrix:
    """Packed rows of one or several projections, and a scale for every row."""

    def __init__(self, packed: list[Tensor], scales: list[Tensor], bits: int, in_features: int) -> None:
        self.packed = torch.cat(packed).contiguous()
        rows = zip(packed, scales, strict=True)
        self.scale = torch.cat([scale.float().reshape(-1).expand(len(part)) for part, scale in rows]).contiguous()
        self.bits, self.in_features = bits, in_features

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes


class GpuEngine:
    """A packed BitNet b1.58 model on the Triton kernels. Called like `BitNetForCausalLM`.

    `tensor(name)` returns a tensor of the packed model's state_dict; it is called once for each of `names` and may read
    a file. `dtype` is that of the residual stream and of attention, and unless `cache_dtype` says otherwise of keys and
    values: float32, bfloat16, float16, int8 with a scale for every position of a head, or fp8 (E4M3) with none, where
    what is beyond 448 becomes 448 and what is below 2^-6 loses bits (`bitnet/kernels/triton/attention.py`). With
    `layers` it is the first layers of a model alone, and a call returns the residual stream behind them, float32
    `[B, T, C]`, instead of logits.
    Raises ValueError where Triton or the GPU is missing, the model is not packed, or its tensors are not exactly those
    of the configuration.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensor: Callable[[str], Tensor],
        names: Iterable[str] | None = None,
        *,
        device: torch.device | str = "cuda",
        dtype: str = "bfloat16",
        cache_dtype: str | None = None,
        graphs: bool = True,
        layers: int | None = None,
    ) -> None:
        if config.quantizer == "none":
            raise ValueError("the engine runs packed weights and this is a float model; run it in torch")
        if unknown := beyond_kernels(config):
            raise ValueError(f"the Triton kernels do not compute {' and '.join(unknown)}; run the model in torch")
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if cache_dtype not in (None, *CACHE_DTYPES):
            raise ValueError(f"cache {cache_dtype!r} is unknown on a GPU; choose one of {', '.join(CACHE_DTYPES)}")
        self._device = torch.device(device)
        backend.require(self._device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._whole = layers is None
        self.config = config if layers is None else config.replace(num_hidden_layers=layers)
        self.dtype = DTYPES[dtype]
        self.cache_dtype = CACHE_DTYPES[cache_dtype or dtype]
        self.graphs = graphs and self._device.type == "cuda"
        self._free: list[_Storage] = []  # the newest last
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(self._device) if self.graphs else None
        # Of the first layers alone, names are left over.
        build_exactly(self._build, lambda name: tensor(name).detach().to(self._device), names if self._whole else None)

    @classmethod
    def from_model(cls, model: BitNetForCausalLM, **options: Any) -> "GpuEngine":
        """The engine of a packed torch model, on its device unless another is given."""
        if not model.head_is_packed:
            raise ValueError("the model is not packed; call model.pack() first")
        tensors = model.state_dict()
        return cls(model.config, tensors.__getitem__, tensors, **{"device": model.device, **options})

    def _build(self, tensor: Callable[..., Tensor]) -> None:
        config, bits = self.config, PACKED_BITS[self.config.quantizer]
        C, V, shapes, norms = config.hidden_size, config.vocab_size, config.projections(), config.norms()

        def matrix(prefix: str, parts: dict[str, int], columns: int, bits: int = bits) -> _Matrix:
            width = packed_width(columns, bits)
            packed = [tensor(f"{prefix}{part}.packed_weight", rows, width) for part, rows in parts.items()]
            one = bits == 2
            scales = [tensor(f"{prefix}{part}.weight_scale", 1 if one else rows, 1) for part, rows in parts.items()]
            return _Matrix(packed, scales, bits, columns)

        def joined(prefix: str, *names: str) -> _Matrix:
            return matrix(prefix, {name: shapes[name][0] for name in names}, shapes[names[0]][1])

        def norm(name: str, size: int) -> Tensor:
            return tensor(f"{name}.weight", size).float().contiguous()

        table = matrix("", {"model.embed_tokens": V}, C, 8)
        self._table, self._table_scale = table.packed, table.scale.view(V, 1)
        self._head: _Matrix | None = None
        if self._whole:
            self._head = table if config.tie_word_embeddings else matrix("", {"lm_head": V}, C, 8)
            self._norm = norm("model.norm", C)
        self._matrices: list[dict[str, _Matrix]] = []
        self._norms: list[dict[str, Tensor | None]] = []
        for index in range(config.num_hidden_layers):
            prefix = f"model.layers.{index}."
            self._matrices.append(
                {
                    "qkv": joined(prefix, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                    "o": joined(prefix, "self_attn.o_proj"),
                    "gate_up": joined(prefix, "mlp.gate_proj", "mlp.up_proj"),
                    "down": joined(prefix, "mlp.down_proj"),
                }
            )
            names = {"qkv": "input_layernorm", "o": "self_attn.attn_sub_norm"}
            names |= {"gate_up": "post_attention_layernorm", "down": "mlp.ffn_sub_norm"}
            found = {part: norm(prefix + name, norms[name]) if name in norms else None for part, name in names.items()}
            self._norms.append(found)
        self._cos, self._sin = (part.to(self._device) for part in rope_tables(config))

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, cache: GpuCache | None = None, *, last_only: bool = False) -> Tensor:
        """Logits float32 `[B, T, V]` of token ids int64 `[B, T]`, or `[B, 1, V]` of the last position with `last_only`.

        With a cache, the tokens continue the ones it holds. Raises ValueError for ids or lengths that the model or the
        cache cannot take; a single id a row that is on the GPU is not waited for, and gives NaN if it is out of range.
        """
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
            raise ValueError(f"input_ids are {input_ids.dtype} {list(input_ids.shape)}; give int64 [batch, tokens]")
        B, T = input_ids.shape
        if T > 1 or input_ids.device.type == "cpu":
            check_ids(self.config, *(int(bound) for bound in input_ids.aminmax()))
        cache = self.new_cache(B, T) if cache is None else cache
        if cache.config != self.config or cache.storage.keys.device != self._device:
            raise ValueError("the cache belongs to another model; take one from new_cache")
        if cache.batch_size != B:
            raise ValueError(f"the cache is for {cache.batch_size} sequences and the input has {B}")
        if cache.length + T > cache.max_length:
            raise ValueError(
                f"the cache holds {cache.max_length} positions and {cache.length + T} are needed; make it longer"
            )
        storage = cache.storage
        storage.start.fill_(cache.length)
        graph = self._graph(storage, T) if T == 1 or (last_only and not cache.length) else None
        if graph is not None:
            graph.ids[:, :T].copy_(input_ids)  # what lies behind comes later than any token, which looks back only
            graph.last.fill_(T - 1)
            logits = graph.replay().clone()
        else:
            last = torch.full((1,), T - 1, device=self._device) if last_only else None
            logits = self._forward(
                input_ids.to(self._device).contiguous(), storage, None if T == 1 else cache.length, last
            )
        cache.length += T
        return logits

    def _graph(self, storage: _Storage, tokens: int) -> _Graph | None:
        """For so many tokens a row at least, or None where they run eagerly."""
        batch_size, _, capacity = storage.keys.shape[1:4]
        tokens = min(rounded_up(tokens), capacity)
        if not self.graphs or (tokens > 1 and batch_size * tokens > _PROMPT_TOKENS):
            return None
        known = storage.graphs
        if tokens > 1 and tokens not in known:
            known[tokens] = None
            return None
        graph = known.pop(tokens, None) or self._capture(storage, tokens)
        known[tokens] = graph
        for old in [size for size in known if size > 1][:-_PROMPT_GRAPHS]:
            del known[old]
        return graph

    def _capture(self, storage: _Storage, tokens: int) -> _Graph:
        # Once outside the graph, so that every kernel is compiled and loaded: it writes where the replay will write.
        # The stream is this engine's: torch's own for captures belongs to the device that captured first.
        side = self._stream
        assert side is not None
        found = _Graph(storage.keys.shape[1], tokens, self._device)
        call = functools.partial(self._forward, found.ids, storage, None if tokens == 1 else 0, found.last)
        graph = torch.cuda.CUDAGraph()
        with self._lock, torch.cuda.device(self._device):
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream(self._device).wait_stream(side)
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                found.logits = call()
        found.graph = graph
        return found

    def _forward(self, ids: Tensor, storage: _Storage, length: int | None, last: Tensor | None) -> Tensor:
        """Logits of ids `[B, T]`, with `last` those of the position with this index (int64 `[1]`) alone. `length` is
        the number of filled positions, None for one token, which reads it from the device."""
        from bitnet.kernels.triton import attention

        config = self.config
        (B, T), H, dtype = ids.shape, config.num_attention_heads, self.dtype
        h = attention.embed(ids.reshape(-1), self._table, self._table_scale, config.hidden_size, dtype)  # [M, C]
        layers = zip(self._matrices, self._norms, storage.keys, storage.values, strict=False)  # `_call` has one of them
        for index, (matrix, norm, keys, values) in enumerate(layers):
            scales = None if storage.scales is None else (storage.scales[0, index], storage.scales[1, index])
            qkv = self._projected(h, matrix["qkv"], norm["qkv"]).view(B, T, -1)
            positions = (self._cos, self._sin, storage.start, keys, values, H)
            if length is None:
                mixed = attention.attend(qkv, *positions, storage.parts, scales, constant=self.graphs)
            else:
                mixed = _attend(attention.rotate(qkv, *positions, scales), keys, values, scales, length)
            h = self._projected(mixed.view(B * T, -1), matrix["o"], norm["o"], h)
            gate_up = self._projected(h, matrix["gate_up"], norm["gate_up"])
            h = self._projected(gate_up, matrix["down"], norm["down"], h, config.hidden_act)
        h = h.view(B, T, -1)
        if self._head is None:
            return h.float()
        if last is not None and T > 1:
            h = h.index_select(1, last)
        logits = self._projected(h.reshape(-1, config.hidden_size), self._head, self._norm, dtype=torch.float32)
        return logits.view(B, -1, config.vocab_size)

    def _projected(
        self,
        x: Tensor,
        matrix: _Matrix,
        norm: Tensor | None,
        residual: Tensor | None = None,
        gate: str = "none",
        dtype: torch.dtype | None = None,
        plan: Any = None,
    ) -> Tensor:
        """`[gate] -> [norm] -> quantization -> product -> [+ residual]` of tokens x `[M, K]`, in the engine's type
        unless told; `plan` of the product as for another number of tokens."""
        from bitnet.kernels.triton.activations import quantize_activations
        from bitnet.kernels.triton.product import product
        from bitnet.kernels.triton.project import pays, project

        weights = matrix.packed, matrix.scale
        shape: dict[str, Any] = {"bits": matrix.bits, "in_features": matrix.in_features, "dtype": dtype or self.dtype}
        if plan is None and len(x) == 1 and pays(len(matrix.packed), matrix.in_features, matrix.bits):
            return project(x, norm, *weights, residual, eps=self.config.rms_norm_eps, gate=gate, **shape)
        tokens = quantize_activations(x, norm, self.config.rms_norm_eps, gate, constant=True)
        return product(*tokens, *weights, None, residual, plan=plan, constant=True, **shape)

    @property
    def device(self) -> torch.device:
        return self._device

    def new_cache(self, batch_size: int, max_length: int) -> GpuCache:
        """An empty cache, if possible with the buffers and the graph of an earlier one that nobody holds any more."""
        positions = self.config.max_position_embeddings
        if not 1 <= max_length <= positions:
            raise ValueError(
                f"a cache of {max_length} positions does not fit a model of {positions}; "
                "shorten the prompt or generate fewer tokens"
            )
        capacity = min(-(-max_length // _CAPACITY_STEP) * _CAPACITY_STEP, positions)
        wanted = (batch_size, capacity)
        with self._lock:
            storage = next((s for s in reversed(self._free) if (s.keys.shape[1], s.keys.shape[3]) == wanted), None)
            if storage is not None:
                self._free.remove(storage)
        if storage is None:
            storage = _Storage(self.config, batch_size, capacity, self.cache_dtype, self._device)
        cache = GpuCache(self.config, storage, max_length)
        weakref.finalize(cache, self._keep, storage)
        return cache

    def _keep(self, storage: _Storage) -> None:
        # Runs in whichever thread drops the cache, which may hold the lock: nothing here waits for it.
        self._free.append(storage)
        del self._free[:-_KEPT_STORAGES]

    def warm_up(self, batch_sizes: Iterable[int] = (1,)) -> None:
        """Compile the kernels of texts of any length and of these batch sizes, in several processes and with a progress
        bar, instead of one by one in silence as lengths come up. Does nothing where they were compiled before."""
        from bitnet.kernels.triton.warm import compile_missing, variants_of

        if self._device.type != "cuda":
            return
        variants = variants_of(self.calls(batch_sizes))
        torch.cuda.empty_cache()
        rows = compile_missing(variants, self._device)
        for _ in progress_bar(rows, "compiling kernels", total=len(variants), unit="kernel", leave=False):
            pass

    def calls(self, batch_sizes: Iterable[int]) -> Iterator[Callable[[], object]]:
        """Calls that launch, between them, every kernel of texts of these batch sizes, however long prompt and cache
        are, for `warm.variants_of`."""
        for size in batch_sizes:
            yield from self.steps(size)
        yield from self._prompts()

    def steps(self, batch_size: int) -> Iterator[Callable[[], object]]:
        """A step of decoding for every number of programs between which a cache's positions may be divided."""
        from bitnet.kernels.triton import attention

        config, positions = self.config, self.config.max_position_embeddings
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_width
        rooms = [min(_CAPACITY_STEP << i, positions) for i in range((positions // _CAPACITY_STEP).bit_length() + 1)]
        smallest = {attention.splits(batch_size, *heads, room): room for room in reversed(rooms)}
        for room in smallest.values():
            yield self._call(batch_size, 1, room)

    def _prompts(self) -> Iterator[Callable[[], object]]:
        """A prompt for every set of plans that its products may have, the head for every one of its own, for whoever
        wants the logits of all positions, and a token drawn."""
        from bitnet.kernels.triton import product, sampling

        def plans(*matrices: _Matrix) -> dict[Any, int]:
            return {
                tuple(product.choose(M, len(m.packed), m.in_features, m.bits, self._device) for m in matrices): M
                for M in reversed(product.LENGTHS[1:])
            }

        for tokens in plans(*self._matrices[0].values()).values():
            yield self._call(1, tokens, tokens)
        if self._head is not None:
            x = torch.zeros(product.DOT4_MAX_TOKENS, self.config.hidden_size, dtype=self.dtype, device=self._device)
            for (plan,), tokens in plans(self._head).items():  # of more tokens, their number is no constant
                part = x[:tokens]
                yield functools.partial(self._projected, part, self._head, self._norm, dtype=torch.float32, plan=plan)
            logits = x.new_zeros(1, self.config.vocab_size, dtype=torch.float32)
            uniform = x.new_zeros(1, dtype=torch.float64)
            yield functools.partial(sampling.draw, logits, uniform, temperature=1.0, top_p=0.5, not_finite=NOT_FINITE)

    def _call(self, batch_size: int, tokens: int, capacity: int) -> Callable[[], object]:
        """Of the first layer alone: all have one shape."""
        one = self.config.replace(num_hidden_layers=1)
        storage = _Storage(one, batch_size, capacity, self.cache_dtype, self._device)
        ids = torch.zeros(batch_size, tokens, dtype=torch.int64, device=self._device)
        last = torch.zeros(1, dtype=torch.int64, device=self._device)
        return torch.inference_mode()(functools.partial(self._forward, ids, storage, None if tokens == 1 else 0, last))

    def weight_bytes(self) -> int:
        """Bytes of weights that one decoding step reads."""
        matrices = [matrix for layer in self._matrices for matrix in layer.values()]
        return sum(matrix.nbytes for matrix in matrices) + (self._head.nbytes if self._head else 0)


def rounded_up(tokens: int) -> int:
    """The next of 1, 16, 24, 32, 48, 64, 96, 128 and so on: at most a third of the places stay empty from 16 on."""
    power = 1 << (tokens - 1).bit_length()
    return tokens if tokens == 1 else max(16, power // 4 * 3 if tokens <= power // 4 * 3 else power)


def _attend(q: Tensor, keys: Tensor, values: Tensor, scales: tuple[Tensor, Tensor] | None, length: int) -> Tensor:
    """Causal attention `[B, T, H * D]` of queries `[B, T, H, D]` behind `length` cached positions."""
    B, T, H, D = q.shape
    total, q = length + T, q.transpose(1, 2)
    keys, values = keys[:, :, :total], values[:, :, :total]
    if scales is not None:
        keys, values = (
            part.float() * scale[:, :, :total, None] for part, scale in zip((keys, values), scales, strict=True)
        )
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    if not length:
        out = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=keys.shape[1] != H)
    else:
        # Of torch's fused kernels none takes a mask together with shared heads, and the unfused one stores all scores.
        # So the heads of a layer are repeated for the time of the call, and the mask is made for some rows at a time.
        keys, values = (part.repeat_interleave(H // part.shape[1], 1) for part in (keys, values))
        positions, rows = torch.arange(total, device=q.device), max(1, _MASK_VALUES // total)
        parts = []
        for first, part in enumerate(q.split(rows, 2)):
            own = length + first * rows + torch.arange(part.shape[2], device=q.device)
            parts.append(F.scaled_dot_product_attention(part, keys, values, attn_mask=positions[None] <= own[:, None]))
        out = torch.cat(parts, 2)
    return out.transpose(1, 2).reshape(B, T, H * D)
