"""The low-precision formats.

A format is data: on which grid the weights are, on which what they are multiplied by, whether both
are rotated first, and what is kept on a grid between layers and in the cache.

`w8a8-static`, `w8a8-clipped`: INT8 weights per output channel; INT8 activations per tensor, with a
    fixed range found on other rows of text: the largest value, or that of the least squared error
`w8a8-tensor`, `w8a8-token`: the same weights; INT8 with a range for each row of text, or token
`fp8`: E4M3 per output channel; E4M3 per token
`w4a8`: INT4 in groups of 128 inputs; INT8 per token
`w4a4`, `w4a4-hadamard`: INT4 per output channel; INT4 per token; both rotated first by a random
    Hadamard matrix, as in QuaRot
`nvfp4`: E2M1 in blocks of 16 with E4M3 scales, in units of a float32 one for the tensor; the same
`mxfp4`: E2M1 in blocks of 32 with powers of two as scales; the same
`stream-fp16`, `stream-int8`: only what every layer adds up to is rounded, INT8 per token
`cache-int8`, `cache-int4`: only keys and values are rounded, with a range for each token and head
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from absorb.quantize.grids import (
    E4M3_ROW,
    FLOAT16,
    FLOAT32,
    INT4_GROUPS,
    INT4_ROW,
    INT8_ROW,
    INT8_TENSOR,
    MXFP4,
    NVFP4,
    Grid,
)
from absorb.quantize.ranges import clipped_ranges
from absorb.quantize.rotation import rotated
from absorb.runtime.inputs import input_peaks
from absorb.schema.settings import FormatName


def _as_they_are(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How the matrices of a model and what they read are rounded.

    A row of a weight is what gives one output, a row of an input is one token, and the tensor of an
    input is all that a matrix reads of one row of text, whatever rows are read with it.
    """

    label: str
    weights: Grid = FLOAT32
    inputs: Grid = FLOAT32
    # Takes (decoder, tokens, lead) and gives the fixed ranges of inputs, as `input_peaks`.
    ranges: Callable[..., dict[str, Tensor]] | None = None
    rotate: Callable[[Tensor], Tensor] = _as_they_are  # of both, before they are rounded
    stream: Grid | None = None
    cache: Grid | None = None

    @property
    def rotates(self) -> bool:
        return self.rotate is rotated

    @property
    def minds_padding(self) -> bool:
        """Whether a row of text is rounded otherwise where padding is read with it."""
        return self.ranges is None and self.inputs.is_of_tensor


FORMATS: dict[FormatName, Format] = {
    "w8a8-static": Format(
        label="W8A8, static per tensor",
        weights=INT8_ROW,
        inputs=INT8_TENSOR,
        ranges=input_peaks,
    ),
    "w8a8-clipped": Format(
        label="W8A8, static per tensor, clipped",
        weights=INT8_ROW,
        inputs=INT8_TENSOR,
        ranges=clipped_ranges,
    ),
    "w8a8-tensor": Format(label="W8A8, dynamic per tensor", weights=INT8_ROW, inputs=INT8_TENSOR),
    "w8a8-token": Format(label="W8A8, dynamic per token", weights=INT8_ROW, inputs=INT8_ROW),
    "fp8": Format(label="FP8 (E4M3), dynamic per token", weights=E4M3_ROW, inputs=E4M3_ROW),
    "w4a8": Format(label="W4A8, weights in groups of 128", weights=INT4_GROUPS, inputs=INT8_ROW),
    "w4a4": Format(label="W4A4, dynamic per token", weights=INT4_ROW, inputs=INT4_ROW),
    "w4a4-hadamard": Format(
        label="W4A4, rotated", weights=INT4_ROW, inputs=INT4_ROW, rotate=rotated
    ),
    "nvfp4": Format(label="NVFP4, weights and activations", weights=NVFP4, inputs=NVFP4),
    "mxfp4": Format(label="MXFP4, weights and activations", weights=MXFP4, inputs=MXFP4),
    "stream-fp16": Format(label="FP16 residual stream", stream=FLOAT16),
    "stream-int8": Format(label="INT8 residual stream, per token", stream=INT8_ROW),
    "cache-int8": Format(label="INT8 cache, per token and head", cache=INT8_ROW),
    "cache-int4": Format(label="INT4 cache, per token and head", cache=INT4_ROW),
}
