"""Every quantization method on one model: quality, size and speed in one table, and pictures."""

import copy
import functools
import hashlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from bitnet.console import note, only_for_looking, progress_bar, say
from bitnet.data.tokens import IGNORE_INDEX
from bitnet.evaluation import pictures, table
from bitnet.evaluation.agreement import Predictor, Reference, with_cache
from bitnet.evaluation.loss import unused_rows
from bitnet.evaluation.options import Options
from bitnet.evaluation.table import Row
from bitnet.evaluation.tasks import last_words, make_tasks
from bitnet.evaluation.texts import calibration_sequences, held_out_windows, open_text
from bitnet.evaluation.twins import find_twins, train_twin, trained_quantizer
from bitnet.files import working_in
from bitnet.inference.cpu_engine import Engine
from bitnet.inference.engine import LanguageModel
from bitnet.inference.generation import time_generation
from bitnet.inference.loading import open_model
from bitnet.kernels import TERNARY_QUANTIZERS, native_wanted
from bitnet.machine import process_memory, reset_peak_memory
from bitnet.model import BitNetForCausalLM
from bitnet.model.compound import OutlierInt8Linear
from bitnet.model.quantized import StaticInt8Linear, cache_weights, model_bits
from bitnet.ptq import drivers
from bitnet.ptq.methods import METHODS, quantize_model
from bitnet.storage.checksums import read_sums, sum_of_weights
from bitnet.storage.folders import CONFIG, packed_quantizer, save_quantized
from bitnet.storage.json_files import load_record
from bitnet.storage.safetensors import MODEL
from bitnet.storage.source import open_source

NATIVE_NAMES = {
    "none": "float", "ternary": "b1.58", "ternary-g64": "b1.58 g64", "ternary-g128": "b1.58 g128",
    "binary": "1-bit BitNet", "int8": "QAT int8", "int4": "QAT int4",
}  # fmt: skip
CACHES = {"kv-int8": 8, "kv-int4": 4}
"""Rows of the float model whose keys and values are stored in so many bits."""
NATIVE_BITS = {
    **dict.fromkeys(TERNARY_QUANTIZERS, math.log2(3)), "none": 32.0, "binary": 1.0, "int4": 4.0, "int8": 8.0,
}  # fmt: skip
LONGEST = 2048
"""Tokens behind which decoding is timed where the cache is what matters, or as many as the model takes."""


@torch.inference_mode()
def layer_outputs(model: BitNetForCausalLM, ids: Tensor) -> list[Tensor]:
    """The residual stream `[T, C]` behind each layer."""
    outputs: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output[0].float().clone()))
        for layer in model.model.layers
    ]
    model.model(ids)
    for hook in hooks:
        hook.remove()
    return outputs


def kernel_of(model: BitNetForCausalLM) -> str:
    """What multiplies the projections of a model in torch: int8 (integer products layer by layer), dequantizes, or
    float."""
    if packed_quantizer(model):
        return "int8"
    projections = [module for name, module in model.named_modules() if name.endswith("_proj")]
    if all(isinstance(module, nn.Linear) for module in projections):
        return "float"
    integers = (StaticInt8Linear, OutlierInt8Linear)
    return "int8" if all(isinstance(module, integers) for module in projections) else "dequantizes"


def open_with_cache(path: str | Path, bits: int) -> LanguageModel:
    """A float model whose keys and values are stored in 32, 8 or 4 bits: on the native engine where that has such a
    cache, else in torch."""
    if bits == 32 or (bits == 8 and native_wanted(torch.device("cpu"))):
        return open_model(path, cache_dtype="int8" if bits == 8 else None)
    model = open_source(path).model()
    model.cache_bits = bits
    return model


