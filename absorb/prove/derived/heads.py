"""The attention of a layer: the matrices that give values and keys, and the one that reads it."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.models.decoder import is_linear
from absorb.prove.derived.layer import Layer, UnderivedError
from absorb.prove.derived.trace import Attention, Call, Trace, same


def derived(model: PreTrainedModel, trace: Trace, layer: Layer) -> dict[str, Any]:
    """What an entry says of attention, but for what a key is rotated by."""
    seen, name = _seen(model, trace, layer)
    heads, kv_heads = seen.query.shape[1], seen.key.shape[1]
    values = _joined(seen.value)
    width = values.shape[1]
    linears = [site for site in layer.sites if is_linear(site.module)]
    outputs = [site for site in linears if same(site.given, seen.gave)]
    if len(outputs) != 1:
        raise UnderivedError("what its heads give is not read by one matrix")
    for interleaved in (False, True):
        parts = kv_heads if interleaved else 1
        for site in linears:
            if same(_block(site.gave, parts, width, 1), values):
                key, block = _key(linears, seen, parts if site.gave.shape[1] > width else 1)
                return {
                    "attention": name,
                    "grouped": _grouped(model.config, heads, kv_heads),
                    "value": layer.name(site, 0),
                    "output": layer.name(outputs[0], 0),
                    "key": key and layer.name(key, 0),
                    "key_block": block,
                    "interleaved": interleaved,
                }
    raise UnderivedError("no matrix gives the values of its heads alone")


def _seen(model: PreTrainedModel, trace: Trace, layer: Layer) -> tuple[Attention, str]:
    """The attention of a layer, and the name of its module there."""
    known = {module: name for name, module in model.named_modules()}
    within = [a for a in trace.attentions if known[a.module].startswith(layer.stem)]
    if not trace.attentions:
        raise UnderivedError("its attention takes no function from outside")
    if len(trace.attentions) != model.config.num_hidden_layers or len(within) != 1:
        raise UnderivedError("not every layer of it attends once")
    return within[0], known[within[0].module].removeprefix(layer.stem)


def _grouped(config: Any, heads: int, kv_heads: int) -> bool:
    """Whether the setting num_key_value_heads says how many KV heads there are."""
    if config.num_attention_heads != heads:
        raise UnderivedError("it has other heads than its setting num_attention_heads says")
    if getattr(config, "num_key_value_heads", None) == kv_heads:
        return True
    if heads != kv_heads:
        raise UnderivedError("it has other KV heads than its setting num_key_value_heads says")
    return False


def _joined(heads: Tensor) -> Tensor:
    """(rows, heads, length, head_dim) as (tokens, heads * head_dim)."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)


def _block(gave: Tensor, parts: int, width: int, block: int) -> Tensor:
    """The block-th block from the end of what a projection gave: (tokens, width), or nothing.

    It is in so many parts, as that of a projection that holds one head after the other.
    """
    rows, each = gave.view(len(gave), parts, -1), width // parts
    start = rows.shape[-1] - block * each
    return rows[..., start : start + each].flatten(1) if start >= 0 else gave[:, :0]


def _key(linears: list[Call], seen: Attention, parts: int) -> tuple[Call | None, int]:
    """The matrix that gives the keys before they are rotated, and which block of it they are.

    Nothing turns at the first position, though all may grow there, by the factor of a long RoPE.
    """
    keys = seen.key[:, :, 0].flatten(1)
    rows, length = len(keys), seen.key.shape[2]
    for site in linears:
        first = site.gave.view(rows, length, -1)[:, 0]
        for block in range(1, first.shape[1] // keys.shape[1] + 1):
            found = _block(first, parts, keys.shape[1], block)
            if found.shape == keys.shape and same(keys, found * (keys.norm() / found.norm())):
                return site, block
    return None, 1


def turned(before: Trace, after: Trace) -> list[bool]:
    """Which layers rotate their keys, by two traces of one text that stands elsewhere in each."""
    pairs = zip(before.attentions, after.attentions, strict=True)
    return [not torch.allclose(one.key, other.key, 1e-4, 1e-6) for one, other in pairs]
