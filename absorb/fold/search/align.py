"""Outlier channels whose values come to lie where a format has numbers.

In a floating format a channel's own error grows with it, so a few outliers make up half of a
matrix's error: on the demo one channel makes 20 to 70 % of that of the queries, keys and values in
MXFP4. No exponent helps, but a factor of less than two between the channel and its block does.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from absorb.fold.order import reordered
from absorb.fold.search.errors import Link, watching_links
from absorb.models.decoder import Decoder
from absorb.quantize.formats import Format
from absorb.quantize.grids import Grid, rounded

_CHANNELS = 12  # of each link, those with the most error of their own
_FACTORS = tuple(2 ** (step / 8) for step in (-4, -3, -2, -1, 1, 2, 3, 4))


@torch.no_grad()
def aligned(
    student: Decoder,
    tokens: Tensor,
    form: Format,
    smoothing: dict[str, Tensor],
    stream: Tensor | None,
    every: int,
) -> dict[str, Tensor]:
    """The smoothing with factors on a few channels of what each norm gives.

    tokens is text (rows, length), of which every so-manieth is read: factors are chosen on the
    first half of these, and taken where they help on the second. stream is the order of channels.
    """
    found = {link: scales.clone() for link, scales in smoothing.items()}
    fed = dict(student.family.feeds)
    order = torch.arange(student.config.hidden_size) if stream is None else stream
    order = order.to(student.device)
    bar = tqdm(total=sum(len(student.having(link)) for link in fed), desc="aligning channels")

    def see(link: Link) -> None:
        if link.name not in fed:
            return
        bar.update()
        scale = found[link.name][link.layer].to(link.inputs)
        first, second = link.inputs.tensor_split(2)
        weights = torch.cat([weight.flatten(0, -2) for weight in link.weights])
        better = _Alignment(form, first, weights, scale, order).found()
        judge = Link(link.name, link.layer, second, link.weights)
        if judge.error(form, better, order) < judge.error(form, scale, order):
            found[link.name][link.layer] = better.to(found[link.name])

    with bar, watching_links(student, every, see):
        student.model.base_model(tokens.to(student.device), use_cache=False)
    return found


class _Alignment:
    """One link whose inputs (tokens, channels) and weights (outputs, channels) stand in order."""

    def __init__(
        self, form: Format, inputs: Tensor, weights: Tensor, scale: Tensor, order: Tensor
    ) -> None:
        assert isinstance(form.inputs.span, int)
        self.form, self.order, self.span = form, order, form.inputs.span
        self.scale = scale.clone()
        self.inputs, self.weights = (reordered(part, order) for part in (inputs, weights))
        scaled = reordered(scale, order)
        read, matrix = self.inputs / scaled, self.weights * scaled
        self.tops = read.abs().max(), matrix.abs().max()
        on_grid = rounded(read, form.inputs), rounded(matrix, form.weights)
        self.error = on_grid[0] @ on_grid[1].T - self.inputs @ self.weights.T
        own = (on_grid[0] - read).square().sum(0) * matrix.square().sum(0)
        own += read.square().sum(0) * (on_grid[1] - matrix).square().sum(0)
        self.worst = own.topk(min(_CHANNELS, len(own))).indices.tolist()

    def found(self) -> Tensor:
        """The scale (channels,) with the best factor for one channel after another."""
        for place in self.worst:
            self._align(place)
        return self.scale

    def _align(self, place: int) -> None:
        channel = int(self.order[place])
        before = self.scale.clone()
        product = self._of_block(place, before)
        least, best = float(self.error.square().sum()), None
        for factor in _FACTORS:
            self.scale[channel] = before[channel] * factor
            error = self.error - product + self._of_block(place, self.scale)
            value = float(error.square().sum())
            if value < least:
                least, best = value, (self.scale.clone(), error)
        self.scale, self.error = best or (before, self.error)

    def _of_block(self, place: int, scale: Tensor) -> Tensor:
        """What the block of a channel adds to the outputs: (tokens, outputs)."""
        start = place // self.span * self.span
        block = slice(start, start + self.span)
        scaled = scale[self.order[block]]
        read, matrix = self.inputs[:, block] / scaled, self.weights[:, block] * scaled
        return (
            _beside(read, self.tops[0], self.form.inputs)
            @ _beside(matrix, self.tops[1], self.form.weights).T
        )


def _beside(block: Tensor, top: Tensor, grid: Grid) -> Tensor:
    """A block on its grid as in a tensor whose largest magnitude is `top`."""
    whole = torch.cat([block, top.expand(1, block.shape[1])])
    return rounded(whole, grid)[:-1]
