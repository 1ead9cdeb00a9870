"""How far the student is from the teacher: a loss that trains it, and a figure that judges it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.errors import AbsorbError
from absorb.models.decoder import Decoder
from absorb.runtime import ranks
from absorb.runtime.losses import mean_kl
from absorb.runtime.precision import free_memory, with_fewer_rows
from absorb.runtime.reading import Subject
from absorb.runtime.walk import logits
from absorb.schema.training import LENGTH

_LABEL = "comparing with the teacher"

# The mean loss in nats per token of text (rows, length).
Loss = Callable[[Tensor], Tensor]


def rows_at_once(student: PreTrainedModel, device: torch.device) -> int:
    """Rows whose logits, with what the loss makes of them, fit easily into memory."""
    room = 0.4e9
    if device.type == "cuda":
        room = min(16e9, 0.25 * free_memory(device))
    return max(1, int(room // (LENGTH * student.config.vocab_size * 16)))


def gap(teacher: Subject, student: Subject, tokens: Tensor) -> Tensor:
    """Mean KL(teacher | student) in nats on text `tokens` (rows, length), with its gradient."""
    with torch.no_grad():
        target = teacher.logits(tokens)
    return mean_kl(target, student.logits(tokens))


@torch.no_grad()
def divergence(teacher: Decoder, student: Decoder, prefix: Tensor, tokens: Tensor) -> float:
    """Mean KL(teacher | student) in nats on text `tokens` (rows, length), in parts that fit.

    The teacher reads the tokens `prefix` (n,) before every row.
    """
    read = Subject(decoder=teacher, lead=prefix), Subject(decoder=student)

    def found(tokens: Tensor) -> Tensor:
        def by(at_once: int) -> Tensor:
            given = (logits(one, tokens, at_once, _LABEL, beside=True) for one in read)
            # A name would keep the logits of one part while the next are made, and so would zip.
            return torch.cat([*map(_by_row, *given)])

        most = rows_at_once(student.model, student.device)
        return with_fewer_rows(by, min(most, len(tokens)))

    mean = float(ranks.by_row(tokens, found).double().mean())
    return max(0.0, finite(mean))  # rounding may bring it below


def _by_row(teacher: Tensor, student: Tensor) -> Tensor:
    """What `mean_kl` gives of each row of logits (rows, length, vocabulary): (rows,)."""
    pairs = zip(teacher.split(1), student.split(1), strict=True)
    return torch.stack([mean_kl(*pair).cpu() for pair in pairs])


@torch.no_grad()
def mean_loss(loss: Loss, tokens: Tensor, rows: int) -> float:
    """The mean loss on text `tokens`, so many rows at once."""
    return finite(sum(loss(part).item() * len(part) for part in tokens.split(rows)) / len(tokens))


def finite(loss: float) -> float:
    """A loss, or an AbsorbError where it is none."""
    if not math.isfinite(loss):
        raise AbsorbError(
            "the converted model predicts what is not a number; convert with another --prefix"
        )
    return loss
