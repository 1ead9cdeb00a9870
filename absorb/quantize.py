"""Fake quantisation: what INT8 arithmetic would do to a model, computed in floating point."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.experts import experts_of, mixed, neurons_of, watching_experts
from absorb.families import Family
from absorb.watch import led, linears_of, watching
from absorb.weights import weight_at

_ROWS = 4
_LEVELS = 127
# Where a range may end, as fractions of the largest magnitude seen, and on how many tokens it is
# tried.
_FRACTIONS = [0.8**step for step in range(25)]
_TRIED = 512


@torch.no_grad()
def input_peaks(
    model: PreTrainedModel, family: Family, tokens: Tensor, lead: Tensor | None = None
) -> dict[str, Tensor]:
    """The largest magnitude of every input channel (channels,) of every Linear, by name.

    And of `up` and `down` of all experts: (channels,) and (experts, channels). tokens is
    (rows, length); each row is read after the tokens `lead` (n,).
    """
    linears = linears_of(model, family)
    names = list(linears)
    peaks: dict[str, Tensor] = {}

    def see_linear(index: int, value: Tensor) -> None:
        see(names[index], value.flatten(0, -2))

    def see(name: str, value: Tensor) -> None:
        peak = value.abs().amax(0).float()
        peaks[name] = peak if name not in peaks else torch.maximum(peaks[name], peak)

    rows = tokens if lead is None else led(tokens, lead)
    inside = watching_experts(model, family, see)
    with inside, watching(linears.values(), see_linear, inputs=True):
        for batch in tqdm(rows.split(_ROWS), desc="measuring inputs of Linears", unit="batch"):
            model.base_model(batch.to(model.device), use_cache=False)
    return peaks


@torch.no_grad()
def clipped_ranges(
    model: PreTrainedModel, family: Family, tokens: Tensor, lead: Tensor | None = None
) -> dict[str, Tensor]:
    """Where a static INT8 grid had best end: a scalar under each name that `input_peaks` gives.

    That is where the output has the least squared error, if errors of different inputs do not add
    up: `sum_i |W_i|^2 (rounded(x_i) - x_i)^2`. What lies beyond is clipped. tokens is (rows,
    length), all read at once, each row after the tokens `lead` (n,).
    """
    linears = linears_of(model, family)
    names = list(linears)
    ranges: dict[str, Tensor] = {}

    def see(name: str, value: Tensor) -> None:
        ranges[name] = _best_range(value.float(), weight_at(model, name))

    rows = tokens if lead is None else led(tokens, lead)
    inside = watching_experts(model, family, see)
    bar = tqdm(total=len(names), desc="choosing INT8 ranges", unit="matrix")

    def see_linear(index: int, value: Tensor) -> None:
        see(names[index], value.flatten(0, -2))
        bar.update()

    with bar, inside, watching(linears.values(), see_linear, inputs=True):
        model.base_model(rows.to(model.device), use_cache=False)
    return ranges


def _best_range(inputs: Tensor, weight: Tensor) -> Tensor:
    """For inputs (tokens, ..., channels) of a weight (..., outputs, channels)."""
    peak = inputs.abs().max()
    tried = inputs[:: max(1, len(inputs) // _TRIED)]
    importance = weight.float().square().sum(-2)
    if importance.ndim == inputs.ndim:  # experts that read the same stream
        importance = importance.sum(0)
    errors = [
        ((rounded(tried, peak * fraction) - tried).square() * importance).sum()
        for fraction in _FRACTIONS
    ]
    return peak * _FRACTIONS[int(torch.stack(errors).argmin())]


def rounded(values: Tensor, peak: Tensor) -> Tensor:
    """Values on the symmetric INT8 grid that reaches to `peak`, which broadcasts against them.

    The gradient is that of values clamped to the grid's ends (straight through, arXiv 1308.3432).
    """
    # In float32: no half precision holds the least step there is, or the products exactly.
    step = (peak.float() / _LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    levels = (values.float() / step).clamp(-_LEVELS, _LEVELS)
    whole = levels.round()
    if levels.requires_grad:
        whole = levels + (whole - levels).detach()
    return (whole * step).to(values.dtype)


@contextmanager
def int8_static(
    model: PreTrainedModel, family: Family, ranges: dict[str, Tensor]
) -> Iterator[None]:
    """W8A8 for a while: weights per output channel, activations per tensor with fixed ranges."""
    names = [*linears_of(model, family), *chain(*experts_of(model, family))]
    weights = [weight_at(model, name).detach() for name in names]
    before = [weight.clone() for weight in weights]
    for weight in weights:
        weight.copy_(rounded(weight, weight.abs().amax(-1, True)))
    try:
        with int8_inputs(model, family, ranges):
            yield
    finally:
        for weight, kept in zip(weights, before, strict=True):
            weight.copy_(kept)


@contextmanager
def int8_inputs(
    model: PreTrainedModel, family: Family, ranges: dict[str, Tensor]
) -> Iterator[None]:
    """What every Linear and expert reads is on a fixed INT8 grid for a while, with a gradient.

    A range is the largest of the tensor under the name that `input_peaks` gives.
    """
    handles = [
        linear.register_forward_pre_hook(_rounding(ranges[name].max()))
        for name, linear in linears_of(model, family).items()
    ]
    experts = experts_of(model, family)
    for (up, down), module in experts.items():
        module.forward = partial(_rounded_experts, module, ranges[up].max(), ranges[down].max())
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in experts.values():
            del module.forward


def _rounding(peak: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, args: (rounded(args[0], peak), *args[1:])


def _rounded_experts(
    experts: Any, up_peak: Tensor, down_peak: Tensor, stream: Tensor, chosen: Tensor, share: Tensor
) -> Tensor:
    neurons = neurons_of(experts, rounded(stream, up_peak), chosen)
    return mixed(experts, rounded(neurons, down_peak), chosen, share)
