"""Every quantization method on one model: quality, size and speed in one table, and pictures."""

import copy
import csv
import dataclasses
import hashlib
import io
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from bitnet import kernels, plots
from bitnet.evaluation.agreement import Reference
from bitnet.evaluation.table import Row, markdown
from bitnet.evaluation.texts import calibration_sequences, held_out_windows, open_text
from bitnet.evaluation.twins import find_twins, train_twin
from bitnet.files import write_atomic
from bitnet.inference.loading import open_model
from bitnet.kernels import blocks
from bitnet.machine import process_memory, reset_peak_memory
from bitnet.model import BitNetForCausalLM
from bitnet.model.quantized import StaticInt8Linear, cache_weights, model_bits
from bitnet.ptq.drivers import quantize_model
from bitnet.ptq.methods import METHODS
from bitnet.quant import PerTensor, PerToken, choose_qparams_symmetric, fake_quantize
from bitnet.quant.nf4 import dequantize_nf4, quantize_nf4
from bitnet.storage.folders import CONFIG, INDEX, MODEL, load_model, packed_quantizer, resolve, save_quantized
from bitnet.storage.safetensors import load_json
from bitnet.storage.source import tokenizer_files

NATIVE_NAMES = {"ternary": "b1.58", "binary": "1-bit BitNet", "int8": "QAT int8", "int4": "QAT int4"}
NATIVE_BITS = {"ternary": math.log2(3), "binary": 1.0, "int4": 4.0, "int8": 8.0}


@dataclass(frozen=True)
class Options:
    """Compare quantization methods on one model."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Runs of train.py, or one float model of any format."""
    methods: tuple[str, ...] = ("all",)
    """Post-training methods to run on the float model: names from `python -m bitnet quantize --list`, all, or none."""
    train: tuple[Literal["none", "ternary", "binary", "int4", "int8"], ...] = ()
    """Train these twins of the first run if they are not found beside it."""
    text: str | None = None
    """Corpus for calibration (its training part) and evaluation (its held-out part); a run's own by default."""
    tokens: int = 32768
    """Held-out tokens to evaluate on."""
    calibration_tokens: int = 16384
    group_size: int | None = None
    """Input channels that share a scale in the grouped methods; 128, or the largest power of 2 below that fits."""
    context: int | None = None
    """Tokens in a window; the training context of a run, at most 512 for other models."""
    out: Path = Path("comparison")
    """Folder of the table, the pictures and what is needed to go on after an interruption."""
    keep_models: bool = False
    """Keep the quantized models in OUT/models."""
    speed: bool = True
    """Measure decode and prefill speed and memory, each in a process of its own."""
    threads: int | None = None


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


def family_of(name: str) -> str:
    """The family under which the pictures show a method."""
    method = METHODS[name]
    if name.startswith("gguf"):
        return "gguf"
    if method.bits >= 16:
        return "float"
    return "weights and activations" if method.int8_activations else "weight-only"


def kernel_of(model: BitNetForCausalLM) -> str:
    """What multiplies the projections: native (the whole model in the engine), int8 (integer products layer by layer),
    dequantizes, or float."""
    if packed_quantizer(model):
        return "native"
    projections = [module for name, module in model.named_modules() if name.endswith("_proj")]
    if all(isinstance(module, nn.Linear) for module in projections):
        return "float"
    return "int8" if all(isinstance(module, StaticInt8Linear) for module in projections) else "dequantizes"


