"""A key/value cache in 8 or 4 bits, with the interface of `KVCache`; attention reads what is stored.

    8 bits   each key and value vector [D] is INT8 with an absmax scale of its own
    4 bits   each value vector is UINT4 with scale and minimum; so are keys, but by channel, for every 32 positions,
             since a few of their channels are large at every position (KIVI, arXiv 2402.02750). Keys of a group that
             is not full yet stay in float32.

Scales and minima are float16. Letters: B batch, G key/value heads, T new tokens, S positions, D head_dim.
"""

import torch
from torch import Tensor

from bitnet.model.config import ModelConfig
from bitnet.model.kv_cache import KVCache

GROUP = 32
BITS = (8, 4)
_SMALLEST = 2.0**-24


class QuantizedKVCache:
    """Keys and values of all layers for up to `max_length` positions of `batch_size` sequences of one length."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        *,
        bits: int = 8,
    ) -> None:
        if bits not in BITS:
            raise ValueError(f"bits is {bits}; a cache has {' or '.join(map(str, BITS))}")
        if not 1 <= max_length <= config.max_position_embeddings:
            raise ValueError(
                f"a cache of {max_length} positions does not fit a model of {config.max_position_embeddings}; "
                "shorten the prompt or generate fewer tokens"
            )
        self.bits, self.max_length, self.length = bits, max_length, 0
        self.batch_size = batch_size
        layers, heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_width
        slots = -(-max_length // GROUP) * GROUP if bits == 4 else max_length

        def empty(*sizes: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(layers, batch_size, heads, *sizes, dtype=dtype, device=device)

        bytes_each = width * bits // 8
        self._keys, self._values = (empty(slots, bytes_each, dtype=torch.uint8) for _ in range(2))
        # Scale and minimum: of each vector, or of each channel of a group of keys.
        self._of_values = empty(2, slots, 1, dtype=torch.float16)
        of_keys = (2, slots // GROUP, width) if bits == 4 else (2, slots, 1)
        self._of_keys = empty(*of_keys, dtype=torch.float16)
        self._open = empty(GROUP, width, dtype=torch.float32) if bits == 4 else None
        self._first_open = [0] * layers

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write `[B, G, T, D]` behind the filled positions of a layer; return all S + T of them, as they are stored, in
        float32."""
        if keys.shape[0] != self.batch_size:
            raise ValueError(f"the cache is for {self.batch_size} sequences and the input has {keys.shape[0]}")
        start, end = self.length, self.length + keys.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions and {end} are needed; make it longer")
        self._values[layer, :, :, start:end], self._of_values[layer, :, :, :, start:end] = self._quantize(values, -1)
        found = self._dequantize(self._values[layer, :, :, :end], self._of_values[layer, :, :, :, :end])
        if self.bits == 4:
            return self._append_groups(layer, keys.float(), start, end), found
        self._keys[layer, :, :, start:end], self._of_keys[layer, :, :, :, start:end] = self._quantize(keys, -1)
        return self._dequantize(self._keys[layer, :, :, :end], self._of_keys[layer, :, :, :, :end]), found

    def _append_groups(self, layer: int, keys: Tensor, start: int, end: int) -> Tensor:
        """Keys up to `end`; each full group is quantized, the rest kept."""
        assert self._open is not None
        base, kept = start // GROUP * GROUP, self._open[layer]
        if self._first_open[layer] != base:  # positions were taken back, into a group that was full
            kept[:, :, : start - base] = self._groups(layer, base, base + GROUP)[:, :, : start - base]
        waiting = torch.cat([kept[:, :, : start - base], keys], 2)
        full = base + waiting.shape[2] // GROUP * GROUP
        if full > base:
            groups = waiting[:, :, : full - base].unflatten(2, (-1, GROUP))
            codes, scales = self._quantize(groups, -2)
            self._keys[layer, :, :, base:full] = codes.flatten(2, 3)
            self._of_keys[layer, :, :, :, base // GROUP : full // GROUP] = scales.squeeze(-2)
        rest = waiting[:, :, full - base :]
        kept[:, :, : end - full] = rest
        self._first_open[layer] = full
        return torch.cat([self._groups(layer, 0, full), rest], 2)

    def _groups(self, layer: int, first: int, last: int) -> Tensor:
        """Keys of full groups, float32 `[B, G, last - first, D]`."""
        codes = self._keys[layer, :, :, first:last].unflatten(2, (-1, GROUP))
        scales = self._of_keys[layer, :, :, :, first // GROUP : last // GROUP].unsqueeze(-2)
        return self._dequantize(codes, scales).flatten(2, 3)

    def _quantize(self, x: Tensor, over: int) -> tuple[Tensor, Tensor]:
        """Codes as bytes, and scale and minimum, stacked behind the heads, of values that share them along `over`."""
        x = x.float()
        if self.bits == 8:
            scale = (x.abs().amax(over, keepdim=True) / 127).half().clamp(min=_SMALLEST)
            codes = (x / scale.float()).round().clamp(-127, 127) + 128
            return codes.to(torch.uint8), torch.stack([scale, -128 * scale.float()], 2).half()
        low = x.amin(over, keepdim=True).half()
        scale = ((x.amax(over, keepdim=True) - low.float()) / 15).half().clamp(min=_SMALLEST)
        codes = ((x - low.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
        first, second = codes.chunk(2, -1)
        return first | second << 4, torch.stack([scale, low], 2)

    def _dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        """float32, from codes `[B, G, .., D]` and scale and minimum `[B, G, 2, ..]`."""
        scale, low = scales.float().unbind(2)
        if self.bits == 8:
            return (codes.float() - 128) * scale
        return torch.cat([codes & 15, codes >> 4], -1) * scale + low

    def advance(self, tokens: int) -> None:
        """Count `tokens` new positions as filled, after every layer has appended them."""
        self.length += tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the filled part, which one decoding step reads."""
        total = self._keys[:, :, :, : self.length].nbytes + self._values[:, :, :, : self.length].nbytes
        each = 2 if self.bits == 4 else 1  # INT8 has no minimum: that follows from the scale
        of_values = self._of_values[:, :, :, :each, : self.length].nbytes
        if self._open is None:
            return total + of_values + self._of_keys[:, :, :, :each, : self.length].nbytes
        full = self.length // GROUP
        rest = self.length - full * GROUP
        halves = self._keys[:, :, :, :rest].nbytes  # of keys that are not quantized yet
        return total - halves + of_values + self._of_keys[:, :, :, :, :full].nbytes + self._open[:, :, :, :rest].nbytes


Cache = KVCache | QuantizedKVCache
"""Any cache of a model in torch."""
