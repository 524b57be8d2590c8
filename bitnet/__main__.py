"""`bitnet COMMAND`, or `python -m bitnet COMMAND`: the table of commands, and the one rule of how they end.

A command is a module of `bitnet/commands` (train.py and generate.py stand at the top of the repository) with `Options`,
the fields of which are its arguments (or `parse(arguments, prog)`, which reads them), and `run(options)`, which may
return an exit code. Exit codes:

    0    done; also where the reader of the output has had enough, as in `| head`: what only prints ends there, what
         trains, measures or writes goes on to its end
    1    done, and the answer is bad: training diverged, a gate of the benchmark is red
    2    wrong usage or input: "error: ...", with the value and the remedy
    130  Ctrl-C; 143 SIGTERM in training, which has saved
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import bitnet
from bitnet.console import error as print_error
from bitnet.console import tolerant_streams
from bitnet.records import require_finite

PRINTERS = ("formats", "generate", "inspect")
"""Commands that make nothing but what they print: they end where nobody reads it any more. The others go on."""
COMMANDS = {
    "train": "train a model, or go on with a run",
    "generate": "continue a text with a model, or talk to it",
    "serve": "models behind a URL: OpenAI's interface, and a page to talk to them",
    "evaluate": "held-out loss, perplexity and bits per byte of models",
    "quantize": "quantize a float model after training",
    "compare": "every quantization method on one model, in a table and pictures",
    "report": "a page from a comparison: what to choose, charts, errors by layer",
    "guide": "a page that shows what quantization does, on a model of yours",
    "export": "write a model for transformers, llama.cpp, GPTQ or this project's engine",
    "inspect": "what is in a model file: tensors, types, bits a weight",
    "bench": "speeds of this machine, with the machine's limits beside them",
    "formats": "a number in FP32, FP16, BF16, FP8 and INT8: bits, error, memory",
    "consolidate": "make the sharded checkpoints of a run plain ones",
}
TEXTS = ("--prompt", "--sample-prompt", "--stop", "--system")
"""Options that an empty value says something of."""
HELP = f"""usage: bitnet COMMAND ...

Train, compare and run BitNet b1.58 (ternary) language models.

{"".join(f"  {name:12}{summary}" + chr(10) for name, summary in COMMANDS.items())}
bitnet COMMAND --help tells more. To begin:

  bitnet train --preset demo --minutes 5
  bitnet generate runs/demo --prompt "The people of the United States"
"""


def execute(command: ModuleType | str, prog: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command, the module or its name, with these arguments or the program's; returns the exit code."""
    code = 0
    try:
        name = prog.split()[-1].removesuffix(".py")
        with tolerant_streams(line_buffering=True, lasting=name not in PRINTERS):
            if isinstance(command, str):
                command = importlib.import_module(f"bitnet.commands.{command}")
            arguments = sys.argv[1:] if arguments is None else list(arguments)
            code = command.run(read_options(command, prog, arguments)) or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print_error(error)
        return 2
    return code


def read_options(command: ModuleType, prog: str, arguments: list[str]) -> Any:
    """The command's options, by its own `parse(arguments, prog)` where it has one. Raises ValueError for a number that
    is none, or infinite, and for an empty argument."""
    refuse_empty(arguments)
    if hasattr(command, "parse"):
        return command.parse(arguments, prog)
    import tyro

    examples = (command.__doc__ or "").replace(f"python {prog.split()[-1]}.py", prog)  # as the command was called
    options = tyro.cli(command.Options, prog=prog, args=arguments, description=examples)
    require_finite(options, "--")
    return options


def refuse_empty(arguments: Sequence[str]) -> None:
    """Raise ValueError for an empty argument: most often a variable of the shell that is not set, and to paths and to
    what is asked with `if` the same as one that was not given."""
    option = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            option = name.replace("_", "-")
        if (not argument or (argument.startswith("--") and equals and not value)) and option not in TEXTS:
            place = f"behind {option}" if option else "among the arguments"
            raise ValueError(f"an empty value stands {place}; give one, or leave it out (a variable that is not set?)")


def main(arguments: Sequence[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or [""]
    if name in COMMANDS:
        return execute(name, f"bitnet {name}", rest)
    with tolerant_streams():
        return _without_command(name)


def _without_command(name: str) -> int:
    if name in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if name == "--version":
        print(f"bitnet {bitnet.__version__}")
        return 0
    if not name:
        print(HELP, end="", file=sys.stderr)
        return 2
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {near[0]!r}?" if near else "choose one of " + ", ".join(COMMANDS)
    print_error(f"{name!r} is no command of bitnet; {hint}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
