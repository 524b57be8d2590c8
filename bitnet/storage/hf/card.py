"""The model card of an exported Hugging Face folder: README.md with the YAML front matter that the hub reads.

    text = model_card(config, "codes and their scale (packed)", origin_of(checkpoint))

What the source does not know is said to be unknown, and nothing is guessed: a packed or a foreign folder tells nothing
of its training, a checkpoint of train.py tells what its run wrote beside it.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet.files import JsonObject
from bitnet.kernels import GROUP_SIZES, TERNARY_QUANTIZERS
from bitnet.model import ModelConfig
from bitnet.storage.folders import STATE
from bitnet.storage.json_files import CheckpointError, State, load_record, read_metrics

CARD = "README.md"
UNKNOWN = "unknown: the exported model carried no record of it"
"""Bytes of metrics.jsonl that are looked at, from its end: more than any run has written."""

TRANSFORMERS = """With transformers and {package}, where `FOLDER` is this folder or its name on the hub:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
ids = tokenizer("The", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))
```

"""
BITNET = """With bitnet, which wrote it:

```python
import bitnet

print(bitnet.load("FOLDER").generate("The", max_new_tokens=40))
```
"""
NOT_READ = (
    "bitnet wrote this folder and does not read its layout: it takes the folder that this one was exported from.\n"
)


@dataclass(frozen=True)
class Origin:
    """How a model was made, a sentence each in Markdown; None where that is not known."""

    data: str | None = None
    recipe: str | None = None
    loss: str | None = None


def origin_of(checkpoint: Path, config: JsonObject) -> Origin:
    """What a checkpoint folder of train.py, whose config.json is `config`, and its run know; all unknown for any other
    folder or a damaged file."""
    try:
        step = load_record(checkpoint / STATE, State).step
    except CheckpointError:
        return Origin()
    if not {"data", "optim", "steps"} <= config.keys():
        return Origin()
    return Origin(*(_known(part, of, step) for part, of in ((_data, config), (_recipe, config), (_loss, checkpoint))))


def model_card(
    config: ModelConfig,
    weights: str,
    origin: Origin | None = None,
    *,
    package: str = "the package accelerate",
    readable: bool = True,
) -> str:
    """The text of a card.

    weights: what the projections are stored as, in a few words; package: what transformers wants to load them;
    readable: whether this project reads what it has written.
    """
    origin = origin or Origin()
    kind = {
        "ternary": "BitNet b1.58: projections of -1, 0 and 1 with a scale a matrix, INT8 activations",
        "binary": "1-bit BitNet: projections of -1 and 1 with a scale a matrix, INT8 activations",
        "none": "a model of floats, not trained for low bits",
        **{
            name: f"BitNet b1.58: projections of -1, 0 and 1 with a scale for each {size} columns, INT8 activations"
            for name, size in GROUP_SIZES.items()
        },
    }.get(config.quantizer, f"projections of {config.quantizer.upper()} with a scale a row, INT8 activations")
    ternary = dict.fromkeys(TERNARY_QUANTIZERS, "tags:\n- bitnet\n- 1.58-bit\n")
    tags = {**ternary, "binary": "tags:\n- bitnet\n"}.get(config.quantizer, "")
    count = config.num_hidden_layers
    shape = (
        f"{count} {'layer' if count == 1 else 'layers'} of width {config.hidden_size}, feed-forward "
        f"{config.intermediate_size}, {config.num_attention_heads} query and {config.num_key_value_heads} key and "
        "value heads"
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: unknown
{tags}---

# Model card

| | |
|---|---|
| kind | {kind} |
| weights in this folder | {weights} |
| shape | {shape} |
| vocabulary, positions | {config.vocab_size:,} tokens, {config.max_position_embeddings:,} positions |
| trained on | {origin.data or UNKNOWN} |
| recipe | {origin.recipe or UNKNOWN} |
| held-out loss | {origin.loss or UNKNOWN} |
| licence | unknown: whoever shares the model states it, and in the first lines of this file |

## How to load it

{TRANSFORMERS.format(package=package)}{BITNET if readable else NOT_READ}
## Limits

The model writes what its training data make likely: it may be wrong, and it was not tested for any use.
"""


def _known(sentence: Callable[[Any, int], str | None], of: Any, step: int) -> str | None:
    try:
        return sentence(of, step)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):  # not what train.py writes: damaged
        return None


def _data(config: JsonObject, step: int) -> str:
    data = config["data"]
    if data.get("chat"):
        return f"conversations, of which the answers count: {_name(data['chat'])}"
    corpora = [data["corpus"]] if isinstance(data["corpus"], str) else data["corpus"]
    found = " and ".join(_name(corpus) for corpus in corpora)
    return found + (f", the first {data['max_bytes']:,} bytes" if data.get("max_bytes") else "")


def _recipe(config: JsonObject, step: int) -> str:
    optim, model = config["optim"], config["model"]
    window = config.get("context") or model["max_position_embeddings"]
    rates = [("learning rate", "lr"), ("of embedding, head and norms", "lr_rest"), ("of the second half", "lr_second")]
    parts = [
        f"{step:,} steps of {config['batch_size']} sequences of {window} tokens "
        f"({step * config['batch_size'] * window:,} tokens)",
        f"weight quantizer {model['quantizer']}",
        f"optimizer {optim['optimizer']}",
        *(f"{words} {optim[key]:g}" for words, key in rates if optim.get(key)),
    ]
    if step < config["steps"]:
        parts.append(f"stopped before its {config['steps']:,} steps")
    if config.get("float_start"):
        parts.append(f"the first {config['float_start']:.0%} of the steps in 16 bit")
    if config.get("ramp"):
        parts.append(f"quantizers faded in over {config['ramp']:.0%}")
    if config.get("init"):
        parts.append(f"started from {_name(config['init'])}")
    return ", ".join([*parts, f"seed {config['seed']}"])


def _loss(checkpoint: Path, step: int) -> str | None:
    """The losses that the run's metrics have for the step of this checkpoint; those of the whole split come first."""
    row: JsonObject = {}
    for each in read_metrics(checkpoint.parent.parent / "metrics.jsonl"):
        row |= each if each["step"] == step else {}
    for prefix, part in (("whole_val", "all of the held-out text"), ("val", "held-out text")):
        loss = row.get(f"{prefix}_loss")
        if isinstance(loss, float) and math.isfinite(loss):
            bits = row.get(f"{prefix}_bits_per_byte")
            more = "" if bits is None else f", {bits:.4f} bits a byte"
            return f"{loss:.4f} nats a token (perplexity {math.exp(loss):.2f}{more}) on {part}, in training"
    return None


def _name(path: str) -> str:
    """A corpus or model without the folders that it lies in, as code in Markdown."""
    path, equals, share = str(path).partition("=")
    name = re.sub(r"[^\w .@+-]", "", path.rstrip("/").rpartition("/")[2]) or "?"
    return f"`{name}`" + (f" ({share} of the sequences)" if equals else "")
