"""Fake quantisation: what INT8 arithmetic would do to a model, computed in floating point."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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


def rounded(values: Tensor, peak: Tensor) -> Tensor:
    """Values on the symmetric INT8 grid that reaches to `peak`, which broadcasts against them."""
    # In float32: no half precision holds the least step there is, or the products exactly.
    step = (peak.float() / _LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return ((values.float() / step).round().clamp(-_LEVELS, _LEVELS) * step).to(values.dtype)


@contextmanager
def int8_static(model: PreTrainedModel, family: Family, peaks: dict[str, Tensor]) -> Iterator[None]:
    """W8A8 for a while: weights per output channel, activations per tensor with fixed `peaks`."""
    linears, experts = linears_of(model, family), experts_of(model, family)
    names = [*linears, *(name for names in experts for name in names)]
    weights = [weight_at(model, name).detach() for name in names]
    before = [weight.clone() for weight in weights]
    for weight in weights:
        weight.copy_(rounded(weight, weight.abs().amax(-1, True)))
    handles = [
        linear.register_forward_pre_hook(_rounding(peaks[name].max()))
        for name, linear in linears.items()
    ]
    for (up, down), module in experts.items():
        module.forward = partial(_rounded_experts, module, peaks[up].max(), peaks[down].max())
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in experts.values():
            del module.forward
        for weight, kept in zip(weights, before, strict=True):
            weight.copy_(kept)


def _rounding(peak: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, args: (rounded(args[0], peak), *args[1:])


def _rounded_experts(
    experts: Any, up_peak: Tensor, down_peak: Tensor, stream: Tensor, chosen: Tensor, share: Tensor
) -> Tensor:
    neurons = neurons_of(experts, rounded(stream, up_peak), chosen)
    return mixed(experts, rounded(neurons, down_peak), chosen, share)
