"""Linear, Conv1D, router and expert tensors alike: rows give outputs, columns read inputs."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from absorb.families import Family


def place_at(layer: nn.Module, name: str) -> Any:
    """The module or parameter under a name of a family."""
    place: Any = layer
    for part in name.split("."):
        place = getattr(place, part)
    return place


def module_at(layer: nn.Module, name: str) -> Any:
    """The module under a name, or the one that holds the parameter under it."""
    place = place_at(layer, name)
    return layer.get_submodule(name.rpartition(".")[0]) if torch.is_tensor(place) else place


def is_norm(layer: nn.Module, name: str) -> bool:
    place = place_at(layer, name)
    weight = place if torch.is_tensor(place) else getattr(place, "weight", None)
    return weight is None or weight.ndim == 1


def weight_at(layer: nn.Module, name: str) -> Tensor:
    """The weight (outputs, inputs), or (experts, outputs, inputs), under a name that is no norm's.

    A view: what is written to it is written to the model.
    """
    place = place_at(layer, name)
    weight: Tensor = place if torch.is_tensor(place) else place.weight
    # GPT-2's Conv1D is a Linear that stores its weight transposed.
    return weight.mT if isinstance(place, Conv1D) else weight


def bias_at(layer: nn.Module, name: str) -> Tensor | None:
    """The bias (outputs,) under a name, if there is one."""
    bias: Tensor | None = getattr(place_at(layer, name), "bias", None)
    return bias


def column(weight: Tensor, neuron: int) -> Tensor:
    """What reads a neuron: (outputs,), a view.

    Neurons of experts are counted one expert after the other.
    """
    expert, inside = divmod(neuron, weight.shape[-1])
    return weight.view(-1, *weight.shape[-2:])[expert, :, inside]


def heads_of(config: PretrainedConfig, family: Family) -> tuple[int, int]:
    """Query heads, and key and value heads."""
    heads: int = config.num_attention_heads
    return heads, config.num_key_value_heads if family.grouped else heads


def read_by_heads(values: Tensor, config: PretrainedConfig, family: Family) -> Tensor:
    """What the query heads (heads * head_dim,) read of value channels (kv_heads * head_dim,)."""
    heads, kv_heads = heads_of(config, family)
    return values.reshape(kv_heads, -1).repeat_interleave(heads // kv_heads, 0).flatten()


def fused_rows(family: Family, rows: int, block: int, heads: int, head_dim: int) -> Tensor:
    """Which of the `rows` of a projection are its block-th block from the end.

    A block is (heads * head_dim,): all keys or all values, in the order of the heads.
    """
    parts = heads if family.interleaved else 1
    width = heads * head_dim // parts
    start = rows // parts - block * width
    assert start >= 0
    return torch.arange(rows).view(parts, -1)[:, start : start + width].flatten()
