"""Scales and orders by the error of the format that is meant, of weights and of what they read.

They are made of one half of the text and judged on the other, by the squared error that they leave
in what matrices give. Where blocks of channels have a scale each, it matters who shares one:

sorted: neighbours are of one size, so that the largest channels coarsen only each other. It serves
    scales that are powers of two, where the largest value of a block is as far off as others
dealt: the largest channels stand in one block each. It serves scales that take the largest value
    to the end of the grid, where it is exact

The size of a channel is that of its inputs times that of its weights: no smoothing changes it.
"""

import logging
from dataclasses import dataclass, field, replace
from math import inf

import torch
from torch import Tensor
from tqdm import tqdm

from absorb.fold.order import stays_as
from absorb.fold.plan import STREAM
from absorb.fold.search.align import aligned
from absorb.fold.search.errors import Link, as_read, watching_links
from absorb.fold.smoothing import (
    norms_of,
    scales_by,
    searched_scales,
    sizes_of,
    smoothing_scales,
)
from absorb.models.decoder import Decoder
from absorb.models.family import Family
from absorb.quantize.formats import FORMATS, Format
from absorb.quantize.grids import power_of_two
from absorb.quantize.training import FORMAT_FOR
from absorb.runtime.inputs import peaks_of_each
from absorb.runtime.precision import autocast_bf16
from absorb.schema.report import Order
from absorb.schema.settings import Purpose

Sizes = dict[str, tuple[Tensor, Tensor]]  # of inputs and of weights, by link: (layers, channels)
Orders = dict[str, Tensor]  # as in a plan

