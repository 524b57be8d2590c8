"""A packed model as the native CPU kernels run it: one C call a forward pass, the same interface as the torch model.

    model = open_source(path).model().pack()    2-bit projections, INT8 embedding and head
    engine = Engine.from_model(model)           the same weights in the run-time layout; the torch model can go
    cache = engine.new_cache(1, 512)
    logits = engine(ids, cache, last_only=True)

The torch model is the specification: the integer products are equal to the last bit, the float operations between them
(norms, softmax, activation) to rounding. Every instruction set computes the same bits. Weights are copied tensor by
tensor into one block of memory (huge pages where the system has them) in the layout of `bitnet/kernels/cpu/layout.h`,
so loading a file peaks at the size of that block and one tensor.

On disk a packed model keeps the canonical tensors (`bitnet/quant/packing.py`), which do not depend on the machine:
`save_packed` in `bitnet/storage/folders.py` writes it, `open_model` in `bitnet/inference/loading.py` puts it here.
"""

import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitnet.inference.cpu_rows import CACHE_DTYPES, MAX_CHUNK, Meeting, NativeRows, Storage
from bitnet.inference.engine import beyond_kernels, build_exactly
from bitnet.kernels import PACKED_BITS
from bitnet.kernels.cpu import native
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.transformer import rope_tables
from bitnet.quant import packed_width


