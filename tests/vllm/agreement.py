"""Whether another program computes a ternary model, although no two programs add floats in the same order.

Activations are rounded to INT8. Where a value lies between two codes, the last bit of a sum (of a norm's, the
attention's) chooses one, and a code is 1/127 of the largest value of its row: far more than the bit. So two right
programs differ by steps that no tolerance of floats describes, this project's native and reference backends among them.
The measure is the model in float64 between its integer products, and the same with its norms' results moved by some
last bits of float32 at random:

    error rule   the other program is at most twice as far from it as the moved one, in root mean square
    choices      it prefers another token at twice as many positions at most, and one, or one in a thousand, more
    near-tie     two tokens no farther apart than twice the largest distance of the moved one's logits, over all
                 positions and tokens; only between such may a choice differ
"""

from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from bitnet import kernels
from bitnet.inference.loading import open_model
from bitnet.model import BitNetForCausalLM
from bitnet.model.lora import attach
from bitnet.model.transformer import RMSNorm
from bitnet.storage.adapters import Adapter
from bitnet.storage.source import Source

Position = dict[str, float]
"""Log-probabilities of the likeliest tokens, by their ids as text."""


MOVED = 2.0**-20
"""Of the size of a value, as a standard deviation: eight last bits of float32."""


@torch.no_grad()
def exact_logits(model: BitNetForCausalLM, ids: Tensor, moved: float = 0.0) -> Tensor:
    """Float64 `[B, T, V]` of a packed model after `double()`."""

    def norm(self: RMSNorm, x: Tensor) -> Tensor:
        y = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return y * (1 + moved * torch.randn_like(y)) if moved else y

    with patch.object(RMSNorm, "forward", norm), kernels.use_backend("reference"):
        return model(ids)


def likeliest(logits: Tensor, count: int = 8) -> list[Position]:
    """Of logits `[.., V]`, every position in a row."""
    best = logits.flatten(0, -2).log_softmax(-1).topk(count, -1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{str(id): value for id, value in zip(*row, strict=True)} for row in rows]


@dataclass(frozen=True)
class Agreement:
    """What `Judge.positions` and `Judge.texts` found."""

    count: int
    equal: int
    """Positions with the same likeliest token, or texts with the same tokens."""
    error: float
    """Root mean square of the distance from float64, of listed log-probabilities; 0 for texts."""
    gap: float
    """Logits, in float64, from our engine's choice down to another one: the largest."""


class Judge:
    """A folder's model in float64 and on this project's engine, and how far it may be missed on prompts `[B, T]`."""

    def __init__(
        self, source: Source, prompts: Sequence[Sequence[int]], embeddings: bool = True, lora: Adapter | None = None
    ) -> None:
        """embeddings: in INT8 like the projections, or else in floats, as transformers has them."""
        self.prompts = [list(prompt) for prompt in prompts]
        self.engine = open_model(source, lora=lora) if embeddings else source.model().pack(embeddings=False).eval()
        self.exact_model = source.model().pack(embeddings=embeddings)
        if lora is not None:
            attach(self.exact_model, lora.matrices)
        self.exact_model.double()
        rows, choices, squares = [], [], []
        self.bound, self.undecided = 0.0, 0
        for prompt in self.prompts:  # of a large vocabulary the logits of all are gigabytes
            ids = torch.tensor([prompt])
            exact, moved = (exact_logits(self.exact_model, ids, by)[0, :-1] for by in (0.0, MOVED))
            self.bound = max(self.bound, 2 * float((moved - exact).abs().max()))
            self.undecided += int((moved.argmax(-1) != exact.argmax(-1)).sum())
            listed = exact.topk(8, -1).indices
            squares.append((moved.log_softmax(-1) - exact.log_softmax(-1)).gather(1, listed).square().mean())
            rows.append(exact.float())
            with torch.no_grad():
                choices.append(self.engine(ids)[0, :-1].argmax(-1))
        self.exact, self.choices = torch.cat(rows), torch.cat(choices)
        self.error = float(torch.stack(squares).mean().sqrt())

    def positions(self, theirs: Sequence[Position]) -> Agreement:
        """theirs: of every position but the last, row by row."""
        assert len(theirs) == len(self.exact)
        equal, gap, squares = 0, 0.0, []
        for position, row, ours in zip(theirs, self.exact, self.choices, strict=True):
            choice = int(max(position, key=position.__getitem__))
            equal += choice == int(ours)
            gap = max(gap, float(row[ours] - row[choice]))
            wanted = row.double().log_softmax(-1)[[int(id) for id in position]]
            squares.append((torch.tensor(list(position.values())) - wanted).square().mean())
        return Agreement(len(theirs), equal, float(torch.stack(squares).mean().sqrt()), gap)

    def accepts_positions(self, found: Agreement) -> bool:
        others = found.count - found.equal
        few = others <= 2 * self.undecided + max(1, found.count // 1000)
        return few and found.error <= 2 * self.error and found.gap <= self.bound

    def texts(self, theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> Agreement:
        """Greedy continuations of the prompts; behind the first token that differs the contexts are others."""
        equal, gap = 0, 0.0
        for prompt, text, wanted in zip(self.prompts, theirs, ours, strict=True):
            at = next((i for i, (a, b) in enumerate(zip(text, wanted, strict=True)) if a != b), None)
            equal += at is None
            if at is not None:
                row = exact_logits(self.exact_model, torch.tensor([prompt + list(wanted[:at])]))[0, -1]
                gap = max(gap, float(row[wanted[at]] - row[text[at]]))
        return Agreement(len(theirs), equal, 0.0, gap)

    def accepts_texts(self, found: Agreement) -> bool:
        return found.gap <= self.bound
