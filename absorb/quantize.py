"""Fake quantisation: what low-precision arithmetic would do to a model, computed in floating point.

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

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import inf
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.experts import experts_of, mixed, neurons_of, watching_experts
from absorb.families import Family
from absorb.grids import (
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
    rounded,
)
from absorb.rotation import rotated
from absorb.settings import FormatName
from absorb.storage import stored
from absorb.watch import led, linears_of, watching
from absorb.weights import weight_at

_ROWS = 4
# Where a range may end, as fractions of the largest magnitude seen, and on how many tokens it is
# tried.
_FRACTIONS = [0.8**step for step in range(25)]
_TRIED = 512


@torch.no_grad()
def input_peaks(
    model: PreTrainedModel,
    family: Family,
    tokens: Tensor,
    lead: Tensor | None = None,
    order: float = inf,
) -> dict[str, Tensor]:
    """The largest magnitude of every input channel (channels,) of every Linear, by name.

    And of `up` and `down` of all experts: (channels,) and (experts, channels). tokens is
    (rows, length); each row is read after the tokens `lead` (n,). The order 2 gives root mean
    squares instead.
    """
    seen: dict[str, list[Tensor]] = {}

    def see(name: str, value: Tensor) -> None:
        seen.setdefault(name, []).append(power_mean(value, order, 0))

    rows = tokens if lead is None else led(tokens, lead)
    with watching_inputs(model, family, see):
        for batch in tqdm(rows.split(_ROWS), desc="measuring inputs of Linears", unit="batch"):
            model.base_model(batch.to(model.device), use_cache=False)
    return {name: power_mean(torch.stack(means), order, 0) for name, means in seen.items()}


def power_mean(values: Tensor, order: float, dim: int) -> Tensor:
    """The mean of magnitudes to the power of `order`, and its root: the largest for infinity."""
    if order == inf:
        return values.float().abs().amax(dim)  # by torch's norm it takes five times as long
    norm: Tensor = torch.linalg.vector_norm(values.float(), order, dim)
    share: float = values.shape[dim] ** (-1 / order)
    return norm * share


@torch.no_grad()
def clipped_ranges(
    model: PreTrainedModel, family: Family, tokens: Tensor, lead: Tensor | None = None
) -> dict[str, Tensor]:
    """Where a static INT8 grid had best end: a scalar under each name that `input_peaks` gives.

    That is where the output has the least squared error, if errors of different inputs do not add
    up: `sum_i |W_i|^2 (rounded(x_i) - x_i)^2`. What lies beyond is clipped. tokens is (rows,
    length), each row read after the tokens `lead` (n,). Errors are those of some _TRIED tokens.
    """
    rows = tokens if lead is None else led(tokens, lead)
    step = max(1, rows.numel() // _TRIED)
    tried: dict[str, list[Tensor]] = defaultdict(list)
    peaks: dict[str, list[Tensor]] = defaultdict(list)
    read: dict[str, int] = defaultdict(int)

    def see(name: str, value: Tensor) -> None:
        tried[name].append(value[-read[name] % step :: step].clone())
        peaks[name].append(value.abs().max())
        read[name] += len(value)

    with watching_inputs(model, family, see):
        for batch in tqdm(rows.split(_ROWS), desc="measuring inputs of Linears", unit="batch"):
            model.base_model(batch.to(model.device), use_cache=False)
    return {
        name: _best_range(
            torch.cat(parts).float(), torch.stack(peaks[name]).max(), weight_at(model, name)
        )
        for name, parts in tqdm(tried.items(), desc="choosing INT8 ranges", unit="matrix")
    }


@contextmanager
def watching_inputs(
    model: PreTrainedModel, family: Family, see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call see(name, inputs (tokens, ..., channels)) with what each Linear and expert reads."""
    linears = linears_of(model, family)
    names = list(linears)

    def see_linear(index: int, value: Tensor) -> None:
        see(names[index], value.flatten(0, -2))

    inside = watching_experts(model, family, see)
    with inside, watching(linears.values(), see_linear, inputs=True):
        yield


def _multiplied(model: PreTrainedModel, family: Family) -> list[str]:
    """The names of all Linears, and of `up` and `down` of all experts."""
    return [*linears_of(model, family), *chain(*experts_of(model, family))]


def _best_range(inputs: Tensor, peak: Tensor, weight: Tensor) -> Tensor:
    """For inputs (tokens, ..., channels) of a weight (..., outputs, channels)."""
    importance = weight.float().square().sum(-2)
    if importance.ndim == inputs.ndim:  # experts that read the same stream
        importance = importance.sum(0)
    errors = [
        ((rounded(inputs, INT8_TENSOR, peak * fraction) - inputs).square() * importance).sum()
        for fraction in _FRACTIONS
    ]
    return peak.float() * _FRACTIONS[int(torch.stack(errors).argmin())]


