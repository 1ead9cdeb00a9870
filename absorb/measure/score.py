"""Models and held-out text → Tallies and Scores, side by side in one pass over the same tokens."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from absorb.measure.divergence import rows_at_once
from absorb.measure.tally import Tally, perplexity_of
from absorb.models.decoder import Decoder
from absorb.quantize.formats import FORMATS, Format
from absorb.quantize.simulate import in_format
from absorb.runtime import ranks
from absorb.runtime.hooks import watching, watching_attention
from absorb.runtime.inputs import watching_inputs
from absorb.runtime.losses import row_losses
from absorb.runtime.memory import release_freed_memory
from absorb.runtime.precision import with_fewer_rows
from absorb.runtime.reading import Subject
from absorb.runtime.walk import logits
from absorb.schema.scores import Score
from absorb.schema.settings import FormatName, Thresholds

# Tokens that are read at once: fewer take longer each, and the logits of these are a tenth of a
# gigabyte, or a few.
_TOKENS = 512
# Where nothing is kept of a row but its loss. A GPU reads eight in little more time than one.
ROWS_AT_ONCE = {"cpu": 1, "cuda": 8}


@torch.no_grad()
def evaluate(
    subjects: Sequence[Subject],
    teacher: Subject,
    held_out: Tensor,
    calibration: Tensor,
    thresholds: Thresholds,
    formats: Sequence[FormatName],
) -> list[Score]:
    """Score every subject on `held_out` (rows, length).

    Fixed ranges of formats come from `calibration` (rows, length); `thresholds` say which
    activations are massive.
    """
    seen = tallies(subjects, teacher, held_out)
    return [
        Score(
            **asdict(tally.figures(thresholds)),
            quantized=in_formats(subject, formats, held_out, calibration),
        )
        for subject, tally in zip(subjects, seen, strict=True)
    ]


@torch.no_grad()
def tallies(
    subjects: Sequence[Subject],
    teacher: Subject,
    held_out: Tensor,
    *,
    inputs: bool = False,
) -> list[Tally]:
    """What every subject shows on `held_out` (rows, length), in one pass side by side.

    Losses are of each row's tokens but the first, whatever lead a model is given. What matrices
    read is seen where `inputs` are asked for.
    """

    def seen(at_once: int) -> list[Tally]:
        return _tallies_by(at_once, subjects, teacher, held_out, inputs)

    found = with_fewer_rows(seen, _rows(held_out))
    for tally in found:
        tally.join(len(held_out))
    return found


def _tallies_by(
    at_once: int, subjects: Sequence[Subject], teacher: Subject, held_out: Tensor, inputs: bool
) -> list[Tally]:
    """The same of the rows that this process reads, so many at once."""
    own_rows = ranks.share(held_out)
    seen = [Tally() for _ in subjects]
    known = next((i for i, subject in enumerate(subjects) if subject.reads_as(teacher)), None)

    def shown(subject: Subject, tally: Tally) -> Iterator[Tensor]:
        length = len(subject.lead) + held_out.shape[1]
        watched = partial(_watched, subject.decoder, tally, length if inputs else None)
        return logits(subject, own_rows, at_once, "evaluating", watched, beside=True)

    given = [shown(subject, tally) for subject, tally in zip(subjects, seen, strict=True)]
    if known is None:
        given.append(logits(teacher, own_rows, at_once, "the teacher", beside=True))

    def see(*read: Tensor) -> None:
        *found, tokens = read
        target = found[-1 if known is None else known]
        for tally, own in zip(seen, found, strict=False):
            tally.see_logits(own, target, tokens.to(target.device))

    # A name would keep the logits of one part while those of the next are made, and so would zip.
    deque(map(see, *given, own_rows.split(at_once)), maxlen=0)
    return seen


@contextmanager
def _watched(decoder: Decoder, tally: Tally, length: int | None) -> Iterator[None]:
    """The tally sees what a model does on text: what matrices read too, for a `length` of rows."""
    release_freed_memory()  # what a tally keeps lies among what was freed
    with ExitStack() as stack:
        stack.enter_context(watching_attention(decoder, tally.see_attention))
        stack.enter_context(watching(decoder.layers, tally.see_stream))
        if length is not None:
            stack.enter_context(watching_inputs(decoder, partial(tally.see_input, length)))
        yield


def in_formats(
    subject: Subject,
    formats: Sequence[FormatName],
    held_out: Tensor,
    calibration: Tensor,
) -> dict[FormatName, float]:
    """Perplexity in each format; fixed ranges, where a format has them, are of `calibration`."""
    return {
        name: perplexity_of(quantized_losses(subject, FORMATS[name], held_out, calibration))
        for name in formats
    }


@torch.no_grad()
def quantized_losses(
    subject: Subject, form: Format, held_out: Tensor, calibration: Tensor
) -> Tensor:
    """What `losses` gives in a format, which takes fixed ranges, if any, from `calibration`."""
    with in_format(subject, form, calibration):
        return losses(subject, held_out, form.label)


def perplexity(subject: Subject, rows: Tensor, label: str) -> float:
    """exp of the mean loss of every token but the first of each row (rows, length)."""
    return perplexity_of(losses(subject, rows, label))


@torch.no_grad()
def losses(subject: Subject, rows: Tensor, label: str) -> Tensor:
    """The mean loss in nats of every row's tokens but its first: (rows,), float64."""
    device = subject.decoder.device
    most = max(_rows(rows), ROWS_AT_ONCE[device.type])
    if device.type == "cuda":
        most = min(most, rows_at_once(subject.decoder.model, device))

    def found(rows: Tensor) -> Tensor:
        def of(own: Tensor, tokens: Tensor) -> Tensor:
            return row_losses(own, tokens.to(device)).cpu()

        def by(at_once: int) -> Tensor:
            # A name would keep the logits of one part while those of the next are made.
            parts = map(of, logits(subject, rows, at_once, label), rows.split(at_once))
            return torch.cat([*parts])

        return with_fewer_rows(by, most)

    return ranks.by_row(rows, found)


def _rows(text: Tensor) -> int:
    """How many rows of text (rows, length) are read at once."""
    return max(1, _TOKENS // text.shape[1])
