"""Weights that stay on the device: what is tried with a layer leaves no trace until it settles."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Resident:
    """The layers of a model that is held whole, as `Streaming` has those of one that is not."""

    def __init__(self, layers: list[Any]):
        self.layers = layers
        self._before: dict[int, dict[str, Tensor]] = {}  # what layers were that have settled

    @torch.no_grad()
    @contextmanager
    def fetched(self, unit: nn.Module) -> Iterator[None]:
        """The weights of a layer, which are afterwards what they were before."""
        before = _copied(unit)
        try:
            with torch.enable_grad():
                yield
        finally:
            _write(unit, before)

    def at_hand(self, layer: int) -> dict[str, Tensor]:
        """The weights of a layer as they are now, by their names in it."""
        return {name: tensor.cpu() for name, tensor in _copied(self.layers[layer]).items()}

    def settle(self, layer: int, file: Path) -> None:
        """Let a layer be what a file holds."""
        self._before[layer] = _copied(self.layers[layer])
        _write(self.layers[layer], load_file(file))

    def unsettle(self) -> None:
        """Let all layers be again what they were before they settled."""
        for layer, tensors in self._before.items():
            _write(self.layers[layer], tensors)
        self._before.clear()


def _copied(unit: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in unit.named_parameters()}


@torch.no_grad()
def _write(unit: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, weight in unit.named_parameters():
        weight.copy_(tensors[name])
