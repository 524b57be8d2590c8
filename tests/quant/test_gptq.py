"""GPTQ against the published code, restated here column by column; its layout against a reader of single bits."""

import itertools
import math
import pydoc_data.topics

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.quant.gptq import HessianSum, gptq_quantize, layer_error
from bitnet.quant.gptq_layout import pack_gptq, pack_words, unpack_gptq, unpack_words
from bitnet.quant.grouped import TERNARY, Grid, QuantizedWeight, round_to_nearest

BITS = [2, 3, 4, 8]
GRIDS = [*(Grid(bits, symmetric) for bits in BITS for symmetric in (False, True)), TERNARY]


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated activations whose channels differ in size, as those of a trained model do."""
    mixing = torch.Generator().manual_seed(1)
    mix = torch.randn(columns, columns, generator=mixing) / math.sqrt(columns)
    size = torch.exp(0.8 * torch.randn(columns, generator=mixing))
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    return (x @ mix + 0.3 * x) * size


def hessian_of(x: Tensor) -> Tensor:
    total = HessianSum(x.shape[-1])
    total.update(x)
    return total.matrix()


def weight_of(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) * torch.exp(0.3 * torch.randn(rows, columns)) * 0.05


# The published code, one column at a time: quant.py's find_params and gptq.py's fasterquant


class PublishedQuantizer:
    def __init__(self, bits: int, sym: bool, mse: bool) -> None:
        self.maxq, self.sym, self.mse = 2**bits - 1, sym, mse

    def find(self, x: Tensor) -> "PublishedQuantizer":
        xmin = torch.minimum(x.min(1)[0], torch.zeros(len(x)))
        xmax = torch.maximum(x.max(1)[0], torch.zeros(len(x)))
        for row in range(len(x)):
            if self.sym:
                xmax[row] = max(abs(xmin[row]), xmax[row])
                if xmin[row] < 0:
                    xmin[row] = -xmax[row]
            if xmin[row] == 0 and xmax[row] == 0:
                xmin[row], xmax[row] = -1, 1
        self.scale = (xmax - xmin) / self.maxq
        self.zero = torch.full_like(self.scale, (self.maxq + 1) / 2) if self.sym else torch.round(-xmin / self.scale)
        if self.mse:
            best = torch.full([len(x)], float("inf"))
            for i in range(int(0.8 * 100)):
                p = 1 - i / 100
                scale = (p * xmax - p * xmin) / self.maxq
                zero = self.zero if self.sym else torch.round(-(p * xmin) / scale)
                q = scale[:, None] * (
                    torch.clamp(torch.round(x / scale[:, None]) + zero[:, None], 0, self.maxq) - zero[:, None]
                )
                error = (q - x).abs().pow(2.4).sum(1)
                for row in (error < best).nonzero().flatten():
                    best[row], self.scale[row] = error[row], scale[row]
                    if not self.sym:
                        self.zero[row] = zero[row]
        return self


def published(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    sym: bool,
    groupsize: int,
    percdamp: float,
    actorder: bool,
    static: bool,
    mse: bool,
    blocksize: int,
) -> tuple[Tensor, Tensor]:
    """Dequantized weight and codes."""
    W, H = weight.clone(), hessian.clone()
    columns = W.shape[1]
    for j in range(columns):
        if H[j, j] == 0:
            H[j, j] = 1
            W[:, j] = 0
    quantizer = PublishedQuantizer(bits, sym, mse).find(W)
    groups = []
    if static:
        groups = [
            PublishedQuantizer(bits, sym, mse).find(W[:, i : i + groupsize]) for i in range(0, columns, groupsize)
        ]
    perm = torch.argsort(torch.diag(H), descending=True) if actorder else torch.arange(columns)
    W, H = W[:, perm], H[perm][:, perm]
    H[range(columns), range(columns)] += percdamp * torch.mean(torch.diag(H))
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q, codes = torch.zeros_like(W), torch.zeros_like(W)
    for i1 in range(0, columns, blocksize):
        i2 = min(i1 + blocksize, columns)
        W1, Err1 = W[:, i1:i2].clone(), torch.zeros_like(W[:, i1:i2])
        Hinv1 = Hinv[i1:i2, i1:i2]
        for i in range(i2 - i1):
            if groupsize != -1 and static:
                quantizer = groups[int(perm[i1 + i]) // groupsize]
            elif groupsize != -1 and (i1 + i) % groupsize == 0:
                quantizer = PublishedQuantizer(bits, sym, mse).find(W[:, i1 + i : i1 + i + groupsize])
            w, d = W1[:, i], Hinv1[i, i]
            code = torch.clamp(torch.round(w / quantizer.scale) + quantizer.zero, 0, quantizer.maxq)
            codes[:, i1 + i] = code
            Q[:, i1 + i] = quantizer.scale * (code - quantizer.zero)
            err = (w - Q[:, i1 + i]) / d
            W1[:, i:] -= err.unsqueeze(1).matmul(Hinv1[i, i:].unsqueeze(0))
            Err1[:, i] = err
        W[:, i2:] -= Err1.matmul(Hinv[i1:i2, i2:])
    invperm = torch.argsort(perm)
    return Q[:, invperm], codes[:, invperm]


@pytest.mark.parametrize(
    ("groupsize", "actorder", "static"),
    [(-1, False, False), (-1, True, False), (16, False, False), (16, True, False), (16, False, True), (16, True, True)],
)
@pytest.mark.parametrize(
    ("bits", "sym", "mse"), [(2, False, False), (3, True, True), (4, False, True), (8, True, False)]
)
def test_original_is_the_published_code(bits, sym, mse, groupsize, actorder, static) -> None:
    weight, hessian = weight_of(12, 64), hessian_of(inputs(100, 64))
    hessian[5] = hessian[:, 5] = 0  # a dead channel
    expected, codes = published(weight, hessian, bits, sym, groupsize, 0.01, actorder, static, mse, 24)
    result = gptq_quantize(
        weight, hessian, Grid(bits, sym), group_size=groupsize, damping=0.01, act_order=actorder, static_groups=static,
        search=mse, block_size=24, algorithm="original",
    )  # fmt: skip
    assert torch.equal(result.codes.float(), codes)
    # A group's scale is that of updated weights, and the update's products round in the order that BLAS sums them.
    assert torch.allclose(result.dequantize(), expected, rtol=1e-5, atol=0)
    groups = 1 if groupsize == -1 else 4
    assert result.scale.shape == result.zero_point.shape == (12, groups)
    assert (result.g_idx.bincount() == 64 // groups).all()


# The refined algorithm


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("group_size", [16, -1])
def test_refined_is_below_rounding_row_by_row_and_below_the_original(grid, group_size) -> None:
    weight, hessian = weight_of(24, 64), hessian_of(inputs(400, 64))
    result = gptq_quantize(weight, hessian, grid, group_size=group_size)
    plain = round_to_nearest(weight, grid, group_size)
    original = gptq_quantize(weight, hessian, grid, group_size=group_size, algorithm="original")
    errors = [layer_error(weight, q.dequantize(), hessian) for q in (result, plain, original)]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.5 * errors[1].sum()
    assert errors[0].sum() < errors[2].sum()
    assert result.codes.dtype == torch.uint8
    assert int(result.codes.max()) <= grid.quant_max
    assert result.scale.dtype == torch.float16
    assert (result.scale > 0).all()
    assert int(result.zero_point.min()) >= 1
    assert int(result.zero_point.max()) <= grid.quant_max


def bad_hessians() -> dict[str, Tensor]:
    few, one = inputs(10, 32), torch.zeros(50, 32)
    one[:, 3] = 1.0
    dead = inputs(200, 32)
    dead[:, [0, 7, 31]] = 0
    huge = inputs(200, 32)
    huge[:, 4] *= 1e4
    cases = {"fewer tokens than channels": few, "one live channel": one, "dead channels": dead, "outlier": huge}
    return {"nothing": torch.zeros(32, 32), **{name: hessian_of(x) for name, x in cases.items()}}


@pytest.mark.parametrize("case", bad_hessians())
@pytest.mark.parametrize("damping", [0.0, 0.003])
@pytest.mark.parametrize("grid", [Grid(2), Grid(4, True), TERNARY], ids=str)
def test_degenerate_hessians_are_never_worse_than_rounding(case, damping, grid) -> None:
    weight, hessian = weight_of(9, 32), bad_hessians()[case]
    result = gptq_quantize(weight, hessian, grid, group_size=16, damping=damping)
    plain = round_to_nearest(weight, grid, 16)
    assert (layer_error(weight, result.dequantize(), hessian) <= layer_error(weight, plain.dequantize(), hessian)).all()
    assert result.dequantize().isfinite().all()


def test_dead_channels_are_rounded_and_in_the_original_zero() -> None:
    weight, x = weight_of(9, 32), inputs(200, 32)
    x[:, 7] = 0
    hessian = hessian_of(x)
    result = gptq_quantize(weight, hessian, Grid(8), group_size=32)
    levels = (torch.arange(256) - result.zero_point) * result.scale.float()
    nearest = (levels - weight[:, 7:8]).abs().amin(1)
    assert torch.allclose((result.dequantize()[:, 7] - weight[:, 7]).abs(), nearest, rtol=0, atol=1e-6)
    original = gptq_quantize(weight, hessian, Grid(8), group_size=32, algorithm="original")
    assert (original.dequantize()[:, 7] == 0).all()


@pytest.mark.parametrize("weight", [torch.zeros(4, 32), torch.full((4, 32), 0.3), torch.full((4, 32), -1e-9)])
@pytest.mark.parametrize("algorithm", ["refined", "original"])
@pytest.mark.parametrize("grid", [Grid(2), Grid(4, True), TERNARY], ids=str)
def test_constant_weights(weight, algorithm, grid) -> None:
    result = gptq_quantize(weight, hessian_of(inputs(100, 32)), grid, group_size=16, algorithm=algorithm).dequantize()
    assert result.isfinite().all()
    if algorithm == "refined":
        assert (result - weight).abs().max() <= weight.abs().max()
    if not weight.any():
        assert not result.any()


def test_no_single_code_can_be_improved_after_enough_rounds() -> None:
    weight, x, damping = weight_of(6, 32), inputs(300, 32), 0.01
    hessian = hessian_of(x)
    result = gptq_quantize(weight, hessian, Grid(3), group_size=16, damping=damping, rounds=50)
    damped = hessian + torch.eye(32) * damping * hessian.diagonal().mean()
    best = layer_error(weight, result.dequantize(), damped)
    for column, step in itertools.product(range(32), (-1, 1)):
        codes = result.codes.int()
        codes[:, column] = (codes[:, column] + step).clamp(0, 7)
        moved = QuantizedWeight(codes, result.scale, result.zero_point, result.g_idx, 3)
        assert (layer_error(weight, moved.dequantize(), damped) >= best * (1 - 1e-4)).all()


def test_each_refinement_helps_and_blocks_do_not_matter() -> None:
    weight, hessian = weight_of(24, 64), hessian_of(inputs(400, 64))

    def error(**options) -> float:
        result = gptq_quantize(weight, hessian, Grid(3), group_size=16, **options)
        return float(layer_error(weight, result.dequantize(), hessian).sum())

    plain = error(search=False, rounds=0)
    searched = error(sweeps=1, rounds=0)
    again = error(sweeps=3, rounds=0)
    assert plain > searched > again > error(sweeps=3, rounds=3)
    assert error(block_size=8) == pytest.approx(error(block_size=128), rel=0.02)


def test_ternary_grid_searches_its_scale_or_keeps_absmean() -> None:
    weight, hessian = weight_of(8, 64), hessian_of(inputs(400, 64))
    fixed = gptq_quantize(weight, hessian, TERNARY, group_size=32, search=False)
    searched = gptq_quantize(weight, hessian, TERNARY, group_size=32)
    absmean = weight.view(8, 2, 32).abs().mean(2).half()
    assert torch.equal(fixed.scale, absmean)
    assert (
        layer_error(weight, searched.dequantize(), hessian).sum()
        < layer_error(weight, fixed.dequantize(), hessian).sum()
    )
    assert set((searched.codes.int() - 1).unique().tolist()) == {-1, 0, 1}
    assert (searched.zero_point == 1).all()


def test_arguments_are_not_modified_and_results_repeat() -> None:
    weight, hessian = weight_of(8, 32).half(), hessian_of(inputs(100, 32))
    before = weight.clone(), hessian.clone()
    for algorithm in ("refined", "original"):
        first, second = (gptq_quantize(weight, hessian, group_size=8, algorithm=algorithm) for _ in range(2))
        assert torch.equal(first.codes, second.codes)
        assert torch.equal(weight, before[0])
        assert torch.equal(hessian, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 24}, r"group_size 24 does not divide 32.*divisor"),
        ({"group_size": 0}, r"group_size 0"),
        ({"algorithm": "fast"}, r"'fast'.*refined"),
        ({"hessian": torch.eye(31)}, r"\[31, 31\]"),
        ({"hessian": -torch.eye(32)}, r"negative"),
        ({"hessian": torch.full((32, 32), torch.nan)}, r"NaN"),
        ({"weight": torch.full((4, 32), torch.nan)}, r"128 values that are NaN"),
        ({"weight": torch.ones(4, 32, dtype=torch.int32)}, r"int32"),
        ({"weight": torch.full((4, 32), 1e7)}, r"too large for float16"),
        ({"damping": -1.0}, r"damping is -1"),
        ({"hessian": torch.zeros(32, 32) + 1, "algorithm": "original", "damping": 0.0}, r"singular"),
    ],
)
def test_bad_input_is_named(change, message) -> None:
    arguments = {"weight": weight_of(4, 32), "hessian": hessian_of(inputs(100, 32)), "group_size": 16, **change}
    with pytest.raises(ValueError, match=message):
        gptq_quantize(arguments.pop("weight"), arguments.pop("hessian"), **arguments)


def test_bad_grids_are_named() -> None:
    with pytest.raises(ValueError, match="bits is 5"):
        Grid(5)
    with pytest.raises(ValueError, match="TERNARY"):
        Grid(3, True, ternary=True)


def test_hessian_of_batches_is_the_hessian_of_all() -> None:
    x = inputs(100, 16)
    total = HessianSum(16)
    for part in (x[:10].view(2, 5, 16), x[10:37], x[37:]):
        total.update(part)
    assert torch.allclose(total.matrix(), 2 / 100 * x.T @ x, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="NaN or infinite"):
        total.update(torch.full((3, 16), torch.inf))
    with pytest.raises(ValueError, match="no input"):
        HessianSum(4).matrix()


# Layers of a trained model


@pytest.fixture(scope="module")
def trained_layers() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Weight, Hessian of training text and Hessian of held-out text of some layers of a small model of bytes."""
    torch.manual_seed(0)
    text = "".join(topic for _, topic in sorted(pydoc_data.topics.topics.items())).encode()
    data = torch.tensor(list(text))
    config = ModelConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, quantizer="none",
    )  # fmt: skip
    model = BitNetForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    split = len(data) * 9 // 10

    def batch(low: int, high: int, rows: int) -> Tensor:
        return torch.stack([data[i : i + 65] for i in torch.randint(low, high - 65, (rows,)).tolist()])

    for _ in range(80):
        ids = batch(0, split, 16)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 3.0

    def hessians(low: int, high: int) -> dict[str, Tensor]:
        sums = {name: HessianSum(m.in_features) for name, m in model.named_modules() if name.endswith("_proj")}
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(lambda _, args, total=total: total.update(args[0]))
            for name, total in sums.items()
        ]
        with torch.no_grad():
            for _ in range(4):
                model(batch(low, high, 64)[:, :-1])
        for hook in hooks:
            hook.remove()
        return {name: total.matrix() for name, total in sums.items()}

    seen, held_out = hessians(0, split), hessians(split, len(data))
    chosen = ("0.self_attn.q_proj", "0.mlp.down_proj", "1.self_attn.o_proj", "1.mlp.gate_proj")
    names = [f"model.layers.{name}" for name in chosen]
    return {name[13:]: (model.get_submodule(name).weight.detach(), seen[name], held_out[name]) for name in names}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("layer", ["0.self_attn.q_proj", "0.mlp.down_proj", "1.self_attn.o_proj", "1.mlp.gate_proj"])
