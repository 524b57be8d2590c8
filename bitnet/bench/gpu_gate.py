"""Gates of the GPU path: every kernel, training and the engine against the reference on the CPU.

Integers must be equal bit for bit, floats within stated bounds. A gate yields what is wrong, as text; while one is red
nothing that stands on it is measured (`bitnet/bench/gpu.py`). The tests run them on a GPU, if there is one.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet import kernels
from bitnet.bench.random_models import GATE_CONFIG
from bitnet.inference.generation import generate
from bitnet.inference.gpu_engine import GpuEngine
from bitnet.inference.options import SamplingConfig
from bitnet.inference.sampling import choose
from bitnet.kernels import reference
from bitnet.model import BitNetForCausalLM, KVCache, ModelConfig, PackedLinear
from bitnet.quant import pack_codes, quantize_ternary
from bitnet.training.compiling import compile_model
from bitnet.training.graphs import GraphedBackward

GREEDY = SamplingConfig(temperature=0)
CONFIGS = {
    "silu, tied": GATE_CONFIG,
    "relu2, untied, no sub-norms": GATE_CONFIG.replace(hidden_act="relu2", tie_word_embeddings=False, sub_norm=False),
    "one key head, wide": GATE_CONFIG.replace(num_key_value_heads=1, hidden_size=640, intermediate_size=1000),
}
QUICK_CONFIG = GATE_CONFIG.replace(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
# Tokens, rows, columns: every branch of every algorithm, in few variants.
SHAPES = (
    (1, 33, 131),
    (2, 130, 515),
    (3, 130, 515),
    (4, 130, 515),
    (5, 40, 131),
    (17, 130, 2560),
    (64, 130, 515),
    (65, 130, 2560),
    (300, 130, 515),
    (1, 2560, 6912),
    (40, 2560, 6912),
    (1030, 640, 2560),
)
QUICK_SHAPES = SHAPES[:1] + SHAPES[4:5]


def half_of(device: torch.device) -> torch.dtype:
    """The type of 16 bits that gates take; Triton's interpreter has no bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def check_activations(device: torch.device, quick: bool) -> Iterator[str]:
    """Codes, scale and row sums of every float type."""
    from bitnet.kernels.triton.activations import quantize_activations

    generator = torch.Generator().manual_seed(0)
    for M, K in [(1, 1), (7, 131), (3, 300)] if quick else [(1, 1), (7, 131), (129, 2560), (4, 6912), (2, 16384)]:
        x = torch.randn(M, K, generator=generator)
        x[0] = 0
        if K > 1:
            x[-1] = torch.arange(K) % 255 - 126.5  # ties
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            codes, scale, total = (part.cpu() for part in quantize_activations(x.to(dtype).to(device)))
            expected, expected_scale = reference.quantize_activations(x.to(dtype))
            same = torch.equal(codes[:, :K], expected) and torch.equal(scale, expected_scale.view(-1))
            if not same or not torch.equal(total, expected.sum(1, dtype=torch.int32)):
                yield f"activations of {M} x {K}, {dtype}: codes, scale or row sums differ from the reference"


def check_weights(device: torch.device, quick: bool) -> Iterator[str]:
    """Ternary codes for the kernel's own scale, which may differ from torch's in the last bits."""
    from bitnet.kernels.triton import weights

    for N, K in [(3, 7), (40, 333)] if quick else [(3, 7), (40, 333), (2560, 6912), (1000, 5000)]:
        weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
        packed, scale = (part.cpu() for part in weights.quantize_ternary(weight.to(device)))
        codes = (weight / scale).round().clamp(-1, 1).to(torch.int8)
        if not torch.equal(packed, pack_codes(codes, 2)):
            yield f"ternary weights of {N} x {K}: the packed codes are not those of the scale"
        if abs(float(scale) / float(quantize_ternary(weight)[1]) - 1) > 1e-5:
            yield f"ternary weights of {N} x {K}: the scale is {float(scale)}, not the mean"
        if not torch.equal(weights.unpack(packed.to(device), 2, K).cpu()[:, :K], codes):
            yield f"unpacking {N} x {K}: other codes come back"
        if not torch.equal(weights.quantize_ternary(weight.to(device))[1].cpu(), scale):
            yield f"ternary weights of {N} x {K}: a second call gives another scale"


