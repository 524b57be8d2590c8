"""The cache in 8 and 4 bits: what is stored, in whatever portions it came, and what it costs."""

import pytest
import torch

from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.quantized_cache import GROUP, QuantizedKVCache

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, quantizer="none", initializer_range=0.1,
)  # fmt: skip
SIZES = (40, 1, 31, 1, 20)


def fill(cache: QuantizedKVCache, keys: torch.Tensor, values: torch.Tensor, sizes=SIZES):
    for k, v in zip(keys.split(sizes, 3), values.split(sizes, 3), strict=True):
        found = [cache.append(layer, k[layer], v[layer]) for layer in range(2)]
        cache.advance(k.shape[3])
    return (torch.stack(parts) for parts in zip(*found, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_comes_back_is_within_half_a_step_and_whole_groups_of_keys_share_a_scale(bits: int) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 3, 2, sum(SIZES), 16)
    keys[..., 5] *= 30  # a channel that is large at every position
    cache = QuantizedKVCache(CONFIG, 3, 100, bits=bits)
    found, read = fill(cache, keys, values)
    steps = 127 if bits == 8 else 15
    spread = values.abs().amax(-1, True) if bits == 8 else values.amax(-1, True) - values.amin(-1, True)
    assert ((read - values).abs() <= 0.51 * spread / steps + 2e-3).all()
    full = sum(SIZES) // GROUP * GROUP
    if bits == 4:
        assert torch.equal(found[..., full:, :], keys[..., full:, :])  # not full yet
        groups = keys[..., :full, :].unflatten(-2, (-1, GROUP))
        spread = groups.amax(-2, True) - groups.amin(-2, True)
        error = (found[..., :full, :].unflatten(-2, (-1, GROUP)) - groups).abs()
        assert (error <= 0.51 * spread / 15 + 0.05 * (groups.abs() > 30) + 4e-3).all()
    else:
        assert ((found - keys).abs() <= 0.51 * keys.abs().amax(-1, True) / 127 + 0.05).all()
    again, once = QuantizedKVCache(CONFIG, 3, 100, bits=bits), QuantizedKVCache(CONFIG, 3, 100, bits=bits)
    a, b = fill(again, keys, values, [1] * sum(SIZES)), fill(once, keys, values, [sum(SIZES)])
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))  # whatever the portions
    floats = 2 * keys.numel() * 4
    assert cache.nbytes < floats * (bits + 6) / 32


def test_positions_that_are_taken_back_and_written_again() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 1, 2, 80, 16)
    cache = QuantizedKVCache(CONFIG, 1, 100, bits=4)
    fill(cache, keys, values, [80])
    for length in (70, 40):  # in the open group, and in one that was full
        cache.length = length
        found, _ = fill(cache, keys[:, :, :, length:], values[:, :, :, length:], [80 - length])
        assert found.shape[-2] == 80
        assert (found - keys).abs().max() < 0.4


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_that_reads_it_says_nearly_what_it_says(bits: int) -> None:
    torch.manual_seed(0)
    model, ids = BitNetForCausalLM(CONFIG).eval(), torch.randint(96, (2, 90))
    with torch.no_grad():
        expected = model(ids)
        model.cache_bits = bits
        cache = model.new_cache(2, 90)
        assert isinstance(cache, QuantizedKVCache)
        found = torch.cat([model(part, cache) for part in ids.split([70, *[1] * 20], 1)], 1)
    assert 0 < float((found - expected).norm() / expected.norm()) < (0.01 if bits == 8 else 0.15)


def test_bad_input_is_named() -> None:
    for options, message in (({"bits": 3}, "bits is 3"), ({}, "200 positions does not fit a model of 128")):
        with pytest.raises(ValueError, match=message):
            QuantizedKVCache(CONFIG, 1, 200, **options)
    cache = QuantizedKVCache(CONFIG, 1, 8)
    with pytest.raises(ValueError, match="holds 8 positions and 9"):
        cache.append(0, torch.zeros(1, 2, 9, 16), torch.zeros(1, 2, 9, 16))
    with pytest.raises(ValueError, match="for 1 sequences and the input has 2"):
        cache.append(0, torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16))
