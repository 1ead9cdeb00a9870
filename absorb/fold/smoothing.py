"""Smoothing scales: how much of its range each channel hands on to the matrices that read it.

Links are norm → matrices, value → output and up → down. Each scale is `max|x|^α / max|W|^(1-α)`, as
in SmoothQuant (arXiv 2211.10438), with the inputs x seen on calibration text.
"""

from math import inf

import torch
from torch import Tensor
from tqdm import tqdm

from absorb.fold.plan import Plan
from absorb.models.decoder import Decoder
from absorb.quantize.grids import INT8_ROW, INT8_TENSOR, rounded
from absorb.runtime import ranks
from absorb.runtime.inputs import input_peaks, peaks_of_each, power_mean, watching_inputs
from absorb.runtime.precision import autocast_bf16

_ALPHA = 0.5  # activations and weights share the range
# The exponents that are tried. Some text is read best with others, which spoil more of other text.
_ALPHAS = (0.4, 0.5, 0.6, 0.7)
# On how many rows of text they are, and on every how-manieth token of these.
_ROWS, _EVERY = 4, 4


def smoothing_scales(
    student: Decoder,
    tokens: Tensor,
    alpha: float = _ALPHA,
    order: float = inf,
) -> dict[str, Tensor]:
    """Scales by the name of what they divide, as a plan holds them, with one exponent.

    tokens is text (rows, length). The order 2 takes root mean squares for the largest values. This
    is for what is rotated before it is rounded: outliers are spread anyway, the error is as the
    product of the norms of `x / s` and `W s`, and by Cauchy and Schwarz that is least where both
    share the range, channel by channel.
    """
    with autocast_bf16(student.device):
        inputs = input_peaks(student, tokens, order=order)
    return scales_by(sizes_of(student, inputs, norms_of(student, order), order), alpha)


