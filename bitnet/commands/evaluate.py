"""Held-out loss of one or several models; of a run of train.py, at its best checkpoint.

    bitnet evaluate runs/demo runs/demo-float      one line a run, and the gap to the last one
    bitnet evaluate runs/demo --tasks arc_easy     tasks of lm-evaluation-harness (pip install -e '.[evaluate]')

The text is the held-out part of the corpus of a run, or of --text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from bitnet.console import note, only_for_looking, table


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """Runs or models of any kind; the last one is the baseline of the gaps, of those that read its text in its
    tokens."""
    lora: tuple[Path, ...] = ()
    """LoRA adapters of the first model, which is evaluated with each of them before it is without."""
    text: str | None = None
    """Corpus to evaluate on, its held-out part; a run's own unless given."""
    picture: Path | None = None
    """Draw the loss curves of all runs into this PNG."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products, as in train.py."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, instead of the held-out loss."""
    task_folder: Path | None = None
    """Folder with YAML files of more tasks."""
    shots: int | None = None
    """Examples in front of each question; the task's own number unless given."""
    limit: int | None = None
    """Questions of each task; all unless given."""


def run(options: Options) -> None:
    """Print one line a run; the gap is the run's loss against the last run's."""
    from bitnet.evaluation.loss import Evaluation, evaluate_model
    from bitnet.machine import pick_device, pick_dtype
    from bitnet.storage.adapters import load_adapter
    from bitnet.training.reporter import draw_runs

    runs = options.runs
    if not runs:
        raise ValueError("no run was given; name a folder made by train.py, or a model of any kind")
    if options.tasks and options.lora:
        raise ValueError("--tasks takes models without adapters; merge them first (bitnet export --merge-lora)")
    of_text = {"--text": options.text, "--picture": options.picture}
    of_tasks = {"--task-folder": options.task_folder, "--shots": options.shots, "--limit": options.limit}
    for name, value in (of_text if options.tasks else of_tasks).items():
        if value is not None:
            raise ValueError(f"{name} {value} has no effect {'beside' if options.tasks else 'without'} --tasks; leave "
                             "it out")  # fmt: skip
    for name, value, least in (("--shots", options.shots, 0), ("--limit", options.limit, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; give at least {least}")
    if options.tasks:
        _run_tasks(options)
        return
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    with_adapters = [(f"{runs[0]} + {path}", runs[0], load_adapter(path)) for path in options.lora]
    models = [*with_adapters, *((run, run, None) for run in runs)]
    results = [(name, evaluate_model(run, device, dtype, options.text, adapter)) for name, run, adapter in models]
    baseline = results[-1][1]
    engines = [name for name, result in results if result.on_engine]
    if options.dtype == "bfloat16" and engines:
        note(f"dtype bfloat16 is of what runs in torch, and changes nothing for {', '.join(engines)}")
    alike = [result.reads_like(baseline) for _, result in results]
    if not all(alike):
        note("gaps are of models that read the same text in the same tokens; bits/byte compares other tokens too")
    if len({result.feed.window for _, result in results}) > 1:
        windows = ", ".join(f"{result.feed.window} ({name})" for name, result in results)
        note(f"windows differ, and in a longer one more of a text is known: {windows}")

    def loss(part: Evaluation) -> str:
        return f"{part.loss:.4f} ± {part.standard_error:.4f}"

    rows = [["run", "quantizer", "held-out loss", "perplexity", "bits/byte", "gap"]]
    for (name, (quantizer, result, *_)), same in zip(results, alike, strict=True):
        bits = "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        gap = f"{result.loss / baseline.evaluation.loss - 1:+.2%}" if same else "-"
        rows.append([name, quantizer, loss(result), f"{result.perplexity:.2f}", bits, gap])
        rows += [[f"  {corpus}", "", loss(part), "", "", ""] for corpus, part in result.corpora.items()]
    shown = rows if len(results) > 1 else [row[:-1] for row in rows]  # a gap to itself says nothing
    print(table(shown, right=[3, 4, 5]))
    if options.picture:
        with only_for_looking(f"the picture {options.picture}"):
            draw_runs(runs, options.picture)


def _run_tasks(options: Options) -> None:
    """Print one line a task, metric and model. Raises ValueError where lm_eval is missing."""
    try:
        from bitnet.evaluation.harness import load, run_tasks
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; run pip install -e '.[evaluate]' in the clone") from error

    rows = [["model", "task", "metric", "value", "± standard error"]]
    for path in options.runs:
        dtype = "float32" if options.dtype == "auto" else options.dtype
        found = run_tasks(
            load(path, device=options.device, dtype=dtype), options.tasks, folder=options.task_folder,
            shots=options.shots, limit=options.limit,
        )  # fmt: skip
        for task, values in found.items():
            for name, value in values.items():
                metric, _, kind = name.partition(",")
                if isinstance(value, float) and not metric.endswith("_stderr"):
                    deviation = values.get(f"{metric}_stderr,{kind}")
                    shown = f"{deviation:.4f}" if isinstance(deviation, float) else "-"
                    rows.append([path, task, metric, f"{value:.4f}", shown])
    print(table(rows, right=[3, 4]))
