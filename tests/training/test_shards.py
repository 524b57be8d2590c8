"""Folders of shards: rows of tensors there and back, folders of earlier versions, damaged and hostile ones."""

import itertools
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from bitnet.storage.safetensors import save_tensors
from bitnet.training import old_shards
from bitnet.training.shards import INDEX, names_and_shapes, read_shards, read_whole, write_shards
from tests.fuzzing import MANY, bounded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TENSORS = {
    "model.a": torch.arange(12.0).view(4, 3),
    "model.b": torch.arange(5.0).to(torch.bfloat16),
    "optimizer.a.exp_avg": torch.arange(12.0).view(4, 3) / 7,
    "optimizer.a.step": torch.tensor(3.0),
}


@pytest.fixture
def new(tmp_path) -> Path:
    write_shards(tmp_path / "new", TENSORS)
    return tmp_path / "new"


@pytest.fixture
def old(tmp_path) -> Path:
    dcp.save(dict(TENSORS), checkpoint_id=tmp_path / "old", no_dist=True)
    return tmp_path / "old"


def check(folder: Path) -> None:
    assert names_and_shapes(folder) == {name: value.shape for name, value in TENSORS.items()}
    found = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    read_shards(folder, found)
    for name, value in TENSORS.items():
        assert torch.equal(found[name], value), name
    whole = read_whole(folder, "model.")
    assert whole.keys() == {"a", "b"}
    assert whole["b"].dtype == torch.bfloat16


def test_there_and_back(new):
    assert sorted(p.name for p in new.iterdir()) == [INDEX, "part-00000.safetensors"]
    check(new)


def test_folders_of_earlier_versions_are_read(old):
    assert (old / ".metadata").is_file()
    check(old)


def cut(folder: Path) -> None:
    """The same tensors in the files of three processes, of which one has no row of b."""
    entries: dict[str, dict[str, object]] = {}
    files: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for name, value in TENSORS.items():
        parts = []
        bounds = [0, 1, 3, 4] if name != "model.b" else [0, 2, 5, 5]
        for number, (first, end) in enumerate(itertools.pairwise(bounds)):
            if value.ndim == 0 and number:
                continue
            if first < end or value.ndim == 0:
                files[number][name] = value[first:end].clone() if value.ndim else value
                rows = end - first if value.ndim else 1
                parts.append({"file": f"part-0000{number}.safetensors", "first": first, "rows": rows})
        entries[name] = {"shape": list(value.shape), "parts": parts}
    folder.mkdir()
    for number, tensors in enumerate(files):
        save_tensors(folder / f"part-0000{number}.safetensors", tensors)
    (folder / INDEX).write_text(json.dumps({"tensors": entries}))


def test_rows_of_several_processes_become_one_tensor(tmp_path):
    cut(tmp_path / "cut")
    check(tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts[1].update(first=2), "rows 1 to 2 are nowhere, or twice"),
        (lambda parts: parts.pop(), r"there are 3 rows of a tensor of \[4, 3\]"),
        (lambda parts: parts[0].update(file="../part-00000.safetensors"), "it must be the name of a part"),
        (lambda parts: parts[0].update(file="part-00009.safetensors"), "does not exist"),
        (lambda parts: (parts[0].update(rows=2), parts[1].update(first=2, rows=1)), "does not hold the rows"),
        (lambda parts: parts[0].update(first=-1), "it must be a whole number from 0"),
        (lambda parts: parts[0].update(rows=2**60), "it must be a whole number from 0"),
        (lambda parts: parts[0].update(more=1), "unknown field"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, change, message):
    cut(tmp_path / "cut")
    index = json.loads((tmp_path / "cut" / INDEX).read_text())
    change(index["tensors"]["model.a"]["parts"])
    (tmp_path / "cut" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"the shards in .*cut cannot be read: .*{message}.*use another checkpoint"):
        read_whole(tmp_path / "cut", "model.")


# Planted code


class Planted:
    """A pickle of this writes a file when it is loaded the usual way."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return (Path.touch, (self.victim,))


class Called:
    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_planted_code_does_not_run(tmp_path, old):
    victim = tmp_path / "ran"
    pickle.loads(pickle.dumps(Planted(victim)))
    assert victim.exists()
    victim.unlink()
    good = old / ".metadata"
    content = good.read_bytes()
    metadata = pickle.loads(content)
    attacks = [
        pickle.dumps(Planted(victim)),
        pickle.dumps(Called(eval, f"open({str(victim)!r}, 'w')")),
        pickle.dumps(Called(getattr, "x", "upper")),
        pickle.dumps(Called(__import__, "os")),
        f"cos\nsystem\n(S'touch {victim}'\ntR.".encode(),
        f"(S'touch {victim}'\nios\nsystem\n.".encode(),
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x01x\x85R.",
    ]
    for attack in attacks:
        good.write_bytes(attack)
        for opening in (names_and_shapes, lambda folder: read_whole(folder, "model."), old_shards.OldShards):
            with pytest.raises(ValueError, match=r"it was made to run code|is no index"):
                opening(old)
    # Where torch itself would unpickle: an entry that is said to hold any object, and the bytes of a tensor.
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata.state_dict_metadata["model.a"] = BytesStorageMetadata()
    good.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"model.a is no tensor; it could be any object"):
        read_whole(old, "model.")
    good.write_bytes(content)
    data = old / "__0_0.distcp"
    size = data.stat().st_size
    data.write_bytes(pickle.dumps(Planted(victim)).ljust(size, b"\0"))
    with pytest.raises(ValueError, match="is damaged"):
        read_whole(old, "model.")
    assert not victim.exists()


@pytest.mark.parametrize("path", ["../x", "/dev/zero", "", ".", "pipe", "a/b"])
def test_old_indexes_name_files_inside_the_folder(old, path):
    metadata = pickle.loads((old / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = path
    (old / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="it names files inside the folder"):
        read_whole(old, "model.")


@pytest.mark.parametrize("kind", ["new", "old"])
def test_mutations_are_refused_or_read(kind, request):
    folder = request.getfixturevalue(kind)

    def opens() -> bool:
        try:
            read_whole(folder, "model.")
        except ValueError as error:
            assert "use another checkpoint" in str(error)  # noqa: PT017
            return False
        return True

    assert opens()  # and what is imported late is now there
    rng, opened = random.Random(5), 0
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for _ in range(30 * MANY):
            bad = bytearray(good)
            for _ in range(rng.randint(1, 3)):
                place = rng.randrange(len(bad))
                bad[place : place + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 4))
            path.write_bytes(bad)
            opened += bounded(bytes(bad), opens)
        path.write_bytes(good)
    assert opened
    check(folder)
