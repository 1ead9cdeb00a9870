"""Which of the measured figures are outliers. Pure: Measurement and Thresholds in, Findings out."""

import torch
from torch import Tensor

from absorb.measure.outliers import Measurement
from absorb.measure.tally import is_massive, outlier_tokens
from absorb.schema.findings import (
    Findings,
    MassiveActivation,
    OutlierChannel,
    SinkHead,
    SinkToken,
    SpikeNeuron,
)
from absorb.schema.settings import Thresholds

# A converted model has outlier tokens left where a peak is this many times the median token's.
_STANDS_OUT = 20.0


def find(measurement: Measurement, thresholds: Thresholds) -> Findings:
    """What of a measurement lies above the thresholds."""
    return Findings(
        sink_heads=_sink_heads(measurement, thresholds),
        sink_tokens=_sink_tokens(measurement, thresholds),
        massive_activations=_massive_activations(measurement, thresholds),
        spike_neurons=_spike_neurons(measurement, thresholds),
        outlier_channels=_outlier_channels(measurement, thresholds),
        outlier_tokens=int(outlier_tokens(measurement.token_peak, thresholds).any(0).sum()),
    )


def massive(measurement: Measurement, thresholds: Thresholds) -> Tensor:
    """Where the stream holds a massive activation: (layers, rows, length), boolean."""
    return is_massive(measurement.token_peak, measurement.median, thresholds)


def _sink_heads(measurement: Measurement, thresholds: Thresholds) -> tuple[SinkHead, ...]:
    weight = measurement.first_weight
    found = (weight > thresholds.sink_weight).nonzero().tolist()
    heads = (SinkHead(layer=i, head=j, weight=float(weight[i, j])) for i, j in found)
    return tuple(sorted(heads, key=lambda head: -head.weight))


def token_weights(measurement: Measurement) -> Tensor:
    """The mean weight that a token gets from later ones: (layers, rows, three quarters of length).

    The last tokens of a row are seen by so few others that their mean means nothing.
    """
    weight = measurement.token_weight
    return weight[:, :, : -(weight.shape[2] // 4)]


def _sink_tokens(measurement: Measurement, thresholds: Thresholds) -> tuple[SinkToken, ...]:
    weight = token_weights(measurement)
    found: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for layer, row, position in (weight > thresholds.sink_weight).nonzero().tolist():
        # A first token is a sink whatever it is; elsewhere its id is what makes it one.
        token = -1 if position == 0 else int(measurement.tokens[row, position])
        key = (token, 0 if position == 0 else -1)
        found.setdefault(key, []).append((layer, float(weight[layer, row, position])))
    tokens = (
        SinkToken(
            token=token,
            position=position,
            layers=tuple(sorted({layer for layer, _ in seen})),
            weight=max(weight for _, weight in seen),
        )
        for (token, position), seen in found.items()
    )
    return tuple(sorted(tokens, key=lambda token: -token.weight))


def _massive_activations(
    measurement: Measurement, thresholds: Thresholds
) -> tuple[MassiveActivation, ...]:
    found: dict[tuple[int, int, int], list[tuple[float, int]]] = {}
    for layer, row, position in massive(measurement, thresholds).nonzero().tolist():
        token = -1 if position == 0 else int(measurement.tokens[row, position])
        channel = int(measurement.token_channel[layer, row, position])
        value = float(measurement.token_peak[layer, row, position])
        found.setdefault((token, 0 if position == 0 else -1, channel), []).append((value, layer))
    activations = []
    for (token, position, channel), seen in found.items():
        value, layer = max(seen)
        activations.append(
            MassiveActivation(
                token=token,
                position=position,
                channel=channel,
                layers=tuple(sorted({layer for _, layer in seen})),
                value=value,
                ratio=value / float(measurement.median[layer]),
            )
        )
    return tuple(sorted(activations, key=lambda activation: -activation.value))


def _spike_neurons(measurement: Measurement, thresholds: Thresholds) -> tuple[SpikeNeuron, ...]:
    peak = measurement.neuron_peak
    return _neurons(peak, is_massive(peak, measurement.median, thresholds).nonzero().tolist())


def neurons_behind_outliers(measurement: Measurement) -> tuple[SpikeNeuron, ...]:
    """Neurons that alone add more than the median token's peak where another stands out.

    Largest first. Each may be too small for a spike neuron: dozens together are not.
    """
    peaks = measurement.token_peak.flatten(1)
    usual = peaks.median(1).values
    stands_out = peaks.amax(1) > _STANDS_OUT * usual
    found = stands_out[:, None] & (measurement.neuron_peak > usual[:, None])
    return _neurons(measurement.neuron_peak, found.nonzero().tolist())


def _neurons(peak: Tensor, places: list[list[int]]) -> tuple[SpikeNeuron, ...]:
    neurons = (SpikeNeuron(layer=i, neuron=j, contribution=float(peak[i, j])) for i, j in places)
    return tuple(sorted(neurons, key=lambda neuron: -neuron.contribution))


def _outlier_channels(
    measurement: Measurement, thresholds: Thresholds
) -> tuple[OutlierChannel, ...]:
    ratio = channel_ratio(measurement)
    layers = ratio > thresholds.channel_ratio
    channels = (
        OutlierChannel(
            channel=channel,
            layers=tuple(layers[:, channel].nonzero().flatten().tolist()),
            ratio=float(ratio[:, channel].max()),
            share=float(measurement.channel_share[:, channel].max()),
            steadiness=float(measurement.channel_steadiness[ratio[:, channel].argmax(), channel]),
        )
        for channel in layers.any(0).nonzero().flatten().tolist()
    )
    return tuple(sorted(channels, key=lambda channel: -channel.ratio))


def channel_ratio(measurement: Measurement) -> Tensor:
    """Mean magnitude of each channel over that of the layer's median channel: (layers, hidden)."""
    mean = measurement.channel_mean
    return mean / torch.median(mean, 1, keepdim=True).values.clamp_min(1e-12)
