"""A stock model → the same function by smaller numbers, so that float16 holds them all.

    the stream  over s, a power of two: all that is added to it, with every epsilon over s²
    a channel   over t, a power of two, and the matrix that reads it times t

RMSNorm and LayerNorm give of x/s, with epsilon/s², what they give of x. A model has one epsilon for
all norms, so whatever else a norm reads is over s too: queries and keys in front of their norms,
and what blocks give in front of the norms that write it. There is no new parameter, and by powers
of two nothing is rounded, short of underflow.
"""

from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor

from absorb.fold.smoothing import smooth_layer
from absorb.measure.headroom import SQUARES, STREAM, WRITTEN, Ranges
from absorb.models.decoder import Decoder, Site

MOST = torch.finfo(torch.float16).max
# Half of that: other text may reach further than what was measured.
LIMIT = 2.0**15
# Norms of queries and keys, and what they read.
_NORMED = {
    "q_norm": "q_proj",
    "k_norm": "k_proj",
    "q_layernorm": "q_proj",
    "k_layernorm": "k_proj",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescaling:
    """What everything is divided by.

    stream is s. channels holds t by the name of what is divided, as a plan holds its smoothing:
    (layers, channels), of experts (layers, experts, channels).
    """

    stream: float
    channels: dict[str, Tensor]


def rescaling(decoder: Decoder, ranges: Ranges) -> Rescaling:
    """The smallest divisors by which all that was measured keeps below half of what float16 holds.

    Whatever none of them reaches is left as it is.
    """
    channels = {}
    for link in decoder.family.links:
        peaks = torch.stack([_peaks(decoder, ranges, layer, link) for layer in _layers(decoder)])
        scale = 2.0 ** (peaks.clamp_min(1) / LIMIT).log2().ceil().clamp_min(0)
        if (scale > 1).any():
            channels[link] = scale.cpu()
    return Rescaling(stream=_stream(decoder, ranges), channels=channels)


def _layers(decoder: Decoder) -> range:
    return range(len(decoder.layers))


def _stream(decoder: Decoder, ranges: Ranges) -> float:
    """s: 1 where norms have an epsilon that no setting changes.

    Sums of squares fit as well where that costs nothing. Where norms write the stream, those with
    an offset have weights near -1 after they are divided, and there float16 has few digits of the
    sum; with a tied head the final norm gives s times as much.
    """
    family = decoder.family
    if family.epsilon is None:
        return 1.0
    needed = _power(max(ranges.peaks[kind][0] for kind in (STREAM, WRITTEN)) / LIMIT)
    if any(decoder.site(0, name).offset for name in family.writes):
        return needed
    wanted = _power((ranges.peaks[SQUARES][0] / LIMIT) ** 0.5)
    if decoder.config.tie_word_embeddings:
        last = float(ranges.given[family.final_norm].max())
        wanted = min(wanted, _power(LIMIT / last) / 2)
    return max(needed, wanted)


def _power(ratio: float) -> float:
    """The smallest power of two from 1 on that is not below a ratio."""
    return 2.0 ** max(0, ceil(log2(max(ratio, 1.0))))


def _peaks(decoder: Decoder, ranges: Ranges, layer: int, link: str) -> Tensor:
    """The largest magnitude of each channel that may be divided at a link."""
    family, stem = decoder.family, f"{decoder.family.layers}.{layer}."
    readers = family.links[link]
    if link == family.value:
        site = decoder.site(layer, link)
        heads, given = decoder.heads[1], ranges.given[stem + link]
        # As many as there are columns of the output to a query head, whose values all are averages.
        width = len(ranges.read[stem + family.output]) // decoder.heads[0]
        return given[decoder.rows_of(site, given.new_zeros(heads, width)).to(given.device)]
    read = ranges.read[stem + readers[0]]
    if link in family.neurons:
        return read.maximum(ranges.given[stem + link][..., -read.shape[-1] :])
    return read


@torch.no_grad()
def rescale(decoder: Decoder, by: Rescaling) -> None:
    """Change a stock model in place; where weights stream, each layer whenever it has come."""
    if by.stream != 1:
        _divide_epsilon(decoder, by.stream**2)
    streaming = decoder.streaming
    if streaming is not None:
        streaming.fold = lambda layer: _rescale_layer(decoder, by, layer)
        streaming.fold_end = lambda unit: _rescale_end(decoder, by.stream, unit)
        return
    for layer in _layers(decoder):
        _rescale_layer(decoder, by, layer)
    family = decoder.family
    for name in filter(None, (family.embedding, family.positions, family.final_norm)):
        _rescale_end(decoder, by.stream, decoder.named(name).module)


def _divide_epsilon(decoder: Decoder, by: float) -> None:
    name, modules = decoder.family.epsilon, decoder.model.modules()
    assert name is not None
    before: float = getattr(decoder.config, name)
    for module in modules:
        for attribute in ("variance_epsilon", "eps"):
            if getattr(module, attribute, None) == before:
                setattr(module, attribute, before / by)
    setattr(decoder.config, name, before / by)


def _rescale_layer(decoder: Decoder, by: Rescaling, layer: int) -> None:
    smooth_layer(decoder, by.channels, layer)
    if by.stream == 1:
        return
    family = decoder.family
    attention: Any = decoder.site(layer, family.attention).module
    normed = {
        f"{family.attention}.{name}"
        for norm, name in _NORMED.items()
        if getattr(attention, norm, None) is not None
    }
    blocks = {family.output, family.down, *(family.shared[1:] if family.shared else ())}
    for site in (decoder.site(layer, name) for name in family.reads):
        if not site.is_norm:
            site.multiply_input(site.weight.new_full(site.weight.shape[-1:], by.stream))
    for name in blocks | normed | {*family.writes}:
        _divide(decoder.site(layer, name), by.stream)


def _divide(site: Site, by: float) -> None:
    weight = site.module.weight if site.is_norm else site.weight
    rows = weight.shape[0 if site.is_norm else -2]
    site.divide_output(weight.new_full((rows,), by))


def _rescale_end(decoder: Decoder, by: float, unit: Any) -> None:
    """A head that is tied to the embedding is divided with it; the final norm makes up for that."""
    family, tied = decoder.family, decoder.config.tie_word_embeddings
    table, last = decoder.named(family.embedding).module, decoder.named(family.final_norm)
    positions = None if family.positions is None else decoder.named(family.positions).module
    if unit is last.module:
        if tied and by != 1:
            _divide(last, 1 / by)
    elif unit in (table, positions) or (tied and getattr(unit, "weight", None) is table.weight):
        unit.weight /= by