def test_held_out_error_is_at_most_the_originals_best(trained_layers, layer, bits) -> None:
    weight, hessian, held_out = trained_layers[layer]

    def error(quantized: QuantizedWeight) -> float:
        return float(layer_error(weight, quantized.dequantize(), held_out).sum())

    settings = itertools.product([False, True], [False, True], [False, True], [0.003, 0.01, 0.1])
    best = min(
        error(
            gptq_quantize(
                weight,
                hessian,
                Grid(bits),
                group_size=64,
                algorithm="original",
                act_order=act_order,
                static_groups=static,
                search=mse,
                damping=damping,
            )
        )
        for act_order, static, mse, damping in settings
    )
    ours = error(gptq_quantize(weight, hessian, Grid(bits), group_size=64))
    assert ours <= best
    assert ours < error(round_to_nearest(weight, Grid(bits), 64))


# The layout


def bit_stream(words: np.ndarray, bits: int, count: int) -> list[int]:
    """Values of `bits` bits of one column of 32-bit words, read one bit at a time."""
    stream = [(int(word) >> b) & 1 for word in words.astype(np.uint32) for b in range(32)]
    return [sum(stream[i * bits + b] << b for b in range(bits)) for i in range(count)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_checkpoint_read_bit_by_bit_is_the_weight(bits, version, act_order) -> None:
    weight = gptq_quantize(
        weight_of(32, 64), hessian_of(inputs(100, 64)), Grid(bits), group_size=16, act_order=act_order,
        static_groups=False, algorithm="original",
    )  # fmt: skip
    weight.zero_point.clamp_(min=1)
    tensors = pack_gptq(weight, version)
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        "qweight": [64 * bits // 32, 32], "qzeros": [4, 32 * bits // 32], "scales": [4, 32], "g_idx": [64],
    }  # fmt: skip
    assert [t.dtype for t in tensors.values()] == [torch.int32, torch.int32, torch.float16, torch.int32]
    qweight, qzeros, scales, g_idx = (t.numpy() for t in tensors.values())
    codes = np.array([bit_stream(qweight[:, n], bits, 64) for n in range(32)])
    zeros = np.array([bit_stream(qzeros[g], bits, 32) for g in range(4)]).T + (2 - version)
    expected = (codes - zeros[:, g_idx]) * scales.T.astype(np.float32)[:, g_idx]
    weight.scale = weight.scale.half()
    assert np.array_equal(expected.astype(np.float32), weight.dequantize().numpy())
    again = unpack_gptq(tensors, bits, version)
    for field in ("codes", "scale", "zero_point", "g_idx"):
        assert torch.equal(getattr(again, field), getattr(weight, field)), field


def test_three_bits_cross_words_where_the_published_packer_puts_them() -> None:
    codes = torch.randint(0, 8, (32, 1))
    c = codes.flatten().tolist()
    words = [
        sum(c[j] << 3 * j for j in range(10)) | c[10] << 30,
        c[10] >> 2 & 1 | sum(c[j] << 3 * (j - 11) + 1 for j in range(11, 21)) | c[21] << 31,
        c[21] >> 1 & 3 | sum(c[j] << 3 * (j - 22) + 2 for j in range(22, 32)),
    ]
    assert [int(word) & 0xFFFFFFFF for word in pack_words(codes, 3).flatten()] == [w & 0xFFFFFFFF for w in words]


@pytest.mark.parametrize("bits", BITS)
def test_words_hold_every_value(bits) -> None:
    values = torch.arange(2**bits).repeat(32)[: 32 * max(1, 2**bits // 32) * 3].view(-1, 3)
    values = values[: len(values) // 32 * 32]
    for extreme in (values, torch.zeros_like(values), torch.full_like(values, 2**bits - 1)):
        assert torch.equal(unpack_words(pack_words(extreme, bits), bits).long(), extreme)


def test_layout_errors_are_named() -> None:
    weight = round_to_nearest(weight_of(32, 64), Grid(4), 16)
    with pytest.raises(ValueError, match="30 values of 3 bits"):
        pack_words(torch.zeros(30, 2, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match=r"span \[0, 16\]"):
        pack_words(torch.arange(17)[:, None].repeat(8, 1)[: 8 * 16], 4)
    with pytest.raises(ValueError, match="version is 3"):
        pack_gptq(weight, 3)
    with pytest.raises(ValueError, match="is bits right"):
        unpack_gptq(pack_gptq(weight), 8)
    with pytest.raises(ValueError, match="bits is 7"):
        unpack_gptq(pack_gptq(weight), 7)
    with pytest.raises(ValueError, match=r"g_idx spans \[0, 9\]"):
        unpack_gptq({**pack_gptq(weight), "g_idx": torch.arange(64, dtype=torch.int32) % 10}, 4)
    weight.zero_point[0, 0] = 0
    with pytest.raises(ValueError, match="version 2"):
        pack_gptq(weight, 1)
    assert unpack_gptq(pack_gptq(weight, 2), 4, 2).zero_point[0, 0] == 0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_takes_the_nearest_code_and_never_zero_point_zero(grid) -> None:
    weight = torch.cat([weight_of(8, 32), weight_of(8, 32).abs(), -weight_of(8, 32).abs(), torch.zeros(1, 32)])
    result = round_to_nearest(weight, grid, 8)
    assert int(result.zero_point.min()) >= 1
    value, group = result.dequantize(), result.g_idx.long()
    scale, zero = result.scale.float()[:, group], result.zero_point[:, group]
    levels = (torch.arange(grid.quant_max + 1)[:, None, None] - zero) * scale
    assert torch.equal((value - weight).abs(), (levels - weight).abs().amin(0))
    assert not value[-1].any()
