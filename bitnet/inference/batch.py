"""Texts for a file of prompts: `bitnet generate MODEL --prompts prompts.jsonl --out answers.jsonl`.

A line of the file is an object with "prompt" (a text, or token ids) or "messages" (a conversation). Beside it may stand
any field of `TextOptions` for this prompt (null: as for all); whatever else there is, an "id" for instance, is copied
to the answer:

    {"line": 1, "text": ..., "stop_reason": ..., "prompt_tokens": ..., "new_tokens": ..., "seed": ..., "of": ..., ...}

Answers are written as the texts end, so in another order; "line" is the prompt's, from 1. Line i has the seed of all
plus i - 1 unless it names one, and a text is what `generate` gives with that seed. A file of answers that is there
already is gone on with: what it has is left out, and what was cut off in its last line is written again. "of" tells
whether an answer is of this prompt, these options and this model.
"""

import dataclasses
import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitnet.console import EveryFewSeconds, note, progress_bar, say
from bitnet.files import parse_json
from bitnet.inference.cpu_rows import BLOCK
from bitnet.inference.engine import check_ids
from bitnet.inference.lookup import Drafter
from bitnet.inference.memory import cache_of
from bitnet.inference.options import TextOptions
from bitnet.inference.rows import rows_of
from bitnet.inference.sampling import draw_rows
from bitnet.inference.text_model import OpenText, TextModel, Writing, is_conversation
from bitnet.records import checked

_OPTIONS = {field.name for field in dataclasses.fields(TextOptions)}
_ANSWER = ("line", "text", "stop_reason", "prompt_tokens", "new_tokens", "seed", "of")


@dataclass
class Asked:
    """A line of the prompts."""

    line: int
    prompt: str | Sequence[int] | Sequence[Mapping[str, str]]
    options: TextOptions
    extra: dict[str, Any]
    of: str


def write_answers(model: TextModel, prompts: Path, out: Path, options: TextOptions, seed: int, rows: int) -> None:
    """Write the texts of all prompts that have none yet to `out`, up to `rows` of them side by side.

    Raises ValueError for a line that is not a prompt, has options out of range or leaves the model no room, before
    anything is written, and for answers that are not of these prompts.
    """
    asked = list(_read(prompts, options, seed, [str(path and path.resolve()) for path in model.made_of]))
    done = _answered(out, asked)
    texts = deque((one, _opened(model, one, prompts)) for one in asked if one.line not in done)
    if done:
        note(f"{out} has {len(done)} of {len(asked)} answers; {len(texts)} are left")
    started, tokens, ended, progress = time.perf_counter(), 0, len(done), EveryFewSeconds()
    with ExitStack() as stack:
        # Half of a pair of UTF-16 is no UTF-8: it is written as JSON's escape, which it was.
        file = stack.enter_context(open(out, "a", encoding="utf-8", errors="backslashreplace"))
        bar = stack.enter_context(progress_bar(title="texts", total=len(asked), done=len(done), unit="text"))
        for one, text in _written(model, texts, rows):
            completion = text.completion
            answer = {
                "line": one.line, "text": completion.text, "stop_reason": completion.stop_reason,
                "prompt_tokens": completion.prompt_tokens, "new_tokens": completion.new_tokens,
                "seed": completion.seed, "of": one.of,
            }  # fmt: skip
            file.write(json.dumps(answer | one.extra, ensure_ascii=False) + "\n")
            file.flush()
            tokens += completion.new_tokens
            ended += 1
            bar.update(1)
            if bar.disable and progress.due():
                note(f"{ended} of {len(asked)} texts, {tokens / (time.perf_counter() - started):.0f} tok/s")
    seconds = time.perf_counter() - started
    say(f"{ended} of {len(asked)} texts in {out}, {tokens} new tokens, {tokens / max(seconds, 1e-9):.0f} tok/s")


@dataclass
class _Running:
    """A text on its way through the passes."""

    one: Asked
    text: OpenText
    row: Any
    pending: list[int]
    """Tokens that the row is about to read: the prompt, then the last one."""
    drafter: Drafter | None

    @property
    def room(self) -> int:
        """Tokens that are still to come, at most."""
        return self.text.room - self.text.completion.new_tokens

    @property
    def ahead(self) -> bool:
        """The logits behind the last token are there."""
        return self.drafter is not None and self.drafter.ahead and not self.row.closed


