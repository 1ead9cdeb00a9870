"""Weights nudged by a fraction of a grid's step, so that plain rounding errs less.

GPTQ (arXiv 2210.17323) rounds column after column and lets the columns to come make up for the
error. Where it goes to the other side of a weight than plain rounding does, and the boundary of
both is near, the weight is moved just beyond that boundary: whoever rounds the weights plainly
afterwards then gets what GPTQ would, and in float the model is hardly another. The largest weight
of each block stays, and so do the scales.
"""

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from absorb.models.decoder import Decoder
from absorb.quantize.formats import Format
from absorb.quantize.grids import Grid, e2m1, e2m1_step, peaks_of, rounded
from absorb.runtime import ranks
from absorb.runtime.inputs import ROWS, watching_inputs
from absorb.runtime.precision import autocast_bf16
from absorb.runtime.walk import Walk
from absorb.tune.kept import KeptLayer

# How far a weight may be from a boundary, in steps of the grid. On the demo a fifth brings most of
# what GPTQ does, and costs a hundredth in float of what rounding costs.
_REACH = 0.2
_BEYOND = 0.02  # of the boundary, in steps: bfloat16 keeps four times less
_DAMPING = 0.03  # of the mean square of inputs, for those that text says little of
_MOST = 64  # rows of text
_COLUMNS = 64  # at once, before the others are told of their errors


def nudges(form: Format) -> bool:
    """Whether weights are nudged for a format: those of four floating bits, as they are stored."""
    return form.weights.nearest is e2m1 and not form.rotates


@torch.no_grad()
def nudge(student: Decoder, tokens: Tensor, form: Format, scratch: Path) -> tuple[float, ...]:
    """Nudge all Linears in place: what is left of the error of each layer's, as a share.

    tokens is text (rows, length). A matrix stays as it is where other rows say that it is better
    so. Experts stay. Layers that stream rest in `scratch` afterwards.
    """
    streaming = student.streaming
    rows = ranks.share(tokens[ROWS:_MOST]), tokens[:ROWS]
    text, other = (Walk(student, part.split(ROWS)) for part in rows)
    left = []
    for layer in tqdm(range(len(student.layers)), desc="nudging weights", unit="layer"):
        with student.fetched(layer):
            known = _inputs(student, text, layer, form, _Squares)
            judges = _inputs(student, other, layer, form, _Both)
            errors = torch.tensor([
                _nudge(student.named(name).weight, known[name], judges[name], form)
                for name in known
            ]).sum(0)  # fmt: skip
            left.append(float(errors[1] / errors[0]))
            if streaming is not None:
                kept = KeptLayer(scratch / f"nudged-{layer}.safetensors")
                kept.write(streaming.at_hand(layer), (1.0, left[-1]))
        if streaming is not None:
            streaming.settle(layer, kept.file)
    return tuple(left)


class _Squares:
    """The squares and products of rounded inputs, summed over tokens: (channels, channels)."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None

    def add(self, inputs: Tensor, on_grid: Tensor) -> None:
        products = on_grid.T @ on_grid
        self.sum = products if self.sum is None else self.sum.add_(products)


class _Both:
    """Inputs and rounded ones: (tokens, channels)."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.on_grid: list[Tensor] = []

    def add(self, inputs: Tensor, on_grid: Tensor) -> None:
        self.inputs.append(inputs)
        self.on_grid.append(on_grid)


_Kind = TypeVar("_Kind", _Squares, _Both)


def _inputs(
    student: Decoder, walk: Walk, layer: int, form: Format, kind: type[_Kind]
) -> dict[str, _Kind]:
    """What the Linears of a layer read, by their names. Those that read the same share it."""
    found: dict[str, _Kind] = {}
    last: list[tuple[Tensor, str]] = []

    def see(name: str, inputs: Tensor) -> None:
        if name not in student.linears:
            return
        if last and _is_same(last[0][0], inputs):
            found[name] = found[last[0][1]]
            return
        last[:] = [(inputs, name)]
        values = inputs.float()
        with torch.autocast(inputs.device.type, enabled=False):  # its digits would not do
            found.setdefault(name, kind()).add(values, rounded(values, form.inputs))

    with watching_inputs(student, see), autocast_bf16(student.device):
        walk.pass_on(layer)
    return found


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _nudge(weight: Tensor, known: _Squares, judge: _Both, form: Format) -> tuple[float, float]:
    """Nudge a weight (outputs, channels), if that helps: the error before and after."""
    assert known.sum is not None
    squares = ranks.summed(known.sum)
    inputs, on_grid = torch.cat(judge.inputs), torch.cat(judge.on_grid)
    exact = inputs @ weight.float().T

    def error(matrix: Tensor) -> float:
        return float((on_grid @ rounded(matrix, form.weights).float().T - exact).square().sum())

    moved = nudged(weight.float(), squares, form.weights).to(weight)
    before, after = error(weight), error(moved)
    if not after < before:
        return before, before
    weight.copy_(moved)
    return before, after


def nudged(weight: Tensor, squares: Tensor, grid: Grid) -> Tensor:
    """A weight (outputs, channels), float32, whose plain rounding to E2M1 is nearly that of GPTQ.

    squares are those of inputs, summed over tokens: (channels, channels).
    """
    upper = _compensation(squares)  # first, as it takes most of the memory
    peaks = peaks_of(weight, grid)
    scale = grid.scales(peaks).clamp_min(torch.finfo(torch.float32).tiny)
    reach = (e2m1_step(weight / scale) * scale * _REACH).masked_fill(weight.abs() >= peaks, 0)
    # A column of the weight is a row from here on: what lies side by side is read at once.
    own, scale, reach = (part.T.contiguous() for part in (weight, scale, reach))
    rest, chosen = own.clone(), torch.empty_like(own)
    for start in range(0, len(own), _COLUMNS):
        block = slice(start, start + _COLUMNS)
        errors = torch.zeros_like(rest[block])
        for place, column in enumerate(range(len(own))[block]):
            near = rest[column].clamp(own[column] - reach[column], own[column] + reach[column])
            chosen[column] = _plain(near, scale[column], grid)
            errors[place] = (rest[column] - chosen[column]) / upper[column, column]
            later = slice(column, block.stop)
            rest[later] -= upper[column, later, None] * errors[place]
        rest[block.stop :] -= upper[block, block.stop :].T @ errors
    plain = _plain(own, scale, grid)
    beyond = (chosen + plain) / 2 + (chosen - plain) * _BEYOND
    return torch.where(chosen == plain, own, beyond).T


def _plain(values: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    return e2m1((values / scale).clamp(-grid.top, grid.top)) * scale


def _compensation(squares: Tensor) -> Tensor:
    """How later columns make up for the error of each: the upper root of the damped inverse.

    Where it does not fit beside the layer it is found on the CPU, lest the fine-tune be lost: of
    8B, 14,336 neurons take five gigabytes.
    """
    try:
        return _root(squares)
    except torch.OutOfMemoryError:
        pass  # what the error holds is free only after this
    return _root(squares.cpu()).to(squares.device)


def _root(squares: Tensor) -> Tensor:
    # Squares of outliers leave float32 no digits for the others.
    whole = squares.to(torch.float64, copy=True)
    whole.diagonal().add_(_DAMPING * whole.diagonal().mean().clamp_min(1e-12))
    whole = torch.linalg.cholesky(whole)  # by one name, so that none is kept beside the next
    whole = torch.cholesky_inverse(whole)
    whole = torch.linalg.cholesky(whole, upper=True)
    root: Tensor = whole.float()
    return root