def check_products(device: torch.device, quick: bool) -> Iterator[str]:
    """Integer sums of every algorithm, and the whole backend function, in every width."""
    from bitnet.kernels.triton import product
    from bitnet.kernels.triton.activations import padded

    generator = torch.Generator().manual_seed(0)
    widths = ((2, -1, 1), (4, -8, 7), (8, -128, 127))
    for (M, N, K), (bits, low, high) in itertools.product(QUICK_SHAPES if quick else SHAPES, widths):
        x = torch.randint(-128, 128, (M, K), generator=generator, dtype=torch.int8)
        w = torch.randint(low, high + 1, (N, K), generator=generator, dtype=torch.int8)
        x[-1], w[0], w[-1] = -128, low, high  # the largest sums there can be
        expected = reference.integer_matmul(x, w, bits=bits)
        packed = pack_codes(w, bits).to(device)
        codes = F.pad(x, (0, padded(K) - K)).to(device)
        total, ones = x.sum(1, dtype=torch.int32).to(device), torch.ones(M, device=device)
        for algorithm in product.ALGORITHMS:
            if (algorithm in ("four_lanes", "select") and bits != 2) or (algorithm == "dot4" and M > 4):
                continue
            plan = product.choose(M, N, K, bits, device, algorithm)
            y = product.product(
                codes, ones, total, packed, ones[:1], bits=bits, in_features=K, dtype=torch.int32, plan=plan
            )
            if algorithm == "dot4":  # as the engine calls it: weights that are read ahead of the wait
                ahead = product.product(
                    codes,
                    ones,
                    total,
                    packed,
                    ones[:1],
                    bits=bits,
                    in_features=K,
                    dtype=torch.int32,
                    plan=plan,
                    constant=True,
                )
                if not torch.equal(ahead, y):
                    yield f"{algorithm}, {bits} bits, {M} x {N} x {K}: other sums with weights read ahead"
            if wrong := int((y.cpu() != expected).sum()):
                yield f"{algorithm}, {bits} bits, {M} x {N} x {K}: {wrong} of {M * N} sums differ from the reference"
        scale, bias = torch.rand(N, 1, generator=generator), torch.randn(N, generator=generator)
        floats = torch.randn(M, K, generator=generator)
        want = reference.packed_linear(floats, packed.cpu(), scale, bias, bits=bits, in_features=K)
        with kernels.use_backend("triton"):
            got = kernels.packed_linear(
                floats.to(device), packed, scale.to(device), bias.to(device), bits=bits, in_features=K
            )
        if not torch.equal(got.cpu(), want):
            yield f"packed_linear, {bits} bits, {M} x {N} x {K}: float32 results differ from the reference"


