"""The GPU benchmark runs on a machine that has torch and Triton, and nothing that only the command line needs."""

import subprocess
import sys

WITHOUT = """
import sys
for name in ("tyro", "docstring_parser", "typeguard"):
    sys.modules[name] = None  # its import raises ImportError
import {modules}
"""


def test_what_runs_on_a_gpu_imports_nothing_of_the_command_line():
    modules = ", ".join(f"bitnet.bench.{name}" for name in ("gpu", "gpu_gate", "random_models", "report"))
    done = subprocess.run([sys.executable, "-c", WITHOUT.format(modules=modules)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_blocked_module_would_be_noticed():
    done = subprocess.run([sys.executable, "-c", WITHOUT.format(modules="tyro")], capture_output=True, text=True)
    assert "tyro" in done.stderr
