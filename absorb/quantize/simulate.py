"""Fake quantisation: what low-precision arithmetic would do, computed in floating point."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor

from absorb.models.decoder import Decoder
from absorb.quantize.formats import Format
from absorb.quantize.grids import rounded
from absorb.quantize.stream_and_cache import rounding_stream_and_cache
from absorb.runtime.experts import mixed, neurons_of
from absorb.runtime.hooks import watching
from absorb.runtime.memory import release_freed_memory
from absorb.runtime.reading import Subject


def multiplied(decoder: Decoder, layer: int) -> list[str]:
    """The names of all Linears of a layer, and of `up` and `down` of its experts."""
    stem = f"{decoder.family.layers}.{layer}."
    names = chain(decoder.linears, *decoder.experts)
    return [name for name in names if name.startswith(stem)]


@contextmanager
def quantized(decoder: Decoder, form: Format, ranges: dict[str, Tensor]) -> Iterator[None]:
    """All that decoder layers multiply is rounded for a while: weights, and what they read.

    So are the stream and the cache, where the format says so. Fixed ranges are needed for a format
    that has them, and none for any other.
    """

    def weights(layer: int) -> list[Tensor]:
        return [decoder.named(name).weight.detach() for name in multiplied(decoder, layer)]

    def edit(layer: int) -> None:
        for weight in weights(layer):
            for matrix in weight.view(-1, *weight.shape[-2:]):
                matrix.copy_(rounded(form.rotate(matrix), form.weights))

    with (
        decoder.edited(edit, weights),
        quantized_inputs(decoder, form, ranges),
        rounding_stream_and_cache(decoder, form.stream, form.cache),
    ):
        yield


@contextmanager
def quantized_inputs(decoder: Decoder, form: Format, ranges: dict[str, Tensor]) -> Iterator[None]:
    """What every Linear and expert reads is rounded for a while, with a gradient.

    A fixed range is the largest of the tensor under the name that `input_peaks` gives. A format
    that rotates needs rotated weights.
    """
    assert bool(ranges) == (form.ranges is not None)
    peaks: dict[str, Tensor] = {}
    known: dict[float, Tensor] = {}
    for name, values in ranges.items():
        peak = values.max().to(decoder.device)
        peaks[name] = known.setdefault(float(peak), peak)  # so that it shows which are the same

    entrance = _Entrance(form)

    def entering(name: str) -> Callable[[Tensor], Tensor]:
        return partial(entrance, peak=peaks.get(name))

    handles = [
        linear.register_forward_pre_hook(_before(entering(name)))
        for name, linear in decoder.linears.items()
    ]
    experts = decoder.experts
    for (up, down), module in experts.items():
        module.forward = partial(_rounded_experts, module, entering(up), entering(down))
    try:
        with watching(decoder.layers, entrance.see, inputs=True):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module in experts.values():
            del module.forward


class _Entrance:
    """Rounds what matrices read, once for those that read the same one after another.

    Each text by itself, though some matrices are given the tokens of all texts in one row.
    """

    def __init__(self, form: Format) -> None:
        self.form = form
        self.texts = 1
        self.last: tuple[Tensor, Tensor | None, Tensor] | None = None  # read, range, given

    def see(self, _: int, stream: Tensor) -> None:
        self.texts = len(stream)

    def __call__(self, values: Tensor, peak: Tensor | None) -> Tensor:
        if self.last is None or self.last[0] is not values or self.last[1] is not peak:
            read = self.form.rotate(values)
            given = rounded(read, self.form.inputs, peak, self.texts)
            self.last = values, peak, given.to(values)
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


@contextmanager
def in_format(subject: Subject, form: Format, calibration: Tensor) -> Iterator[None]:
    """The subject in a format for a while, with fixed ranges, if any, from `calibration`."""
    release_freed_memory()  # each format has tensors of other sizes
    find = form.ranges
    ranges = {} if find is None else find(subject.decoder, calibration, subject.lead)
    with quantized(subject.decoder, form, ranges):
        yield
