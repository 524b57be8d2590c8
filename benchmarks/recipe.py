"""Which recipe brings ternary weights closest to their float twin: rows x corpora x sizes x seeds, in a table.

    python benchmarks/recipe.py --prepare sotu my.txt --data DATA                 tokenize corpora, on any machine
    python benchmarks/recipe.py --data DATA --out OUT --workers 16 --minutes 9    what OUT lacks, then the table
    python benchmarks/recipe.py --out OUT --table                                 the table only

A run is `train.py --preset demo` with another shape, corpus, seed, rate and what its row says; the loss is over the
whole validation split. Where a row has several rates, all of them run with the first seed, and the best goes on with
the others. A row with a teacher, or that starts from a model, takes the run of that row with the same corpus, size and
seed. OUT/results.jsonl has a line for every finished run, written at once; at the end of the time what still runs is
lost and nothing else. Needs neither tyro nor a network (DATA is carried).
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RATES = (5e-3, 1e-2, 2e-2)
FLOAT: dict[str, Any] = {"model.quantizer": "none", "float_start": 0.0}
RAMP: dict[str, Any] = {"float_start": 0.4, "ramp": 0.3}
LONG: dict[str, Any] = {"float_start": 0.2, "ramp": 0.6}


@dataclass(frozen=True)
class Row:
    """What is trained otherwise than by the demo's recipe with half of the steps in 16 bit, no ramp, and rate 1e-2."""

    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the configuration, dotted those within."""
    lrs: tuple[float, ...] = (1e-2,)
    teacher: str = ""
    """The row whose run teaches."""
    init: str = ""
    """The row whose run gives the first weights."""
    technique: str = ""
    """Of `benchmarks/recipe_runs.py`."""
    budget: float = 1.0
    """Tokens, as a share of those of the other rows."""


ROWS: dict[str, Row] = {
    "float": Row(FLOAT, RATES),
    "switch": Row({}, RATES),
    "ramp": Row(RAMP, RATES),
    "switch, teacher": Row({}, (1e-2, 2e-2), teacher="float"),
    "ramp, teacher": Row(RAMP, RATES, teacher="float"),
    "float, teacher": Row(FLOAT, RATES, teacher="float"),
    "long ramp": Row(LONG),
    "long ramp, teacher": Row(LONG, teacher="float"),
    # Where the ramp lies.
    "from the first step": Row({"float_start": 0.0}),
    "ramp 0.5 + 0.4": Row({"float_start": 0.5, "ramp": 0.4}),
    "ramp 0.2 + 0.3": Row({"float_start": 0.2, "ramp": 0.3}),
    "ramp 0.2 + 0.7": Row({"float_start": 0.2, "ramp": 0.7}),
    "ramp 0.1 + 0.8": Row({"float_start": 0.1, "ramp": 0.8}),
    "ramp 0.0 + 0.8": Row({"float_start": 0.0, "ramp": 0.8}),
    # One technique each.
    "long ramp, cosine": Row({**LONG, "ramp_shape": "cosine"}),
    "long ramp, square": Row({**LONG, "ramp_shape": "square"}),
    "long ramp, root": Row({**LONG, "ramp_shape": "root"}),
    "long ramp, rate x 2 behind": Row({**LONG, "optim.lr_second": 2e-2, "optim.second_from": 0.5}),
    "long ramp, rate / 2 behind": Row({**LONG, "optim.lr_second": 5e-3, "optim.second_from": 0.5}),
    "long ramp, no decay at all": Row({**LONG, "optim.weight_decay": 0.0}),
    "long ramp, cosine rate": Row({**LONG, "optim.decay": "cosine"}),
    "long ramp, soft": Row({**LONG, "ramp_shape": "soft"}),
    "long ramp, dead zone": Row(LONG, technique="dead zone"),
    "long ramp, median scale": Row(LONG, technique="median scale"),
    # How much of a teacher.
    "long ramp, teacher 0.25": Row({**LONG, "teacher_weight": 0.25}, teacher="float"),
    "long ramp, teacher 0.75": Row({**LONG, "teacher_weight": 0.75}, teacher="float"),
    "long ramp, teacher 0.9": Row({**LONG, "teacher_weight": 0.9}, teacher="float"),
    "long ramp, teacher at 2": Row({**LONG, "teacher_temperature": 2.0}, teacher="float"),
    # The other quantizers, each at its own rates: from scratch, and as fine-tuning of the float twin.
    "int8": Row({"model.quantizer": "int8", "float_start": 0.0}, RATES),
    "int4": Row({"model.quantizer": "int4", "float_start": 0.0}, RATES),
    "int4, long ramp": Row({"model.quantizer": "int4", **LONG}, RATES),
    "binary, long ramp": Row({"model.quantizer": "binary", **LONG}, RATES),
    "int4 from float": Row(
        {"model.quantizer": "int4", "float_start": 0.0, "optim.lr_rest": 3e-3}, (5e-4, 1e-3, 2e-3), init="float",
        budget=0.25,
    ),
    "int4 from float, teacher": Row(
        {"model.quantizer": "int4", "float_start": 0.0, "optim.lr_rest": 3e-3}, (5e-4, 1e-3, 2e-3), init="float",
        teacher="float", budget=0.25,
    ),
    "ternary from float, teacher": Row(
        {"float_start": 0.0, "ramp": 0.5, "optim.lr_rest": 1e-2}, (2e-3, 5e-3), init="float", teacher="float",
        budget=0.5,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run."""

    row: str
    corpus: str
    size: str
    lr: float
    seed: int
    tokens: float
    changes: dict[str, Any]
    technique: str
    keep: bool
    """Whether the model is saved, for those that learn or start from it."""
    teacher: str = ""
    """Key of the run that teaches."""
    init: str = ""

    @property
    def key(self) -> str:
        """What tells it from every other run; a file name."""
        name = "".join(c if c.isalnum() or c == "." else "-" for c in self.row)
        return f"{self.corpus}-{self.size}-{name}-lr{self.lr:g}-{self.tokens / 1e6:g}M-seed{self.seed}"


