"""One pass over the original model: everything that the findings are drawn from."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from absorb.measure.tally import (
    ByLayer,
    first_token_attention,
    outlier_tokens,
    row_medians,
    token_attention,
)
from absorb.models.decoder import Decoder
from absorb.runtime import ranks
from absorb.runtime.experts import watching_neurons
from absorb.runtime.hooks import watching, watching_attention
from absorb.runtime.inputs import watching_inputs
from absorb.runtime.precision import autocast_bf16, with_fewer_rows
from absorb.runtime.reading import Subject, led
from absorb.runtime.walk import logits, read
from absorb.schema.settings import Thresholds

ROWS, _LABEL = 4, "measuring the stream"
# A token is ordinary unless it is an outlier token by these, whatever the user counts as one: a
# channel that is large on the sink token alone is no residual sink.
_USUAL = Thresholds()
_LEAST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a model does on text. The stream of a layer is what that layer hands on.

    Tokens count the lead, which is where most sinks are.
    """

    tokens: Tensor  # (rows, length): the ids that were read, lead included
    channel_mean: Tensor  # (layers, hidden): mean magnitude of each channel, on ordinary tokens
    channel_share: Tensor  # (layers, hidden): its mean share of the squared norm, likewise
    channel_steadiness: Tensor  # (layers, hidden): abs(mean) / std of its value, likewise
    channel_peak: Tensor  # (hidden,): largest magnitude of each, wherever it is read or written
    median: Tensor  # (layers,): median magnitude of the stream in a row, the mean over rows
    token_peak: Tensor  # (layers, rows, length): largest magnitude of each token
    token_channel: Tensor  # (layers, rows, length): the channel that has it
    first_weight: Tensor  # (layers, heads): mean attention weight on the first token
    token_weight: Tensor  # (layers, rows, length): mean weight a token gets from later ones
    neuron_peak: Tensor  # (layers, neurons): most that one MLP neuron adds to the stream
    input_peak: dict[str, Tensor]  # (): largest magnitude that a matrix reads, under its name


class OutlierTally:
    """What the hooks of a measurement collect."""

    def __init__(self, decoder: Decoder) -> None:
        # Of each row: sums over its ordinary tokens, and how many these are.
        self.sizes, self.shares, self.ordinary = ByLayer(), ByLayer(), ByLayer()
        self.values, self.squares = ByLayer(), ByLayer()
        self.median, self.peak, self.channel = ByLayer(), ByLayer(), ByLayer()
        self.first, self.received = ByLayer(), ByLayer()
        self.reach: list[Tensor] = []
        self.neuron: dict[int, Tensor] = {}
        self.readers = [decoder.down(layer) for layer in range(len(decoder.layers))]
        self.fired: dict[int, Tensor] = {}
        self.down_peak: dict[int, Tensor] = {}
        self.read: dict[str, Tensor] = {}

    def stream(self, layer: int, stream: Tensor) -> None:
        size = stream.float().abs()
        peak, channel = size.max(-1)
        self.median.add(layer, row_medians(size))
        self.peak.add(layer, peak)
        self.channel.add(layer, channel)
        self.ordinary_channels(layer, stream.float(), ~outlier_tokens(peak, _USUAL))

    def ordinary_channels(self, layer: int, stream: Tensor, ordinary: Tensor) -> None:
        """stream is (rows, length, hidden), and ordinary (rows, length) says which tokens count."""
        stream = stream.masked_fill(~ordinary[..., None], 0)
        size, energy = stream.abs(), stream.square()
        total = energy.sum(-1, keepdim=True).clamp_min(_LEAST)
        self.sizes.add(layer, size.sum(1))
        self.shares.add(layer, (energy / total).sum(1))
        self.ordinary.add(layer, ordinary.sum(1))
        self.values.add(layer, stream.sum(1))
        self.squares.add(layer, energy.sum(1))

    def channels(self, _: int, part: Tensor) -> None:
        """part is (..., hidden): the stream, or what is added to it."""
        self.reach.append(part.float().abs().flatten(0, -2).amax(0))

    def weights(self, layer: int, weights: Tensor) -> None:
        """weights is (rows, heads, queries, keys)."""
        self.first.add(layer, first_token_attention(weights))
        self.received.add(layer, token_attention(weights))

    def inputs(self, name: str, inputs: Tensor) -> None:
        peak = inputs.float().abs().max()
        self.read[name] = torch.maximum(self.read.get(name, peak), peak)

    def activation(self, layer: int, activation: Tensor) -> None:
        self.fired[layer] = activation.float().abs()

    def down(self, layer: int, out: Tensor) -> None:
        self.down_peak[layer] = out.float().abs().amax(-1).flatten()  # experts have no rows

    def written(self, layer: int, out: Tensor) -> None:
        # Between the neurons and the stream there may be a norm or a multiplier: the same factor
        # for all neurons of a token, near enough to rank them.
        # Experts are given tokens one after the other, whatever row they are of.
        peaks = self.down_peak.pop(layer).flatten().clamp_min(1e-12)
        gain = out.float().abs().amax(-1).flatten() / peaks
        added = self.fired.pop(layer).flatten(0, -2) * gain[:, None]
        columns = self.readers[layer].weight.detach().abs().amax(-2).flatten()
        peak = added.amax(0) * columns
        self.neuron[layer] = torch.maximum(self.neuron.get(layer, peak), peak)

    def join(self, rows: int) -> None:
        """Take in what other processes have seen of so many rows, each of its share."""
        if ranks.count() == 1:
            return
        sums = (self.sizes, self.shares, self.ordinary, self.values, self.squares)
        for figure in (*sums, self.median, self.peak, self.channel, self.first, self.received):
            figure.join(rows)
        self.reach = [ranks.largest(torch.stack(self.reach).amax(0))]
        self.neuron = {layer: ranks.largest(peak) for layer, peak in self.neuron.items()}
        self.read = {name: ranks.largest(peak) for name, peak in self.read.items()}

    def per_ordinary_token(self, sums: ByLayer) -> Tensor:
        """The mean over ordinary tokens, of sums over those of each row: (layers, hidden)."""
        return sums.all().sum(1) / self.ordinary.all().sum(1)[:, None]

    def steadiness(self) -> Tensor:
        """abs(mean) / std over ordinary tokens: (layers, hidden)."""
        mean = self.per_ordinary_token(self.values)
        variance = self.per_ordinary_token(self.squares) - mean.square()
        # What the difference of two large sums leaves of the digits of float32.
        least = mean.square() * 2**-20
        return mean.abs() / variance.clamp_min(least).clamp_min(_LEAST).sqrt()


