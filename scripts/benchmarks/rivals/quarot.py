"""The rotations of QuaRot (arXiv 2404.00456), each in the place where rounding would meet it.

QuaRot rotates the whole stream, once and for all, and merges that into the weights. Between two
roundings a rotation and its inverse change nothing, so here the stream stays as it is: what reads
it is rotated on the way in, and what adds to it is undone on the way out. The numbers that are
rounded are the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from absorb.fold.smoothing import smooth
from absorb.models.decoder import Decoder, Site
from absorb.quantize.rotation import rotated


@torch.no_grad()
def turn_inputs(decoder: Decoder) -> Decoder:
    """The same function, every Linear reading rotated inputs; the decoder, changed in place.

    The weights of the norms go into the Linears first, as rotations could not pass them.
    """
    smooth(decoder, norm_weights(decoder))
    for name, linear in decoder.linears.items():
        weight = decoder.named(name).weight
        weight.copy_(rotated(weight))
        linear.register_forward_pre_hook(lambda _, args: (rotated(args[0]).to(args[0]), *args[1:]))
    return decoder


@torch.no_grad()
def turn(decoder: Decoder) -> Decoder:
    """The same function, with rotated inputs and outputs; the decoder, changed in place."""
    turn_inputs(decoder)
    family = decoder.family
    rows = _value_rows(decoder)
    for value in decoder.sites(family.value):
        _turn_output(value, *rows)
    for site in (site for name in family.writes for site in decoder.sites(name)):
        if not site.is_norm:
            outputs = torch.arange(len(site.weight), device=decoder.device)
            _turn_output(site, outputs, len(outputs))
    return decoder


def _value_rows(decoder: Decoder) -> tuple[Tensor, int]:
    """Which outputs of the projection of values are values, and how wide a head is."""
    heads, kv_heads = decoder.heads
    width = decoder.site(0, decoder.family.output).weight.shape[-1] // heads
    values = decoder.site(0, decoder.family.value)
    return decoder.rows_of(values, torch.empty(kv_heads, width)), width


def _turn_output(site: Site, rows: Tensor, width: int) -> None:
    """Rotate the rows of a weight, `width` at a time, and what they give back."""
    weight, bias = site.weight, site.bias
    matrix = rotated(torch.eye(width)).to(weight)
    weight[rows] = (matrix.mT @ weight[rows].unflatten(0, (-1, width))).flatten(0, 1)
    if bias is not None:
        bias[rows] = (bias[rows].view(-1, width) @ matrix).flatten()
    site.module.register_forward_hook(_turning_back(rows, matrix))


def _turning_back(rows: Tensor, matrix: Tensor) -> Callable[..., Tensor]:
    def back(_: object, __: object, out: Tensor) -> Tensor:
        parts = out[..., rows].unflatten(-1, (-1, len(matrix))) @ matrix.mT
        return out.index_copy(-1, rows, parts.flatten(-2).to(out))

    return back


def norm_weights(decoder: Decoder) -> dict[str, Tensor]:
    """The weights (layers, hidden) of the norms that Linears alone read, zeros left where they are.

    By the names that `smooth` takes.
    """
    found = {}
    for name in decoder.family.links:
        sites = decoder.sites(name)
        if sites[0].is_norm and getattr(sites[0].module, "weight", None) is not None:
            offset = decoder.family.norm_offset
            weights = torch.stack([site.module.weight.float() + offset for site in sites])
            found[name] = torch.where(weights == 0, 1.0, weights)
    return found
