"""How long a model takes to read: a small sample, from which the time of long work is reckoned."""

from dataclasses import dataclass

import torch

from absorb.measure.score import ROWS_AT_ONCE
from absorb.measure.timing import Run, seconds
from absorb.models.decoder import Decoder
from absorb.runtime.precision import autocast_bf16, free_memory
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
    walked = _walked(decoder)
    walk, layers = Walk(decoder, [tokens]), len(decoder.layers)
    with decoder.fetched(0):
        row, hasty = _both(decoder, lambda: walk.given(0, 0))
    return Pace(row=row * layers / rows, hasty=hasty * layers / rows, walk=walked)


def _walked(decoder: Decoder) -> float:
    """Seconds of a walk: the first reads files, which the system keeps if it has the room."""

    def fetch() -> None:
        with decoder.fetched(0):
            pass

    first, again = (seconds(fetch, decoder.device.type) for _ in range(2))
    stored = sum(weight.nbytes for weight in decoder.model.parameters())
    stays = stored < free_memory(torch.device("cpu"))
    return (again if stays else first) * len(decoder.layers)


def _both(decoder: Decoder, run: Run) -> tuple[float, float]:
    """Seconds of a run, exact and hasty, each the second time: the first is that of a beginner."""
    exact = [seconds(run, decoder.device.type) for _ in range(2)]
    with autocast_bf16(decoder.device):
        hasty = [seconds(run, decoder.device.type) for _ in range(2)]
    return exact[1], hasty[1]
