"""Before and after in figures small enough to draw: plain data, kept beside the pictures."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from absorb.load.source import Source
from absorb.measure.findings import channel_ratio
from absorb.measure.outliers import Measurement
from absorb.models.family import Family
from absorb.schema.report import Inspection
from absorb.show.charts import Layers

_BANDS = 192
_TOKENS = 24
_NEURONS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What one model shows on the calibration text."""

    first_weight: Layers  # of every head: mean attention weight on the first token
    channels: Layers  # of every band of channels: largest mean |x| over the median channel's
    channel_ratios: dict[int, float]  # of the channels named: the largest such multiple
    token_text: tuple[str, ...]
    tokens: Layers  # of every token of `token_text`: the largest |x|
    inputs: dict[str, tuple[float, ...]]  # by the matrix that reads it: largest |x| of every layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Neuron:
    """An MLP neuron, and the most that it adds to an entry of the stream."""

    layer: int
    neuron: int
    contribution: float
    status: str  # "removed", "kept", or "no spike"


@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeAfter:
    """An inspection, and how the model looks before and after what it plans.

    After is before any fine-tune. Both snapshots have as many channels in a band.
    """

    inspection: Inspection
    before: Snapshot
    after: Snapshot
    band: int  # channels
    hidden: int
    neurons: tuple[Neuron, ...]  # those that add most, the largest first


def before_after_of(
    inspection: Inspection, source: Source, measurement: Measurement, after: Measurement
) -> BeforeAfter:
    """What is shown of the measurements of the original and of the student, on the same text."""
    row = _busiest_row(measurement, measurement.tokens.shape[1] - after.tokens.shape[1])
    named = _named_channels(inspection, measurement)
    band = -(-len(measurement.channel_peak) // _BANDS)
    decode: Any = source.tokenizer.decode

    def snapshot(measured: Measurement) -> Snapshot:
        shown = slice(_TOKENS + measured.tokens.shape[1] - after.tokens.shape[1])
        ratio = channel_ratio(measured)
        return Snapshot(
            first_weight=_rounded(measured.first_weight),
            channels=_rounded(banded(ratio, band)),
            channel_ratios={channel: _short(float(ratio[:, channel].max())) for channel in named},
            token_text=tuple(decode([token]) for token in measured.tokens[row, shown].tolist()),
            tokens=_rounded(measured.token_peak[:, row, shown]),
            inputs=_input_ranges(measured, source.family),
        )

    return BeforeAfter(
        inspection=inspection,
        before=snapshot(measurement),
        after=snapshot(after),
        band=band,
        hidden=len(measurement.channel_peak),
        neurons=_neurons(inspection, measurement),
    )


def _busiest_row(measurement: Measurement, lead: int) -> int:
    """The row whose shown tokens, those at its start aside, reach furthest."""
    return int(measurement.token_peak[:, :, lead + 1 : lead + _TOKENS].amax((0, 2)).argmax())


def _named_channels(inspection: Inspection, measurement: Measurement) -> list[int]:
    """The outlier channels, or the one that is nearest to it where there is none."""
    found = [outlier.channel for outlier in inspection.findings.outlier_channels]
    return found or [int(channel_ratio(measurement).amax(0).argmax())]


def banded(values: Tensor, band: int) -> Tensor:
    """The largest of every `band` neighbouring columns: (rows, columns) to fewer columns."""
    rows, columns = values.shape
    padded = values.new_zeros(rows, -(-columns // band) * band)
    padded[:, :columns] = values
    return padded.view(rows, -1, band).amax(2)


def _input_ranges(measurement: Measurement, family: Family) -> dict[str, tuple[float, ...]]:
    """Under the name, within a layer, of every matrix: the largest |x| that it reads, per layer."""
    ranges: dict[str, list[float]] = {}
    for name, peak in measurement.input_peak.items():
        site = name.removeprefix(f"{family.layers}.").partition(".")[2]
        ranges.setdefault(site, []).append(_short(float(peak)))
    return {site: tuple(values) for site, values in ranges.items()}


def _neurons(inspection: Inspection, measurement: Measurement) -> tuple[Neuron, ...]:
    spikes = {(spike.layer, spike.neuron) for spike in inspection.findings.spike_neurons}
    removed = {(gone.spike.layer, gone.spike.neuron) for gone in inspection.removals}
    peak = measurement.neuron_peak
    count = min(max(_NEURONS, len(spikes)), 2 * _NEURONS, peak.numel())
    most = peak.flatten().topk(count)
    neurons = []
    for value, index in zip(most.values.tolist(), most.indices.tolist(), strict=True):
        place = divmod(index, peak.shape[1])
        status = "removed" if place in removed else "kept" if place in spikes else "no spike"
        neurons.append(Neuron(layer=place[0], neuron=place[1], contribution=value, status=status))
    return tuple(neurons)


def _rounded(values: Tensor) -> Layers:
    return tuple(tuple(map(_short, row)) for row in values.tolist())


def _short(value: float) -> float:
    """Four digits: no picture shows more."""
    return float(f"{value:.4g}")
