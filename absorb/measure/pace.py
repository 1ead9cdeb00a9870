"""How long a model takes to read: a small sample, from which the time of long work is reckoned."""

import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from absorb.measure.score import ROWS_AT_ONCE
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
    if decoder.streaming is not None:
        return _streamed(decoder, tokens)
    taken = [_whole(decoder, tokens, hasty) / rows for hasty in (False, True)]
    return Pace(row=taken[0], hasty=taken[1], walk=0.0)


def _whole(decoder: Decoder, tokens: Tensor, hasty: bool) -> float:
    given = tokens.to(decoder.device)
    for _ in range(2):  # the first time is that of a beginner
        started = _now(decoder)
        with autocast_bf16(decoder.device) if hasty else torch.no_grad():
            decoder.model.base_model(given, use_cache=False)
    return _now(decoder) - started


def _streamed(decoder: Decoder, tokens: Tensor) -> Pace:
    walk, layers = Walk(decoder, [tokens]), len(decoder.layers)
    times = [_now(decoder)]
    with decoder.fetched(0):
        times.append(_now(decoder))
        for hasty in (False, False, True, True):
            with autocast_bf16(decoder.device) if hasty else torch.no_grad():
                walk.given(0, 0)
            times.append(_now(decoder))
    fetched, _, exact, _, hasty_one = (end - start for start, end in pairwise(times))
    each = layers / len(tokens)
    return Pace(row=exact * each, hasty=hasty_one * each, walk=fetched * layers)


def _now(decoder: Decoder) -> float:
    if decoder.device.type == "cuda":
        torch.cuda.synchronize(decoder.device)
    return time.monotonic()
