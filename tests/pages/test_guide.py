"""The guide: its own numbers, the right arithmetic where it slips, and a page with every figure of a model."""

import math
import re
from pathlib import Path

import pytest
import torch

from bitnet.__main__ import main
from bitnet.model import BitNetForCausalLM
from bitnet.pages.guide import calibration, linear, minima, numbers, ptq, qat, ternary
from bitnet.pages.guide.guide import guide
from bitnet.pages.guide.subject import CLIP, OUTLIER_VECTOR, VECTOR, Subject, own_text, subject_of
from bitnet.quant.affine import PerTensor, choose_qparams_symmetric
from bitnet.quant.formats import FORMATS
from bitnet.quant.gptq_original import quantize_original
from bitnet.quant.grouped import Grid
from tests.pages.builders import self_contained

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(0)
    shape = minima.TINY.replace(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4)
    ids = torch.tensor(list(own_text(512).encode()))[:256].view(4, 64)
    return subject_of(BitNetForCausalLM(shape).eval(), ids, "a <test> model")


@pytest.fixture(scope="module")
def measured() -> minima.Minima:
    torch.manual_seed(0)
    return minima.measure_tiny(steps=3, points=5)


@pytest.fixture(scope="module")
def page(subject: Subject, measured: minima.Minima) -> str:
    """The page with fewer positions of the sliders than people get, each of which is a drawing."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, values in (
            (linear, "BITS", (3, 8)),
            (calibration, "BITS", (8,)),
            (qat, "BITS", (3, 4)),
            (ptq, "MARKS", 1),
            (numbers, "SIZES", {"7 billion": 7e9, "70 billion": 70e9}),
        ):
            patch.setattr(module, name, values)
        return guide(subject, measured)


def test_absmax_of_the_guide() -> None:
    found = linear.absmax(VECTOR, 8)
    assert max(map(abs, VECTOR)) == 10.8
    assert f"{1 / found.scale:.2f}" == "11.76"
    assert found.codes.tolist() == [64, 36, -89, 0, -23, -54, 127]
    assert found.of(3.08)[0] == found.of(3.02)[0] == 36
    assert found.of(3.08)[1] == pytest.approx(36 / 11.76, rel=1e-3)
    assert found.errors == pytest.approx(
        [x - q * 10.8 / 127 for x, q in zip(VECTOR, found.codes.tolist(), strict=True)], abs=1e-6
    )


def test_zero_point_of_the_guide() -> None:
    found = linear.zero_point(VECTOR, 8)
    assert 1 / found.scale == pytest.approx(255 / (10.8 + 7.59))
    assert found.zero_point == -23
    assert (int(found.codes.min()), int(found.codes.max())) == (-128, 127)
    assert found.of(0.0) == (-23, 0.0)


def test_clipping_of_the_guide() -> None:
    whole, cut = linear.clipped(OUTLIER_VECTOR, 256.0, 8), linear.clipped(OUTLIER_VECTOR, CLIP, 8)
    assert whole.codes.tolist() == [0, 0, 0, 0, 0, 0, 127], "the outlier leaves nothing for the others"
    assert cut.codes.tolist() == [-15, -5, -2, 3, 7, 14, 127]
    assert float(cut.back[-1]) == CLIP


def test_gptq_is_the_papers_and_the_guides_way_is_worse() -> None:
    torch.manual_seed(3)
    x = torch.randn(40, 16) @ torch.randn(16, 16)
    weight, hessian = torch.randn(4, 16), 2 * x.t() @ x / 40
    low, high = weight.amin(1), weight.amax(1)
    scale = (torch.maximum(-low, high) * 2 / 15)[:1]
    steps = ptq.sweep(weight[:1], hessian, scale, 4)
    theirs = quantize_original(weight[:1], hessian, Grid(4, symmetric=True), -1, 0.0, False, True, False, 16)
    # Their grid has one code more below; where it is not used the two are the same.
    assert int(theirs.codes.min()) > 0
    torch.testing.assert_close(steps[-1].weight.float(), theirs.dequantize(), rtol=1e-4, atol=1e-5)

    weight, hessian, scale = ptq.example()
    assert list(weight.shape) == list(hessian.shape) == [3, 3]
    errors = ptq.outcomes(weight, hessian, scale, ptq.EXAMPLE_BITS)
    assert errors["GPTQ"] < errors["the guide's way"] < errors["to the nearest"]
    assert float(choose_qparams_symmetric(weight, ptq.EXAMPLE_BITS, PerTensor())) == float(scale)
    # By hand, for the first row: the first column's error goes to the others by the inverse's first row.
    inverse = torch.linalg.inv(hessian.double())
    first = ptq.sweep(weight, hessian, scale, ptq.EXAMPLE_BITS)[0].weight
    moved = (weight[:, 0].double() - first[:, 0])[:, None] * inverse[0, 1:] / inverse[0, 0]
    torch.testing.assert_close(first[:, 1:], weight[:, 1:].double() - moved)


def test_bit_linear_is_the_layer(subject: Subject) -> None:
    from bitnet import kernels

    x = subject.inputs[0, -1]
    steps = ternary.bit_linear(x, subject.weight)
    assert len(steps) == 5
    expected = kernels.fake_quant_linear(steps[0][1], subject.weight, None, "ternary")
    torch.testing.assert_close(steps[-1][1], expected, rtol=1e-4, atol=1e-5)
    assert set(steps[1][1].flatten().tolist()) == {-1, 0, 1}
    assert steps[3][1].dtype == torch.int32


def test_few_levels_are_few_and_near() -> None:
    x = numbers.scene(24, 18).view(-1, 3)
    errors = []
    for count in (2, 8, 64):
        few = numbers.levels_of(x, count)
        assert len(few.unique(dim=0)) <= count
        errors.append(float((few - x).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 20


def test_cuts_are_those_of_the_calibration(subject: Subject) -> None:
    found = calibration.bounds(subject.inputs.flatten(), 4)
    largest = float(subject.inputs.abs().max())
    assert found["minmax"][0] == pytest.approx(largest)
    assert all(0 < bound <= 1.1 * largest for bound, _ in found.values())
    assert found["mse"][1] >= max(ratio for _, ratio in found.values()) - 0.1, "it is the best by its own measure"


def test_minima_are_losses_of_the_models_along_the_lines() -> None:
    torch.manual_seed(0)
    config = minima.TINY
    a, b = BitNetForCausalLM(config).eval(), BitNetForCausalLM(config.replace(quantizer="int4")).eval()
    ids = torch.randint(256, (4, 33))
    windows = [(row[None, :-1], row[None, 1:]) for row in ids]
    found = minima.measure(a, b, windows, "int4", "two", points=5)

    def loss(model: BitNetForCausalLM) -> float:
        plain = BitNetForCausalLM.from_tensors(config, dict(model.state_dict()))
        with torch.no_grad():
            logits = plain(ids[:, :-1])
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    assert found.line.at == [-0.5, 0.0, 0.5, 1.0, 1.5]
    assert found.line.plain[1] == pytest.approx(loss(a), rel=1e-5)
    assert found.line.plain[3] == pytest.approx(loss(b), rel=1e-5)
    for name, place in (("float", 1), ("QAT", 3)):
        way = found.ways[name]
        assert way.plain[way.at.index(0.0)] == pytest.approx(found.line.plain[place], rel=1e-6)
        assert way.plain[way.at.index(1.0)] == pytest.approx(found.line.rounded[place], rel=1e-6)
        assert found.cost(name) == pytest.approx(found.line.rounded[place] - found.line.plain[place], abs=1e-6)


def test_the_page_has_every_figure_group(page: str) -> None:
    self_contained(page)
    assert "<test>" not in page
    assert "a &lt;test&gt; model" in page
    text = re.sub(r"<[^>]+>", "", page)
    for words in (
        "s = 127 / 10.8 = 11.76",
        "3.08 and 3.02 both become 36, which is 3.061 again",
        "s = 255 / (10.8 + 7.59) = 13.87, z = -23",
        "Clipped at [-5, 5]: 7 different integers for 7 values",
        "8 colors, 3 bits a pixel",
        "What a format reaches",
        "static, entropy",
        "Columns rounded",
        "144 bytes",
        "Wide against narrow minima, measured",
        "additions",
    ):
        assert words in text, words
    assert text.count("The guide slips here.") == 5
    assert all(format.name in text for format in FORMATS)
    for value in ("70 billion", "5. Rescaled by both scales"):
        assert f'data-value="{value}"' in page, value
    assert "560 GB" in text, "70 billion parameters in FP64, as the guide has it"
    assert math.isfinite(float(re.search(r"Rounding costs the float model ([+-][\d.]+)", text)[1]))


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guide", str(tmp_path / "none")]) == 2
    assert "make demo" in capsys.readouterr().err
