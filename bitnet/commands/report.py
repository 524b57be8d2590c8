"""The page of a comparison, from what `bitnet compare` measured, now or long ago.

    bitnet report comparison                       the folder of a comparison: writes report.html into it
    bitnet report table.json --out page.html       its table alone

One file that needs no network and no other file: what to choose for so many megabytes and tokens a second, perplexity
against size and against speed, errors by layer, distributions.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Options:
    comparison: tyro.conf.Positional[Path]
    """Folder of a comparison, or its table.json."""
    out: Path | None = None
    """The page; report.html beside the table unless given."""


def run(options: Options) -> None:
    """Write the page."""
    from bitnet.console import say
    from bitnet.pages.report import read_table, write_report

    folder = options.comparison if options.comparison.is_dir() else options.comparison.parent
    out = options.out or folder / "report.html"
    write_report(out, read_table(options.comparison))
    say(f"written   {out}")
