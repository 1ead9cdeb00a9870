"""A model and its places: where each part that a family's entry names is, found once."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from absorb.models.family import Family
from absorb.models.resting.streaming import Edit, Streaming


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix that text is multiplied by."""
    return isinstance(module, nn.Linear | Conv1D)


@dataclass(frozen=True, slots=True)
class Site:
    """A place that a family names: a norm, a Linear, a Conv1D, a router or the tensor of experts.

    In a matrix rows give outputs and columns read inputs, however it is stored. Tensors are looked
    up when they are asked for, so a site stays true where a layer's weights are loaded or replaced.
    """

    module: Any  # that is called, and that hooks go on
    parameter: str = "weight"
    offset: float = 0.0  # what a norm adds to its weight

    @property
    def is_norm(self) -> bool:
        weight = getattr(self.module, self.parameter, None)
        return weight is None or weight.ndim == 1

    @property
    def is_of_experts(self) -> bool:
        """Whether it is one tensor with a matrix for every expert."""
        return self.parameter != "weight"

    @property
    def weight(self) -> Tensor:
        """The weight (outputs, inputs), or (experts, outputs, inputs); of no norm.

        A view: what is written to it is written to the model.
        """
        weight: Tensor = getattr(self.module, self.parameter)
        # GPT-2's Conv1D is a Linear that stores its weight transposed.
        return weight.mT if isinstance(self.module, Conv1D) else weight

    @property
    def bias(self) -> Tensor | None:
        """(outputs,), if there is one."""
        return None if self.is_of_experts else getattr(self.module, "bias", None)

    def column(self, neuron: int) -> Tensor:
        """What reads a neuron: (outputs,), a view.

        Neurons of experts are counted one expert after the other.
        """
        weight = self.weight
        expert, inside = divmod(neuron, weight.shape[-1])
        return weight.view(-1, *weight.shape[-2:])[expert, :, inside]

    def divide_output(self, scale: Tensor, rows: Tensor | slice | None = None) -> None:
        """Divide what a norm or matrix gives by `scale`: in the rows given, or its last ones.

        The gate of a norm reads what that gives, and stays as wide open as it was.
        """
        if hasattr(self.module, "gate_in"):
            self.module.gate_in *= scale
        if hasattr(self.module, "output_scale"):
            self.module.output_scale /= scale
            return
        rows = slice(-scale.shape[-1], None) if rows is None else rows
        if self.is_norm:
            self.module.weight += self.offset
            self.module.weight /= scale
            self.module.weight -= self.offset
        else:
            self.weight[..., rows, :] /= scale[..., None]
        bias = self.bias
        if bias is not None:
            bias[rows] /= scale

    def multiply_input(self, scale: Tensor) -> None:
        """Let a norm or matrix read its input times `scale`."""
        if self.is_norm:
            self.module.input_scale *= scale
        else:
            self.weight.mul_(scale[..., None, :])


def site_at(root: nn.Module, name: str) -> Site:
    """The site under a name, relative to a model or a decoder layer."""
    owner, _, last = name.rpartition(".")
    holder = root.get_submodule(owner)
    place = getattr(holder, last)
    return Site(holder, last) if torch.is_tensor(place) else Site(place)


