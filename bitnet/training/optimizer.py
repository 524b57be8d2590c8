"""Optimizer, its parameter groups, and the two-stage schedule of BitNet b1.58.

Ternary training takes a higher peak learning rate than float training, and halves the run (Training Tips, table 2;
BitNet a4.8, tables 6 and 7); `second_from` moves the border:

    first half    lr = lr_peak * decay(p)           weight decay `weight_decay`
    second half   lr = lr_peak_second * decay(p)    weight decay 0

with p the progress from 0 to 1 and a linear warm-up before. Without a second peak there is one stage, which is the
ordinary recipe of the float twin.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitnet.machine import cpu_capabilities
from bitnet.model import bit_linears
from bitnet.training.sharding import full_tensor, local_part, shard_like

OPTIMIZERS = ("adamw", "muon")
BFLOAT16_CPUS = ("amx_bf16", "avx512_bf16", "sve_bf16", "neon_bf16", "bf16")
"""What torch calls the instructions of processors that multiply bfloat16."""
DECAYS = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule. Raises ValueError for values that cannot train."""

    optimizer: str = "adamw"
    """adamw for everything, or muon for the projections' matrices (updates scaled to AdamW's RMS) and adamw for the
    rest."""
    lr: float = 3e-3
    """Peak learning rate of the projections' matrices in the first stage."""
    lr_rest: float | None = None
    """Peak learning rate of embeddings, lm_head and norms; `lr` unless given."""
    lr_second: float | None = None
    """Peak learning rate of the matrices in the second stage of the run (the rest changes by the same factor); none
    keeps one stage."""
    second_from: float = 0.5
    """Share of the steps behind which the second stage begins."""
    weight_decay: float = 0.1
    """On the projections' matrices; embeddings and norms are not decayed."""
    weight_decay_second: float = 0.0
    """Weight decay of the second stage, where there is one."""
    warmup_steps: int = 50
    decay: str = "linear"
    """Shape of the decay over the whole run: linear, cosine or constant."""
    lr_min_ratio: float = 0.0
    """Learning rate at the end of the decay, as a fraction of the peak."""
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    """Largest norm of the gradient of all parameters; larger ones are scaled down. 0 turns clipping off."""

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
        if self.decay not in DECAYS:
            raise ValueError(f"decay {self.decay!r} is unknown; choose one of {', '.join(DECAYS)}")
        for name in ("lr", "lr_rest", "lr_second"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; a learning rate must be above 0")
        for name in ("weight_decay", "weight_decay_second", "warmup_steps", "grad_clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 for none, or more")
        for name in ("beta1", "beta2"):
            if getattr(self, name) < 0 or getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to below 1")
        for name, whole in (("second_from", "steps"), ("lr_min_ratio", "peak")):
            if getattr(self, name) < 0 or getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share of the {whole}, from 0 to 1")


def schedule(step: int, total_steps: int, config: OptimConfig, at: float | None = None) -> tuple[float, float]:
    """Learning rate multiplier (of the first peak, 0 to 1) and weight decay for a step counted from 0, which stands
    `at` another place of the schedule where the number of steps was changed on the way."""
    progress = (step if at is None else at) / max(1, total_steps)
    multiplier, weight_decay = 1.0, config.weight_decay
    if config.lr_second is not None and progress >= config.second_from:
        multiplier, weight_decay = config.lr_second / config.lr, config.weight_decay_second
    if config.decay != "constant":
        remaining = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        multiplier *= config.lr_min_ratio + (1 - config.lr_min_ratio) * remaining
    return multiplier * min(1.0, (step + 1) / max(1, config.warmup_steps)), weight_decay


class Optimizer:
    """One or two torch optimizers behind one face: `step`, `set_schedule`, and a state of named tensors.

    The state is a flat dict, `{parameter name}.{slot}` to tensor, so that it goes into a safetensors file and survives
    a change in the order of the parameters.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        # Only the projections decay: the embedding is a look-up table and a norm's gain is no matrix.
        matrices = [layer.weight for _, layer in bit_linears(model) if layer.weight.requires_grad]
        projections = set(matrices)
        rest = [parameter for parameter in self.names if parameter not in projections]
        betas, fused = (config.beta1, config.beta2), rest[0].device.type in ("cpu", "cuda")
        groups: list[dict] = [
            {"params": matrices, "lr": config.lr, "peak_lr": config.lr, "decays": True},
            {
                "params": rest,
                "lr": config.lr_rest or config.lr,
                "peak_lr": config.lr_rest or config.lr,
                "decays": False,
            },
        ]
        self.optimizers: list[torch.optim.Optimizer] = []
        if not matrices:  # adapters alone train, which are all of the rest
            groups = [{**groups[1], "lr": config.lr, "peak_lr": config.lr}]
        if config.optimizer == "muon":
            muon = ShardedMuon if hasattr(matrices[0], "device_mesh") else Muon
            self.optimizers.append(muon(groups[:1], adjust_lr_fn="match_rms_adamw"))
            groups = groups[1:]
        self.optimizers.append(torch.optim.AdamW(groups, betas=betas, fused=fused))

    def _groups(self) -> Iterable[dict]:
        return (group for optimizer in self.optimizers for group in optimizer.param_groups)

    def set_schedule(self, step: int, total_steps: int, at: float | None = None) -> float:
        """Set learning rate and weight decay for a step, as `schedule` does; returns the learning rate of the first
        group."""
        multiplier, weight_decay = schedule(step, total_steps, self.config, at)
        for group in self._groups():
            group["lr"] = group["peak_lr"] * multiplier
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        return float(next(iter(self._groups()))["lr"])

    def step(self) -> None:
        """Apply the gradients and clear them."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The moments and counters, named `{parameter name}.{slot}`; the tensors are not copied."""
        return {
            f"{self.names[parameter]}.{slot}": value
            for optimizer in self.optimizers
            for parameter, slots in optimizer.state.items()
            for slot, value in slots.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`. Raises ValueError where a tensor belongs to no parameter of this model, or was left by
        another kind of optimizer."""
        parameters: dict[str, tuple[torch.optim.Optimizer, Tensor]] = {
            self.names[p]: (optimizer, p)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for key, value in state.items():
            name, _, slot = key.rpartition(".")
            if name not in parameters:
                raise ValueError(f"optimizer state {key!r} belongs to no parameter of this model")
            optimizer, parameter = parameters[name]
            slots = (
                ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("step", "exp_avg", "exp_avg_sq")
            )
            if slot not in slots:
                raise ValueError(
                    f"optimizer state {key!r} was not left by {type(optimizer).__name__}; go on with the optimizer "
                    "that the run was started with"
                )
            # A 0-dim counter stays where the fused optimizers keep it, beside the parameter.
            optimizer.state[parameter][slot] = shard_like(parameter, value).clone()


class Muon(torch.optim.Muon):
    """torch's Muon, with its numbers where it computes in bfloat16, which torch always does: on a processor without
    bfloat16 instructions (25 times slower than float32 on one) the iteration runs in float32, in fewer operations
    (`orthogonalize`). On a GPU matrices of
    equal shape are one batch, since it would wait for the launches of single ones."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step(parameters, group)

    def _step(self, parameters: list[Any], group: dict[str, Any]) -> None:
        updates = self._updates(parameters, group)
        batches = [[i] for i in range(len(updates))]
        if updates[0].device.type == "cuda":
            shapes = sorted({tuple(update.shape) for update in updates})
            batches = [[i for i, update in enumerate(updates) if update.shape == shape] for shape in shapes]
        for batch in batches:
            matrices = updates[batch[0]] if len(batch) == 1 else torch.stack([updates[i] for i in batch])
            results = orthogonalize(matrices, group["eps"])
            _descend([parameters[i] for i in batch], [results] if len(batch) == 1 else results.unbind(), group)

    def _updates(self, parameters: list[Any], group: dict[str, Any]) -> list[Tensor]:
        """The momentum's proposal for each matrix, or for this process's rows of it, in the type of the iteration."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        # Element by element, so each process updates its own rows.
        gradients = [local_part(parameter.grad) for parameter in parameters]
        buffers = [local_part(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        dtype = iteration_dtype(buffers[0].device)
        if not group["nesterov"]:
            return [buffer.to(dtype, copy=True) for buffer in buffers]
        return [update.to(dtype) for update in torch._foreach_lerp(gradients, buffers, group["momentum"])]


def _descend(parameters: Sequence[Any], updates: Sequence[Tensor], group: dict[str, Any]) -> None:
    """Of parameters of one shape."""
    weights = [local_part(parameter) for parameter in parameters]
    torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
    rate = group["lr"] * 0.2 * math.sqrt(max(parameters[0].shape))  # match_rms_adamw
    ours = [update.view(weight.shape).to(weight.dtype) for weight, update in zip(weights, updates, strict=True)]
    torch._foreach_add_(weights, ours, alpha=-rate)


@functools.cache
def iteration_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it, or does not say, else float32."""
    found = cpu_capabilities() if device.type == "cpu" else {}
    return torch.float32 if found and not any(found.get(name) for name in BFLOAT16_CPUS) else torch.bfloat16


class ShardedMuon(Muon):
    """Muon of matrices that are sharded by rows, with the numbers of one process.

    Each matrix is made orthogonal whole, by the one process that is in charge of it; two exchanges a step carry all
    updates there and back, in the type that the iteration computes in.
    """

    def _step(self, parameters: list[Any], group: dict[str, Any]) -> None:
        updates = self._updates(parameters, group)
        mesh = parameters[0].device_mesh
        rank, size = mesh.get_local_rank(), mesh.size()
        owners = _shares([p.shape for p in parameters], size)
        mine = [p.shape for p, owner in zip(parameters, owners, strict=True) if owner == rank]
        # all_to_all sends one run of values to each process: the matrices are put in the order of their owners.
        order = sorted(range(len(parameters)), key=lambda i: owners[i])  # by owner, then as they stand
        counts = [updates[i].numel() for i in order]
        sent = [sum(updates[i].numel() for i in order if owners[i] == other) for other in range(size)]
        sizes = [[_rows(shape[0], size, other) * shape[1] for shape in mine] for other in range(size)]
        received = [sum(each) for each in sizes]
        outgoing = torch.cat([updates[i].flatten() for i in order])
        del updates

        incoming = outgoing.new_empty(sum(received))
        dist.all_to_all_single(incoming, outgoing, received, sent, group=mesh.get_group())
        # Of every process its rows of each matrix; what becomes of them goes back to where they came from.
        pieces = [
            [piece.view(-1, shape[1]) for piece, shape in zip(part.split(each), mine, strict=True)]
            for part, each in zip(incoming.split(received), sizes, strict=True)
        ]
        for parts in zip(*pieces, strict=True):
            whole = orthogonalize(torch.cat(parts), group["eps"])
            for part, result in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                part.copy_(result)
        dist.all_to_all_single(outgoing, incoming, sent, received, group=mesh.get_group())

        for i, update in zip(order, outgoing.split(counts), strict=True):
            _descend([parameters[i]], [update], group)


def _rows(total: int, size: int, rank: int) -> int:
    """Rows of a matrix that a process has: all have the same number, but the last ones may have fewer."""
    each = -(-total // size)
    return min(total, each * (rank + 1)) - min(total, each * rank)


def _shares(shapes: Sequence[torch.Size], size: int) -> list[int]:
    """The process in charge of each matrix, so that all have about as much to multiply."""
    work, owners = [0] * size, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -shapes[i].numel() * min(shapes[i])):
        owners[i] = work.index(min(work))
        work[owners[i]] += shapes[i].numel() * min(shapes[i])
    return owners


TORCH_COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5
COEFFICIENTS = (
    (8.4209, -24.9129, 18.4740), (4.1022, -3.0525, 0.5742), (3.6841, -2.7562, 0.5404), (2.7330, -2.0355, 0.4591),
)  # fmt: skip
"""a, b and c of the iterations in float32: each the odd polynomial of degree 5 that is nearest to 1 on what the ones
before make of [0.0022, 1], where they end within 0.3 of 1. Source of the method: Amsel et al., arXiv 2505.16932."""
MARGIN = 1.02
"""For rounding in the norm that bounds the singular values: above 1 the polynomials leave their range."""


def orthogonalize(matrices: Tensor, eps: float = 1e-7) -> Tensor:
    """The nearest matrices whose singular values are about 1, of `[N, K]` or a batch `[B, N, K]`, in their type: Muon's
    Newton-Schulz iteration, X <- R X with R = a I + b G + c G^2, G = X X^T. Source: Jordan, "Muon", 2024.

    In bfloat16 R is torch's, five times. In float32 four others do as much, behind a scale by |G^2|^(1/4), the tightest
    bound of the singular values that needs no product of its own; and where one side is 1.5 times the other, they are
    collected in a product P of small matrices, and X is multiplied once: G <- R G R, P <- R P, X <- P X, the same
    numbers but for rounding. In bfloat16 G is too coarse for either."""
    add_product = torch.addmm if matrices.ndim == 2 else torch.baddbmm
    # X X^T of the shorter side: fewer products, and the same result.
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    coefficients, collected = _coefficients(x.dtype), collects(x.shape[-2], x.shape[-1], x.dtype)
    square, product = None, None
    shrink: Tensor | float = 1.0
    # The iteration converges for singular values up to about 1, which the Frobenius norm bounds.
    if x.dtype == torch.bfloat16:
        x = x / _norm(x).clamp(min=eps)
    gram = x @ x.mT
    if x.dtype != torch.bfloat16:
        norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].sqrt().clamp(min=eps)
        gram = gram / norm**2
        square = gram @ gram
        bound = MARGIN * _norm(square).sqrt().sqrt().clamp(min=eps)
        gram, square, shrink = gram / bound**2, square / bound**4, 1 / (norm * bound)
        x = x if collected else x * shrink
    last = len(coefficients) - 1
    for step, (a, b, c) in enumerate(coefficients):
        # R without its a I, which has no rounding where it is not added.
        factor = add_product(gram, gram, gram, beta=b, alpha=c) if square is None else b * gram + c * square
        square = None
        if collected:
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else factor @ product
            gram = gram if step == last else factor @ (factor @ gram)
        else:
            x = add_product(x, factor, x, beta=a)
            gram = gram if step == last else x @ x.mT
    x = x if product is None else (product * shrink) @ x
    return x.mT if tall else x


def _coefficients(dtype: torch.dtype) -> Sequence[tuple[float, float, float]]:
    return TORCH_COEFFICIENTS if dtype == torch.bfloat16 else COEFFICIENTS


def _norm(matrices: Tensor) -> Tensor:
    """Frobenius, `[1, 1]` or `[B, 1, 1]`."""
    return matrices.norm(dim=(-2, -1), keepdim=True)


def collects(N: int, K: int, dtype: torch.dtype) -> bool:
    """Whether the iteration on a matrix `[N, K]` collects its factors before it multiplies by them."""
    return dtype == torch.float32 and 2 * max(N, K) >= 3 * min(N, K)


def iteration_flops(N: int, K: int, dtype: torch.dtype) -> int:
    """Of Muon's iterations on one matrix."""
    short, long, steps = min(N, K), max(N, K), len(_coefficients(dtype))
    if collects(N, K, dtype):
        return 4 * short * short * long + (steps + 3 * (steps - 1)) * 2 * short**3  # the first square among them
    return steps * (4 * short * short * long + 2 * short**3)


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients down to `max_norm` together (0: leave them) and return their norm before, `[]`; of sharded
    parameters, the norm of the whole."""
    norm = full_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    nn.utils.clip_grads_with_norm_(parameters, max_norm if max_norm > 0 else math.inf, norm)
    return norm