# What scales are made of: the order of a power mean, and the exponent of inputs in it.
_TRIED = (
    *((inf, alpha) for alpha in (0.5, 0.75, 1.0)),
    *((2.0, alpha) for alpha in (0.25, 0.4, 0.5, 0.6)),
)
# On how many rows of text candidates are judged, and on every how-manieth token of these.
_ROWS, _EVERY = 4, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The smoothing and the orders of a plan, and what these leave of the error.

    shares holds that by the name of an order, on the text that it was judged on, as a multiple of
    the error without one: (layers,), 1 where a layer stays as it is.
    """

    smoothing: dict[str, Tensor]
    orders: Orders = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict)

    @property
    def reported(self) -> tuple[Order, ...]:
        """The orders as a report has them."""
        found = []
        for name, share in self.shares.items():
            layers = (share != 1).nonzero().flatten()
            mean = float(share[layers].log().mean().exp())
            found.append(Order(channels=name, layers=tuple(layers.tolist()), share=mean))
        return tuple(found)


def found_for(student: Decoder, tokens: Tensor, purpose: Purpose, is_listed: bool = True) -> Found:
    """Scales and orders of a student that has none yet, from text (rows, length).

    Without orders where the family has no entry: what was proved of it says nothing of them.
    """
    goal = FORMAT_FOR.get(purpose)
    if goal is None or FORMATS[goal].ranges is not None:
        return Found(smoothing=searched_scales(student, tokens))
    if FORMATS[goal].rotates:  # a search brings nothing: 45.6 on the demo, and this 45.4
        return Found(smoothing=smoothing_scales(student, tokens, order=2))
    return searched(student, tokens, FORMATS[goal], is_listed)


@torch.no_grad()
def searched(student: Decoder, tokens: Tensor, form: Format, may_order: bool = True) -> Found:
    """The scales and orders with the least error in a format with a scale for each block."""
    first, second = tokens.tensor_split(2)
    known, both = _sizes_of_halves(student, first, second)
    tried, scales = (
        [scales_by(sizes[order], alpha) for order, alpha in _TRIED] for sizes in (known, both)
    )
    orders = _orders(student, form, known[2.0]) if may_order else {}
    errors = _errors(student, second[:_ROWS], form, tried, orders)
    best = {link: error.amin(1) for link, error in errors.items()}
    choice = _choice(student, best)
    smoothing = {}
    for link, error in errors.items():
        ordered = (choice[_place(student.family, link)] & (len(error) > 1)).tolist()
        exponents = [int(error[int(kind), :, i].argmin()) for i, kind in enumerate(ordered)]
        smoothing[link] = torch.stack([scales[k][link][i] for i, k in enumerate(exponents)])
    found = _taken(student, orders, choice, best)
    stream = found.orders.get(STREAM)
    smoothing = aligned(student, second[-_ROWS:], form, smoothing, stream, _EVERY)
    return replace(found, smoothing=smoothing)


def _sizes_of_halves(
    student: Decoder, first: Tensor, second: Tensor
) -> tuple[dict[float, Sizes], dict[float, Sizes]]:
    """Sizes by the order of their power mean, in the first half of the text and in both halves."""
    known, both = {}, {}
    for order in dict.fromkeys(order for order, _ in _TRIED):
        with autocast_bf16(student.device):
            one, other = peaks_of_each(student, (first, second), order)
        mean = torch.maximum if order == inf else _root_mean_square
        whole = {name: mean(part, other[name]) for name, part in one.items()}
        norms = norms_of(student, order)
        known[order], both[order] = (sizes_of(student, i, norms, order) for i in (one, whole))
    return known, both


def _root_mean_square(one: Tensor, other: Tensor) -> Tensor:
    return ((one.square() + other.square()) / 2).sqrt()


# --- orders ---------------------------------------------------------------------------------------


def _place(family: Family, link: str) -> str:
    """The name of the order that the channels of a link stand in."""
    if link == family.value:
        return family.output
    return family.neurons.get(link, STREAM)


def _orders(student: Decoder, form: Format, sizes: Sizes) -> Orders:
    """All channels sorted, or all channels dealt."""
    block = form.inputs.span
    assert isinstance(block, int)
    family = student.family
    keys = {link: (size * weight).clamp_min(1e-12).log() for link, (size, weight) in sizes.items()}
    by_size: Orders = {}
    reason = stays_as(student)
    if reason is not None:
        logging.getLogger("absorb").warning(
            "the channels of the stream keep their order, as %s", reason
        )
    elif family.feeds:
        layers = [keys[link][i] for link, _ in family.feeds for i in student.having(link)]
        by_size[STREAM] = torch.stack(layers).mean(0).argsort(descending=True)
    for link in family.neurons:
        by_size[family.neurons[link]] = keys[link].argsort(descending=True)
    if not family.gated:
        heads = keys[family.value].unflatten(-1, (student.heads[1], -1))
        by_size[family.output] = heads.argsort(descending=True)
    if form.inputs.scale is not power_of_two:
        by_size = {name: dealt(order, block) for name, order in by_size.items()}
    return {name: _from_heads(name, family, order) for name, order in by_size.items()}


def dealt(order: Tensor, block: int) -> Tensor:
    """An order (..., channels), largest first, dealt to blocks one after the other."""
    channels = order.shape[-1]
    if channels % block:
        return order
    rows: Tensor = order.unflatten(-1, (block, channels // block))
    return rows.mT.flatten(-2)


def _from_heads(name: str, family: Family, order: Tensor) -> Tensor:
    """An order inside of heads (layers, kv_heads, head_dim) as one of all value channels."""
    if name != family.output:
        return order
    starts = order.shape[-1] * torch.arange(order.shape[-2])
    return (order + starts[:, None]).flatten(-2)


# --- errors ---------------------------------------------------------------------------------------


def _errors(
    student: Decoder,
    tokens: Tensor,
    form: Format,
    tried: list[dict[str, Tensor]],
    orders: Orders,
) -> dict[str, Tensor]:
    """The squared errors on text (rows, length), by link: (without and with orders, tried, layers).

    Without alone, where its channels have no order.
    """
    family, layers = student.family, len(student.layers)
    kinds = {link: 1 + (_place(family, link) in orders) for link in family.links}
    errors = {link: torch.zeros(kinds[link], len(tried), layers) for link in family.links}
    attending = len(student.having(family.value))
    bar = tqdm(total=attending, desc="choosing scales and orders", unit="layer")

    def see(link: Link) -> None:
        place = _place(family, link.name)
        order = orders.get(place)
        if order is not None:
            order = (order if place == STREAM else order[link.layer]).to(student.device)
        for number, scales in enumerate(tried):
            scale = scales[link.name][link.layer].to(student.device)
            for kind, known in enumerate([None, order][: kinds[link.name]]):
                error = link.error(form, *as_read(student, link.name, scale, known))
                errors[link.name][kind, number, link.layer] = error
        bar.update(link.name == family.value)

    with bar, watching_links(student, _EVERY, see):
        student.model.base_model(tokens.to(student.device), use_cache=False)
    return errors


def _choice(student: Decoder, best: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whether each layer is to have an order, by the name of its place: (layers,).

    best holds the least errors without one and with one, by link: (1 or 2, layers). The stream has
    one order for all layers.
    """
    family = student.family
    choice = {_place(family, link): error[-1] < error[0] for link, error in best.items()}
    whole = [best[link][:, student.having(link)].log() for link, _ in family.feeds]
    if whole:
        both = torch.cat(whole, 1).sum(1)
        choice[STREAM] = (both[-1] < both[0]).expand(len(student.layers))
    return choice


def _taken(
    student: Decoder, orders: Orders, choice: dict[str, Tensor], best: dict[str, Tensor]
) -> Found:
    """The orders that were chosen, and the shares of errors that they leave; no smoothing."""
    found: Orders = {}
    shares: dict[str, list[Tensor]] = {}
    for link, error in best.items():
        name = _place(student.family, link)
        chosen = choice[name]
        if not chosen.any():
            continue
        order = orders[name]
        if name != STREAM:
            kept = chosen.view(-1, *[1] * (order.ndim - 1))
            order = torch.where(kept, order, torch.arange(order.shape[-1]))
        found[name] = order
        share = (error[-1] / error[0]).nan_to_num(1.0)
        shares.setdefault(name, []).append(torch.where(chosen, share, 1.0))
    means = {name: torch.stack(parts).log().mean(0).exp() for name, parts in shares.items()}
    return Found(smoothing={}, orders=found, shares=means)