class Decoder:
    """A decoder-only model, and its family: what says where its parts are.

    With `streaming` the weights of a layer are at hand only while it is at work, or `fetched`.
    Where it `is_part` of a model that reads pictures, these enter the stream beside the embedding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        streaming: Streaming | None = None,
        is_part: bool = False,
    ):
        self.model, self.family, self.streaming = model, family, streaming
        self.is_part = is_part
        self._sites: dict[str, Site] = {}

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.streaming.device if self.streaming else self.model.device

    @cached_property
    def layers(self) -> list[Any]:
        """First to last."""
        return list(self.model.get_submodule(self.family.layers).children())

    def has(self, layer: int, name: str) -> bool:
        """Whether a layer has the place `name`, as all have that are not of `some` layers only."""
        if name not in self.family.some:
            return True
        place: Any = self.layers[layer]
        for part in name.split("."):
            place = getattr(place, part, None)
        return place is not None

    def having(self, name: str) -> list[int]:
        """The layers that have the place `name`."""
        return [index for index in range(len(self.layers)) if self.has(index, name)]

    def each(self, name: str) -> list[Any]:
        """The submodule `name` of every layer that has it, first to last."""
        return [self.layers[index].get_submodule(name) for index in self.having(name)]

    def names(self, name: str) -> list[str]:
        """The name in the model of the place `name` of every layer that has it."""
        return [f"{self.family.layers}.{index}.{name}" for index in self.having(name)]

    def down(self, layer: int) -> Site:
        """What reads the neurons of a layer that may be spike neurons."""
        dense = self.family.dense
        names = [self.family.down, *(dense[1:] if dense else ())]
        return self.site(layer, next(name for name in names if self.has(layer, name)))

    @property
    def rotating(self) -> list[Any]:
        """The attention of every layer that rotates its keys (RoPE), where they may get a bias."""
        if self.family.positions is not None or self.family.key is None:
            return []
        named = self.family.rotation
        modules = self.each(self.family.attention)
        return [m for m in modules if named is None or getattr(m, named) not in (None, False)]

    def layer_of(self, name: str) -> int:
        """In which layer a place is that has this name in the model."""
        return int(name.removeprefix(f"{self.family.layers}.").partition(".")[0])

    def sites(self, name: str) -> list[Site]:
        """The site `name` of every layer that has it, first to last."""
        return [self.site(index, name) for index in self.having(name)]

    def site(self, layer: int, name: str) -> Site:
        return self.named(f"{self.family.layers}.{layer}.{name}")

    def named(self, name: str) -> Site:
        """The site under a name in the model."""
        if name not in self._sites:
            site = site_at(self.model, name)
            offset = self.family.norm_offset if site.is_norm else 0.0
            self._sites[name] = replace(site, offset=offset)
        return self._sites[name]

    @cached_property
    def linears(self) -> dict[str, Any]:
        """Every Linear or Conv1D inside a layer, under its name in the model."""
        stem = f"{self.family.layers}."
        known = self.model.named_modules()
        return {name: m for name, m in known if name.startswith(stem) and is_linear(m)}

    @cached_property
    def experts(self) -> dict[tuple[str, str], Any]:
        """The module of experts of every layer with any, under the names of its `up` and `down`.

        Empty where `down` belongs to a Linear.
        """
        up, down = self.family.up, self.family.down
        if up is None or not self.sites(down)[0].is_of_experts:
            return {}
        names = zip(self.names(up), self.names(down), strict=True)
        return dict(zip(names, (site.module for site in self.sites(down)), strict=True))

    def expert_weights(self, layer: int) -> list[nn.Parameter]:
        """The weights of the experts of a layer; none where it has no experts."""
        known = {id(module) for module in self.experts.values()}
        inside = [part for part in self.layers[layer].modules() if id(part) in known]
        return [weight for part in inside for weight in part.parameters()]

    def fetched(self, layer: int) -> AbstractContextManager[None]:
        """The weights of a layer at hand, to be looked at."""
        streaming = self.streaming
        return streaming.fetched(self.layers[layer]) if streaming else nullcontext()

    @contextmanager
    def edited(self, edit: Edit, touched: Callable[[int], Iterable[Tensor]]) -> Iterator[None]:
        """Every layer as `edit` leaves it for a while, which changes the weights `touched`."""
        if self.streaming:
            self.streaming.edits.append(edit)
            try:
                yield
            finally:
                self.streaming.edits.remove(edit)
            return
        indices = range(len(self.layers))
        weights = [weight.detach() for index in indices for weight in touched(index)]
        before = [weight.clone() for weight in weights]
        try:
            for index in indices:
                edit(index)
            yield
        finally:
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads, and key and value heads."""
        heads: int = self.config.num_attention_heads
        return heads, self.config.num_key_value_heads if self.family.grouped else heads

    def read_by_heads(self, values: Tensor) -> Tensor:
        """What query heads (heads * head_dim,) read of value channels (kv_heads * head_dim,)."""
        heads, kv_heads = self.heads
        return values.reshape(kv_heads, -1).repeat_interleave(heads // kv_heads, 0).flatten()

    def rows_of(self, site: Site, vectors: Tensor, block: int = 1) -> Tensor:
        """The rows of a projection that give a vector for every KV head: (kv_heads * head_dim,).

        vectors is (kv_heads, head_dim). They are the block-th block of that size from the end, in
        a projection that gives more than values.
        """
        heads, head_dim = vectors.shape
        rows = len(site.weight)
        parts = heads if self.family.interleaved else 1
        width = heads * head_dim // parts
        start = rows // parts - block * width
        assert start >= 0
        every = torch.arange(rows, device=self.device).view(parts, -1)
        return every[:, start : start + width].flatten()