def check_groups(device: torch.device, quick: bool) -> Iterator[str]:
    """Products with a scale for each group of columns: exact sums within a group, a float32 added for each."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 9, 64), (5, 70, 131)) if quick else ((1, 9, 64), (3, 70, 131), (40, 2560, 2560), (300, 640, 6912))
    for (M, N, K), quantizer in itertools.product(shapes, ("ternary-g64", "ternary-g128")):
        codes, scale = kernels.quantize_weight(torch.randn(N, K, generator=generator), quantizer)
        x, bias = (torch.randn(size, generator=generator) for size in ((M, K), (N,)))
        packed = pack_codes(codes, 2)
        shared: dict[str, Any] = {"bits": 2, "in_features": K, "group_size": kernels.GROUP_SIZES[quantizer]}
        want = reference.packed_linear(x, packed, scale, bias, **shared)
        with kernels.use_backend("triton"):
            tensors = (tensor.to(device) for tensor in (x, packed, scale.half(), bias))
            got = kernels.packed_linear(*tensors, **shared).cpu()
        apart = float((got - want).abs().max() / want.std())
        if not apart < 1e-5:
            yield f"{quantizer}, {M} x {N} x {K}: off by {apart:.1e} of the results' standard deviation"


def check_sampling(device: torch.device, quick: bool) -> Iterator[str]:
    """Tokens are drawn as the specification draws them, of 32 rows all but one, which may lie on a border of rounding;
    a row with a logit that is not finite says so."""
    from bitnet.kernels.triton.sampling import draw

    generator = torch.Generator().manual_seed(0)
    rows, V = (4, 100) if quick else (32, 128_256)
    for top_p, min_p in ((1.0, 0.2), (0.5, 0.0), (0.95, 0.05)):
        logits = 3 * torch.randn(rows, V, generator=generator)
        logits[1] = logits[1].round()  # equal ones
        uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
        want = choose(logits, SamplingConfig(0.8, top_p=top_p, min_p=min_p), uniform[:, None])
        logits[-1, V // 2], want[-1] = float("nan"), -2
        options: dict[str, Any] = {"temperature": 0.8, "top_p": top_p, "min_p": min_p, "not_finite": -2}
        unlike = draw(logits.to(device), uniform.to(device), **options).cpu() != want
        if unlike[-1] or int(unlike.sum()) > rows // 32:
            yield f"top-p {top_p}, min-p {min_p}: {int(unlike.sum())} of {rows} rows are not the specification's"


def check_projections(device: torch.device, quick: bool) -> Iterator[str]:
    """A token through gate, norm, quantization and product in one launch, bit for bit what two launches give; and
    those of products against the reference."""
    from bitnet.kernels.triton.activations import quantize_activations
    from bitnet.kernels.triton.product import product
    from bitnet.kernels.triton.project import project

    generator = torch.Generator().manual_seed(0)
    half = half_of(device)
    cases = [(5, 131, 2, "none", torch.float32), (40, 131, 4, "silu", half)]
    if not quick:
        cases += [
            (3840, 2560, 2, "none", half),
            (640, 515, 2, "relu2", torch.float32),
            (130, 6912, 2, "relu2", half),
            (1536, 4096, 2, "silu", half),
            (2560, 2560, 4, "none", half),
            (33, 1111, 2, "silu", torch.float32),
        ]
    for N, K, bits, gate, dtype in cases:
        low, high = {2: (-1, 1), 4: (-8, 7)}[bits]

        def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        w = torch.randint(low, high + 1, (N, K), generator=generator, dtype=torch.int8)
        packed, scale = pack_codes(w, bits).to(device), draw(N).abs()
        x, norm, residual = draw(1, K if gate == "none" else 2 * K, dtype=dtype), draw(K), draw(1, N, dtype=dtype)
        shared: dict[str, Any] = {"bits": bits, "in_features": K, "dtype": dtype}
        for weight, added in ((norm, residual), (None, None)):
            y = project(x, weight, packed, scale, added, eps=1e-5, gate=gate, **shared)
            codes = quantize_activations(x, weight, 1e-5, gate)
            expected = product(*codes, packed, scale, None, added, **shared)
            # The sums of squares run in another order, so a code on a border may round to its neighbour.
            apart = float((y.float() - expected.float()).norm() / expected.float().norm())
            exact = weight is None
            if not (torch.equal(y, expected) if exact else apart < 1e-3):
                yield f"one token, {bits} bits, {N} x {K}, {gate}, {dtype}, norm {not exact}: off by {apart:.1e}"


def check_training(device: torch.device, quick: bool) -> Iterator[str]:
    """Forward and gradients in two types: at most twice the error of the reference in the same type, plus 1e-5 or
    1e-2, against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    for M, N, K in [(9, 11, 70)] if quick else [(9, 11, 70), (300, 640, 515), (2048, 512, 1536)]:
        for dtype, atol in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            x, weight, grad = (torch.randn(s, generator=generator).to(dtype) for s in ((M, K), (N, K), (M, N)))
            results: list[list[Tensor]] = []
            for where, kind, name in (
                (torch.device("cpu"), torch.float64, "reference"),
                (device, dtype, "reference"),
                (device, dtype, "triton"),
            ):
                mine = [tensor.to(where, kind, copy=True).requires_grad_() for tensor in (x, weight)]
                with kernels.use_backend(name):
                    y = kernels.fake_quant_linear(mine[0], mine[1], None, "ternary")
                y.backward(grad.to(where, kind))
                results.append(
                    [y.detach().cpu().double(), *(t.grad.cpu().double() for t in mine if t.grad is not None)]
                )
            for part, exact, theirs, ours in zip(("y", "grad_x", "grad_w"), *results, strict=True):
                largest = float(exact.abs().max())
                error, allowed = float((ours - exact).abs().max()), 2 * float((theirs - exact).abs().max())
                if not error <= allowed + atol * largest:
                    yield f"training, {dtype}, {M} x {N} x {K}: {part} is off by {error:.2e}, allowed {allowed:.2e}"


