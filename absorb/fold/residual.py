"""Residual scales: outlier channels of the stream, written small and read large."""

from math import log2
from typing import Any

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
    family = student.family
    for name in (one for one in family.writes if student.has(layer, one)):
        student.site(layer, name).divide_output(scale)
    for name in (one for one in family.reads if student.has(layer, one)):
        student.site(layer, name).multiply_input(scale)


def has_end_apart(decoder: Decoder) -> bool:
    """Whether the final norm needs a scale of its own, to make up for an embedding that is divided.

    It does where that is the head as well, and the norm has no weight that could take λ: with an
    offset the weight would lie where bfloat16 keeps few digits. The embedding has no scale: others
    read it by its weight alone, as trainers of single tokens and adapters do. Only where pictures
    enter the stream beside it have both one scale.
    """
    if decoder.is_part:
        return False
    weight = getattr(decoder.named(decoder.family.final_norm).module, "weight", None)
    plain = weight is not None and decoder.family.norm_offset == 0
    return decoder.config.tie_word_embeddings and not plain


def write_end(student: Decoder, plan: Plan, unit: Any) -> None:
    """Let a module outside of the layers write the stream divided by λ, or read it multiplied.

    A head that is tied to the embedding is divided with it, and the final norm makes up for that.
    The embedding has no scale of its own: others read it by its weight alone, such as adapters,
    trainers of single tokens, and vLLM.
    """
    family, tied = student.family, student.config.tie_word_embeddings
    last = student.named(family.final_norm)
    tables = [student.named(name).module for name in (family.embedding, family.positions) if name]
    scale = plan.residual.to(student.device)
    if unit is last.module:
        last.multiply_input(scale)
        if tied and not student.is_part:
            last.divide_output(1 / scale)
    elif student.is_part and unit is tables[0]:
        unit.output_scale /= scale
    elif unit in tables or (
        tied and not student.is_part and getattr(unit, "weight", None) is tables[0].weight
    ):
        unit.weight /= scale