class NativeCache:
    """Keys and values of all layers for up to `max_length` positions of `batch_size` sequences of one length.

    Keys lie as `[L, B, G, S / 16, D, 16]` and values as `[L, B, G, S, D]`, see `Storage`.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, dtype: str = "float32") -> None:
        if not 1 <= max_length <= config.max_position_embeddings:
            raise ValueError(
                f"a cache of {max_length} positions does not fit a model of {config.max_position_embeddings}; "
                "shorten the prompt or generate fewer tokens"
            )
        capacity, heads = _round_up(max_length, 16), config.num_key_value_heads
        strides = (heads * capacity, batch_size * heads * capacity, capacity)
        self.storage = Storage(config, batch_size, capacity, strides, dtype)
        self.keys, self.values = self.storage.keys, self.storage.values
        self.config, self.max_length, self.batch_size = config, max_length, batch_size
        self.blocks = torch.arange(batch_size, dtype=torch.int32)
        self.rows = (native.Row * batch_size)()
        for number, row in enumerate(self.rows):
            row.cache.contents, row.blocks = self.storage.struct, self.blocks[number:].data_ptr()
        self.length = 0
        """Positions that are filled."""

    @property
    def nbytes(self) -> int:
        """Bytes of the filled part, which one decoding step reads."""
        return self.storage.per_position * self.batch_size * self.length


class Engine:
    """A packed BitNet b1.58 model on the native CPU kernels. Called like `BitNetForCausalLM`.

    `tensor(name)` returns a tensor of the packed model's state_dict; it is called once for each of `names` and may read
    a file. Raises ValueError where the native kernels were not built, the model is not packed, or its tensors are not
    exactly those of the configuration.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensor: Callable[[str], Tensor],
        names: Iterable[str] | None = None,
        *,
        cache_dtype: str | None = None,
        codec: str | None = None,
    ) -> None:
        if config.quantizer == "none":
            raise ValueError("the native engine runs packed weights and this is a float model; run it in torch")
        if unknown := beyond_kernels(config):
            raise ValueError(f"the native kernels do not compute {' and '.join(unknown)}; run the model in torch")
        if cache_dtype not in (None, *CACHE_DTYPES):
            raise ValueError(f"cache dtype {cache_dtype!r} is unknown; choose one of {', '.join(CACHE_DTYPES)}")
        if config.head_width > 1024:
            raise ValueError(f"head_dim is {config.head_width}; the native attention takes at most 1024")
        names = None if names is None else set(names)
        if names is not None and config.num_hidden_layers > len(names):
            raise ValueError(
                f"the configuration says {config.num_hidden_layers} layers and there are {len(names)} tensors"
            )
        native.kernels()
        self.config, self.cache_dtype = config, cache_dtype
        self._keep: list[Tensor] = []
        self._workspaces: list[Tensor] = []  # that no call is using
        self._bits = PACKED_BITS[config.quantizer]
        self._codec = codec
        self._matrices: list[native.Lines] = []
        build_exactly(self._build, tensor, names)
        self.meeting = Meeting()

    @classmethod
    def from_model(cls, model: BitNetForCausalLM, **options: str | None) -> "Engine":
        """The engine of a packed torch model, which shares nothing with it afterwards."""
        if not model.head_is_packed:
            raise ValueError("the model is not packed; call model.pack() first")
        tensors = model.state_dict()
        return cls(model.config, tensors.__getitem__, tensors, **options)

    def _build(self, tensor: Callable[..., Tensor]) -> None:
        config = self.config
        C, V, D, matrices = config.hidden_size, config.vocab_size, config.head_width, config.projections()
        queries, keys, F = (matrices[name][0] for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
        layers = (native.Layer * config.num_hidden_layers)()
        # Row offsets of what is multiplied together: q, k and v one behind the other, gate and up by blocks in turn.
        starts = [0, _round_up(queries, 16), _round_up(queries, 16) + _round_up(keys, 16)]
        shapes = {
            "qkv": (starts[2] + _round_up(keys, 16), C),
            "o": matrices["self_attn.o_proj"],
            "gate_up": (2 * _round_up(F, 16), C),
            "down": matrices["mlp.down_proj"],
        }
        codecs = {name: native.codec_of(self._bits, columns) for name, (_, columns) in shapes.items()}
        if self._codec and self._bits == 2:
            codecs = dict.fromkeys(shapes, self._codec)
        sizes = {name: native.Lines.size(*shape, codecs[name]) for name, shape in shapes.items()}
        head_size = native.Lines.size(V, C, "eight_bit")
        arena = native.huge_pages(sum(sizes.values()) * config.num_hidden_layers + head_size)
        self._keep.append(arena)
        used = 0

        def matrix(name: str, rows: int, columns: int, codec: str) -> native.Lines:
            nonlocal used
            size = native.Lines.size(rows, columns, codec)
            lines = native.Lines(rows, columns, codec, arena[used : used + size])
            used += size
            self._matrices.append(lines)
            return lines

        def fill(lines: native.Lines, name: str, rows: int, bits: int, at: int = 0, step: int = 1) -> None:
            packed = tensor(f"{name}.packed_weight", rows, packed_width(lines.columns, bits))
            scale = tensor(f"{name}.weight_scale", 1 if bits == 2 else rows, 1)
            lines.fill(packed, scale, bits, at=at, step=step)

        def floats(name: str, size: int) -> int:
            # The C structs hold bare addresses, so `_keep` holds the tensors.
            value = tensor(name, size).detach().float().contiguous().clone()
            self._keep.append(value)
            return value.data_ptr()

        # The largest tensor first, while nothing else is resident.
        head, embedding = matrix("head", V, C, "eight_bit"), "model.embed_tokens"
        fill(head, embedding if config.tie_word_embeddings else "lm_head", V, 8)

        for index, layer in enumerate(layers):
            prefix = f"model.layers.{index}."
            made = {name: matrix(name, *shape, codecs[name]) for name, shape in shapes.items()}
            if any(count % 16 for count in (queries, keys, F)):
                for name in ("qkv", "gate_up"):
                    made[name].memory.zero_()  # gaps between the parts; their scale is 0
            for at, rows, part in zip(starts, (queries, keys, keys), ("q", "k", "v"), strict=True):
                fill(made["qkv"], f"{prefix}self_attn.{part}_proj", rows, self._bits, at)
            fill(made["o"], f"{prefix}self_attn.o_proj", C, self._bits)
            for at, part in enumerate(("gate", "up")):
                fill(made["gate_up"], f"{prefix}mlp.{part}_proj", F, self._bits, 16 * at, 2)
            fill(made["down"], f"{prefix}mlp.down_proj", C, self._bits)
            for name, lines in made.items():
                setattr(layer, name, lines.struct)
            layer.input_norm = floats(f"{prefix}input_layernorm.weight", C)
            layer.post_norm = floats(f"{prefix}post_attention_layernorm.weight", C)
            if config.sub_norm:
                layer.attn_sub_norm = floats(f"{prefix}self_attn.attn_sub_norm.weight", queries)
                layer.ffn_sub_norm = floats(f"{prefix}mlp.ffn_sub_norm.weight", F)

        model = native.Model(
            hidden=C,
            intermediate=F,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=D,
            vocab=V,
            layers=config.num_hidden_layers,
            relu2=config.hidden_act == "relu2",
            eps=config.rms_norm_eps,
            layer=layers,
            norm=floats("model.norm.weight", C),
            head=head.struct,
        )
        if not config.tie_word_embeddings:
            table = tensor(f"{embedding}.packed_weight", V, packed_width(C, 8))
            scale = tensor(f"{embedding}.weight_scale", V, 1)
            self._keep += [table := table.clone(), scale := scale.float().clone()]
            model.embedding, model.embedding_scale = table.data_ptr(), scale.data_ptr()
            model.embedding_width = table.shape[1]
        cos, sin = rope_tables(config)
        self._keep += [cos, sin]
        model.cos, model.sin = cos.data_ptr(), sin.data_ptr()
        self._struct, self._layers = model, layers

    def __call__(
        self, input_ids: Tensor, cache: NativeCache | None = None, *, last_only: bool = False, out: Tensor | None = None
    ) -> Tensor:
        """Logits float32 `[B, T, V]` of token ids int64 `[B, T]`, or `[B, 1, V]` of the last position with `last_only`.

        With a cache, the tokens continue the ones it holds. `out`, of the result's shape, saves its allocation.
        Raises ValueError for ids or lengths that the model or the cache cannot take.
        """
        config = self.config
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
            raise ValueError(f"input_ids are {input_ids.dtype} {list(input_ids.shape)}; give int64 [batch, tokens]")
        B, T = input_ids.shape
        smallest, largest = (int(bound) for bound in input_ids.aminmax())
        if smallest < 0 or largest >= config.vocab_size:
            raise ValueError(
                f"token id {smallest if smallest < 0 else largest} is outside the vocabulary (0 to "
                f"{config.vocab_size - 1})"
            )
        cache = self.new_cache(B, T) if cache is None else cache
        if cache.config != config:
            raise ValueError("the cache belongs to a model of another shape; take one from new_cache")
        if cache.batch_size != B:
            raise ValueError(f"the cache is for {cache.batch_size} sequences and the input has {B}")
        if cache.length + T > cache.max_length:
            raise ValueError(
                f"the cache holds {cache.max_length} positions and {cache.length + T} are needed; make it longer"
            )
        shape = [B, 1 if last_only else T, config.vocab_size]
        logits = torch.empty(shape) if out is None else out
        if list(logits.shape) != shape or logits.dtype != torch.float32 or not logits.is_contiguous():
            raise ValueError(f"out must be contiguous float32 {shape}, got {logits.dtype} {list(logits.shape)}")
        # A long prompt goes through all layers piece by piece: the cache joins the pieces, and the workspace stays
        # small.
        chunk = max(1, MAX_CHUNK // B)
        for start in range(0, T, chunk):
            ids = input_ids[:, start : start + chunk].contiguous()
            part = logits
            if not last_only and chunk < T:
                part = torch.empty(B, ids.shape[1], config.vocab_size)
            # Of the last position alone, only the last piece needs the head.
            count = ids.shape[1]
            wanted = range(B * count) if not last_only else range(count - 1, B * count, count)
            for row in cache.rows:
                row.length, row.tokens = cache.length, count
            self.forward(cache.rows, ids.view(-1), wanted if not last_only or start + chunk >= T else (), part)
            cache.length += count
            if part is not logits:
                logits[:, start : start + chunk] = part
        return logits

    def forward(self, rows: Any, ids: Tensor | array.array, wanted: Sequence[int], logits: Tensor) -> None:
        """Run the new tokens `ids`, int64, of rows (an array of `native.Row`), one row behind the other, and write the
        logits behind those numbered by `wanted` to `logits` float32 `[len(wanted), V]`. Any number of threads may."""
        lib, threads = native.library(), native.threads()
        assert lib is not None
        longest = _round_up(max(row.length + row.tokens for row in rows), 1024)  # not a little more at every step
        size = lib.bn_workspace_bytes(self._struct, len(ids), len(rows), longest, threads)
        workspace = self._workspaces.pop() if self._workspaces else torch.empty(0, dtype=torch.uint8)
        if len(workspace) < size:
            workspace = torch.empty(size, dtype=torch.uint8)
        tokens = ids.data_ptr() if isinstance(ids, Tensor) else ids.buffer_info()[0]
        numbers = array.array("i", wanted)
        target = numbers.buffer_info()[0], len(numbers), logits.data_ptr(), workspace.data_ptr(), threads
        native.kernels().forward(self._struct, rows, len(rows), tokens, *target)
        self._workspaces.append(workspace)

    @property
    def rows(self) -> NativeRows:
        """Texts of any lengths side by side, see `bitnet/inference/rows.py`."""
        return NativeRows(self)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def new_cache(self, batch_size: int, max_length: int) -> NativeCache:
        """An empty cache in the engine's cache dtype, float32 where none was chosen."""
        return NativeCache(self.config, batch_size, max_length, self.cache_dtype or "float32")

    def weight_bytes(self) -> int:
        """Bytes of weights that one decoding step reads, as they lie in memory."""
        return sum(lines.memory.nbytes + lines.scale.nbytes for lines in self._matrices)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
