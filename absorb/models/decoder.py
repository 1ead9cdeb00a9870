"""Linear, Conv1D, router and expert tensors alike: rows give outputs, columns read inputs."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from absorb.models.family import Family


def layers_of(model: PreTrainedModel, family: Family) -> list[Any]:
    """The decoder layers, first to last."""
    return list(model.get_submodule(family.layers).children())


def each_layers(model: PreTrainedModel, family: Family, name: str) -> list[Any]:
    """The submodule `name` of every decoder layer, first to last."""
    return [layer.get_submodule(name) for layer in layers_of(model, family)]


def each_name(model: PreTrainedModel, family: Family, name: str) -> list[str]:
    """The name in the model of the submodule `name` of every decoder layer."""
    return [f"{family.layers}.{index}.{name}" for index in range(len(layers_of(model, family)))]


def rotating_of(model: PreTrainedModel, family: Family) -> list[Any]:
    """The attention of every decoder layer that rotates its keys (RoPE)."""
    if family.positions is not None:
        return []
    modules = each_layers(model, family, family.attention)
    named = family.rotation
    return [m for m in modules if named is None or getattr(m, named) not in (None, False)]


def linears_of(model: PreTrainedModel, family: Family) -> dict[str, Any]:
    """Every Linear or Conv1D inside a decoder layer, under its name in the model."""
    stem = f"{family.layers}."
    return {n: m for n, m in model.named_modules() if n.startswith(stem) and is_linear(m)}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


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


def experts_of(model: PreTrainedModel, family: Family) -> dict[tuple[str, str], Any]:
    """The module of experts of every layer, under the names of its `up` and `down` in the model.

    Empty where `down` belongs to a Linear.
    """
    layers = layers_of(model, family)
    if family.up is None or not torch.is_tensor(place_at(layers[0], family.down)):
        return {}
    names = zip(
        each_name(model, family, family.up), each_name(model, family, family.down), strict=True
    )
    return dict(zip(names, (module_at(layer, family.down) for layer in layers), strict=True))


def fused_rows_of(
    student: PreTrainedModel,
    family: Family,
    layer: nn.Module,
    name: str,
    vectors: Tensor,
    block: int = 1,
) -> Tensor:
    """The rows of a projection that give a vector for every KV head: (kv_heads, head_dim)."""
    outputs = len(weight_at(layer, name))
    return fused_rows(family, outputs, block, *vectors.shape).to(student.device)


def divide_output(
    layer: nn.Module, name: str, scale: Tensor, rows: Tensor | slice | None = None
) -> None:
    """Divide what a norm or matrix gives by `scale`: in the rows given, or its last ones."""
    module = place_at(layer, name)
    if hasattr(module, "output_scale"):
        module.output_scale /= scale
        return
    rows = slice(-scale.shape[-1], None) if rows is None else rows
    if is_norm(layer, name):
        module.weight /= scale
    else:
        weight_at(layer, name)[..., rows, :] /= scale[..., None]
    bias = bias_at(layer, name)
    if bias is not None:
        bias[rows] /= scale


def multiply_input(layer: nn.Module, name: str, scale: Tensor) -> None:
    if is_norm(layer, name):
        place_at(layer, name).input_scale *= scale
    else:
        weight_at(layer, name).mul_(scale[..., None, :])
