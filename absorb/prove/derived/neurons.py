"""The neurons of a layer: what gives them, and the matrix that reads them alone."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.models.decoder import is_linear
from absorb.prove.derived.layer import Layer, UnderivedError, is_norm, summed
from absorb.prove.derived.trace import Call, same, trace_of

_FACTOR = 0.25  # exact in every type


def derived(model: PreTrainedModel, layer: Layer, output: str, tokens: Tensor) -> dict[str, Any]:
    """What an entry says of neurons; `output` is the matrix that reads the attention."""
    downs = _downs(layer, output)
    if not downs:
        raise UnderivedError("no matrix that writes to its stream reads neurons")
    experts = [call for call in downs if not is_linear(call.module)]
    linears = [call for call in downs if is_linear(call.module)]
    if len(experts) > 1 or len(linears) > 1:
        raise UnderivedError("several matrices that write to its stream read neurons")
    pairs = [(_up(model, layer, down, tokens), layer.name(down, 0)) for down in linears]
    if not experts:
        return {"up": pairs[0][0], "down": pairs[0][1]}
    up, down = (layer.name(experts[0], which) for which in (0, 1))
    return {"up": up, "down": down, "shared": next((p for p in pairs if p[0]), None)}


def _downs(layer: Layer, output: str) -> list[Call]:
    """What gives the outputs that writers other than the attention's add, behind norms or not."""
    found = []
    for writer in layer.writers:
        sources = [writer]
        if is_norm(writer.module):
            before = layer.sites[: layer.sites.index(writer)]
            sources = [*summed(writer.given, before)]
        found += [call for call in sources if layer.name(call, 0) != output]
    return found


def _up(model: PreTrainedModel, layer: Layer, down: Call, tokens: Tensor) -> str | None:
    """The matrix whose last rows are factors of the neurons, if there is one.

    Divided, they divide the neurons: no activation bends what they give.
    """
    width = down.given.shape[1]
    for site in layer.sites:
        outputs = site.gave.shape[1]
        if not is_linear(site.module) or outputs not in (width, 2 * width) or site is down:
            continue
        rows = [*range(outputs - width, outputs)]
        again = _divided(model, site, rows, down.name, tokens)
        if again is not None and same(again, down.given * _FACTOR):
            return layer.name(site, 0)
    return None


def _divided(
    model: PreTrainedModel, site: Call, rows: list[int], down: str, tokens: Tensor
) -> Tensor | None:
    """What `down` is given where these rows of a matrix give a part of what they gave."""

    def part(_: Any, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[..., rows] *= _FACTOR
        return out

    handle = site.module.register_forward_hook(part)
    try:
        with torch.no_grad():
            call = trace_of(model, tokens).call(down)
    finally:
        handle.remove()
    return None if call is None else call.given
