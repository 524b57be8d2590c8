"""What is asked of the machine: device, type of the products, memory."""

import mmap
from pathlib import Path

import pytest
import torch

from bitnet import machine


def test_auto_is_what_the_machine_has():
    device = machine.pick_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert machine.pick_dtype("auto", device) in (torch.float32, torch.bfloat16)
    assert machine.pick_dtype("float16", device) is torch.float16


@pytest.mark.parametrize("name", ["abacus", "cuda:77", "cpu:x"])
def test_unknown_devices_are_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        machine.pick_device(name)


def test_unknown_dtype_is_refused_by_name():
    with pytest.raises(ValueError, match="float8"):
        machine.pick_dtype("float8", torch.device("cpu"))


def test_memory_of_this_process_is_read_in_megabytes():
    machine.reset_peak_memory()
    held, most = machine.process_memory("VmRSS"), machine.process_memory()
    if held is None or most is None:
        pytest.skip("this system does not tell")
    assert 10 < held < 1.1 * most < 1e5
    with mmap.mmap(-1, 120_000_000) as block:  # from the system: the heap may have as much to give again
        block.write(b"1" * len(block))
        grown = machine.process_memory("VmRSS")
    assert grown is not None
    assert grown - held > 50
    assert machine.available_memory() > 1e6


def test_freed_blocks_are_returned_without_an_error(monkeypatch):
    machine.return_freed_blocks()
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda *_: pytest.fail("the environment's choice counts"))
    machine.return_freed_blocks()


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "800000 100000"}, 3),
        ("0::/../outside\n", {"cpu.max": "20000 100000"}, 1),  # a group that is not below what is mounted here
        (
            "4:cpu,cpuacct:/x\n0::/\n",
            {f"cpu,cpuacct/x/cpu.cfs_{k}_us": v for k, v in (("quota", "400000"), ("period", "100000"))},
            4,
        ),
        ("1:cpu:/x\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("1:cpu:/x\n", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("5:cpuset:/x\n", {"cpuset/cpu.cfs_quota_us": "1", "cpuset/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_quota_of_a_control_group(tmp_path: Path, groups: str, files: dict[str, str], expected: int | None) -> None:
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert machine.cpu_quota(tmp_path / "groups", tmp_path / "mount") == expected
    assert machine.cpu_quota(tmp_path / "none") is None
