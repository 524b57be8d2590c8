"""Hadamard matrices, and random rotations made of them.

A Hadamard matrix has entries of 1 and -1 and orthogonal rows. They exist, as far as this file knows, for the orders

    2 n          [[H, H], [H, -H]]                                  Sylvester, from one of order n
    q + 1        q prime, q = 3 mod 4                               Paley's first construction
    2 (q + 1)    q prime, q = 1 mod 4                               Paley's second construction

Multiplied by random signs and divided by sqrt(n) it is a rotation that spreads every value over all n of them: outliers
become what everything else is, which is what quantizers like (QuaRot, arXiv 2404.00456).
"""

import functools

import torch
from torch import Tensor


@functools.cache
def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix, float64 `[order, order]`, or None where no construction above has this order."""
    one = torch.ones(1, 1, dtype=torch.float64)
    if order == 1:
        return one
    half = hadamard(order // 2) if order % 2 == 0 else None
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    if order % 4 == 0 and _is_prime(order - 1):
        matrix = _jacobsthal(order - 1)  # antisymmetric
        border = torch.ones(order, order, dtype=torch.float64)
        border[1:, 0] = -1
        border[1:, 1:] = matrix + torch.eye(order - 1, dtype=torch.float64)
        return border
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        conference = torch.ones(order // 2, order // 2, dtype=torch.float64)
        conference[0, 0] = 0
        conference[1:, 1:] = _jacobsthal(order // 2 - 1)  # symmetric
        plain = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, plain) + torch.kron(torch.eye(order // 2, dtype=torch.float64), turned)
    return None


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix, float64 `[size, size]`: random signs times a Hadamard matrix. Where none is known for the
    size, one of its largest divisor that has one, and a random rotation of the other divisor (Kronecker product)."""
    divisor = max(n for n in range(1, size + 1) if size % n == 0 and hadamard(n) is not None)
    found = hadamard(divisor)
    assert found is not None
    rest, upper = torch.linalg.qr(torch.randn(size // divisor, size // divisor, generator=generator).double())
    rest = rest * upper.diagonal().sign()  # evenly distributed over all rotations
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return signs * torch.kron(rest.contiguous(), found / divisor**0.5)


def _is_prime(number: int) -> bool:
    return number > 2 and number % 2 == 1 and all(number % d for d in range(3, int(number**0.5) + 1, 2))


def _jacobsthal(prime: int) -> Tensor:
    """1 where i - j is a square modulo the prime, -1 where it is none, 0 on the diagonal."""
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[torch.arange(1, prime).square() % prime] = 1
    character[0] = 0
    places = torch.arange(prime)
    return character[(places[:, None] - places[None]) % prime]
