"""A stock model → the entry that it would have in FAMILIES, read off a trace of it.

Every name is found by what a module read and gave: two tensors that are equal are the same one.
What is found here is a claim, and nothing more; prove.py says whether it is true.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.models.family import Family
from absorb.prove.derived import ends, heads, neurons
from absorb.prove.derived.layer import UnderivedError, has_weight, is_norm, layer_of, layers_of
from absorb.prove.derived.trace import Trace, trace_of

_ELSEWHERE = 7  # positions on


def derived(model: PreTrainedModel, tokens: Tensor) -> Family:
    """The entry of a model's architecture, from how the model reads text (rows, length)."""
    stack = layers_of(model)
    trace = trace_of(model, tokens)
    layer = layer_of(trace, f"{stack}.1.")
    both = ends.derived(model, trace, stack, tokens.shape[1])
    attention = heads.derived(model, trace, layer)
    if "positions" not in both and attention["key"] is not None:
        attention |= _rotation(model, trace, f"{layer.stem}{attention['attention']}", tokens)
    norms = [call for call in layer.readers if is_norm(call.module) and has_weight(call.module)]
    scaled = [*norms, *(call for call in layer.writers if is_norm(call.module))]
    inside = neurons.derived(model, layer, attention["output"], tokens)
    writes = [layer.name(call, experts=1) for call in layer.writers]
    return Family(
        model_type=model.config.model_type,
        layers=stack,
        reads=layer.reading(layer.readers),
        writes=tuple(sorted(writes, key=lambda name: name == inside["down"])),  # neurons come last
        feeds=tuple((layer.name(n, 0), layer.reading(layer.fed_by(n))) for n in norms),
        norm_offset=_offset([call.module for call in scaled]),
        epsilon=None,  # no trace shows from which setting it comes
        **both,
        **attention,
        **inside,
    )


@torch.no_grad()
def _offset(norms: list[Any]) -> float:
    """What norms add to their weights, which is what they give nothing without."""
    found = {offset for norm in norms for offset in (0.0, 1.0) if _is_silent(norm, -offset)}
    if norms and len(found) != 1:
        raise UnderivedError("its norms do not multiply by their weights, or not all in one way")
    return found.pop() if found else 0.0


def _is_silent(norm: Any, weight: float) -> bool:
    """Whether a norm gives nothing but its bias with such weights."""
    before = norm.weight.clone()
    norm.weight.fill_(weight)
    draw = torch.Generator().manual_seed(2)
    gave = norm(torch.randn(3, len(before), generator=draw).to(before))
    norm.weight.copy_(before)
    bias = getattr(norm, "bias", None)
    return bool((gave if bias is None else gave - bias).abs().max() < 1e-6)


def _rotation(model: PreTrainedModel, trace: Trace, name: str, tokens: Tensor) -> dict[str, Any]:
    """The attribute by which layers are told that rotate their keys; no key where there is none."""
    if "position_ids" not in signature(model.forward).parameters:
        return {"key": None, "key_block": 1}
    places = torch.arange(_ELSEWHERE, _ELSEWHERE + tokens.shape[1]).expand_as(tokens)
    turned = heads.turned(trace, trace_of(model, tokens, position_ids=places))
    if all(turned):
        return {}
    modules = [attention.module for attention in trace.attentions]
    for attribute in vars(modules[0]):
        told = [getattr(module, attribute, None) for module in modules]
        if [value not in (None, False) for value in told] == turned:
            return {"rotation": attribute}
    return {"key": None, "key_block": 1}
