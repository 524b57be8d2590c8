"""`python -m bitnet COMMAND ...`: the commands that work on models and runs."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = ("bench", "compare", "consolidate", "evaluate", "export", "formats", "inspect", "quantize")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with the arguments behind its name; returns its exit code, 2 for a name that is none."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        wanted_help = arguments[:1] in (["-h"], ["--help"])
        print(
            f"usage: python -m bitnet COMMAND ...    commands: {', '.join(COMMANDS)}",
            file=sys.stdout if wanted_help else sys.stderr,
        )
        return 0 if wanted_help else 2
    command = importlib.import_module(f"bitnet.commands.{arguments[0]}")
    return command.main(arguments[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
