"""Residual scales: outlier channels of the stream, written small and read large."""

from math import log2

from torch import Tensor
from transformers import PreTrainedModel

from absorb.measure.outliers import Measurement
from absorb.models.decoder import divide_output, layers_of, multiply_input, place_at
from absorb.models.family import Family
from absorb.schema.findings import Findings

# Half of the largest number in float16: other text may reach further than that of the calibration.
_FLOAT16 = 2.0**15


def residual_scales(measurement: Measurement, findings: Findings, target: float) -> Tensor:
    """λ, powers of two not below one: (hidden,).

    Each brings an outlier channel near `target` times the median channel, and the largest magnitude
    of any channel, seen on calibration text, below _FLOAT16.
    """
    scales = 2.0 ** (measurement.channel_peak / _FLOAT16).log2().ceil()
    for found in findings.outlier_channels:
        level = 2.0 ** round(log2(found.ratio / target))
        scales[found.channel] = scales[found.channel].clamp_min(level)
    return scales.clamp_min(1)


def rescale_stream(student: PreTrainedModel, family: Family, scale: Tensor) -> None:
    """Write the stream divided by `scale` (hidden,), and read it multiplied: the same function."""
    # A table of tokens may be tied to the language model head, one of positions is tied to nothing.
    place_at(student, family.embedding).output_scale /= scale
    if family.positions is not None:
        place_at(student, family.positions).weight /= scale
    multiply_input(student, family.final_norm, scale)
    for layer in layers_of(student, family):
        for name in family.writes:
            divide_output(layer, name, scale)
        for name in family.reads:
            multiply_input(layer, name, scale)
