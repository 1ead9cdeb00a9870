"""How long a model takes to read: a small sample, from which the time of long work is reckoned."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from absorb.measure.score import ROWS_AT_ONCE
from absorb.measure.timing import Run, seconds
from absorb.models.decoder import Decoder
from absorb.runtime.precision import autocast_bf16
from absorb.runtime.walk import Walk
from absorb.schema.training import LENGTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds for all layers: of a row of LENGTH tokens, as exact as figures are taken and as fast
    as training is; and of a walk through weights that stream, whatever is read on it."""

    row: float
    hasty: float
    walk: float


@torch.no_grad()
def pace_of(decoder: Decoder) -> Pace:
    """A sample of each, of one layer where weights stream."""
    rows = ROWS_AT_ONCE[decoder.device.type]
    tokens = (torch.arange(rows * LENGTH) % decoder.config.vocab_size).view(rows, LENGTH)
    if decoder.streaming is None:
        given = tokens.to(decoder.device)
        row, hasty = _both(decoder, lambda: decoder.model.base_model(given, use_cache=False))
        return Pace(row=row / rows, hasty=hasty / rows, walk=0.0)
    walk, layers = Walk(decoder, [tokens]), len(decoder.layers)
    with ExitStack() as stack:
        fetched = seconds(lambda: stack.enter_context(decoder.fetched(0)), decoder.device.type)
        row, hasty = _both(decoder, lambda: walk.given(0, 0))
    return Pace(row=row * layers / rows, hasty=hasty * layers / rows, walk=fetched * layers)


def _both(decoder: Decoder, run: Run) -> tuple[float, float]:
    """Seconds of a run, exact and hasty, each the second time: the first is that of a beginner."""
    exact = [seconds(run, decoder.device.type) for _ in range(2)]
    with autocast_bf16(decoder.device):
        hasty = [seconds(run, decoder.device.type) for _ in range(2)]
    return exact[1], hasty[1]
