"""The correctness gate of the CPU benchmark: wrong kernels have no speed."""

import itertools
from collections.abc import Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from bitnet.bench.random_models import GATE_CONFIG
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.weights import matrix_of, stored
from bitnet.kernels import cpu, reference, use_backend
from bitnet.kernels.cpu import native
from bitnet.kernels.cpu.matrices import linear
from bitnet.machine import DTYPES
from bitnet.model import BitNetForCausalLM, KVCache, ModelConfig
from bitnet.quant import pack_codes


def check_products(config: ModelConfig) -> Iterator[str]:
    """Compare the integer sums of every instruction set and codec with the reference; yields what differs."""
    generator = torch.Generator().manual_seed(0)
    wide = [(M, 80, K) for M in (1, 70) for K in (config.hidden_size, config.intermediate_size)]
    for M, N, K in [(1, 16, 64), (1, 37, 131), (5, 48, 257), (33, 40, 384), (513, 64, 200), *wide]:
        x = torch.randn(M, K, generator=generator)
        x[0] = 1  # the largest sum there can be: all codes 127 against all weights at their bound
        codes = reference.quantize_activations(x)[0]
        for codec, bits in {"base3": 2, "two_bit": 2, "four_bit": 4, "eight_bit": 8}.items():
            if codec == "base3" and K > native.BASE3_MAX_K:
                continue
            high = 1 if bits == 2 else 2 ** (bits - 1) - 1
            weight = torch.randint(-1 if bits == 2 else -high - 1, high + 1, (N, K), generator=generator).to(torch.int8)
            weight[0] = high
            expected = reference.integer_matmul(codes, weight, bits=bits)
            lines = native.Lines(N, K, codec)
            lines.fill(pack_codes(weight, bits), torch.ones(1, 1), bits)
            for isa in native.instruction_sets():
                with native.use_instruction_set(isa):
                    wrong = int((cpu.integer_matmul(x, lines) != expected).sum())
                if wrong:
                    yield f"{isa}, {codec}, {M} x {N} x {K}: {wrong} of {M * N} integer sums differ from the reference"


C = TypeVar("C", contravariant=True)


class CachedModel(Protocol[C]):
    """A model with a cache of its own kind."""

    def __call__(self, input_ids: Tensor, cache: C, /) -> Tensor: ...


@torch.inference_mode()
def _gate_logits(model: CachedModel[C], ids: Tensor, cache: C) -> Tensor:
    return torch.cat([model(ids[:, :-1], cache), model(ids[:, -1:], cache)], 1)


def check_engine(dtype: str) -> Iterator[str]:
    """Compare the logits of a small random model, prompt and one cached step; yields what differs.

    Reference and engine may round a value on a border to neighbouring INT8 codes, which moves logits by 0.5 %: of
    four models one must be free of that. Instruction sets and codecs give equal bits always.
    """
    B, T = 2, 71
    first, *_ = sets = native.instruction_sets()
    # The reference has no INT8 cache, which costs 3 %.
    limit, reference_dtype = (1e-4, DTYPES[dtype]) if dtype in DTYPES else (0.05, torch.float32)
    for seed in range(4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = BitNetForCausalLM(GATE_CONFIG).pack().eval()
            ids = torch.randint(GATE_CONFIG.vocab_size, (B, T))
        with use_backend("reference"):
            expected = _gate_logits(model, ids, KVCache(GATE_CONFIG, B, T, dtype=reference_dtype))
        with native.use_instruction_set(first):
            engine = Engine.from_model(model, cache_dtype=dtype)
            logits = _gate_logits(engine, ids, engine.new_cache(B, T))
        if (error := float((logits - expected).norm() / expected.norm())) < limit:
            break
    else:
        yield f"{first}: the engine's logits are off by {error:.1e} (relative, limit {limit:.0e}) with a {dtype} cache"
    for isa, codec in itertools.product(sets, ("base3", "two_bit")):
        with native.use_instruction_set(isa):
            engine = Engine.from_model(model, cache_dtype=dtype, codec=codec)
            if not torch.equal(_gate_logits(engine, ids, engine.new_cache(B, T)), logits):
                yield f"{isa}, {codec}: the engine's logits have other bits than {first}'s with a {dtype} cache"


@torch.inference_mode()
def check_layers(model: BitNetForCausalLM, activations: str) -> Iterator[str]:
    """Compare one projection of every format in a model with torch, on every instruction set; yields what differs.

    Torch multiplies by the dequantized weight: with float and INT16 activations 1e-4 apart is rounding, with INT8 ones
    by groups 2 % is theirs. Instruction sets give equal bits.
    """
    seen: set[tuple[object, ...]] = set()
    for name, layer in model.named_modules():
        traits = (getattr(layer, trait, None) for trait in ("block_type", "dtype", "bits"))
        kind = (type(layer).__name__, *traits)
        if not name.endswith("_proj") or kind in seen:
            continue
        seen.add(kind)
        weight = stored(layer, activations)
        matrix = matrix_of(weight)
        x = torch.randn(7, weight.form.inputs, generator=torch.Generator().manual_seed(0))
        with use_backend("reference"):
            expected = layer(x)
        results = {}
        for isa in native.instruction_sets():
            with native.use_instruction_set(isa):
                results[isa] = linear(matrix, x)
        first, *others = results
        error = float((results[first] - expected).norm() / expected.norm())
        limit = 1e-4 if weight.form.activations in ("float", "int16") else 0.02
        if not error < limit:
            yield f"{first}: {name} ({layer}) is off by {error:.1e} (relative, limit {limit:.0e})"
        for isa in others:
            if not torch.equal(results[isa], results[first]):
                yield f"{isa}: {name} ({layer}) has other bits than on {first}"