@contextmanager
def _counting(decoder: Decoder, tally: OutlierTally) -> Iterator[None]:
    family = decoder.family
    layers = range(len(decoder.layers))
    down = [decoder.down(layer).module for layer in layers]
    writes = [
        [decoder.site(layer, name).module for name in family.writes if decoder.has(layer, name)]
        for layer in layers
    ]
    reads = [site.module for name in family.reads for site in decoder.sites(name)]
    with ExitStack() as stack:
        stack.enter_context(watching(decoder.layers, tally.stream))
        stack.enter_context(watching_neurons(down, tally.activation))
        stack.enter_context(watching(down, tally.down))
        stack.enter_context(watching([written[-1] for written in writes], tally.written))
        # Inside a layer a channel may be larger than in what the layer hands on.
        stack.enter_context(watching(reads, tally.channels, inputs=True))
        # Where weights stream, no norm may read what the last layer gives.
        stack.enter_context(watching(chain(*writes, decoder.layers[-1:]), tally.channels))
        stack.enter_context(watching_inputs(decoder, tally.inputs))
        stack.enter_context(watching_attention(decoder, tally.weights))
        yield


def _by_layers(decoder: Decoder, attention: Tensor) -> Tensor:
    """What attention shows, (layers that have any, ...), as (layers, ...): zero in the others."""
    every = attention.new_zeros(len(decoder.layers), *attention.shape[1:])
    every[decoder.having(decoder.family.attention)] = attention
    return every


@torch.inference_mode()
def measure(decoder: Decoder, tokens: Tensor, lead: Tensor) -> Measurement:
    """Measure a model on text `tokens` (rows, length), read after the tokens `lead` (n,)."""
    rows = led(tokens, lead)
    return measurement_of(rows, decoder, with_fewer_rows(partial(tally_by, decoder, rows), ROWS))


def tally_by(
    decoder: Decoder,
    rows: Tensor,
    at_once: int,
    see: Callable[[Tensor, Tensor], object] | None = None,
) -> OutlierTally:
    """What a model does on this process's share of rows (rows, length), so many at once.

    `see` is shown them and their logits; without it there are none.
    """
    tally = OutlierTally(decoder)
    own_rows = ranks.share(rows)
    with _counting(decoder, tally), autocast_bf16(decoder.device):
        if see is None:
            read(decoder, own_rows.split(at_once), _LABEL)
        else:
            given = logits(Subject(decoder=decoder), own_rows, at_once, _LABEL)
            for part, own in zip(own_rows.split(at_once), given, strict=True):
                see(part.to(own.device), own)
    return tally


def measurement_of(rows: Tensor, decoder: Decoder, tally: OutlierTally) -> Measurement:
    """What was measured on rows (rows, length), of which every process has tallied its share."""
    tally.join(len(rows))
    return Measurement(
        tokens=rows.cpu(),
        channel_mean=tally.per_ordinary_token(tally.sizes).cpu(),
        channel_share=tally.per_ordinary_token(tally.shares).cpu(),
        channel_steadiness=tally.steadiness().cpu(),
        channel_peak=torch.stack(tally.reach).amax(0).cpu(),
        median=tally.median.mean().cpu(),
        token_peak=tally.peak.all().cpu(),
        token_channel=tally.channel.all().cpu(),
        first_weight=_by_layers(decoder, tally.first.mean()).cpu(),
        token_weight=_by_layers(decoder, tally.received.all()).cpu(),
        neuron_peak=pad_sequence([*tally.neuron.values()], batch_first=True).cpu(),
        input_peak={name: peak.cpu() for name, peak in tally.read.items()},
    )
