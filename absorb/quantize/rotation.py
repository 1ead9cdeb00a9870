"""A random Hadamard rotation: it spreads an outlier over all channels, and a product undoes it.

With an orthogonal R, `(x R)(W R)ᵀ = x Wᵀ`; only rounding between the two tells the difference
(QuaRot, arXiv 2404.00456, which merges most of the rotations into the weights).
"""

from functools import cache
from math import sqrt

import torch
from torch import Tensor

_SEED = 0
_WIDEST = 64  # of a power of two; a wider one is a product of several


def rotated(values: Tensor) -> Tensor:
    """Values (..., channels) times a random sign for each channel and a Hadamard matrix, float32.

    The matrix is orthogonal, and the same at every call. Where no Hadamard matrix of the size is
    known here, equal blocks of channels are rotated each by itself.
    """
    signs, blocks, factors = _rotation(values.shape[-1], values.device)
    with torch.autocast(values.device.type, enabled=False):
        result: Tensor = (values.float() * signs).unflatten(-1, (blocks, -1))
        for factor in factors:
            # The first axis of what a Kronecker product works on is taken, and becomes the last.
            result = (result.unflatten(-1, (len(factor), -1)).mT @ factor.T).flatten(-2)
    return result.flatten(-2)


@cache
def _rotation(channels: int, device: torch.device) -> tuple[Tensor, int, tuple[Tensor, ...]]:
    """A sign for each channel, the number of blocks, and what makes up the matrix of a block.

    The matrix is the Kronecker product of the last, which are orthogonal. All are on the device,
    since to send them anew takes longer than the rotation does.
    """
    draw = torch.Generator().manual_seed(_SEED)
    signs = torch.randint(0, 2, (channels,), generator=draw).mul(2).sub(1).float()
    core = _core(channels)
    rest = channels // len(core)
    width = rest & -rest  # the largest power of two in it
    factors = [core / sqrt(len(core))]
    while width > 1:
        size = min(width, _WIDEST)
        factors.append(_sylvester(size) / sqrt(size))
        width //= size
    blocks = rest // (rest & -rest)
    return signs.to(device), blocks, tuple(factor.to(device) for factor in factors)


def _sylvester(size: int) -> Tensor:
    """Sylvester's Hadamard matrix of ±1, for a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1], [1, -1]]), matrix)
    return matrix


def _core(channels: int) -> Tensor:
    """The smallest of Paley's matrices that is `channels` over a power of two, or (1, 1)."""
    least = channels // (channels & -channels)
    orders = [least << shift for shift in range((channels & -channels).bit_length())]
    return next((m for m in map(paley, orders) if m is not None), torch.ones(1, 1))


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix of ±1 (order, order) from quadratic residues, if there is one for a prime.

    Paley's two constructions (J. Math. Phys. 12, 1933): of order q + 1 for q = 3 modulo 4, and of
    order 2 (q + 1) for q = 1 modulo 4.
    """
    first, second = order - 1, order // 2 - 1
    if _is_prime(first) and first % 4 == 3:
        return torch.eye(order) + _conference(first, border=-1)
    if _is_prime(second) and second % 4 == 1 and order % 2 == 0:
        off, on = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
        return torch.kron(_conference(second, border=1), off) + torch.kron(
            torch.eye(order // 2), on
        )
    return None


def _conference(prime: int, border: int) -> Tensor:
    """Whether i - j is a square modulo the prime, as ±1 and 0, below and beside a border."""
    squares = {number * number % prime for number in range(1, prime)}
    sign = torch.tensor([0.0, *(1.0 if n in squares else -1.0 for n in range(1, prime))])
    numbers = torch.arange(prime)
    inside = sign[(numbers[:, None] - numbers) % prime]
    beside = torch.full((prime, 1), float(border))
    above = torch.cat([torch.zeros(1, 1), torch.ones(1, prime)], 1)
    return torch.cat([above, torch.cat([beside, inside], 1)])


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