@torch.no_grad()
def searched_scales(student: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    """The same with the exponent for each link of each layer that does best in static INT8.

    It is what leaves the least squared error in the outputs. Scales by the first half of the text
    (rows, length) are judged on the other: on the text that they were made for the best would be
    those without any margin.
    """
    first, second = tokens.tensor_split(2)
    with autocast_bf16(student.device):
        known, other = peaks_of_each(student, (first, second))
    both = {name: peaks.maximum(other[name]) for name, peaks in known.items()}
    norms = norms_of(student)
    tried, scales = (
        [scales_by(sizes, alpha) for alpha in _ALPHAS]
        for sizes in (sizes_of(student, inputs, norms) for inputs in (known, both))
    )
    errors = _errors(student, second[:_ROWS], other, tried)
    return {
        link: torch.stack([scales[best][link][i] for i, best in enumerate(error.argmin(0))])
        for link, error in errors.items()
    }


def scales_by(sizes: dict[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """Scales for what `sizes_of` gives."""
    scales = {}
    for name, (size, weight) in sizes.items():
        scale = size.clamp_min(1e-5) ** alpha / weight.clamp_min(1e-5) ** (1 - alpha)
        # Of an expert that calibration never reached, nothing is known.
        scales[name] = torch.where(size > 0, scale.clamp(1e-3, 1e3), 1.0).cpu()
    return scales


def sizes_of(
    student: Decoder, inputs: dict[str, Tensor], norms: dict[str, Tensor], order: float = inf
) -> dict[str, tuple[Tensor, Tensor]]:
    """How large inputs, as `input_peaks` gives them, and weights are, by link: (layers, channels).

    norms are what `norms_of` gives for the same order.
    A neuron that is quieter than the median one of its layer counts as that loud: on other text it
    may fire, and if it had been made louder, it would widen the range of all.
    """
    sizes = {}
    for name, readers in student.family.links.items():
        known = {layer: readers_of(student, layer, readers) for layer in student.having(name)}
        present = {layer: names for layer, names in known.items() if names}
        shape = inputs[next(iter(present.values()))[0]].shape
        size, weight = (torch.zeros(len(student.layers), *shape) for _ in range(2))
        for layer, names in present.items():
            size[layer] = inputs[names[0]]
            # Experts that read the same channels share one size.
            columns = [power_mean(norms[n].view(-1, *shape), order, 0) for n in names]
            weight[layer] = power_mean(torch.stack(columns), order, 0)
        if name in student.family.neurons and order == inf:
            size = size.maximum(size.median(-1, keepdim=True).values)
        if name == student.family.value:
            size, weight = (_shared(part, student, order) for part in (size, weight))
        sizes[name] = size, weight
    return sizes


def readers_of(student: Decoder, layer: int, readers: tuple[str, ...]) -> list[str]:
    """Those of the readers that a layer has, by their names in the model."""
    stem = f"{student.family.layers}.{layer}."
    return [stem + reader for reader in readers if student.has(layer, reader)]


def norms_of(student: Decoder, order: float = inf) -> dict[str, Tensor]:
    """How large the weights of every input channel of each reader of a link are, by its name.

    (channels,), of experts (experts, channels). A layer is asked for once: where weights stream
    each time is a walk.
    """
    links = student.family.links.values()
    norms = {}
    for layer in range(len(student.layers)):
        names = [name for readers in links for name in readers_of(student, layer, readers)]
        with student.fetched(layer):
            for name in names:
                norms[name] = power_mean(student.named(name).weight.detach(), order, -2)
    return norms


def _shared(channels: Tensor, student: Decoder, order: float) -> Tensor:
    """The power mean over the query heads (layers, heads * head_dim) of a value channel."""
    heads, kv_heads = student.heads
    grouped = channels.view(len(channels), kv_heads, heads // kv_heads, -1)
    return power_mean(grouped, order, 2).flatten(1)


def _errors(
    student: Decoder,
    tokens: Tensor,
    peaks: dict[str, Tensor],
    tried: list[dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The squared errors that scales leave in static INT8 outputs, by link: (tried, layers).

    tokens is text (rows, length), peaks are those of inputs, which the grids reach to.
    """
    family = student.family
    places = {
        name: (link, layer)
        for link, readers in family.links.items()
        for layer in student.having(link)
        for name in readers_of(student, layer, readers)
    }
    layers = len(student.layers)
    errors = {link: torch.zeros(len(tried), layers) for link in family.links}
    bar = tqdm(total=len(peaks), desc="choosing exponents of scales", unit="matrix")

    def see(name: str, inputs: Tensor) -> None:
        bar.update()
        if name not in places:
            return
        link, layer = places[name]
        read, weight = inputs[::_EVERY].float(), student.named(name).weight.detach().float()
        exact = product(read, weight)
        for error, scales in zip(errors[link], tried, strict=True):
            scale = scales[link][layer].to(read.device)
            if link == family.value:
                scale = student.read_by_heads(scale)
            given = _int8_product(read, weight, scale, peaks[name])
            error[layer] += float((given - exact).square().sum())

    with bar, watching_inputs(student, see):
        student.model.base_model(ranks.share(tokens).to(student.device), use_cache=False)
    return {link: ranks.summed(error) for link, error in errors.items()}


def _int8_product(inputs: Tensor, weight: Tensor, scale: Tensor, peak: Tensor) -> Tensor:
    """For inputs (tokens, ..., channels), a weight (..., outputs, channels), and their scale."""
    read = rounded(inputs / scale, INT8_TENSOR, (peak / scale).max())
    return product(read, rounded(weight * scale[..., None, :], INT8_ROW))


def product(inputs: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("t...c,...oc->t...o", inputs, weight)


def write(student: Decoder, plan: Plan, layer: int) -> None:
    """Give a layer the scales of a plan."""
    smooth_layer(student, plan.smoothing, layer)


@torch.no_grad()
def smooth(decoder: Decoder, smoothing: dict[str, Tensor]) -> None:
    """Divide outputs that few matrices read, and multiply the columns of those matrices.

    smoothing holds the divisors (layers, channels), for experts (layers, experts, channels), under
    the name of what is divided.
    """
    for layer in range(len(decoder.layers)):
        smooth_layer(decoder, smoothing, layer)


def smooth_layer(decoder: Decoder, smoothing: dict[str, Tensor], layer: int) -> None:
    """The same for one layer."""
    for name, scales in smoothing.items():
        if not decoder.has(layer, name):
            continue
        scale = columns = scales[layer].to(decoder.device)
        if name == decoder.family.value:
            columns = _smooth_values(decoder, layer, scale)
        else:
            decoder.site(layer, name).divide_output(scale)
        for reader in readers_of(decoder, layer, decoder.family.links[name]):
            decoder.named(reader).multiply_input(columns)


def _smooth_values(student: Decoder, layer: int, scale: Tensor) -> Tensor:
    """Divide values by `scale` (kv_heads * head_dim,); what columns are to be multiplied by."""
    value, vectors = student.site(layer, student.family.value), scale.view(student.heads[1], -1)
    value.divide_output(scale, student.rows_of(value, vectors))
    attention = student.site(layer, student.family.attention).module
    if hasattr(attention, "sink_value"):
        attention.sink_value /= vectors[:, None]
    return student.read_by_heads(scale)
