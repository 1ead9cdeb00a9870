"""Grids: on which numbers a low-precision format leaves a tensor, computed in float32.

A grid is data: its values in units of a scale, who shares a scale, and what a scale may be.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

_TINY = torch.finfo(torch.float32).tiny
_E4M3_TOP = 448.0
_EXPONENT = 0x7F800000  # its bits in a float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Symmetric, and rounded half to even."""

    nearest: Callable[[Tensor], Tensor]  # of values in units of the scale, none beyond `top`
    top: float  # the largest value, in the same units
    span: int | Literal["row", "tensor"]  # what shares a scale: so many neighbours in a row, ...
    # Of the largest magnitudes of spans (tensors, spans), and `top`.
    scale: Callable[[Tensor, float], Tensor]

    @property
    def is_of_tensor(self) -> bool:
        """Whether a value's place depends on the largest of the whole tensor."""
        return self.span == "tensor" or self.scale is e4m3_scale

    def scales(self, peaks: Tensor, tensors: int = 1) -> Tensor:
        """The scale of each span by its largest magnitude; spans of so many tensors in a row."""
        return self.scale(peaks.reshape(tensors, -1), self.top).view(peaks.shape)


def rounded(values: Tensor, grid: Grid, peak: Tensor | None = None, tensors: int = 1) -> Tensor:
    """Values (..., channels) on the grid, in their own dtype. A row is what the last index counts.

    A grid whose span is the tensor reaches to `peak`, where one is given. Values may be so many
    `tensors` one after another. The gradient is that of values clamped to the grid's ends (straight
    through, arXiv 1308.3432).
    """
    if grid is FLOAT32:
        return values
    # In float32: no half precision holds the least scale there is, or the products exactly.
    spans = _spans(values.float(), grid.span, tensors)
    peaks = spans.detach().abs().amax(-1, True) if peak is None else peak.float()
    scale = grid.scales(peaks, tensors if peak is None else 1)
    find = _StraightThrough.apply if spans.requires_grad else _on_grid
    rows = find(spans, scale, grid).reshape(*values.shape[:-1], -1)
    return rows[..., : values.shape[-1]].to(values.dtype)


def _on_grid(spans: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    return _at(_levels(spans, scale), scale, grid)


def _levels(spans: Tensor, scale: Tensor) -> Tensor:
    return spans / scale.clamp_min(_TINY)


def _at(levels: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The values at levels, which are overwritten."""
    return grid.nearest(levels.clamp_(-grid.top, grid.top)) * scale


class _StraightThrough(torch.autograd.Function):
    """The same, with a gradient. Only which values were clamped is remembered for it."""

    @staticmethod
    def forward(ctx: Any, spans: Tensor, scale: Tensor, grid: Grid) -> Tensor:
        levels = _levels(spans, scale)
        ctx.save_for_backward(levels.abs() <= grid.top)
        return _at(levels, scale, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


def peaks_of(values: Tensor, grid: Grid) -> Tensor:
    """For each of the values (..., channels) the largest magnitude of those it shares a scale with.

    float32, as `grid.scales` takes it.
    """
    spans = _spans(values.float(), grid.span, 1)
    peaks = spans.abs().amax(-1, True).expand_as(spans)
    return peaks.reshape(*values.shape[:-1], -1)[..., : values.shape[-1]]


def _spans(values: Tensor, span: int | str, tensors: int) -> Tensor:
    """Values in rows (..., width) that share a scale; the end of the last is filled with zeros."""
    if span == "tensor":
        return values.reshape(tensors, -1)
    if not isinstance(span, int):
        return values
    filled: Tensor = nn.functional.pad(values, (0, -values.shape[-1] % span))
    return filled.view(*values.shape[:-1], -1, span)


# --- scales ---------------------------------------------------------------------------------------


def exact(peak: Tensor, top: float) -> Tensor:
    """The scale that takes `peak` to the end of the grid, in float32."""
    return peak / top


def power_of_two(peak: Tensor, top: float) -> Tensor:
    """An E8M0 scale: 2^(⌊log2 peak⌋ - ⌊log2 top⌋) (OCP Microscaling Formats 1.0, section 6.3).

    Up to a quarter of a power of two may lie beyond the end of the grid, and is clipped.
    """
    exponent = torch.frexp(peak)[1] - torch.frexp(peak.new_tensor(top))[1]
    return torch.where(peak > 0, torch.ldexp(torch.ones_like(peak), exponent.clamp(-126, 127)), 0)


def e4m3_scale(peak: Tensor, top: float) -> Tensor:
    """An E4M3 scale for each span, in units of a tensor's scale that brings its largest to 448.

    NVFP4's two levels (arXiv 2509.25149). A span whose scale is below half of the least number of
    E4M3, 2^-9, becomes zero.
    """
    unit = peak.amax(-1, True) / (top * _E4M3_TOP)
    return e4m3(peak / top / unit.clamp_min(_TINY)) * unit


def unit(peak: Tensor, _: float) -> Tensor:
    """No scale: values are on the grid as they are."""
    return torch.ones_like(peak)


# --- values ---------------------------------------------------------------------------------------


def e4m3(values: Tensor) -> Tensor:
    """The nearest numbers of 4 bits of exponent and 3 of mantissa, which end at 448."""
    return values.clamp(-_E4M3_TOP, _E4M3_TOP).to(torch.float8_e4m3fn).float()


def e2m1(values: Tensor) -> Tensor:
    """The nearest of ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}, for values up to 6."""
    step = e2m1_step(values)
    return (values / step).round_().mul_(step)


def e2m1_step(values: Tensor) -> Tensor:
    """How far apart the two of these are that a value is between: half its power of two."""
    power = values.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
    return power.clamp_(1, 4).mul_(0.5)


def as_is(values: Tensor) -> Tensor:
    return values


def half(values: Tensor) -> Tensor:
    """The nearest of float16, infinity beyond its end."""
    return values.half().float()


FLOAT32 = Grid(nearest=as_is, top=torch.inf, span="row", scale=unit)
FLOAT16 = Grid(nearest=half, top=torch.inf, span="row", scale=unit)
INT8_TENSOR = Grid(nearest=torch.round, top=127, span="tensor", scale=exact)
INT8_ROW = Grid(nearest=torch.round, top=127, span="row", scale=exact)
INT4_ROW = Grid(nearest=torch.round, top=7, span="row", scale=exact)
INT4_GROUPS = Grid(nearest=torch.round, top=7, span=128, scale=exact)
E4M3_ROW = Grid(nearest=e4m3, top=_E4M3_TOP, span="row", scale=exact)
NVFP4 = Grid(nearest=e2m1, top=6, span=16, scale=e4m3_scale)
MXFP4 = Grid(nearest=e2m1, top=6, span=32, scale=power_of_two)
