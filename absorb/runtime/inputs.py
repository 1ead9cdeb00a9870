"""What matrices read: every Linear of a decoder layer, and the experts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, pairwise
from math import inf

import torch
from torch import Tensor

from absorb.models.decoder import Decoder
from absorb.runtime import ranks
from absorb.runtime.experts import watching_experts
from absorb.runtime.hooks import watching
from absorb.runtime.precision import with_fewer_rows
from absorb.runtime.reading import led
from absorb.runtime.walk import read

ROWS = 4


@torch.no_grad()
def input_peaks(
    decoder: Decoder,
    tokens: Tensor,
    lead: Tensor | None = None,
    order: float = inf,
) -> dict[str, Tensor]:
    """The largest magnitude of every input channel (channels,) of every Linear, by name.

    And of `up` and `down` of all experts: (channels,) and (experts, channels). tokens is
    (rows, length); each row is read after the tokens `lead` (n,). The order 2 gives root mean
    squares instead.
    """
    [found] = peaks_of_each(decoder, [tokens if lead is None else led(tokens, lead)], order)
    return found


@torch.no_grad()
def peaks_of_each(
    decoder: Decoder, texts: Sequence[Tensor], order: float = inf
) -> list[dict[str, Tensor]]:
    """The same of several texts (rows, length), all of them on one walk where weights stream."""
    shares = [ranks.share(text) for text in texts]

    def found(at_once: int) -> list[dict[str, Tensor]]:
        seen: dict[str, list[Tensor]] = {}

        def see(name: str, value: Tensor) -> None:
            seen.setdefault(name, []).append(power_mean(value, order, 0))

        parts = [share.split(at_once) for share in shares]
        with watching_inputs(decoder, see):
            read(decoder, [*chain(*parts)], "measuring inputs of Linears")
        sizes = [len(part) for part in chain(*parts)]
        ends = [*accumulate((len(own) for own in parts), initial=0)]
        return [
            {n: _added(means[begin:end], sizes[begin:end], order) for n, means in seen.items()}
            for begin, end in pairwise(ends)
        ]

    each = zip(with_fewer_rows(found, ROWS), map(len, texts), strict=True)
    return [{name: _of_all(sums, rows, order) for name, sums in own.items()} for own, rows in each]


def _added(means: list[Tensor], rows: list[int], order: float) -> Tensor:
    """The sum of powers of what parts with so many rows read, by their means: or the largest."""
    if order == inf:
        return torch.stack(means).amax(0)
    return torch.stack([mean**order * size for mean, size in zip(means, rows, strict=True)]).sum(0)


def _of_all(sums: Tensor, rows: int, order: float) -> Tensor:
    """The power mean of so many rows, of which all processes have read their shares."""
    if order == inf:
        return ranks.largest(sums)
    return (ranks.summed(sums) / (rows * ranks.readers(rows))) ** (1 / order)


def power_mean(values: Tensor, order: float, dim: int) -> Tensor:
    """The mean of magnitudes to the power of `order`, and its root: the largest for infinity."""
    if order == inf:
        return values.float().abs().amax(dim)  # by torch's norm it takes five times as long
    norm: Tensor = torch.linalg.vector_norm(values.float(), order, dim)
    share: float = values.shape[dim] ** (-1 / order)
    return norm * share


@contextmanager
def watching_inputs(decoder: Decoder, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call see(name, inputs (tokens, ..., channels)) with what each Linear and expert reads."""
    linears = decoder.linears
    names = list(linears)

    def see_linear(index: int, value: Tensor) -> None:
        see(names[index], value.flatten(0, -2))

    inside = watching_experts(decoder, see)
    with inside, watching(linears.values(), see_linear, inputs=True):
        yield
