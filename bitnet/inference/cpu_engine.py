"""A model as the native CPU kernels run it: one C call a forward pass, the same interface as the torch model.

    model = open_source(path).model().pack()    2-bit projections, INT8 embedding and head
    engine = Engine.from_model(model)           the same weights in the run-time layout; the torch model can go
    cache = engine.new_cache(1, 512)
    logits = engine(ids, cache, last_only=True)

The torch model is the specification: the integer products are equal to the last bit, the float operations between them
(norms, softmax, activation) to rounding. Every instruction set computes the same bits. Weights of any format are copied
piece by piece into one block of memory (`bitnet/inference/cpu_model.py`), so loading a file peaks at the size of that
block and one piece.

On disk a model keeps tensors that do not depend on the machine; `open_model` in `bitnet/inference/loading.py` puts them
here.
"""

import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitnet.inference.cpu_model import NativeModel
from bitnet.inference.cpu_rows import MAX_CHUNK, Meeting, NativeRows, Storage, check_cache_dtype, meeting_of
from bitnet.inference.engine import check_ids
from bitnet.inference.weights import ModuleWeights, Weights
from bitnet.kernels.cpu import native
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.lora import Matrices


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
        capacity, heads = native.round_up(max_length, 16), config.num_key_value_heads
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
    """A model on the native CPU kernels. Called like `BitNetForCausalLM`.

    `weights` gives its tensors (`bitnet/inference/weights.py`), each once. Raises ValueError where the native kernels
    were not built, for weights that they do not know, and for tensors that are not exactly those of the configuration.
    """

    def __init__(self, config: ModelConfig, weights: Weights, *, cache_dtype: str | None = None) -> None:
        check_cache_dtype(cache_dtype)
        if config.head_width > 1024:
            raise ValueError(f"head_dim is {config.head_width}; the native attention takes at most 1024")
        native.kernels()
        self.config, self.cache_dtype = config, cache_dtype
        self._scratch = native.Scratch()
        self._model = NativeModel(config, weights)
        self._struct = self._model.struct
        self.meeting = Meeting()

    @classmethod
    def from_model(
        cls,
        model: BitNetForCausalLM,
        *,
        cache_dtype: str | None = None,
        activations: str = "int8",
        embeddings: str | None = None,
        codec: str | None = None,
    ) -> "Engine":
        """The engine of a torch model of any weights but latent ones, which shares nothing with it afterwards.

        activations, embeddings: as `open_model` takes them. codec: the layout of per-tensor ternary weights, two_bit or
        base3, instead of the one that the instruction set in force is fastest with.
        """
        return cls(model.config, ModuleWeights(model, activations, embeddings, codec), cache_dtype=cache_dtype)

    def __call__(
        self, input_ids: Tensor, cache: NativeCache | None = None, *, last_only: bool = False, out: Tensor | None = None
    ) -> Tensor:
        """Logits float32 `[B, T, V]` of token ids int64 `[B, T]`, or `[B, 1, V]` of the last position with `last_only`.

        With a cache, the tokens continue the ones it holds. `out`, of the result's shape, saves its allocation.
        Raises ValueError for ids or lengths that the model or the cache cannot take.
        """
        self._check(input_ids)
        cache = self.new_cache(*input_ids.shape) if cache is None else cache
        return self._run(input_ids, None, cache, last_only, out)

    def go_on(self, hidden: Tensor, cache: NativeCache, *, last_only: bool = False) -> Tensor:
        """The same of the residual stream, float32 `[B, T, C]`, that other layers have left before this engine's first.
        Raises ValueError for another shape and for lengths that the cache cannot take."""
        width = self.config.hidden_size
        if hidden.dim() != 3 or hidden.shape[2] != width or hidden.dtype != torch.float32 or not hidden.numel():
            raise ValueError(f"hidden is {hidden.dtype} {list(hidden.shape)}; give float32 [batch, tokens, {width}]")
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)  # not looked at
        return self._run(ids, hidden, cache, last_only, None)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """What the head multiplies: the last layer's output behind the final norm, float32 `[B, T, C]`, of token ids
        int64 `[B, T]`. Raises ValueError as a call does."""
        self._check(input_ids)
        return self._run(input_ids, None, self.new_cache(*input_ids.shape), last_only=False, out=None, states=True)

    def _check(self, input_ids: Tensor) -> None:
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
            raise ValueError(f"input_ids are {input_ids.dtype} {list(input_ids.shape)}; give int64 [batch, tokens]")
        check_ids(self.config, *(int(bound) for bound in input_ids.aminmax()))

    def _run(
        self,
        input_ids: Tensor,
        hidden: Tensor | None,
        cache: NativeCache,
        last_only: bool,
        out: Tensor | None,
        states: bool = False,
    ) -> Tensor:
        config = self.config
        B, T = input_ids.shape
        if cache.config != config:
            raise ValueError("the cache belongs to a model of another shape; take one from new_cache")
        if cache.batch_size != B:
            raise ValueError(f"the cache is for {cache.batch_size} sequences and the input has {B}")
        if cache.length + T > cache.max_length:
            raise ValueError(
                f"the cache holds {cache.max_length} positions and {cache.length + T} are needed; make it longer"
            )
        shape = [B, 1 if last_only else T, config.hidden_size if states else config.vocab_size]
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
                part = torch.empty(B, ids.shape[1], shape[2])
            # Of the last position alone, only the last piece needs the head.
            count = ids.shape[1]
            wanted = range(count - 1, B * count, count) if last_only else range(B * count)
            if last_only and start + chunk < T:
                wanted = range(0)
            for row in cache.rows:
                row.length, row.tokens = cache.length, count
            stream = None if hidden is None else hidden[:, start : start + chunk].contiguous()
            self.forward(cache.rows, ids.view(-1), wanted, part, stream, states)
            cache.length += count
            if part is not logits:
                logits[:, start : start + chunk] = part
        return logits

    def forward(
        self,
        rows: Any,
        ids: Tensor | array.array,
        wanted: Sequence[int],
        logits: Tensor,
        hidden: Tensor | None = None,
        states: bool = False,
    ) -> None:
        """Run the new tokens `ids`, int64, of rows (an array of `native.Row`), one row behind the other, and write the
        logits behind those numbered by `wanted` to `logits` float32 `[len(wanted), V]`, or with `states` to
        `[len(wanted), C]` what the head would multiply. With `hidden`, contiguous float32 `[len(ids), C]`, they begin
        there and not at their embeddings. Any number of threads may."""
        kernels, threads = native.kernels(), native.threads()
        longest = native.round_up(max(row.length + row.tokens for row in rows), 1024)  # not a little more at every step
        size = kernels.workspace(self._struct, len(ids), len(rows), longest, threads)
        tokens = ids.data_ptr() if isinstance(ids, Tensor) else ids.buffer_info()[0]
        numbers = array.array("i", wanted)
        stream = None if hidden is None else hidden.data_ptr()
        with self._scratch.piece(size) as workspace:
            target = numbers.buffer_info()[0], len(numbers), logits.data_ptr(), states, workspace, threads
            kernels.forward(self._struct, rows, len(rows), tokens, stream, *target)

    def attach(self, adapters: Matrices) -> None:
        """Add LoRA adapters (`bitnet/model/lora.py`), in the place of those that are there; none takes them away. Waits
        for a pass over rows that another thread runs; a call of the engine itself must not run. Raises ValueError for
        projections or shapes that the model does not have."""
        with meeting_of(self).between_passes():
            self._model.attach(adapters)

    @property
    def rows(self) -> NativeRows:
        """Texts of any lengths side by side, see `bitnet/inference/rows.py`."""
        return NativeRows(self)

    @property
    def activations(self) -> list[str]:
        """How the projections take their inputs, "float", "int16", "int8" or several."""
        return self._model.activations()

    @property
    def kernel(self) -> str:
        """What multiplies: "native int8", "native int16" or "native float", by the activations of the projections."""
        return f"native {'+'.join(self.activations)}"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def new_cache(self, batch_size: int, max_length: int) -> NativeCache:
        """An empty cache in the engine's cache dtype, float32 where none was chosen."""
        return NativeCache(self.config, batch_size, max_length, self.cache_dtype or "float32")

    def weight_bytes(self) -> int:
        """Bytes of weights that one decoding step reads, as they lie in memory."""
        return self._model.weight_bytes()
