"""The guide as a page."""

from bitnet.pages.guide import calibration, linear, numbers, ptq, qat, ternary
from bitnet.pages.guide.minima import Minima
from bitnet.pages.guide.subject import Subject
from bitnet.pages.page import escape, page


def guide(subject: Subject, minima: Minima) -> str:
    """The page, as HTML: every part from the guide's own numbers and from the subject."""
    rows, columns = subject.weight.shape
    intro = (
        "<p>The figures of M. Grootendorst's <cite>A Visual Guide to Quantization</cite>, computed by this project's "
        "own quantizers: on the left from the guide's vectors, on the right from a model. Where the guide slips, the "
        "page says what is right.</p>"
        f"<p>The model is <strong>{escape(subject.model)}</strong>, {subject.parameters:,} parameters; its layer "
        f"<code>{escape(subject.layer)}</code> has {rows:,} × {columns:,} weights, and "
        f"{subject.inputs.shape[0] * subject.inputs.shape[1]:,} tokens came into it.</p>"
    )
    sections = [
        numbers.section(subject),
        linear.section(subject),
        calibration.section(subject),
        ptq.section(subject),
        qat.section(subject, minima),
        ternary.section(subject),
    ]
    return page("Quantization, seen on a model", intro, sections)
