"""Smoothing scales: how much of its range each channel hands on to the matrices that read it.

Links are norm → matrices, value → output and up → down. Each scale is `max|x|^α / max|W|^(1-α)`, as
in SmoothQuant (arXiv 2211.10438), with the inputs x seen on calibration text.
"""

from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.models.decoder import (
    divide_output,
    each_name,
    fused_rows_of,
    heads_of,
    layers_of,
    multiply_input,
    read_by_heads,
    weight_at,
)
from absorb.models.family import Family
from absorb.quantize.grids import INT8_ROW, INT8_TENSOR, rounded
from absorb.runtime.inputs import input_peaks, power_mean, watching_inputs
from absorb.runtime.precision import hastened

_ALPHA = 0.5  # activations and weights share the range
# The exponents that are tried. Some text is read best with others, which spoil more of other text.
_ALPHAS = (0.4, 0.5, 0.6, 0.7)
# On how many rows of text they are, and on every how-manieth token of these.
_ROWS, _EVERY = 4, 4


def smoothing_scales(
    student: PreTrainedModel,
    family: Family,
    tokens: Tensor,
    alpha: float = _ALPHA,
    order: float = inf,
) -> dict[str, Tensor]:
    """Scales by the name of what they divide, as `graft.smooth` takes them, with one exponent.

    tokens is text (rows, length). The order 2 takes root mean squares for the largest values. This
    is for what is rotated before it is rounded: outliers are spread anyway, the error is as the
    product of the norms of `x / s` and `W s`, and by Cauchy and Schwarz that is least where both
    share the range, channel by channel.
    """
    with hastened(student.device):
        inputs = input_peaks(student, family, tokens, order=order)
    return _scales(_sizes(student, family, inputs, order), alpha)


@torch.no_grad()
def searched_scales(student: PreTrainedModel, family: Family, tokens: Tensor) -> dict[str, Tensor]:
    """The same with the exponent for each link of each layer that does best in static INT8.

    It is what leaves the least squared error in the outputs. Scales by the first half of the text
    (rows, length) are judged on the other: on the text that they were made for the best would be
    those without any margin.
    """
    first, second = tokens.tensor_split(2)
    with hastened(student.device):
        known, other = (input_peaks(student, family, half) for half in (first, second))
    both = {name: peaks.maximum(other[name]) for name, peaks in known.items()}
    tried, scales = (
        [_scales(sizes, alpha) for alpha in _ALPHAS]
        for sizes in (_sizes(student, family, inputs) for inputs in (known, both))
    )
    errors = _errors(student, family, second[:_ROWS], other, tried)
    return {
        link: torch.stack([scales[best][link][i] for i, best in enumerate(error.argmin(0))])
        for link, error in errors.items()
    }


