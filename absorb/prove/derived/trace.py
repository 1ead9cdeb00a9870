"""What the modules of a model read and gave while it read a text, and what its attention saw."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from absorb.fold.sinks.attention import layer_attention
from absorb.runtime.hooks import replacing_attention


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One module's turn: what it was given and gave, as (tokens, channels)."""

    name: str
    module: Any
    given: Tensor
    gave: Tensor


@dataclass(frozen=True, slots=True)
class Attention:
    """What the attention of a module was given, as (rows, heads, length, head_dim)."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    gave: Tensor  # (tokens, heads * head_dim)


@dataclass(slots=True)
class Trace:
    """All of it, in the order of time."""

    calls: list[Call] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)

    def call(self, name: str) -> Call | None:
        """The first call of the module with a name."""
        return next((call for call in self.calls if call.name == name), None)


@torch.no_grad()
def trace_of(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Trace:
    """The trace of a model that reads text (rows, length)."""
    found = Trace()
    with _watching(model, found), replacing_attention(model, _seeing(found)):
        model(tokens, use_cache=False, **options)
    return found


@contextmanager
def _watching(model: nn.Module, found: Trace) -> Iterator[None]:
    def after(name: str) -> Any:
        def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            given, gave = _flat([*args, *kwargs.values()]), _flat(out)
            if given is not None and gave is not None:
                found.calls.append(Call(name, module, given, gave))

        return look

    with ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_hook(after(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _flat(given: Any) -> Tensor | None:
    """The first tensor of what a module is given or gives, as (tokens, channels)."""
    parts = given if isinstance(given, list | tuple) else [given]
    first = next((part for part in parts if torch.is_tensor(part)), None)
    if first is None and isinstance(given, dict):
        first = next((part for part in given.values() if torch.is_tensor(part)), None)
    if first is None or not first.ndim:
        return None
    return first.reshape(-1, first.shape[-1]) if first.is_floating_point() else first.flatten()


def _seeing(found: Trace) -> Any:
    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        scene = layer_attention(module, None, *args, **kwargs)
        out = scene.mix(scene.text_scores().softmax(-1), scene.value).transpose(1, 2).contiguous()
        gave = out.flatten(2).flatten(0, 1)
        found.attentions.append(Attention(module, scene.query, scene.key, scene.value, gave))
        return out, None

    return attend


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, but for the type they are in."""
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), 1e-5, 1e-7)
