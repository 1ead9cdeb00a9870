"""Decoder layers in real INT8: weights stored in it, and products of integers, by torchao."""

from typing import Any

import torch
from torch import Tensor
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.utils import should_reduce_range
from transformers import PreTrainedModel

from absorb.models.decoder import Decoder
from absorb.models.family import Family


def to_int8(
    model: PreTrainedModel, family: Family, peaks: dict[str, Tensor] | None, *, reduced: bool
) -> None:
    """Put every Linear of the decoder layers into INT8, in place.

    With peaks, which `input_peaks` gives, inputs have one fixed range for each Linear; else one for
    each token. Weights have one for each output. A range is `reduced` to -64..63 where a CPU
    without VNNI would add products of full ones in 16 bits.
    """
    top = 63 if reduced else 127
    for name, linear in Decoder(model, family).linears.items():
        config: Any = Int8DynamicActivationInt8WeightConfig(reduce_range=reduced)
        if peaks is not None:
            config = Int8StaticActivationInt8WeightConfig(
                act_quant_scale=peaks[name].max().view(1, 1, 1) / top,
                granularity=[PerTensor(), PerRow()],
                reduce_range=reduced,
            )
        quantize_(linear, config, filter_fn=lambda *_: True)


def needs_reducing() -> bool:
    """Whether this machine's CPU has no VNNI."""
    return bool(should_reduce_range(torch.device("cpu")))


def size(model: PreTrainedModel) -> int:
    """Bytes of all parameters, with the scales of those in INT8."""
    return sum(map(_bytes, model.parameters()))


def _bytes(parameter: Any) -> int:
    if hasattr(parameter, "qdata"):
        return int(parameter.qdata.nbytes + parameter.scale.nbytes)
    return int(parameter.nbytes)
