"""Weights that rest where there is room, and come to the device while a layer computes.

A model that is larger than the device computes one unit at a time: a unit is a decoder layer, or
another module with weights of its own (embedding, final norm, head). Its weights rest in the type
they are stored in: on the device if they fit, else in host memory or in the pages of their files,
which the system reads when they are asked for. While a unit is at work they are float32 on the
device. Every forward pass is then one walk through all weights.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Edit = Callable[[int], None]


def units_of(model: nn.Module, layers: list[Any]) -> list[nn.Module]:
    """The layers, and what has weights of its own outside of them."""
    inside = {module for layer in layers for module in layer.modules()}
    others = [m for m in model.modules() if m not in inside and m._parameters]
    return [*others, *layers]


class Streaming:
    """Lets a model compute on `device` without room for it there; for passes without gradients."""

    def __init__(self, model: nn.Module, layers: list[Any], device: torch.device):
        self.model, self.layers, self.device = model, layers, device
        self.fold: Edit | None = None  # what makes a student's layer of the original's
        self.fold_end: Callable[[Any], None] | None = None  # and its other units likewise
        self.edits: list[Edit] = []  # what is done to a layer besides, whenever it has come
        self._settled: dict[int, dict[nn.Parameter, Tensor]] = {}  # and where it rested before
        self._resting: dict[nn.Parameter, Tensor] = {}
        self._users: Counter[nn.Module] = Counter()
        self._index = {layer: index for index, layer in enumerate(layers)}
        for unit in self.units:
            unit.register_forward_pre_hook(lambda unit, _: self._fetch(unit))
            unit.register_forward_hook(lambda unit, *_: self._leave(unit), always_call=True)
        self._place_buffers(device)

    @property
    def units(self) -> list[nn.Module]:
        return units_of(self.model, self.layers)

    def hold(self) -> None:
        """Let the weights rest on the device, in the types they are stored in."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(self.device)

    def settle(self, layer: int, file: Path) -> None:
        """Let a layer rest as it is at hand from now on: in a file, in the types it rested in."""
        unit = self.layers[layer]
        self._settled[layer] = {p: self._resting[p] for p in unit.parameters()}
        named = {
            name: p.detach().to("cpu", self._resting[p].dtype).contiguous()
            for name, p in unit.named_parameters()
        }
        save_file(named, file)
        with safe_open(file, "pt") as content:
            for name, parameter in unit.named_parameters():
                self._resting[parameter] = content.get_tensor(name)

    def unsettle(self) -> None:
        """Let all layers be again what they were before they settled."""
        for tensors in self._settled.values():
            for parameter, tensor in tensors.items():
                parameter.data = tensor
        self._settled.clear()

    def move(self, device: torch.device) -> None:
        """Let the model compute elsewhere from now on."""
        self.device = device
        self._place_buffers(device)

    @contextmanager
    def fetched(self, unit: nn.Module) -> Iterator[None]:
        """The weights of a unit at hand, as they are while it is at work."""
        self._fetch(unit)
        try:
            yield
        finally:
            self._leave(unit)

    def _place_buffers(self, device: torch.device) -> None:
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    @torch.no_grad()
    def _fetch(self, unit: nn.Module) -> None:
        self._users[unit] += 1
        if self._users[unit] > 1:
            return
        for parameter in unit.parameters():
            self._resting[parameter] = parameter.data
            parameter.data = parameter.data.to(self.device, torch.float32, copy=True)
        if unit in self._index:
            self._edit(self._index[unit])
        elif self.fold_end is not None:
            self.fold_end(unit)

    def _edit(self, layer: int) -> None:
        if self.fold is not None and layer not in self._settled:
            self.fold(layer)
        for edit in self.edits:
            edit(layer)

    def _leave(self, unit: nn.Module) -> None:
        self._users[unit] -= 1
        if not self._users[unit]:
            for parameter in unit.parameters():
                parameter.data = self._resting.pop(parameter)
