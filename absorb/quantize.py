"""Fake quantisation: what INT8 arithmetic would do to a model, computed in floating point."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.families import Family
from absorb.watch import led, linears_of, watching

_ROWS = 4
_LEVELS = 127


@torch.no_grad()
def input_peaks(
    model: PreTrainedModel, family: Family, tokens: Tensor, lead: Tensor | None = None
) -> dict[str, Tensor]:
    """The largest magnitude of every input channel (channels,) of every Linear, by name.

    tokens is (rows, length); each row is read after the tokens `lead` (n,).
    """
    linears = linears_of(model, family)
    names = list(linears)
    peaks: dict[str, Tensor] = {}

    def see(index: int, value: Tensor) -> None:
        peak = value.abs().flatten(0, -2).amax(0).float()
        name = names[index]
        peaks[name] = peak if name not in peaks else torch.maximum(peaks[name], peak)

    rows = tokens if lead is None else led(tokens, lead)
    with watching(linears.values(), see, inputs=True):
        for batch in tqdm(rows.split(_ROWS), desc="measuring inputs of Linears", unit="batch"):
            model.base_model(batch.to(model.device), use_cache=False)
    return peaks


def rounded(values: Tensor, peak: Tensor) -> Tensor:
    """Values on the symmetric INT8 grid that reaches to `peak`, which broadcasts against them."""
    step = (peak / _LEVELS).clamp_min(torch.finfo(torch.float32).tiny).to(values.dtype)
    return (values / step).round().clamp(-_LEVELS, _LEVELS) * step


@contextmanager
def int8_static(model: PreTrainedModel, family: Family, peaks: dict[str, Tensor]) -> Iterator[None]:
    """W8A8 for a while: weights per output channel, activations per tensor with fixed `peaks`."""
    linears = linears_of(model, family)
    before = {name: linear.weight.data for name, linear in linears.items()}
    handles = []
    for name, linear in linears.items():
        linear.weight.data = rounded(linear.weight.data, linear.weight.data.abs().amax(1, True))
        handles.append(linear.register_forward_pre_hook(_rounding(peaks[name].max())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            linear.weight.data = before[name]


def _rounding(peak: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, args: (rounded(args[0], peak), *args[1:])