@torch.inference_mode()
def _written(model: TextModel, waiting: "deque[tuple[Asked, OpenText]]", most: int) -> Iterator[tuple[Asked, OpenText]]:
    """Every text once it has ended. A prompt is read beside the texts that go on, as soon as a row is free; while none
    is, they may carry drafts."""
    rows, ends, lookup = rows_of(model.model), model.source.tokenizer.eos_ids, model.lookup
    needs = sorted((len(text.ids) + text.room + BLOCK for _, text in waiting), reverse=True)
    cache = cache_of(model.model, sum(needs[:most]) or 1)
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < most:
            one, text = waiting.popleft()
            row = cache.new_row()
            drafter = Drafter(lookup, row, text.ids) if lookup.tokens else None
            running.append(_Running(one, text, row, text.ids, drafter))
        drafts: list[list[int]] = [[] for _ in running]
        drafters = [(one.drafter, one.room) for one in running if one.drafter is not None]
        if drafting := bool(drafters) and all(one.text.completion.new_tokens for one in running):
            drafts = lookup.begin(drafters)
        steps = [(one.row, one.pending + draft) for one, draft in zip(running, drafts, strict=True)]
        started = time.perf_counter()
        logits = rows.step(steps, every=True) if any(drafts) else rows.step(steps).split(1)
        if drafting:
            lookup.measured(len(running), sum(map(len, drafts)), time.perf_counter() - started)
        behind, place = list(zip(running, logits, strict=True)), 0
        while behind:
            drawn = draw_rows([one.text.sampler for one, _ in behind], torch.stack([out[place] for _, out in behind]))
            for (now, _), token in zip(behind, drawn, strict=True):
                text = now.text
                if not token.finite:
                    raise ValueError(f"the model's logits are not finite in the text of line {now.one.line}")
                text.push(token)
                if text.finished or token.token in ends or not now.room:
                    text.close()
                    now.row.close()
                    yield now.one, text
                else:
                    now.pending = [token.token]
                    if now.drafter is not None:
                        now.drafter.take(token.token)
            behind, place = [(one, out) for one, out in behind if one.ahead], place + 1
        running = [one for one in running if not one.row.closed]


def _read(path: Path, options: TextOptions, seed: int, model: list[str]) -> Iterator[Asked]:
    with open(path, encoding="utf-8") as file:
        for line, content in enumerate(file, 1):
            if not content.strip():
                continue
            where = f"{path}, line {line}"
            try:
                value = parse_json(content)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error})") from None
            if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
                raise ValueError(f'{where}: give an object with either "prompt" or "messages"')
            key = "prompt" if "prompt" in value else "messages"
            prompt = value.pop(key)
            listed = isinstance(prompt, list) and len(prompt) > 0
            ids = listed and all(type(token) is int for token in prompt)
            text = key == "prompt" and (isinstance(prompt, str) or ids)
            if not (text or (listed and all(isinstance(each, dict) for each in prompt))):
                raise ValueError(f'{where}: "prompt" is a text or token ids, "messages" a list of objects')
            if taken := sorted(set(value) & set(_ANSWER) - _OPTIONS):
                raise ValueError(f'{where}: "{taken[0]}" is a field of the answers; give it another name')
            given = {name: value.pop(name) for name in sorted(_OPTIONS & set(value))}
            given = {name: option for name, option in given.items() if option is not None}
            own = {name: getattr(checked(TextOptions, given, where), name) for name in given}
            how = dataclasses.replace(options, **{"seed": (seed + line - 1) % 2**63, **own})
            drawn = own.get("seed") if options.seed is None else how.seed  # a random one may be another next time
            kept = dataclasses.asdict(dataclasses.replace(how, seed=drawn))
            of = hashlib.sha256(json.dumps([prompt, kept, model], sort_keys=True).encode()).hexdigest()[:16]
            yield Asked(line, prompt, how, value, of)


def _opened(model: TextModel, one: Asked, path: Path) -> OpenText:
    try:
        sampling = one.options.sampling(model.source.sampling)
        writing = Writing(model.encode(one.prompt), one.options, sampling, not is_conversation(one.prompt))
        check_ids(model.model.config, min(writing.ids, default=0), max(writing.ids, default=0))
        return OpenText(model.model, model.source.tokenizer, writing, None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {one.line}: {error}") from None


def _answered(path: Path, asked: Sequence[Asked]) -> set[int]:
    """Lines that have an answer. A last line that was cut off is taken away."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    known, done = {one.line: one.of for one in asked}, set()
    for number, content in enumerate(data[:whole].split(b"\n")[:-1], 1):  # a text may hold other ends of lines
        try:
            answer = parse_json(content)
            line, of = answer["line"], answer["of"]
            same = known.get(line) == of
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number} is no answer of this command; give another --out") from None
        if not same:
            raise ValueError(
                f"{path}, line {number} answers another prompt, or was written with other options or by another model; "
                "give another --out"
            )
        done.add(line)
    if whole < len(data):
        with open(path, "r+b") as file:
            file.truncate(whole)
    return done
