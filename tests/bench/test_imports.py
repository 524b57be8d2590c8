"""The GPU benchmark runs on a machine that has torch and Triton, and nothing that only the command line needs."""

from tests.forked import Forked

WITHOUT = """
import sys
for name in ("tyro", "docstring_parser", "typeguard"):
    sys.modules[name] = None  # its import raises ImportError
import {modules}
"""


def test_what_runs_on_a_gpu_imports_nothing_of_the_command_line(tmp_path):
    modules = ", ".join(f"bitnet.bench.{name}" for name in ("gpu", "gpu_gate", "random_models", "report"))
    done = Forked(tmp_path, bare=True, code=WITHOUT.format(modules=modules)).wait()
    assert done.returncode == 0, done.stderr


def test_a_blocked_module_would_be_noticed(tmp_path):
    done = Forked(tmp_path, bare=True, code=WITHOUT.format(modules="tyro")).wait()
    assert "tyro" in done.stderr