def measure(path: str, threads: int | None, cache: int | None = None) -> dict[str, float | None]:
    """Speed and memory of a model on disk, medians of 3; runs in a process of its own. With `cache`, the bits of keys
    and values, also what they take behind a long text, and the speed there, once."""
    if threads:
        torch.set_num_threads(threads)
    before = process_memory("VmRSS")
    reset_peak_memory()
    model = open_model(path) if cache is None else open_with_cache(path, cache)
    if isinstance(model, nn.Module):
        cache_weights(model)  # dequantized once: the speed that a method can have without a kernel
    positions = model.config.max_position_embeddings
    prompt, steps = min(256, positions // 2), min(32, positions // 4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, prompt), generator=generator)
    rounds = [time_generation(model, ids, steps) for _ in range(4)][1:]  # the first touches memory and starts threads
    peak = process_memory()
    far: dict[str, float | None] = {}
    if cache is not None:
        ids = torch.randint(model.config.vocab_size, (1, min(LONGEST, positions) - steps - 1), generator=generator)
        stats = time_generation(model, ids, steps)
        far = {
            "far_decode": stats.decode_rate,
            "cache_mb": (stats.bytes_per_token - model.weight_bytes()) / 1e6,
        }
    return {
        **far,
        "prefill": statistics.median(stats.prefill_rate for stats in rounds),
        "decode": statistics.median(stats.decode_rate for stats in rounds),
        "peak_mb": None if peak is None or before is None else peak - before,
    }


def measure_in_child(path: Path, threads: int | None, cache: int | None = None) -> dict[str, float | None]:
    """`measure` in a fresh process. Raises ValueError with its message where it fails."""
    work = "from bitnet.evaluation.comparison import measure; print(json.dumps(measure(*json.loads(sys.argv[1]))))"
    code = f"import json, sys; {work}"
    command = [sys.executable, "-c", code, json.dumps([str(path), threads, cache])]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise ValueError(f"{path} could not be measured: {child.stderr.strip()[-500:]}")
    return json.loads(child.stdout.splitlines()[-1])


class Comparison:
    """What one call works on: the float model, the held-out windows with its predictions, and the rows so far."""

    def __init__(self, options: Options, train: Sequence[str] = ()) -> None:
        """`train` is the command that trains, for twins that are asked for and missing. Raises ValueError for models
        that cannot be compared, or other settings than those of the rows in the folder."""
        for name in ("tokens", "calibration_tokens", "group_size", "context", "threads"):
            value = getattr(options, name)
            if value is not None and value < 1 and (name, value) != ("group_size", -1):
                raise ValueError(f"--{name.replace('_', '-')} is {value}; give at least 1")
        if options.tasks < 0:
            raise ValueError(f"--tasks is {options.tasks}; give a number of questions, or 0 for none")
        self.options = options
        self.out = options.out
        path, self.runs = self._runs(train)
        source = open_source(path)
        self.tokenizer, self.files = source.tokenizer, source.tokenizer_files()
        self.model = source.model()
        if self.model.config.quantizer != "none":
            raise ValueError(
                f"{path} is no float model, and none trained like it was found beside it; train one with "
                "--train none, or give a float model"
            )
        # The largest power of two up to 128 that divides the rows of every projection.
        sizes = {module.in_features for name, module in self.model.named_modules() if name.endswith("_proj")}
        self.group_size = math.gcd(128, *sizes) if options.group_size is None else options.group_size
        feed = open_text(source, options.text, options.context)
        mixture, self.context = feed.mixture, feed.window
        windows = max(1, options.tokens // self.context)
        self.windows = held_out_windows(mixture, self.context, windows)
        self.tokens = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in self.windows)
        if self.tokens < options.tokens - self.context * len(mixture.corpora):
            note(f"the held-out text has {self.tokens:,} tokens, and --tokens is {options.tokens:,}")
        self.calibration = calibration_sequences(mixture, self.context, options.calibration_tokens)
        self.tasks = make_tasks(
            self.tokenizer, self.model.config.max_position_embeddings, options.tasks, options.wordnet
        )
        self.unused = unused_rows(self.tokenizer, self.model.config.vocab_size)
        settings = (
            *(() if self.unused is None else ("of what is drawn",)),  # not how such rows were once measured
            str(path),
            self.context,
            options.tokens,
            options.calibration_tokens,
            options.text,
            self.group_size,
            options.tasks,
            sum_of_weights(self.model),
        )
        self.settings = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
        self.distributions: list[table.Distribution] = []
        # Read once, before any row: a run that is trained on meanwhile is measured again next time.
        self.sums = {name: (read_sums(open_source(run).path) or {}).get(MODEL) for name, run in self.runs.items()}
        """Of the weights of each run."""
        self.rows = self._finished_rows()

    def _runs(self, train: Sequence[str]) -> tuple[Path, dict[str, Path]]:
        """The float model, and the trained models by the names of their rows: the runs that were given, and of twins of
        the first those with other quantizers. A second run with a quantizer is called by its folder too; the first
        float one is the reference."""
        if not self.options.models:
            raise ValueError("no model was given; name a run of train.py or a float model")
        models = [Path(model) for model in self.options.models]
        first = models[0]
        if not all((first / part).exists() for part in ("checkpoints", CONFIG)):  # other checkpoints have no settings
            if len(models) > 1 or self.options.train:
                raise ValueError(f"{first} is not a run of train.py; several models and --train need runs")
            return first, {}
        twins = find_twins(first)
        given = [(trained_quantizer(run), run) for run in models]
        for wanted in self.options.train:
            if wanted not in twins and wanted not in dict(given):
                train_twin(first, wanted, train)
                twins = {**find_twins(first), **twins}
        runs: dict[str, Path] = {}
        found = [(quantizer, run) for quantizer, run in twins.items() if quantizer not in dict(given)]
        for quantizer, run in [*given, *found]:
            name = NATIVE_NAMES[quantizer]
            name = name if name not in runs else f"{name}, {run.resolve().name}"
            if name in runs or run in runs.values():
                raise ValueError(
                    f"{run} would be the row of another; give each run once, in folders of different names"
                )
            runs[name] = run
        return runs.pop(NATIVE_NAMES["none"], first), runs

    def _finished_rows(self) -> dict[str, Row]:
        """Rows of an interrupted call with the same settings."""
        path = self.out / "table.json"
        if not path.exists():
            if (self.out / "models").exists():  # whose models would be in the way, and are not ours to delete
                raise ValueError(f"{self.out} has a folder 'models' and is no comparison; choose another --out")
            return {}
        stored = load_record(path, table.Table)
        if stored.settings != self.settings:
            raise ValueError(
                f"{self.out} holds a comparison with other settings or other float weights; choose another --out or "
                "delete it"
            )
        rows = {row.name: row for row in stored.rows}
        for name in self.runs:
            if name in rows and stored.runs.get(name) != self.sums[name]:
                note(f"{self.runs[name]} has other weights than the row {name} in {self.out}, which is measured again")
                del rows[name]
        return rows

    def methods(self) -> list[str]:
        """Post-training methods that were asked for. Raises ValueError for one that does not exist."""
        if self.options.methods == ("none",):
            return []
        if self.options.methods == ("all",):
            return [*METHODS, *CACHES]
        unknown = [name for name in self.options.methods if name not in METHODS and name not in CACHES]
        if unknown:
            raise ValueError(f"method {unknown[0]!r} is unknown; choose from {', '.join([*METHODS, *CACHES])}")
        return list(self.options.methods)

    def run(self) -> None:
        """Fill the table, writing it after every row."""
        with working_in(self.out, "comparison"):
            self._fill()

    def _fill(self) -> None:
        self.write()  # from now on the folder is ours
        if self.options.speed:
            self._time_finished()
        jobs: list[tuple[str, str | None]] = [("float32", None)]
        jobs += [(name, name) for name in self.runs]
        pending = [job for job in [*jobs, *((name, name) for name in self.methods())] if self._missing(job[0])]
        if not pending:
            return
        words = [last_words(labels[0], self.tokenizer) for _, labels in self.windows]
        self.reference = Reference(self.model, self.windows, self.model.config.vocab_size, words, self.unused)
        if self.tasks and not any(task.name == "definitions" for task in self.tasks):
            note("no column definitions: WordNet is not installed; give its folder with --wordnet")
        self.float_layers = layer_outputs(self.model, self.windows[0][0])
        with progress_bar(pending, unit="model") as bar:
            for name, what in bar:
                bar.set_description(name)
                try:
                    row = self.measure_row(name, what)
                except ValueError as error:
                    if what not in METHODS and what not in CACHES:
                        raise
                    note(f"no row {name}: {error}")  # a shape that the method cannot take
                    continue
                self.rows[name] = row
                self.write()
                if bar.disable:
                    say(f"{name:24} perplexity {row.perplexity:.2f}")

    def _time_finished(self) -> None:
        """Speed and memory of rows that were measured without (`--no-speed`): of the models that were kept
        (`--keep-models`)."""
        for name, row in self.rows.items():
            if row.decode is None and self.folder(name).exists():
                note(f"speed of {name}")
                self.time(row, self.folder(name), {"float32": 32, **CACHES}.get(name))
                self.write()

    def _missing(self, name: str) -> bool:
        """Whether a row is not there, or there without the speed or a task that is wanted: WordNet may have come."""
        row = self.rows.get(name)
        if row is None or (self.options.speed and row.decode is None):
            return True
        return any(task.questions and getattr(row, task.name) is None for task in self.tasks)

    def measure_row(self, name: str, what: str | None) -> Row:
        """The row of the float model (None), of a run, a method or a cache by its name."""
        if what is None:
            return self.add(name, "float", 32.0, self.model, None, cache=32)
        if what in CACHES:
            return self.add_cache(what)
        return self.add_trained(name) if what in self.runs else self.add_quantized(what)

    def add_trained(self, name: str) -> Row:
        model = open_source(self.runs[name]).model()
        quantizer = model.config.quantizer
        if quantizer == "none":
            return self.add(name, "float", NATIVE_BITS[quantizer], model, None)
        return self.add(name, "native", NATIVE_BITS[quantizer], model.pack(), None)

    def add_quantized(self, name: str) -> Row:
        method = METHODS[name]
        known = isinstance(method.driver, drivers.GGUF) and not method.rotated
        importance, seconds = self.importance if known else (None, 0.0)
        start = time.perf_counter()
        # Embedding and head as a file of that method would have them; in float32 they would hide what the method saves.
        embeddings = "int8" if method.int8_activations else "float16"
        options = drivers.Options(
            group_size=self.group_size,
            progress=False,
            embeddings=embeddings,
            importance=importance,
            unused=self.unused,
        )
        model = quantize_model(copy.deepcopy(self.model), name, self.calibration, options)
        seconds += time.perf_counter() - start
        row = self.add(name, method.family, method.bits, model, seconds)
        changed = layer_outputs(model, self.windows[0][0])
        row.layer_errors = [float((a - b).norm() / b.norm()) for a, b in zip(changed, self.float_layers, strict=True)]
        return row

    @functools.cached_property
    def importance(self) -> tuple[dict[str, Tensor], float]:
        """Of the float model's input channels, which all block types take, and the seconds that each would need for
        it."""
        start = time.perf_counter()
        found = drivers.measure_importance(self.model, self.calibration, drivers.Options(progress=False))
        return found, time.perf_counter() - start

    def add(
        self,
        name: str,
        family: str,
        bits: float,
        model: BitNetForCausalLM,
        seconds: float | None,
        cache: int | None = None,
    ) -> Row:
        """Write a model, read it back, and measure it; with `cache` also its cache of so many bits."""
        with self.written(name, model) as path:
            stored = open_model(path)
            if isinstance(stored, nn.Module):
                cache_weights(stored)
            kernel = stored.kernel if isinstance(stored, Engine) else kernel_of(model)
            row = self.score(name, family, bits, model, stored, kernel, (path / MODEL).stat().st_size)
            row.seconds = seconds
            del stored
            self.time(row, path, cache)
        return row

    def add_cache(self, name: str) -> Row:
        """The row of the float model with a cache of fewer bits."""
        bits, config = CACHES[name], self.model.config
        with self.written(name, self.model) as path:
            stored = open_with_cache(path, bits)
            kernel = stored.kernel if isinstance(stored, Engine) else kernel_of(self.model)
            size = (path / MODEL).stat().st_size
            row = self.score(name, "cache", 32.0, self.model, with_cache(stored), kernel, size)
            cache = stored.new_cache(1, self.context)
            with torch.inference_mode():
                stored(self.windows[0][0][:, : self.context], cache, last_only=True)
            numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_width * cache.length
            row.cache_bits = 8 * cache.nbytes / numbers
            del stored, cache
            self.time(row, path, bits)
        return row

    def folder(self, name: str) -> Path:
        """Where the model of a row is on disk."""
        return self.out / "models" / name.replace(" ", "-")

    @contextmanager
    def written(self, name: str, model: BitNetForCausalLM) -> Iterator[Path]:
        """The folder of a model on disk, while it is measured."""
        path = self.folder(name)
        if path.exists():
            shutil.rmtree(path)
        path.parent.mkdir(exist_ok=True)
        save_quantized(model, path, name, self.files)
        yield path
        if not self.options.keep_models:
            shutil.rmtree(path)

    def time(self, row: Row, path: Path, cache: int | None) -> None:
        """Fill in the columns of speed and memory, where they are wanted."""
        if self.options.speed:
            for key, value in measure_in_child(path, self.options.threads, cache).items():
                setattr(row, key, value)

    def score(
        self, name: str, family: str, bits: float, model: BitNetForCausalLM, run: Predictor, kernel: str, size: int
    ) -> Row:
        """The row of a model whose predictions `run` gives, of `size` bytes on disk; without speed and memory."""
        score = self.reference.score(run)
        perplexity = math.exp(min(score.loss, 700))
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        row = Row(
            name=name,
            family=family,
            bits=bits,
            effective_bits=model_bits(model)[1],
            file_mb=size / 1e6,
            perplexity=perplexity,
            perplexity_error=perplexity * score.error,
            gap=score.gap,
            gap_error=score.gap_error,
            kl=score.kl,
            top1=score.top1,
            kernel=kernel,
            whole_bits=8 * sum(tensor.nbytes for tensor in model.state_dict().values()) / parameters,
        )
        for task, accuracy in {
            "cloze": score.cloze,
            **{task.name: task.accuracy(run, self.unused) for task in self.tasks},
        }.items():
            if accuracy is not None:
                setattr(row, task, accuracy.share)
                setattr(row, f"{task}_error", accuracy.error)
        return row

    def write(self) -> None:
        """The table's files, each replaced whole."""
        table.write(self.out, self.so_far())

    def so_far(self) -> table.Table:
        """What was measured so far."""
        rows = list(self.rows.values())
        runs = {name: known for name, known in self.sums.items() if name in self.rows}
        return table.Table(self.settings, self.context, self.tokens, rows, self.distributions, runs)

    def draw(self) -> None:
        """The pictures of the table, and histograms of weights and activations of the float model, before and after
        quantizers of each kind."""
        with only_for_looking("the pictures of the table"):
            pictures.draw_table(list(self.rows.values()), self.out)
        with only_for_looking("the pictures of the distributions"):
            self.distributions = pictures.draw_distributions(self.model, self.windows[0][0], self.out)
            self.write()
