"""Looking into a model while it runs, without leaving anything behind."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from absorb.families import Family

See = Callable[[int, Tensor], None]
Attend = Callable[..., tuple[Tensor, Tensor | None]]


def layers_of(model: PreTrainedModel, family: Family) -> list[Any]:
    """The decoder layers, first to last."""
    return list(model.get_submodule(family.layers).children())


def each_layers(model: PreTrainedModel, family: Family, name: str) -> list[Any]:
    """The submodule `name` of every decoder layer, first to last."""
    return [layer.get_submodule(name) for layer in layers_of(model, family)]


def each_name(model: PreTrainedModel, family: Family, name: str) -> list[str]:
    """The name in the model of the submodule `name` of every decoder layer."""
    return [f"{family.layers}.{index}.{name}" for index in range(len(layers_of(model, family)))]


def linears_of(model: PreTrainedModel, family: Family) -> dict[str, Any]:
    """Every Linear or Conv1D inside a decoder layer, under its name in the model."""
    stem = f"{family.layers}."
    return {n: m for n, m in model.named_modules() if n.startswith(stem) and is_linear(m)}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


@contextmanager
def watching(modules: Iterable[nn.Module], see: See, *, inputs: bool = False) -> Iterator[None]:
    """Call see(index, tensor) with what each module gives, or with what it is given."""

    def before(index: int) -> Callable[..., None]:
        return lambda _, args: see(index, args[0].detach())

    def after(index: int) -> Callable[..., None]:
        return lambda _, args, out: see(index, (out if torch.is_tensor(out) else out[0]).detach())

    handles = [
        module.register_forward_pre_hook(before(index))
        if inputs
        else module.register_forward_hook(after(index))
        for index, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attending(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Let `attend` compute the attention of a stock model, under the masks of stock SDPA."""
    name = "absorb_watch"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS._global_mapping[name]
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name]


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Let the attention modules of a model return their weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def watching_attention(model: PreTrainedModel, family: Family, see: See) -> Iterator[None]:
    """Call see(layer, weights (rows, heads, queries, keys)) with what the attention gives to what.

    Attention is eager meanwhile: no other form has weights to show.
    """

    def after(layer: int) -> Callable[..., None]:
        return lambda _, args, out: see(layer, out[1].detach())

    modules = enumerate(each_layers(model, family, family.attention))
    handles = [module.register_forward_hook(after(layer)) for layer, module in modules]
    try:
        with eager(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and warnings."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def led(tokens: Tensor, lead: Tensor) -> Tensor:
    """Text `tokens` (batch, length), each row after the tokens `lead` (n,): (batch, n + length)."""
    return torch.cat([lead.to(tokens.device).expand(len(tokens), -1), tokens], 1)


class _Roomy(DynamicLayer):
    """Keys and values in room for so many tokens: joined, all are copied for each new token."""

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        new = (key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.is_initialized = True
            self.whole = [t.new_empty(*t.shape[:-2], self.room, t.shape[-1]) for t in new]
        for whole, states in zip(self.whole, new, strict=True):
            whole[..., start:end, :] = states
        self.keys, self.values = (whole[..., :end, :] for whole in self.whole)
        return self.keys, self.values


def remembering(
    model: PreTrainedModel, room: int | None = None
) -> tuple[DynamicCache, dict[str, Any]]:
    """An empty cache of keys and values, and the arguments that let a model fill and use it.

    With `room` it is made for so many tokens at once, and takes no more.
    """
    cache = DynamicCache(config=model.config)
    if room is not None:
        # Of a sliding window only the end is kept.
        cache.layers = [_Roomy(room) if type(x) is DynamicLayer else x for x in cache.layers]
    # Renamed in transformers 5.24.
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    return cache, {name: cache, "use_cache": True}
