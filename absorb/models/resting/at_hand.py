"""Layers of a model that is all there, trained one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


class AtHand:
    """What `Streaming` is to a model whose weights stream, as far as training layers needs it.

    What is done to a layer while it is `fetched` is undone afterwards, unless it settles.
    """

    def __init__(self, layers: list[Any]):
        self.layers = layers
        self._settled: list[dict[nn.Parameter, Tensor]] = []  # what they were before

    @contextmanager
    def fetched(self, unit: nn.Module) -> Iterator[None]:
        before = _copies(unit)
        try:
            yield
        finally:
            _restore(before)

    def at_hand(self, layer: int) -> dict[str, Tensor]:
        """The weights of a layer, by their names in it."""
        named = self.layers[layer].named_parameters()
        return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in named}

    @torch.no_grad()
    def settle(self, layer: int, file: Path) -> None:
        """Let a layer be what a file holds from now on, which is what `at_hand` gave."""
        self._settled.append(_copies(self.layers[layer]))
        with safe_open(file, "pt") as content:
            for name, parameter in self.layers[layer].named_parameters():
                parameter.copy_(content.get_tensor(name))

    def unsettle(self) -> None:
        """Let all layers be again what they were before they settled."""
        for before in self._settled:
            _restore(before)
        self._settled.clear()


def _copies(unit: nn.Module) -> dict[nn.Parameter, Tensor]:
    return {parameter: parameter.detach().clone() for parameter in unit.parameters()}


@torch.no_grad()
def _restore(before: dict[nn.Parameter, Tensor]) -> None:
    for parameter, tensor in before.items():
        parameter.copy_(tensor)