def check_steps(device: torch.device, quick: bool) -> Iterator[str]:
    """Loss and gradient of a training step: compiled within 2 % of eager, where a rounding may flip a code, and the
    same as a CUDA graph, of one micro-batch and of two."""
    config = QUICK_CONFIG if quick else GATE_CONFIG
    for quantizer in ("ternary", "ternary-g64", "int4"):
        torch._dynamo.reset()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = BitNetForCausalLM(config.replace(quantizer=quantizer)).to(device)
            ids = torch.randint(config.vocab_size, (2, 2, 8 if quick else 128)).to(device)
        parameters = list(model.parameters())

        def backward(ids: Tensor, model: BitNetForCausalLM = model) -> Tensor:
            loss = model.loss(ids, ids)
            loss.backward()
            return loss.detach()

        def gradient(work: Callable[..., Tensor], parts: Tensor, parameters: Sequence[Tensor] = parameters) -> Tensor:
            for parameter in parameters:
                parameter.grad = None
            losses = [work(part) for part in parts]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            return torch.cat([torch.stack(losses), *(grad.flatten() for grad in grads)]).clone()

        with kernels.use_backend("reference"):
            eager = [gradient(backward, parts) for parts in (ids[:1], ids)]
            compile_model(model, "off" if quick else "on")
            ways = {"compiled": [gradient(backward, parts) for parts in (ids[:1], ids)]}
            if device.type == "cuda":
                graphed = GraphedBackward(backward, parameters)
                for _ in range(5):
                    ways["a graph"] = [
                        gradient(functools.partial(graphed, None, len(parts) == 1), parts) for parts in (ids[:1], ids)
                    ]
                if graphed.refused:
                    yield f"steps, {quantizer}: could not be captured"
        for way, found in ways.items():
            for wanted, got in zip(ways["compiled"] if way == "a graph" else eager, found, strict=True):
                error = float((got - wanted).norm() / wanted.norm())
                if not error <= (1e-5 if way == "a graph" else 0.02):
                    yield f"steps, {quantizer}: the gradient {way} is off by {error:.2e}"


