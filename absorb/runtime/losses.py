"""Logits → losses and divergences, of a few positions at a time.

What is made of the logits of few positions fits into a cache, and takes little memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

_POSITIONS = 32


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher | student) in nats, from log-probabilities (..., vocabulary): (...)."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def mean_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """The mean KL(teacher | student) in nats of logits (rows, length, vocabulary): a scalar."""
    pairs = zip(teacher.split(_POSITIONS, 1), student.split(_POSITIONS, 1), strict=True)
    sums = [kl(*(one.float().log_softmax(-1) for one in both)).sum() for both in pairs]
    return torch.stack(sums).sum() / teacher[..., 0].numel()


def row_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean loss (rows,) of logits (rows, length, vocabulary) at all tokens but the first."""
    each = [_losses_at(logits[:, part], following) for part, following in parts(tokens)]
    return torch.cat(each, 1).mean(1, dtype=torch.float64)


def _losses_at(logits: Tensor, following: Tensor) -> Tensor:
    """The loss of each token (rows, few) that follows logits (rows, few, vocabulary)."""
    flat = functional.cross_entropy(
        logits.flatten(0, 1).float(), following.flatten(), reduction="none"
    )
    return flat.view(following.shape)


def parts(tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Positions of text (rows, length), few at once, and the tokens (rows, few) after them."""
    last = tokens.shape[1] - 1
    for start in range(0, last, _POSITIONS):
        end = min(start + _POSITIONS, last)
        yield slice(start, end), tokens[:, start + 1 : end + 1]