def _scales(sizes: dict[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """Scales for what `_sizes` gives."""
    scales = {}
    for name, (size, weight) in sizes.items():
        scale = size.clamp_min(1e-5) ** alpha / weight.clamp_min(1e-5) ** (1 - alpha)
        # Of an expert that calibration never reached, nothing is known.
        scales[name] = torch.where(size > 0, scale.clamp(1e-3, 1e3), 1.0).cpu()
    return scales


def _sizes(
    student: PreTrainedModel, family: Family, inputs: dict[str, Tensor], order: float = inf
) -> dict[str, tuple[Tensor, Tensor]]:
    """How large inputs, as `input_peaks` gives them, and weights are, by link: (layers, channels).

    A neuron that is quieter than the median one of its layer counts as that loud: on other text it
    may fire, and if it had been made louder, it would widen the range of all.
    """
    sizes = {}
    for name, readers in family.links.items():
        size = torch.stack([inputs[reader] for reader in each_name(student, family, readers[0])])
        reach = [_reach(student, family, r, size[0], order) for r in readers]
        weight = power_mean(torch.stack(reach), order, 0)
        if name in family.neurons and order == inf:
            size = size.maximum(size.median(-1, keepdim=True).values)
        if name == family.value:
            size, weight = (_shared(part, student, family, order) for part in (size, weight))
        sizes[name] = size, weight
    return sizes


def _reach(
    student: PreTrainedModel, family: Family, name: str, size: Tensor, order: float
) -> Tensor:
    """How large the weights of every input channel are, in the shape (layers, ...) of `size`.

    Experts that read the same channels share it.
    """
    layers = layers_of(student, family)
    reaches = [power_mean(weight_at(layer, name).detach(), order, -2) for layer in layers]
    return torch.stack([power_mean(reach.view(-1, *size.shape), order, 0) for reach in reaches])


def _shared(channels: Tensor, student: PreTrainedModel, family: Family, order: float) -> Tensor:
    """The power mean over the query heads (layers, heads * head_dim) of a value channel."""
    heads, kv_heads = heads_of(student.config, family)
    grouped = channels.view(len(channels), kv_heads, heads // kv_heads, -1)
    return power_mean(grouped, order, 2).flatten(1)


def _errors(
    student: PreTrainedModel,
    family: Family,
    tokens: Tensor,
    peaks: dict[str, Tensor],
    tried: list[dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The squared errors that scales leave in static INT8 outputs, by link: (tried, layers).

    tokens is text (rows, length), peaks are those of inputs, which the grids reach to.
    """
    places = {
        name: (link, layer)
        for link, readers in family.links.items()
        for reader in readers
        for layer, name in enumerate(each_name(student, family, reader))
    }
    layers = len(layers_of(student, family))
    errors = {link: torch.zeros(len(tried), layers) for link in family.links}
    bar = tqdm(total=len(peaks), desc="choosing exponents of scales", unit="matrix")

    def see(name: str, inputs: Tensor) -> None:
        bar.update()
        if name not in places:
            return
        link, layer = places[name]
        read, weight = inputs[::_EVERY].float(), weight_at(student, name).detach().float()
        exact = _product(read, weight)
        for error, scales in zip(errors[link], tried, strict=True):
            scale = scales[link][layer].to(read.device)
            if link == family.value:
                scale = read_by_heads(scale, student.config, family)
            product = _int8_product(read, weight, scale, peaks[name])
            error[layer] += float((product - exact).square().sum())

    with bar, watching_inputs(student, family, see):
        student.base_model(tokens.to(student.device), use_cache=False)
    return errors


def _int8_product(inputs: Tensor, weight: Tensor, scale: Tensor, peak: Tensor) -> Tensor:
    """For inputs (tokens, ..., channels), a weight (..., outputs, channels), and their scale."""
    read = rounded(inputs / scale, INT8_TENSOR, (peak / scale).max())
    return _product(read, rounded(weight * scale[..., None, :], INT8_ROW))


def _product(inputs: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("t...c,...oc->t...o", inputs, weight)


@torch.no_grad()
def smooth(student: PreTrainedModel, family: Family, smoothing: dict[str, Tensor]) -> None:
    """Divide outputs that few matrices read, and multiply the columns of those matrices.

    smoothing holds the divisors (layers, channels), for experts (layers, experts, channels), under
    the name of what is divided.
    """
    for name, scales in smoothing.items():
        for layer, scale in zip(layers_of(student, family), scales.to(student.device), strict=True):
            if name == family.value:
                columns = _smooth_values(student, family, layer, scale)
            else:
                divide_output(layer, name, scale)
                columns = scale
            for reader in family.links[name]:
                multiply_input(layer, reader, columns)


def _smooth_values(
    student: PreTrainedModel, family: Family, layer: nn.Module, scale: Tensor
) -> Tensor:
    """Divide values by `scale` (kv_heads * head_dim,); what columns are to be multiplied by."""
    vectors = scale.view(heads_of(student.config, family)[1], -1)
    rows = fused_rows_of(student, family, layer, family.value, vectors)
    divide_output(layer, family.value, scale, rows)
    attention: Any = layer.get_submodule(family.attention)
    if hasattr(attention, "sink_value"):
        attention.sink_value /= vectors[:, None]
    return read_by_heads(scale, student.config, family)
