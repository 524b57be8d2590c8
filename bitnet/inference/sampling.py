"""How the next token of a text is drawn: the specification, and many rows at once in native code.

    sampler = RowSampler(SamplingConfig(0.8, top_p=0.95), seed=1, prompt=ids, vocab_size=V)
    drawn = draw_rows([sampler, ...], logits)       float32 [n, V] to a `Drawn` for each row

A token is drawn in these steps, transformers' order:

    0. unused tokens        padded rows and the like (`BaseTokenizer.drawable`) are no part of the distribution at all
    1. presence, frequency  l = l + bias - (presence + frequency * count) with the token's count in the text so far,
       and bias             without the prompt, and no presence where it is 0 (OpenAI's penalties)
    2. allowed tokens       the others are left out
    3. repetition penalty   l = l / r if l > 0 else l * r, for every token of the prompt and of the text so far
    4. temperature          w = exp((l - max l) / temperature); 0 takes the largest logit instead and ends here
    5. top-k                the k largest
    6. top-p                the smallest set of what is left whose mass reaches p of it, at least one token
    7. min-p                what has at least min_p times the weight of the most likely token
    8. draw                 the first token whose cumulative weight exceeds u * total, u uniform in [0, 1)

Equal logits count in the order of their ids, and one that a bias or penalty takes beyond float32 is the largest float.
Every text has a generator on the CPU of its own, started from its seed, which gives one u a token: so a text depends on
its seed, prompt and options, not on its company. Log-probabilities are those of the model, before all steps but 0:
probabilities of all that can be drawn sum to 1. (llama.cpp and transformers count every row of the head, and may draw
them.)

Letters: B batch, V vocab_size, N candidates.
"""

import array
import ctypes
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet.inference.options import SamplingConfig
from bitnet.kernels import native_wanted
from bitnet.kernels.cpu import native
from bitnet.tokenizer import Drawable

_AHEAD = 32  # uniform numbers that are drawn at once
_LOWEST, _HIGHEST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max

_scratch = native.Scratch()


class Drawn(NamedTuple):
    """A token and, where they were asked for, log-probabilities under the model."""

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []  # noqa: RUF012 - a constant
    """The most likely tokens, in descending order."""
    finite: bool = True
    """Whether the row's logits were; if not, nothing was drawn."""