def _as_they_are(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How the matrices of a model and what they read are rounded.

    A row of a weight is what gives one output, a row of an input is one token, and the tensor of an
    input is all that a matrix reads at once: one row of text.
    """

    label: str
    weights: Grid = FLOAT32
    inputs: Grid = FLOAT32
    # Takes (model, family, tokens, lead) and gives the fixed ranges of inputs, as `input_peaks`.
    ranges: Callable[..., dict[str, Tensor]] | None = None
    turn: Callable[[Tensor], Tensor] = _as_they_are  # of both, before they are rounded
    stream: Grid | None = None
    cache: Grid | None = None

    @property
    def rotates(self) -> bool:
        return self.turn is rotated

    @property
    def mixes_rows(self) -> bool:
        """Whether a row of text is rounded otherwise where other rows are read with it."""
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
    "w4a4-hadamard": Format(label="W4A4, rotated", weights=INT4_ROW, inputs=INT4_ROW, turn=rotated),
    "nvfp4": Format(label="NVFP4, weights and activations", weights=NVFP4, inputs=NVFP4),
    "mxfp4": Format(label="MXFP4, weights and activations", weights=MXFP4, inputs=MXFP4),
    "stream-fp16": Format(label="FP16 residual stream", stream=FLOAT16),
    "stream-int8": Format(label="INT8 residual stream, per token", stream=INT8_ROW),
    "cache-int8": Format(label="INT8 cache, per token and head", cache=INT8_ROW),
    "cache-int4": Format(label="INT4 cache, per token and head", cache=INT4_ROW),
}


@contextmanager
def quantised(
    model: PreTrainedModel, family: Family, form: Format, ranges: dict[str, Tensor]
) -> Iterator[None]:
    """All that decoder layers multiply is rounded for a while: weights, and what they read.

    So are the stream and the cache, where the format says so. Fixed ranges are needed for a format
    that has them, and none for any other.
    """
    weights = [weight_at(model, name).detach() for name in _multiplied(model, family)]
    before = [weight.clone() for weight in weights]
    try:
        for weight in weights:
            for matrix in weight.view(-1, *weight.shape[-2:]):
                matrix.copy_(rounded(form.turn(matrix), form.weights))
        with (
            quantised_inputs(model, family, form, ranges),
            stored(model, family, form.stream, form.cache),
        ):
            yield
    finally:
        for weight, kept in zip(weights, before, strict=True):
            weight.copy_(kept)


@contextmanager
def quantised_inputs(
    model: PreTrainedModel, family: Family, form: Format, ranges: dict[str, Tensor]
) -> Iterator[None]:
    """What every Linear and expert reads is rounded for a while, with a gradient.

    A fixed range is the largest of the tensor under the name that `input_peaks` gives. A format
    that rotates needs rotated weights.
    """
    assert bool(ranges) == (form.ranges is not None)
    peaks: dict[str, Tensor] = {}
    known: dict[float, Tensor] = {}
    for name, values in ranges.items():
        peak = values.max().to(model.device)
        peaks[name] = known.setdefault(float(peak), peak)  # so that it shows which are the same

    entrance = _Entrance(form)

    def entering(name: str) -> Callable[[Tensor], Tensor]:
        return partial(entrance, peak=peaks.get(name))

    handles = [
        linear.register_forward_pre_hook(_before(entering(name)))
        for name, linear in linears_of(model, family).items()
    ]
    experts = experts_of(model, family)
    for (up, down), module in experts.items():
        module.forward = partial(_rounded_experts, module, entering(up), entering(down))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in experts.values():
            del module.forward


class _Entrance:
    """Rounds what matrices read, once for those that read the same one after another."""

    def __init__(self, form: Format) -> None:
        self.form = form
        self.last: tuple[Tensor, Tensor | None, Tensor] | None = None  # read, range, given

    def __call__(self, values: Tensor, peak: Tensor | None) -> Tensor:
        if self.last is None or self.last[0] is not values or self.last[1] is not peak:
            turned = self.form.turn(values)
            self.last = values, peak, rounded(turned, self.form.inputs, peak).to(values)
        return self.last[2]


def _before(enter: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda _, args: (enter(args[0]), *args[1:])


def _rounded_experts(
    experts: Any,
    enter_up: Callable[[Tensor], Tensor],
    enter_down: Callable[[Tensor], Tensor],
    stream: Tensor,
    chosen: Tensor,
    share: Tensor,
) -> Tensor:
    neurons = neurons_of(experts, enter_up(stream), chosen)
    return mixed(experts, enter_down(neurons), chosen, share)
