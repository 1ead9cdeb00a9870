"""What a format leaves of the outputs of the matrices that read one channel each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

from torch import Tensor

from absorb.fold.order import columns_of_values, reordered
from absorb.fold.smoothing import product, readers_of
from absorb.models.decoder import Decoder
from absorb.quantize.formats import Format
from absorb.quantize.grids import rounded
from absorb.quantize.training import on_grid
from absorb.runtime.inputs import watching_inputs


class Link:
    """A link of a layer while text passes it: what its readers read, and their weights.

    inputs is (tokens, ..., channels), and each weight (..., outputs, channels).
    """

    def __init__(self, name: str, layer: int, inputs: Tensor, weights: list[Tensor]) -> None:
        self.name, self.layer, self.inputs, self.weights = name, layer, inputs, weights
        self.exact = [product(inputs, weight) for weight in weights]

    def error(self, form: Format, scale: Tensor, order: Tensor | None) -> float:
        """The squared error of all outputs, where inputs are divided by `scale` (channels,).

        Channels stand in `order`, if one is given.
        """
        read = self.inputs / scale
        if order is not None:
            read = read.take_along_dim(order.expand(1, *read.shape[1:]), -1)
        read = rounded(form.rotate(read), form.inputs)
        total = 0.0
        for weight, exact in zip(self.weights, self.exact, strict=True):
            matrix = weight * scale[..., None, :]
            if order is not None:
                matrix = reordered(matrix, order)
            total += float((product(read, on_grid(form, matrix)) - exact).square().sum())
        return total


@contextmanager
def watching_links(student: Decoder, every: int, see: Callable[[Link], None]) -> Iterator[None]:
    """Call see(link) for each link of each layer with every so-manieth token of what is read.

    Routers are not rounded, and count for nothing.
    """
    family, known = student.family, {*student.linears, *chain(*student.experts)}
    found: dict[str, tuple[str, int, list[str]]] = {}
    for link, readers in family.links.items():
        for layer in student.having(link):
            names = [name for name in readers_of(student, layer, readers) if name in known]
            if names:
                found[names[0]] = link, layer, names

    def look(name: str, inputs: Tensor) -> None:
        if name in found:
            link, layer, names = found[name]
            weights = [student.named(one).weight.detach().float() for one in names]
            see(Link(link, layer, inputs[::every].float(), weights))

    with watching_inputs(student, look):
        yield


def as_read(
    student: Decoder, link: str, scale: Tensor, order: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scale and order of what a link divides as its readers see them: values once for each head."""
    if link != student.family.value:
        return scale, order
    return student.read_by_heads(scale), None if order is None else columns_of_values(
        student, order
    )