class RowSampler:
    """How the tokens of one text are chosen, and what they were so far."""

    def __init__(
        self,
        sampling: SamplingConfig,
        seed: int,
        prompt: Iterable[int] = (),
        *,
        vocab_size: int,
        unused: Sequence[int] = (),
        logprobs: int | None = None,
    ) -> None:
        """`vocab_size`, `unused`: what can be drawn, as in `Drawable`. `logprobs`: how many of the most likely tokens
        come with their log-probabilities, next to the drawn one.

        Raises ValueError for a seed, a number of them and biased tokens out of range.
        """
        if not 0 <= seed < 2**63 or seed % 1:
            raise ValueError(f"seed is {seed}; give a whole number from 0 to 2^63 - 1")
        self.drawable = Drawable(vocab_size, tuple(unused))
        if self.drawable.number < 1 or (unused and not 0 <= min(unused) <= max(unused) < vocab_size):
            raise ValueError(f"{len(unused)} of {vocab_size} ids are unused; they must be among them and leave one")
        if logprobs is not None and not 0 <= logprobs <= self.drawable.number:
            raise ValueError(f"logprobs is {logprobs}; give a number of tokens from 0 to {self.drawable.number}")
        for token, bias in sampling.logit_bias.items():
            if not 0 <= token < vocab_size or not abs(bias) < float("inf"):
                raise ValueError(f"logit_bias has {token}: {bias}; give a number for ids from 0 to {vocab_size - 1}")
            if token in unused:
                raise ValueError(f"logit_bias has {token}: {bias}, and that token is unused: it is never drawn")
        self.sampling, self.vocab_size, self.logprobs = sampling, vocab_size, logprobs
        self.unused = torch.tensor(unused) if unused else None
        """int64: `Drawable.unused`, on the CPU."""
        self.allowed: Tensor | None = None
        """Bool `[V]`: the tokens that may come next, on the CPU; None: all. At least one must be, but unused ones never
        are."""
        self._generator = torch.Generator().manual_seed(int(seed))
        self._ahead: list[float] = []
        self._counts: dict[int, int] = {}
        self._penalized = bool(sampling.presence_penalty or sampling.frequency_penalty)
        # Where each changed token stands in the lists, as C reads them.
        self._places = {token: place for place, token in enumerate(sampling.logit_bias)}
        self.change_ids = array.array("i", self._places)
        self.changes = array.array("f", sampling.logit_bias.values())
        self._seen: set[int] = set()
        self.seen_ids = array.array("i")
        if sampling.repetition_penalty != 1:
            for token in prompt:
                self._see(token)

    def uniform(self) -> float:
        """The next number of the seed in [0, 1)."""
        if not self._ahead:
            self._ahead = torch.rand(_AHEAD, dtype=torch.float64, generator=self._generator).tolist()[::-1]
        return self._ahead.pop()

    def allowed_next(self) -> Tensor | None:
        """Bool `[V]`, in one piece: `allowed` without the unused tokens; None: all."""
        if self.unused is None:
            return None if self.allowed is None else self.allowed.contiguous()
        allowed = torch.ones(self.vocab_size, dtype=torch.bool) if self.allowed is None else self.allowed
        return allowed.index_fill(0, self.unused, False)

    def take(self, token: int) -> None:
        """Go on by one token."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            self._see(token)
        if self._penalized:
            self._counts[token] = count = self._counts.get(token, 0) + 1
            bias = sampling.logit_bias.get(token, 0.0)
            change = bias - (sampling.presence_penalty + sampling.frequency_penalty * count)
            place = self._places.setdefault(token, len(self._places))
            if place == len(self.changes):
                self.change_ids.append(token)
                self.changes.append(change)
            self.changes[place] = change

    def _see(self, token: int) -> None:
        if token < self.vocab_size and token not in self._seen:
            self._seen.add(token)
            self.seen_ids.append(token)


def without(logits: Tensor, unused: Tensor) -> Tensor:
    """A copy of logits `[.., V]` in float32 in which the unused tokens (int64, on their device) have no share of the
    softmax, and are finite: what another column holds that is not, is a fault of the model."""
    return logits.float().index_fill(-1, unused, _LOWEST)


def draw_rows(samplers: Sequence[RowSampler], logits: Tensor) -> list[Drawn]:
    """The next token of every row, of logits float32 `[n, V or more]`, whose columns from V on are left out. Samplers
    take what was drawn, and all of them can draw the same. A row whose logits are not finite draws nothing."""
    if not samplers:
        return []
    first = samplers[0]
    V = first.vocab_size
    assert all(sampler is first or sampler.drawable == first.drawable for sampler in samplers)
    if first.unused is not None:
        logits = without(logits[:, :V], first.unused.to(logits.device))
    whole = native_wanted(logits.device) and logits.dtype == torch.float32 and logits.stride(1) == 1
    drawn = (_draw_native if whole else _draw_plain)(samplers, logits, V)
    for sampler, one in zip(samplers, drawn, strict=True):
        if one.finite:
            sampler.take(one.token)
    return drawn


def _draw_native(samplers: Sequence[RowSampler], logits: Tensor, V: int) -> list[Drawn]:
    lib = native.library()
    assert lib is not None
    rows = (native.Draw * len(samplers))()
    keep: list[object] = []  # what the structs point to
    for index, (row, sampler) in enumerate(zip(rows, samplers, strict=True)):
        sampling = sampler.sampling
        row.logits = logits.data_ptr() + 4 * index * logits.stride(0)
        row.change_ids, row.change_count = sampler.change_ids.buffer_info()
        row.changes = sampler.changes.buffer_info()[0]
        row.seen_ids, row.seen_count = sampler.seen_ids.buffer_info()
        if (allowed := sampler.allowed_next()) is not None:
            keep.append(allowed)
            row.allowed = allowed.data_ptr()
        row.top_count = -1 if sampler.logprobs is None else sampler.logprobs
        if sampler.logprobs:
            ids, values = (ctypes.c_int32 * sampler.logprobs)(), (ctypes.c_float * sampler.logprobs)()
            keep.append((ids, values))
            row.top_ids, row.top_logprobs = ctypes.addressof(ids), ctypes.addressof(values)
        row.top_k, row.top_p, row.min_p = min(sampling.top_k, V), sampling.top_p, sampling.min_p
        row.repetition_penalty = sampling.repetition_penalty
        row.temperature = 0.0 if sampling.greedy else sampling.temperature
        row.uniform = 0.0 if sampling.greedy else sampler.uniform()
    threads = min(native.threads(), len(samplers))
    with _scratch.piece(lib.bn_draw_bytes(V) * threads) as room:
        native.kernels().sample(rows, len(rows), V, room, threads)
    drawn = []
    for row, sampler in zip(rows, samplers, strict=True):
        top: list[tuple[int, float]] = []
        if sampler.logprobs:
            ids = (ctypes.c_int32 * sampler.logprobs).from_address(row.top_ids)
            top = list(zip(ids, (ctypes.c_float * sampler.logprobs).from_address(row.top_logprobs), strict=True))
        drawn.append(Drawn(row.token, None if sampler.logprobs is None else row.logprob, top, bool(row.finite)))
    return drawn


def _draw_plain(samplers: Sequence[RowSampler], logits: Tensor, V: int) -> list[Drawn]:
    drawn = []
    for sampler, row in zip(samplers, logits[:, :V].float(), strict=True):
        if not bool(row.isfinite().all()):
            drawn.append(Drawn(0, finite=False))
            continue
        changed = row
        if sampler.changes:
            places = torch.tensor(sampler.change_ids, device=row.device)
            changed = row.index_add(0, places, torch.tensor(sampler.changes, device=row.device))
            changed = changed.clamp(_LOWEST, _HIGHEST)
        if (allowed := sampler.allowed_next()) is not None:
            changed = changed.masked_fill(~allowed.to(row.device), -torch.inf)
        seen = torch.zeros(1, V, dtype=torch.bool, device=row.device)
        seen[0, torch.tensor(sampler.seen_ids, dtype=torch.int64, device=row.device)] = True
        sampling, uniform = sampler.sampling, torch.zeros(1, 1, dtype=torch.float64)
        if not sampling.greedy:
            uniform.fill_(sampler.uniform())
        token = int(choose(changed[None], sampling, uniform, seen))
        if sampler.logprobs is None:
            drawn.append(Drawn(token))
            continue
        scores = row.double().log_softmax(-1).float()
        order = scores.sort(descending=True, stable=True).indices[: sampler.logprobs]
        top = list(zip(order.tolist(), scores[order].tolist(), strict=True))
        drawn.append(Drawn(token, float(scores[token]), top))
    return drawn


def sample(
    logits: Tensor, sampling: SamplingConfig, generator: torch.Generator | None, seen: Tensor | None = None
) -> Tensor:
    """Draw one token per row, with one generator for all: logits `[B, V]` of any float dtype to ids int64 `[B]`, on the
    logits' device.

    `seen` is a bool mask `[B, V]` of the tokens that the repetition penalty applies to. `generator` may be None
    when decoding is greedy, and may live on another device. Inputs stay as they are.
    """
    if sampling.greedy:
        return choose(logits, sampling, None, seen)
    device = None if generator is None else generator.device
    u = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64, device=device)
    return choose(logits, sampling, u, seen)


def choose(logits: Tensor, sampling: SamplingConfig, uniform: Tensor | None, seen: Tensor | None = None) -> Tensor:
    """The specification of steps 3 to 8: as `sample`, with the numbers u float64 `[B, 1]`, None when greedy."""
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        changed = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(_LOWEST, _HIGHEST)
        logits = torch.where(seen & (logits > -torch.inf), changed, logits)
    if sampling.greedy:
        return logits.argmax(-1)  # of equal ones the first
    assert uniform is not None

    # From here on unnormalized probabilities, the largest exactly 1.
    weights = torch.exp((logits - logits.amax(-1, keepdim=True)) / sampling.temperature)
    ids = None  # of the candidates, in descending order, once something needs that order
    if 0 < sampling.top_k < weights.shape[-1]:
        kth = weights.topk(sampling.top_k).values[:, -1:]
        weights, ids = (part[:, : sampling.top_k] for part in _descending(weights, kth))
    if sampling.top_p < 1:
        total = weights.sum(-1, keepdim=True, dtype=torch.float64)
        if ids is None and weights.device.type != "cpu":
            # Where waiting for a count costs more than sorting: all of them.
            weights, ids = weights.sort(dim=-1, descending=True, stable=True)
        elif ids is None:
            # All tokens below this floor together weigh less than (1 - p) of the total, so none is in the set.
            weights, ids = _descending(weights, total * (1 - sampling.top_p) / weights.shape[-1])
        mass_before = weights.cumsum(-1, dtype=torch.float64) - weights
        weights = weights.masked_fill(mass_before >= sampling.top_p * total, 0)
    if sampling.min_p > 0:
        weights = weights.masked_fill(weights < sampling.min_p, 0)

    # Inverse CDF: one random number per row, where torch.multinomial draws V of them (3 ms at V = 128 k, one x86 core).
    # u <= 1 - 2^-53, so u * total < total also after rounding, and a weight of 0 is never drawn.
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    u = uniform.to(weights.device)
    drawn = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)


def _descending(weights: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """All weights of `[B, V]` that reach their row's floor `[B, 1]`, in descending order, with their ids: `[B, N]`.

    Rows with fewer than N of them are filled up with weights of 0, which are never drawn. Only N values are sorted.
    """
    reached = weights >= floor
    counts = reached.sum(-1)
    rows, columns = reached.nonzero(as_tuple=True)
    places = torch.arange(len(rows), device=weights.device) - (counts.cumsum(0) - counts)[rows]
    ids = rows.new_zeros(len(weights), int(counts.amax()))
    values = weights.new_zeros(ids.shape)
    ids[rows, places] = columns
    values[rows, places] = weights[rows, columns]
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)
