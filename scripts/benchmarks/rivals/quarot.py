"""The rotations of QuaRot (arXiv 2404.00456), each in the place where rounding would meet it.

QuaRot rotates the whole stream, once and for all, and merges that into the weights. Between two
roundings a rotation and its inverse change nothing, so here the stream stays as it is: what reads
it is rotated on the way in, and what adds to it is undone on the way out. The numbers that are
rounded are the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.fold.smoothing import smooth
from absorb.models.decoder import (
    bias_at,
    fused_rows,
    heads_of,
    is_norm,
    layers_of,
    linears_of,
    place_at,
    weight_at,
)
from absorb.models.family import Family
from absorb.quantize.rotation import rotated


@torch.no_grad()
def turn_inputs(model: PreTrainedModel, family: Family) -> PreTrainedModel:
    """The same function, every Linear reading rotated inputs; the model, changed in place.

    The weights of the norms go into the Linears first, as rotations could not pass them.
    """
    smooth(model, family, norm_weights(model, family))
    for name, linear in linears_of(model, family).items():
        weight = weight_at(model, name)
        weight.copy_(rotated(weight))
        linear.register_forward_pre_hook(lambda _, args: (rotated(args[0]).to(args[0]), *args[1:]))
    return model


@torch.no_grad()
def turn(model: PreTrainedModel, family: Family) -> PreTrainedModel:
    """The same function, with rotated inputs and outputs; the model, changed in place."""
    turn_inputs(model, family)
    rows = _value_rows(model, family)
    for layer in layers_of(model, family):
        _turn_output(layer, family.value, *rows)
        for name in family.writes:
            if not is_norm(layer, name):
                outputs = torch.arange(len(weight_at(layer, name)), device=model.device)
                _turn_output(layer, name, outputs, len(outputs))
    return model


def _value_rows(model: PreTrainedModel, family: Family) -> tuple[Tensor, int]:
    """Which outputs of the projection of values are values, and how wide a head is."""
    heads, kv_heads = heads_of(model.config, family)
    layer = layers_of(model, family)[0]
    width = weight_at(layer, family.output).shape[-1] // heads
    outputs = len(weight_at(layer, family.value))
    return fused_rows(family, outputs, 1, kv_heads, width).to(model.device), width


def _turn_output(layer: Any, name: str, rows: Tensor, width: int) -> None:
    """Rotate the rows of a weight, `width` at a time, and what they give back."""
    weight, bias = weight_at(layer, name), bias_at(layer, name)
    matrix = rotated(torch.eye(width)).to(weight)
    weight[rows] = (matrix.mT @ weight[rows].unflatten(0, (-1, width))).flatten(0, 1)
    if bias is not None:
        bias[rows] = (bias[rows].view(-1, width) @ matrix).flatten()
    place_at(layer, name).register_forward_hook(_turning_back(rows, matrix))


def _turning_back(rows: Tensor, matrix: Tensor) -> Callable[..., Tensor]:
    def back(_: object, __: object, out: Tensor) -> Tensor:
        parts = out[..., rows].unflatten(-1, (-1, len(matrix))) @ matrix.mT
        return out.index_copy(-1, rows, parts.flatten(-2).to(out))

    return back


def norm_weights(model: PreTrainedModel, family: Family) -> dict[str, Tensor]:
    """The weights (layers, hidden) of the norms that Linears alone read, zeros left where they are.

    By the names that `smooth` takes.
    """
    layers = layers_of(model, family)
    found = {}
    for name in family.links:
        norms = [place_at(layer, name) for layer in layers]
        if is_norm(layers[0], name) and getattr(norms[0], "weight", None) is not None:
            weights = torch.stack([norm.weight.float() + family.norm_offset for norm in norms])
            found[name] = torch.where(weights == 0, 1.0, weights)
    return found
