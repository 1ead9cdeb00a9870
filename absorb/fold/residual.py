"""Residual scales: outlier channels of the stream, written small and read large."""

from math import log2

from torch import Tensor

from absorb.fold.plan import Plan
from absorb.measure.outliers import Measurement
from absorb.models.decoder import Decoder
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


def write(student: Decoder, plan: Plan, layer: int) -> None:
    """Let a layer read the stream multiplied by λ, and write to it divided: the same function."""
    scale = plan.residual.to(student.device)
    for name in student.family.writes:
        student.site(layer, name).divide_output(scale)
    for name in student.family.reads:
        student.site(layer, name).multiply_input(scale)


def write_ends(student: Decoder, plan: Plan) -> None:
    """The same where the stream begins and ends."""
    family = student.family
    embedding, last = student.named(family.embedding), student.named(family.final_norm)
    scale = plan.residual.to(last.module.input_scale)
    # A table of tokens may be tied to the language model head, one of positions is tied to nothing.
    embedding.module.output_scale /= scale
    if family.positions is not None:
        student.named(family.positions).module.weight /= scale
    last.multiply_input(scale)
