"""Looking into a model while it runs, without leaving anything behind."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from absorb.models.decoder import Decoder

See = Callable[[int, Tensor], None]
Attend = Callable[..., tuple[Tensor, Tensor | None]]


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
def replacing_attention(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
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
def watching_attention(decoder: Decoder, see: See) -> Iterator[None]:
    """Call see(layer, weights (rows, heads, queries, keys)) with what the attention gives to what.

    Attention is eager meanwhile: no other form has weights to show.
    """

    def after(layer: int) -> Callable[..., None]:
        return lambda _, args, out: see(layer, out[1].detach())

    name = decoder.family.attention
    modules = zip(decoder.having(name), decoder.each(name), strict=True)
    handles = [module.register_forward_hook(after(layer)) for layer, module in modules]
    try:
        with eager(decoder.model):
            yield
    finally:
        for handle in handles:
            handle.remove()
