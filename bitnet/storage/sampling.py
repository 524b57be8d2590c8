"""How a model's makers want its tokens drawn: a folder's generation_config.json, a GGUF file's `general.sampling.*`.

    sampling_of_folder(folder)      {"temperature": 0.2, "top_p": 0.9}, by the names of `SamplingConfig`
    sampling_of_gguf(metadata)

What such settings ask for and this package does not do is said in a note, since it changes the texts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitnet.console import note
from bitnet.files import JsonObject, read_json
from bitnet.storage.json_files import CheckpointError
from bitnet.tokenizer.added import GENERATION

Sampling = dict[str, float]
GGUF_PREFIX = "general.sampling."
GGUF_NAMES = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty"
}  # fmt: skip
NAMES = tuple(GGUF_NAMES.values())
# What would change a text, with the values that change nothing.
_NOT_DONE: dict[str, tuple[object, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0,), "typical_p": (1,), "epsilon_cutoff": (0,),
    "eta_cutoff": (0,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "length_penalty": (1,), "bad_words_ids": (), "sequence_bias": (),
    "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (), "guidance_scale": (1,), "min_length": (0,), "min_new_tokens": (0,),
    "top_h": (), "stop_strings": ([],), "dola_layers": (), "watermarking_config": (),
}  # fmt: skip
_NOT_DONE_GGUF: dict[str, tuple[object, ...]] = {
    "sequence": ("",), "xtc_probability": (0,), "mirostat": (0,), "penalty_last_n": (-1,)
}  # fmt: skip


def sampling_of_folder(folder: Path) -> Sampling:
    """Of a folder's generation_config.json; {} without one. `do_sample: false` is a temperature of 0. Raises
    CheckpointError for a damaged file and values that are no numbers."""
    path = folder / GENERATION
    if not path.is_file():
        return {}
    try:
        settings = read_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    found = _numbers({name: settings.get(name) for name in NAMES}, path)
    if settings.get("do_sample") is False:
        found["temperature"] = 0.0
    _tell(settings, _NOT_DONE, path)
    return found


def sampling_of_gguf(metadata: JsonObject, path: Path) -> Sampling:
    """Of a GGUF file's metadata. Raises CheckpointError for values that are no numbers."""
    settings = {key.removeprefix(GGUF_PREFIX): value for key, value in metadata.items() if key.startswith(GGUF_PREFIX)}
    found = _numbers({ours: settings.get(theirs) for theirs, ours in GGUF_NAMES.items()}, path)
    # The window of llama.cpp's penalty says nothing where there is no penalty.
    silent = () if found.get("repetition_penalty", 1.0) != 1.0 else ("penalty_last_n",)
    _tell({name: value for name, value in settings.items() if name not in silent}, _NOT_DONE_GGUF, path)
    return found


def sampling_metadata(sampling: Mapping[str, float]) -> JsonObject:
    """The keys of a GGUF file for such settings."""
    kinds = {"top_k": int}
    return {
        GGUF_PREFIX + theirs: kinds.get(ours, float)(sampling[ours])
        for theirs, ours in GGUF_NAMES.items()
        if ours in sampling
    }


def _numbers(values: Mapping[str, Any], path: Path) -> Sampling:
    found: Sampling = {}
    for name, value in values.items():
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e30
        if not number or (name == "top_k" and value != int(value)):
            raise CheckpointError(f"{path}: {name} is {value!r:.60}; it must be a number")
        found[name] = float(value)
    if "top_k" in found:
        found["top_k"] = min(max(0, int(found["top_k"])), 2**31 - 1)  # some write -1 for all
    return found


def _tell(settings: Mapping[str, Any], not_done: Mapping[str, tuple[object, ...]], path: Path) -> None:
    asked = [
        f"{name} {settings[name]}" for name, neutral in not_done.items() if settings.get(name) not in (None, *neutral)
    ]
    if asked:
        note(f"{path} also asks for {', '.join(asked)}, which is not done here")