@dataclass
class Grid:
    """The runs that are wanted, in order, and what is known of those that are done."""

    rows: Sequence[str]
    corpora: Sequence[str]
    sizes: Sequence[str]
    seeds: Sequence[int]
    tokens: float
    runs: Path
    """Folder of the saved models."""
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Results by key."""
    failed: set[str] = field(default_factory=set)

    def jobs(self) -> Iterator[Job]:
        """Every run that can be named by now, seed by seed; the rates of later seeds wait for the first one's."""
        for seed in self.seeds:
            for size in self.sizes:
                for name in self.rows:
                    for corpus in self.corpora:
                        yield from self.cell(name, corpus, size, seed)

    def cell(self, name: str, corpus: str, size: str, seed: int) -> list[Job]:
        """The runs of a row on a corpus, at a size, with a seed; none where they cannot be named yet."""
        row, first = ROWS[name], seed == self.seeds[0]
        lrs: Sequence[float] = row.lrs
        if not first:
            best = self.best(name, corpus, size, self.seeds[0])
            lrs = [] if best is None else [best.lr]
        others = {}
        for role in ("teacher", "init"):
            if other := getattr(row, role):
                model = self.best(other, corpus, size, seed)
                if model is None:
                    return []
                others[role] = model.key
        keep = any(name in (other.teacher, other.init) for other in ROWS.values())
        return [
            Job(name, corpus, size, lr, seed, row.budget * self.tokens, row.changes, row.technique, keep, **others)
            for lr in lrs
        ]

    def best(self, name: str, corpus: str, size: str, seed: int) -> Job | None:
        """The run of the lowest loss in a cell, once all of it is done."""
        cell = self.cell(name, corpus, size, seed)
        if not cell or not all(job.key in self.done for job in cell):
            return None
        return min(cell, key=lambda job: self.done[job.key]["loss"])

    def ready(self, running: Iterable[str]) -> Job | None:
        """The next run to start. A model that was saved elsewhere is trained again where somebody needs it."""
        taken = {*running, *self.failed}
        named = list(self.jobs())
        lost = {
            key for job in named if job.key not in self.done for key in (job.teacher, job.init)
            if key and not (self.runs / key).exists()
        }  # fmt: skip
        for job in named:
            waits = any(key in lost or key in taken for key in (job.teacher, job.init) if key)
            if job.key not in taken and not waits and (job.key not in self.done or job.key in lost):
                return job
        return None

    def total(self) -> int:
        """Runs of the whole grid."""
        cells = len(self.corpora) * len(self.sizes)
        return cells * sum(len(ROWS[name].lrs) + len(self.seeds) - 1 for name in self.rows)


