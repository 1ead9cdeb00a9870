"""What can be told of an architecture without an entry in FAMILIES: enough to measure a model.

Never enough to change one. What stands where is read off the model itself, and refused unless it
is plain.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from absorb.models.decoder import Decoder, is_linear
from absorb.models.family import Family, UnsupportedFamilyError
from absorb.runtime.hooks import eager


def inferred_family(model: PreTrainedModel, name: str) -> Family:
    """Where the decoder layers and their attention are, of a model that people call `name`."""
    layers = _layers(model)
    if layers is None:
        raise _refusal(name, "its layers do not stand in one list")
    first = model.get_submodule(f"{layers}.0")
    strange = _unmultiplied(first)
    if strange:
        raise _refusal(name, f"the matrix {strange} of its layers belongs to no Linear")
    attention = [n for n, m in first.named_modules() if type(m).__name__.endswith("Attention")]
    family = Family(
        model_type=model.config.model_type,
        inferred=True,
        layers=layers,
        attention=min(attention, key=len, default=""),
        positions=_positions(model),
        reads=(),
        writes=(),
        feeds=(),
        key=None,
        up=None,
    )
    weights = _weights(Decoder(model, family)) if attention else None
    if weights is None:
        raise _refusal(name, "its layers have no attention that gives its weights")
    if weights.triu(1).any():
        raise _refusal(name, "a token of it sees those that come after it")
    return family


def _refusal(name: str, reason: str) -> UnsupportedFamilyError:
    return UnsupportedFamilyError(
        f"absorb does not know the architecture of {name} and cannot measure it either, as "
        f"{reason}; choose another model"
    )


def _layers(model: PreTrainedModel) -> str | None:
    """The name of the list of decoder layers."""
    count = model.config.num_hidden_layers
    lists = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    names = [n for n, m in lists if len(m) == count and any(map(is_linear, m[0].modules()))]
    return names[0] if len(names) == 1 else None


def _unmultiplied(layer: nn.Module) -> str | None:
    """A matrix that no hook on a Linear sees, as those of experts that stand in one parameter."""
    for name, parameter in layer.named_parameters():
        owner = layer.get_submodule(name.rpartition(".")[0])
        if parameter.ndim > 1 and not is_linear(owner):
            return name
    return None


def _positions(model: PreTrainedModel) -> str | None:
    """The name of a table of positions, beyond whose end no text can be read."""
    tokens = model.get_input_embeddings()
    tables = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding))
    return next((name for name, table in tables if table is not tokens), None)


@torch.no_grad()
def _weights(decoder: Decoder) -> Tensor | None:
    """The attention weights (1, heads, queries, keys) of a first layer on a few tokens."""
    seen: list[Any] = []
    module = decoder.site(0, decoder.family.attention).module
    handle = module.register_forward_hook(lambda _, args, out: seen.append(out))
    try:
        with eager(decoder.model):
            decoder.model(torch.tensor([[0, 1, 0]]), use_cache=False)
    finally:
        handle.remove()
    given = seen[0][1] if isinstance(seen[0], tuple) and len(seen[0]) > 1 else None
    return given if torch.is_tensor(given) and given.shape[-2:] == (3, 3) else None
