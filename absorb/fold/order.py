"""Orders: which channels share a block with which, where a format has a scale for each block.

Channels of the stream, neurons and channels of values may stand in any order, as long as all that
writes and all that reads them agree. So the function is the same, and so is the architecture.

An order says for every new place which channel stands there. A plan holds orders by these names:
`STREAM` (hidden,); the `down` of neurons (layers, neurons), with experts (layers, experts,
neurons); and what reads the values (layers, kv_heads * head_dim), where each stays in its head.
All else in a plan counts channels as the original does.
"""

from typing import Any

import torch
from torch import Tensor

from absorb.fold.plan import STREAM, Plan
from absorb.models.decoder import Decoder, Site, is_linear
from absorb.models.family import Family

_ROWS = 4096  # that are reordered at once: a copy of a whole embedding takes gigabytes


def write(student: Decoder, plan: Plan, layer: int) -> None:
    """Let a layer have its channels in the orders of a plan. Nothing may be written after it."""
    orders = {name: order.to(student.device) for name, order in plan.orders.items()}
    stream = orders.pop(STREAM, None)
    if stream is not None:
        for name in _readers(student.family):
            if student.has(layer, name):
                reorder_input(student.site(layer, name), stream)
        for name in _writers(student.family):
            if student.has(layer, name):
                reorder_output(student.site(layer, name), stream)
    for name, order in orders.items():
        if not student.has(layer, name):
            continue
        if name == student.family.output:
            _reorder_values(student, layer, order[layer])
        else:
            _reorder_neurons(student, layer, name, order[layer])


def write_end(student: Decoder, plan: Plan, unit: Any) -> None:
    """The same for the embedding, positions, the final norm and the head, whichever this is."""
    order = plan.orders.get(STREAM)
    if order is None:
        return
    family = student.family
    ends = {student.named(name).module for name in (family.embedding, family.positions) if name}
    # A tied head has the embedding's table, and comes with it.
    if not student.config.tie_word_embeddings:
        ends.add(student.model.get_output_embeddings())
    if unit in ends or unit is student.named(family.final_norm).module:
        reorder_input(Site(unit), order.to(student.device))


def stays_as(decoder: Decoder) -> str | None:
    """Why the channels of the stream must stay in their order, if they must."""
    family = decoder.family
    norms = {name for name in family.reads if decoder.sites(name)[0].is_norm}
    if decoder.is_part:
        return "pictures enter it too"
    if not norms <= {norm for norm, _ in family.feeds}:
        return "nothing names what reads its norms, which have no weight"
    return None


def downs(family: Family) -> list[str]:
    """All that reads neurons."""
    return [*dict.fromkeys([family.down, *family.neurons.values()])]


def producers(student: Decoder, layer: int, down: str) -> list[Site]:
    """What gives the neurons that `down` reads: gate and up, each or both in one matrix.

    They are the other matrices of the module that it is in.
    """
    stem, _, own = down.rpartition(".")
    if student.site(layer, down).is_of_experts:
        return [student.site(layer, str(student.family.up))]
    inside: Any = student.layers[layer].get_submodule(stem)
    children = dict(inside.named_children())
    names = [name for name, child in children.items() if name != own and is_linear(child)]
    return [student.site(layer, f"{stem}.{name}".lstrip(".")) for name in names]


def _readers(family: Family) -> list[str]:
    """All that has the stream, or what a norm makes of it, in its columns; norms too."""
    return [*family.reads, *(name for _, names in family.feeds for name in names)]


def _writers(family: Family) -> list[str]:
    """All that has the stream in its rows: in front of norms that write, matrices as well."""
    return [*dict.fromkeys([*family.writes, family.output, *downs(family)])]


def _reorder_neurons(student: Decoder, layer: int, down: str, order: Tensor) -> None:
    """order is (neurons,), or (experts, neurons)."""
    reorder_input(student.site(layer, down), order)
    for site in producers(student, layer, down):
        count = site.weight.shape[-2] // order.shape[-1]
        blocks = [order + block * order.shape[-1] for block in range(count)]
        reorder_output(site, torch.cat(blocks, -1))


def _reorder_values(student: Decoder, layer: int, order: Tensor) -> None:
    """order is (kv_heads * head_dim,), and takes no channel to another head."""
    family, inside = student.family, _inside_heads(student, order)
    value = student.site(layer, family.value)
    rows = student.rows_of(value, inside)
    every = torch.arange(value.weight.shape[-2], device=order.device)
    every[rows] = rows[order]
    reorder_output(value, every)
    reorder_input(student.site(layer, family.output), columns_of_values(student, order))
    attention = student.site(layer, family.attention).module
    if hasattr(attention, "sink_value"):
        kept = attention.sink_value
        kept.copy_(kept.take_along_dim(inside[:, None].expand_as(kept), -1))


def columns_of_values(student: Decoder, order: Tensor) -> Tensor:
    """In which order `output` reads values that stand in `order`: (heads * head_dim,)."""
    heads = student.heads[0]
    read = student.read_by_heads(_inside_heads(student, order)).view(heads, -1)
    return (read + read.shape[1] * torch.arange(heads, device=order.device)[:, None]).flatten()


def _inside_heads(student: Decoder, order: Tensor) -> Tensor:
    """The same counted from the start of each head: (kv_heads, head_dim)."""
    inside = order.view(student.heads[1], -1)
    starts = inside.shape[1] * torch.arange(len(inside), device=order.device)
    return inside - starts[:, None]


def reorder_input(site: Site, order: Tensor) -> None:
    """Let a matrix read its channels in another order, or a norm its own."""
    if site.is_norm:
        _reorder_vectors(site, order)
    else:
        for rows in site.weight.split(_ROWS, -2):
            rows.copy_(reordered(rows, order, -1))


def reorder_output(site: Site, order: Tensor) -> None:
    """Let a matrix give its channels in another order, or a norm its own."""
    if site.is_norm:
        _reorder_vectors(site, order)
        return
    site.weight.copy_(reordered(site.weight, order, -2))
    if site.bias is not None:
        site.bias.copy_(site.bias[order])


def reordered(values: Tensor, order: Tensor, dim: int = -1) -> Tensor:
    """Rows (-2) or columns (-1) in an order (channels,), or of each expert in its own."""
    if order.ndim == 1:
        return values.index_select(dim, order)
    return values.take_along_dim(order.unsqueeze(-3 - dim), dim)


def _reorder_vectors(site: Site, order: Tensor) -> None:
    for vector in site.module.parameters(recurse=False):  # or several, of a gate
        vector.copy_(vector[..., order])