def check_engine(device: torch.device, quick: bool) -> Iterator[str]:
    """Logits of a prompt and of single tokens behind it, and greedy text, of three architectures.

    Engine and reference may round a value on a border to neighbouring INT8 codes, which moves a position's logits by
    about 5e-4; that happens to a few positions of a correct engine, so each is judged by itself: the median below 1e-5,
    half of them below 1e-4, none above 5 %. In bfloat16 the engine may be off by twice what torch's own model is.
    """
    T = 5 if quick else 71
    for name, config in {"quick": QUICK_CONFIG}.items() if quick else CONFIGS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = BitNetForCausalLM(config).eval().pack()
            ids = torch.randint(config.vocab_size, (2, T))
        with kernels.use_backend("reference"), torch.no_grad():
            expected = model(ids)
        engine = GpuEngine.from_model(model, device=device, dtype="float32")
        cache = engine.new_cache(2, T)
        pieces = torch.cat(
            [engine(piece.to(device), cache) for piece in ids.split([T // 2, T - T // 2 - 2, 1, 1], 1)], 1
        )
        for how, logits in (("in pieces", pieces), ("at once", engine(ids))):
            apart = ((logits.cpu() - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()
            print(f"engine, {name}, {how}: positions off by", quantiles(apart))
            if not (apart.median() < 1e-5 and (apart < 1e-4).sum() >= len(apart) / 2 and apart.max() < 0.05):
                yield f"engine, {name}, float32, {how}: positions are off by {quantiles(apart)} (relative)"
        half = half_of(device)
        with kernels.use_backend("reference"), torch.no_grad():
            theirs = rounding_to(half, model)(ids)
        ours = GpuEngine.from_model(model, device=device, dtype=str(half).removeprefix("torch."))(ids).cpu()
        error, allowed = (float((y - expected).norm() / expected.norm()) for y in (ours, theirs))
        print(f"engine, {name}, {half}: off by {error:.1e}, torch's model by {allowed:.1e}")
        if not error <= 2 * allowed + 1e-3:
            yield f"engine, {name}, {half}: logits are off by {error:.1e} (relative), torch's model by {allowed:.1e}"
        arguments: dict[str, Any] = {"max_new_tokens": 2 if quick else 20, "sampling": GREEDY, "seed": 0}
        for batch in (ids[:1, :4], ids[:, :4], ids[:, :4].repeat(4, 1)):
            eager = GpuEngine.from_model(model, device=device, dtype="float32", graphs=False)
            texts = [torch.stack(list(generate(e, batch, **arguments))) for e in (engine, eager)]
            if not torch.equal(*texts):
                yield f"engine, {name}: the text of {len(batch)} rows from CUDA graphs is not the eager one"


def check_caches(device: torch.device, quick: bool) -> Iterator[str]:
    """Caches of fewer bits: every code of FP8 and every number where rounding to one changes; and the engine's logits
    beside those of torch's model with a cache that rounds alike. In float32 the median position must be within 1e-3 of
    them and all within 5 %, in half precision the mean within twice what torch's own model is off by."""
    yield from check_e4m3(device)
    half = half_of(device)
    T = 5 if quick else 71
    for config, name in itertools.product(cache_configs(quick), CACHES):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = BitNetForCausalLM(config).eval().pack()
            ids = torch.randint(config.vocab_size, (2, T))
        with kernels.use_backend("reference"), torch.no_grad():
            expected, theirs = (
                part(ids, RoundedCache(config, 2, T, CACHES[name])) for part in (model, rounding_to(half, model))
            )
        for dtype in (torch.float32, half):
            engine = GpuEngine.from_model(
                model, device=device, dtype=str(dtype).removeprefix("torch."), cache_dtype=name
            )
            cache = engine.new_cache(2, T)
            pieces = [engine(piece.to(device), cache).cpu() for piece in ids.split([T // 2, T - T // 2 - 2, 1, 1], 1)]
            apart, allowed = (
                ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()
                for logits in (torch.cat(pieces, 1), theirs)
            )
            what = f"{name} cache, {config.num_key_value_heads} key heads, {dtype}"
            print(f"{what}: positions off by", quantiles(apart))
            exact = dtype == torch.float32
            within = apart.median() < 1e-3 and apart.max() < 0.05 if exact else apart.mean() < 2 * allowed.mean() + 1e-3
            if not within:
                yield f"{what}: positions are off by {quantiles(apart)} (relative)"


def cache_configs(quick: bool) -> list[ModelConfig]:
    """Models of `check_caches`: one whose query heads share keys, one whose do not."""
    config = QUICK_CONFIG if quick else GATE_CONFIG
    return [config, config.replace(num_key_value_heads=config.num_attention_heads)]


def e4m3_borders() -> Tensor:
    """Float32 numbers at which rounding to E4M3 changes: its values, the middles between them,
    the neighbours of all of these in float32, what is larger or smaller than all, infinities and NaN; both signs."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ends = torch.tensor([464.0, 480, 512, 65504, 65520, 3e38, float("inf"), float("nan"), 2.0**-126, 1e-45])
    exact = torch.cat([values, (values[1:] + values[:-1]) / 2, ends])
    numbers = torch.cat([exact, exact.nextafter(torch.tensor(1e9)), exact.nextafter(torch.tensor(-1e9))])
    return torch.cat([numbers, -numbers])


def to_e4m3(x: Tensor) -> Tensor:
    """FP8 as `bitnet/kernels/triton/float8.py` defines it, by torch's conversion."""
    return torch.where(x.isfinite(), x.clamp(-448, 448), float("nan")).to(torch.float8_e4m3fn)


def check_e4m3(device: torch.device) -> Iterator[str]:
    """Values on their way through `rotate` and `attend`: rounded numbers to the bit, and what all codes stand for."""
    from bitnet.kernels.triton import attention

    def same(found: Tensor, expected: Tensor) -> bool:
        a, b = found.cpu(), expected
        return bool(((a.view(torch.uint8) == b.view(torch.uint8)) | (a.float().isnan() & b.float().isnan())).all())

    D, codes = 128, torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = e4m3_borders()
    numbers = F.pad(numbers, (0, -len(numbers) % D)).view(-1, D)
    rows = len(numbers)
    tables = torch.ones(rows, D, device=device), torch.zeros(rows, D, device=device)  # of no rotation
    first, second = (torch.tensor([n], dtype=torch.int32, device=device) for n in (0, 1))
    for dtype in (torch.float32, half_of(device)):
        v = numbers.to(dtype)
        qkv = torch.cat([torch.ones(rows, 2 * D, dtype=dtype), v], 1).to(device)
        keys, values = torch.zeros(2, 1, 1, rows, D, dtype=codes.dtype, device=device)
        attention.rotate(qkv[None], *tables, first, keys, values, 1)
        if not same(values[0, 0], to_e4m3(v.float())):
            yield f"FP8 cache, {dtype}, several tokens: rounded numbers are not torch's"
        keys, values = torch.zeros(2, rows, 1, 1, D, dtype=codes.dtype, device=device)
        parts = attention.AttentionParts(rows, 1, 1, D, 1, device)
        out = attention.attend(qkv[:, None], *tables, first, keys, values, 1, parts)
        if not same(values[:, 0, 0], to_e4m3(v.float())):
            yield f"FP8 cache, {dtype}, one token: rounded numbers are not torch's"
        if not torch.allclose(out[:, 0].cpu().float(), to_e4m3(v.float()).float(), 1e-6, 0, equal_nan=True):
            yield f"FP8 cache, {dtype}, one token: attention does not see what is stored"
        # All weight is on the first of two positions.
        keys, values = torch.zeros(2, 2, 1, 2, D, dtype=codes.dtype, device=device)
        keys[:, :, 0] = torch.full((D,), 16.0)
        values[:, 0, 0] = codes.view(2, D).to(device)
        qkv = torch.tensor([16.0, -16.0, 0]).to(dtype).repeat_interleave(D).expand(2, 1, -1).contiguous().to(device)
        parts = attention.AttentionParts(2, 1, 1, D, 2, device)
        out = attention.attend(qkv, *tables, second, keys, values, 1, parts)
        if not torch.allclose(out.view(-1).cpu().float(), codes.float(), 1e-6, 0, equal_nan=True):
            yield f"FP8 cache, {dtype}: attention reads other numbers than torch"


class RoundedCache(KVCache):
    """A cache of float32 numbers that one of fewer bits could hold."""

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, rounded: Callable[[Tensor], Tensor]):
        super().__init__(config, batch_size, max_length)
        self._rounded = rounded

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return super().append(layer, self._rounded(keys), self._rounded(values))


def _int8_and_back(x: Tensor) -> Tensor:
    codes, scale = reference.quantize_activations(x)
    return codes * scale


CACHES: dict[str, Callable[[Tensor], Tensor]] = {
    "float16": lambda x: x.half().float(),
    "int8": _int8_and_back,
    "fp8": lambda x: to_e4m3(x).float(),
}
"""Types of keys and values of fewer bits, and float32 numbers as they hold them."""


def rounding_to(dtype: torch.dtype, model: BitNetForCausalLM) -> BitNetForCausalLM:
    """A copy of the model in which every module's result is rounded to this type, as one that is stored in it."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if name and not isinstance(module, torch.nn.ModuleList) and name != "model":
            module.register_forward_hook(lambda _, __, result: result.to(dtype).float())
    return model


def quantiles(values: Tensor) -> str:
    """Smallest, median, nine tenths and largest."""
    return " ".join(f"{float(values.quantile(q)):.1e}" for q in (0, 0.5, 0.9, 1))


def packed_layer(device: torch.device) -> tuple[PackedLinear, Tensor]:
    """A layer for `check_compile`, and its input."""
    torch.manual_seed(0)
    layer = PackedLinear.from_linear(torch.nn.Linear(300, 40), "ternary").to(device)
    return layer, torch.randn(3, 300, device=device)


def check_compile(device: torch.device, quick: bool) -> Iterator[str]:
    """A packed layer in one graph of torch.compile, and in a CUDA graph of its own making."""
    layer, x = packed_layer(device)
    ways: tuple[dict[str, Any], ...] = ({"backend": "inductor"}, {"mode": "reduce-overhead"})
    for way in ways if device.type == "cuda" else ({"backend": "aot_eager"},):
        with kernels.use_backend("triton"), torch.no_grad():
            compiled = torch.compile(layer, fullgraph=True, **way)
            if not all(torch.equal(compiled(x), layer(x)) for _ in range(3)):  # a graph is replayed the third time
                yield f"torch.compile, {way}: a packed layer gives other numbers"


GATES: dict[str, Callable[[torch.device, bool], Iterator[str]]] = {
    "activations": check_activations,
    "weights": check_weights,
    "products": check_products,
    "projections": check_projections,
    "groups": check_groups,
    "sampling": check_sampling,
    "training": check_training,
    "steps": check_steps,
    "engine": check_engine,
    "caches": check_caches,
    "compile": check_compile,
}
"""What is wrong, as text, and nothing where all is right: `gate(device, quick)`."""