def measure(path: str, threads: int | None) -> dict[str, float | None]:
    """Speed and memory of a model on disk; runs in a process of its own. Medians of 3."""
    if threads:
        torch.set_num_threads(threads)
    before = process_memory("VmRSS")
    reset_peak_memory()
    model = open_model(path).model
    if isinstance(model, nn.Module):
        cache_weights(model)  # dequantized once: the speed that a method can have without a kernel
    vocab, positions = model.config.vocab_size, model.config.max_position_embeddings
    prompt, steps = min(256, positions // 2), min(32, positions // 4)
    ids = torch.randint(vocab, (1, prompt), generator=torch.Generator().manual_seed(0))
    prefill, decode = [], []
    with torch.inference_mode():
        for _ in range(4):
            cache = model.new_cache(1, prompt + steps)
            start = time.perf_counter()
            token = model(ids, cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
            middle = time.perf_counter()
            for _ in range(steps):
                token = model(token, cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
            end = time.perf_counter()
            prefill.append(prompt / (middle - start))
            decode.append(steps / (end - middle))
    peak = process_memory()
    # The first round touches memory and starts threads.
    return {
        "prefill": float(np.median(prefill[1:])), "decode": float(np.median(decode[1:])),
        "peak_mb": None if peak is None or before is None else peak - before,
    }  # fmt: skip


def measure_in_child(path: Path, threads: int | None) -> dict[str, float | None]:
    """`measure` in a fresh process. Raises ValueError with its message where it fails."""
    work = "from bitnet.evaluation.comparison import measure; print(json.dumps(measure(*json.loads(sys.argv[1]))))"
    code = f"import json, sys; {work}"
    command = [sys.executable, "-c", code, json.dumps([str(path), threads])]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise ValueError(f"{path} could not be measured: {child.stderr.strip()[-500:]}")
    return json.loads(child.stdout.splitlines()[-1])


class Comparison:
    """What one call works on: the float model, the held-out windows with its predictions, and the rows so far."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.out = options.out
        self.runs = self._runs()
        source = self.runs.get("none", Path(options.models[0]))
        opened = open_model(str(source), pack=False)
        self.tokenizer, self.files = opened.tokenizer, tokenizer_files(opened)
        if not isinstance(opened.model, BitNetForCausalLM) or opened.model.config.quantizer != "none":
            raise ValueError(
                f"{source} is no float model, and none trained like it was found beside it; train one with "
                "--train none, or give a float model"
            )
        self.model = opened.model.float()
        sizes = {module.in_features for name, module in self.model.named_modules() if name.endswith("_proj")}
        self.group_size = options.group_size or math.gcd(128, *sizes)
        mixture, self.context = open_text(opened, options.text, options.context)
        windows = max(1, options.tokens // self.context)
        self.windows = held_out_windows(mixture, self.context, windows)
        self.calibration = calibration_sequences(mixture, self.context, options.calibration_tokens)
        self.settings = hashlib.sha256(
            repr(
                (str(source), self.context, options.tokens, options.calibration_tokens, options.text, self.group_size)
            ).encode()
        ).hexdigest()[:16]
        self.rows = self._finished_rows()

    def _runs(self) -> dict[str, Path]:
        """Quantizer to run folder of the trained models; empty for a model that is no run."""
        if not self.options.models:
            raise ValueError("no model was given; name a run of train.py or a float model")
        first = Path(self.options.models[0])
        if not (first / "checkpoints" / INDEX).exists():
            if len(self.options.models) > 1 or self.options.train:
                raise ValueError(f"{first} is not a run of train.py; several models and --train need runs")
            return {}
        runs = find_twins(first)
        for other in self.options.models[1:]:
            runs[load_json(Path(other) / CONFIG)["model"]["quantizer"]] = Path(other)
        for quantizer in self.options.train:
            if quantizer not in runs:
                train_twin(first, quantizer)
                runs = {**find_twins(first), **runs}
        return runs

    def _finished_rows(self) -> dict[str, Row]:
        """Rows of an interrupted call with the same settings."""
        path = self.out / "table.json"
        if not path.exists():
            return {}
        stored = load_json(path)
        if stored.get("settings") != self.settings:
            raise ValueError(f"{self.out} holds a comparison with other settings; choose another --out or delete it")
        return {row["name"]: Row(**row) for row in stored["rows"]}

    def methods(self) -> list[str]:
        """Post-training methods that were asked for. Raises ValueError for one that does not exist."""
        if self.options.methods == ("none",):
            return []
        if self.options.methods == ("all",):
            return list(METHODS)
        unknown = [name for name in self.options.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"method {unknown[0]!r} is unknown; choose from {', '.join(METHODS)}")
        return list(self.options.methods)

    def run(self) -> None:
        """Fill the table, writing it after every row."""
        self.out.mkdir(parents=True, exist_ok=True)
        jobs = [("float32", None)] + [(NATIVE_NAMES[q], q) for q in self.runs if q != "none"]
        pending = [job for job in [*jobs, *((m, m) for m in self.methods())] if job[0] not in self.rows]
        if not pending:
            return
        self.reference = Reference(self.model, self.windows, self.model.config.vocab_size)
        self.float_layers = layer_outputs(self.model, self.windows[0][0])
        with tqdm(pending, unit="model", dynamic_ncols=True, disable=None) as bar:
            for name, what in bar:
                bar.set_description(name)
                if what is None:
                    row = self.add(name, "float", 32.0, self.model, None)
                elif what in self.runs:
                    row = self.add_trained(name, what)
                else:
                    try:
                        row = self.add_quantized(what)
                    except ValueError as error:  # a shape that the method cannot take
                        tqdm.write(f"note: no row {name}: {error}", file=sys.stderr)
                        continue
                self.rows[name] = row
                self.write()
                if bar.disable:
                    print(f"{name:24} perplexity {row.perplexity:.2f}", flush=True)

    def add_trained(self, name: str, quantizer: str) -> Row:
        model = load_model(resolve(self.runs[quantizer], "best"))
        return self.add(name, "native", NATIVE_BITS[quantizer], model.pack(), None)

    def add_quantized(self, name: str) -> Row:
        method = METHODS[name]
        start = time.perf_counter()
        model = quantize_model(
            copy.deepcopy(self.model), name, self.calibration, group_size=self.group_size, progress=False,
            embeddings="int8" if method.int8_activations else "float16",
        )  # fmt: skip
        seconds = time.perf_counter() - start
        row = self.add(name, family_of(name), method.bits, model, seconds)
        changed = layer_outputs(model, self.windows[0][0])
        row.layer_errors = [float((a - b).norm() / b.norm()) for a, b in zip(changed, self.float_layers, strict=True)]
        return row

    def add(self, name: str, family: str, bits: float, model: BitNetForCausalLM, seconds: float | None) -> Row:
        """Write a model, read it back, and measure it."""
        path = self.out / "models" / name.replace(" ", "-")
        if path.exists():
            shutil.rmtree(path)
        path.parent.mkdir(exist_ok=True)
        save_quantized(model, path, name, self.files)
        stored = open_model(path).model
        if isinstance(stored, nn.Module):
            cache_weights(stored)
        score = self.reference.score(stored)
        perplexity = math.exp(min(score.loss, 700))
        row = Row(
            name=name, family=family, bits=bits, effective_bits=model_bits(model)[1],
            file_mb=(path / MODEL).stat().st_size / 1e6, perplexity=perplexity,
            perplexity_error=perplexity * score.error, gap=score.gap, gap_error=score.gap_error, kl=score.kl,
            top1=score.top1, kernel=kernel_of(model), seconds=seconds,
        )  # fmt: skip
        del stored
        if self.options.speed:
            for key, value in measure_in_child(path, self.options.threads).items():
                setattr(row, key, value)
        if not self.options.keep_models:
            shutil.rmtree(path)
        return row

    def write(self) -> None:
        """table.json, table.csv and table.md, each replaced whole."""
        rows = list(self.rows.values())
        stored = {"settings": self.settings, "context": self.context, "tokens": self.options.tokens}
        write_atomic(
            self.out / "table.json", json.dumps({**stored, "rows": [dataclasses.asdict(r) for r in rows]}, indent=1)
        )
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([f.name for f in dataclasses.fields(Row)])
        writer.writerows([getattr(row, f.name) for f in dataclasses.fields(Row)] for row in rows)
        write_atomic(self.out / "table.csv", text.getvalue())
        write_atomic(self.out / "table.md", markdown(rows))

    def draw(self) -> None:
        """The pictures."""
        rows = list(self.rows.values())
        bars = "bars: standard error of the difference to the float model"
        for name, column, label, title in (
            ("size", "file_mb", "file, MB", "Perplexity against size on disk"),
            ("speed", "decode", "decode, tokens/s", "Perplexity against decode speed"),
        ):
            points = [
                plots.Point(
                    r.name, r.family, getattr(r, column), r.perplexity, r.perplexity * r.gap_error,
                    hollow=r.kernel == "dequantizes",
                )
                for r in rows
                if getattr(r, column)
            ]  # fmt: skip
            if points:
                plots.draw_scatter(
                    points, self.out / f"{name}.png", xlabel=label, title=f"{title} ({bars}; hollow: dequantizes)",
                    lower_is_better=name == "size",
                )  # fmt: skip
        errors = {r.name: r.layer_errors for r in rows if r.layer_errors}
        if errors:
            plots.draw_layers(
                errors, self.out / "layers.png", title="Relative error of the residual stream behind each layer"
            )

    def draw_distributions(self) -> None:
        """Histograms of one layer's weights and of its input, before and after quantizers of each kind."""
        layers = self.model.model.layers
        middle: Any = layers[len(layers) // 2].mlp
        inputs: list[Tensor] = []
        hook = middle.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
        with torch.inference_mode():
            self.model(self.windows[0][0])
        hook.remove()
        weight = middle.gate_proj.weight.detach().float()
        codes = {q: kernels.quantize_weight(weight, q) for q in ("ternary", "binary", "int4", "int8")}
        after = {name: plots.sample_values(values * scale) for name, (values, scale) in codes.items()}
        after["nf4"] = plots.sample_values(dequantize_nf4(quantize_nf4(weight)))
        after["Q2_K"] = plots.sample_values(blocks.dequantize(blocks.quantize(weight, "Q2_K"), "Q2_K"))
        plots.draw_histograms(
            plots.sample_values(weight), after, self.out / "weights.png",
            title="gate_proj of the middle layer: float weights (grey) and what quantizers make of them (red)",
        )  # fmt: skip
        x = inputs[0].float()[0]
        static = choose_qparams_symmetric(x, 8, PerTensor())
        variants = {
            "int8 per token": fake_quantize(x, choose_qparams_symmetric(x, 8, PerToken()), None, -128, 127),
            "int8 per tensor": fake_quantize(x, static, None, -128, 127),
            "int4 per token": fake_quantize(x, choose_qparams_symmetric(x, 4, PerToken()), None, -8, 7),
        }
        plots.draw_histograms(
            plots.sample_values(x), {k: plots.sample_values(v) for k, v in variants.items()},
            self.out / "activations.png",
            title="input of down_proj in the middle layer: float (grey) and quantized (red), logarithmic", log=True,
        )  # fmt: skip