class Fleet:
    """Worker processes that run what is ready, until nothing is or the time is up."""

    def __init__(
        self, grid: Grid, data: Path, out: Path, device: str, *, compiled: bool, workers: int, until: float
    ) -> None:
        self.grid, self.data, self.out, self.device, self.compiled = grid, data, out, device, compiled
        self.workers, self.until = workers, until
        self.changed = threading.Condition()
        self.running: dict[str, float] = {}
        self.processes: set[subprocess.Popen[str]] = set()
        self.started = time.monotonic()
        self.took: list[float] = []
        """Seconds of the runs that are done."""

    def run(self) -> None:
        """Raises nothing: a run that fails is named, and its worker starts anew."""
        threads = [threading.Thread(target=self.serve, args=(n,), daemon=True) for n in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, self.until - time.monotonic()))
        with self.changed:
            lost = sorted(self.running)
            for process in self.processes:
                process.kill()
        if lost:
            print(f"time is up; {len(lost)} runs were cut off: {', '.join(lost)}", flush=True)

    def serve(self, number: int) -> None:
        """One worker's life."""
        process: subprocess.Popen[str] | None = None
        while (job := self.take()) is not None:
            if process is None or process.poll() is not None:
                process = self.spawn(number)
            assert process.stdin is not None
            assert process.stdout is not None
            line = ""
            try:
                process.stdin.write(json.dumps(asdict(job) | {"key": job.key}) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                pass  # it has ended, as the empty line says
            if not line:
                process.wait()
            self.put(job, json.loads(line) if line else None, number)
        if process is not None and process.stdin is not None:
            process.stdin.close()

    def spawn(self, number: int) -> "subprocess.Popen[str]":
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / "recipe_runs.py"),
            self.data,
            self.out / "runs",
            self.device,
            "compiled" if self.compiled else "eager",
        ]
        with open(self.out / f"worker-{number}.log", "a", encoding="utf-8") as log, self.changed:
            process = subprocess.Popen(
                list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT
            )
            self.processes.add(process)
        return process

    def take(self) -> Job | None:
        """The next run, which may wait for another; None where nothing is left or the time is up."""
        with self.changed:
            # What would be cut off is not begun.
            while time.monotonic() + (0.8 * statistics.median(self.took) if self.took else 0) < self.until:
                job = self.grid.ready(self.running)
                if job is not None:
                    self.running[job.key] = time.monotonic()
                    return job
                if not self.running:
                    return None
                self.changed.wait(1.0)
            return None

    def put(self, job: Job, result: dict[str, Any] | None, number: int) -> None:
        """Write a result down, and tell of it."""
        with self.changed:
            self.took.append(time.monotonic() - self.running.pop(job.key))
            self.changed.notify_all()
            if time.monotonic() >= self.until:
                return  # it was killed
            if result is None:
                self.grid.failed.add(job.key)
                print(f"failed    {job.key}: see {self.out}/worker-{number}.log", flush=True)
                return
            if job.key not in self.grid.done:
                with open(self.out / "results.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
            self.grid.done[job.key] = result
            left = self.grid.total() - sum(job.key in self.grid.done for job in self.grid.jobs())
            rate = len(self.took) / (time.monotonic() - self.started)
            print(
                f"{job.key}  loss {result['loss']:.4f}  {result['seconds']:.0f} s; {left} runs left, "
                f"{rate * 60:.1f} a minute, ETA {left / rate / 60:.1f} min", flush=True,
            )  # fmt: skip


def table(grid: Grid) -> str:
    """Losses at the best rate of the first seed, mean over the seeds; and how far they are from the float rows,
    seed by seed, with half of the range."""
    places = [(corpus, size) for size in grid.sizes for corpus in grid.corpora]
    lines = [
        "| | " + " | ".join(f"{corpus} {size}" for corpus, size in places) + " | tokens | seconds |",
        "|---|" + "---|" * (len(places) + 2),
    ]
    found = {(name, place): by_seed(grid, name, *place) for name in grid.rows for place in places}
    for name in grid.rows:
        cells, seconds = [], []
        for place in places:
            rows = found[name, place]
            parts = [f"{statistics.mean(row['loss'] for row in rows.values()):.4f}"] if rows else []
            for base in ("float", "float, teacher"):
                gaps = [row["loss"] / other["loss"] - 1 for row, other in paired(rows, found.get((base, place), {}))]
                if gaps and name != base:
                    spread = f" ± {(max(gaps) - min(gaps)) / 2:.1%}" if len(gaps) > 1 else ""
                    parts.append(f"{statistics.mean(gaps):+.1%}{spread}" + (" of taught" if "," in base else ""))
            if rows:
                lr, tried = next(iter(rows.values()))["lr"], ROWS[name].lrs
                edge = ", edge" if len(tried) > 2 and lr in (tried[0], tried[-1]) else ""
                parts.append(f"lr {lr:g}{edge}; {len(rows)} seeds")
            cells.append(", ".join(parts))
            seconds += [row["seconds"] for row in rows.values()]
        if seconds:
            tokens = ROWS[name].budget * grid.tokens / 1e6
            lines.append(f"| {name} | {' | '.join(cells)} | {tokens:.2g} M | {statistics.mean(seconds):.0f} |")
    return "\n".join(lines)


def by_seed(grid: Grid, name: str, corpus: str, size: str) -> dict[int, dict[str, Any]]:
    """The results of a cell that are there, by seed."""
    best = {seed: grid.best(name, corpus, size, seed) for seed in grid.seeds}
    return {seed: grid.done[job.key] for seed, job in best.items() if job}


def paired(rows: dict[int, Any], others: dict[int, Any]) -> list[tuple[Any, Any]]:
    """The results of two cells with the same seeds."""
    return [(rows[seed], others[seed]) for seed in rows if seed in others]


def prepare(specs: Sequence[str], data: Path) -> None:
    """Tokenize corpora, names or paths, each into DATA/NAME with a tokenizer of its own."""
    sys.path.insert(0, str(ROOT))
    from bitnet.data.corpus import NO_DOWNLOAD, open_corpus
    from bitnet.data.tokens_write import tokenize_corpus
    from bitnet.tokenizer import train_tokenizer
    from bitnet.training.config import PRESETS

    for spec in specs:
        corpus = open_corpus(spec if spec in NO_DOWNLOAD else Path(spec))
        tokenizer = train_tokenizer(corpus.documents(), PRESETS["demo"].model.vocab_size)
        tokens = tokenize_corpus(corpus, tokenizer, data / "made", workers=1)
        shutil.rmtree(data / Path(spec).stem, ignore_errors=True)
        tokens.folder.rename(data / Path(spec).stem)
        tokenizer.save(data / Path(spec).stem / "tokenizer.model")
    shutil.rmtree(data / "made", ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the tokenized corpora")
    parser.add_argument("--out", type=Path, help="folder of results and saved models")
    parser.add_argument("--prepare", nargs="+", metavar="CORPUS", help="tokenize these into --data, and end")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--minutes", type=float, default=1e6, help="the whole program ends within this time")
    parser.add_argument("--workers", type=int, default=1, help="processes that train beside each other on the device")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile: three quarters of the time on a CPU")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW")
    parser.add_argument("--corpora", nargs="+", default=["sotu", "stdlib"])
    parser.add_argument("--sizes", nargs="+", default=["256x4", "128x4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=float, default=1.2e6, help="training tokens of a run")
    given = parser.parse_args()
    until = time.monotonic() + given.minutes * 60
    if given.data is None and (given.prepare or not given.table):
        parser.error("--data is missing: the folder of the tokenized corpora")
    if given.prepare:
        prepare(given.prepare, given.data)
        return 0
    if given.out is None:
        parser.error("--out is missing: the folder of the results")
    given.out.mkdir(parents=True, exist_ok=True)
    grid = Grid(given.rows, given.corpora, given.sizes, given.seeds, given.tokens, given.out / "runs")
    results = given.out / "results.jsonl"
    for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else ():
        result = json.loads(line)
        grid.done[result["key"]] = result
    if not given.table:
        missing = [corpus for corpus in given.corpora if not (given.data / corpus / "meta.json").is_file()]
        if missing:
            parser.error(f"{given.data} has no tokenized corpus {', '.join(missing)}; make it with --prepare")
        fleet = Fleet(
            grid, given.data, given.out, given.device, compiled=given.compile, workers=given.workers, until=until
        )
        fleet.run()
    text = table(grid)
    (given.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(bool(grid.failed))


if __name__ == "__main__":
    sys.exit(main())
