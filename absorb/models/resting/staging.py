"""Weights on their way to a GPU: copied to page-locked memory while the layer before computes.

A GPU takes them from there at the speed of its bus; from the pages of a file at a twentieth of it.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

_SLOTS = 2  # one that the GPU takes from, one that is being filled
_ALIGNMENT = 256  # bytes


class Staging:
    """The next layer's weights, in the order in which layers are asked for."""

    def __init__(self, layers: list[nn.Module]):
        self._layers = layers
        size = max(sum(map(_room, layer.parameters())) for layer in layers)
        self._slots = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(_SLOTS)]
        self._taken: list[Any] = [torch.cuda.Event() for _ in range(_SLOTS)]
        self._staged: dict[int, Future[dict[nn.Parameter, Tensor]]] = {}
        self._worker = ThreadPoolExecutor(1)

    def take(self, layer: int) -> dict[nn.Parameter, Tensor]:
        """The weights of a layer in page-locked memory; those of the next are sent for.

        The caller copies them before anything else is asked for, and then calls `taken`.
        """
        found = self._ask(layer).result()
        del self._staged[layer]
        return found

    def taken(self, layer: int) -> None:
        """The GPU has been told to copy the weights of this layer."""
        self._taken[layer % _SLOTS].record()
        if layer + 1 < len(self._layers):
            self._ask(layer + 1)

    def forget(self) -> None:
        """Weights rest elsewhere from now on."""
        for future in self._staged.values():
            future.result()
        self._staged.clear()

    def _ask(self, layer: int) -> Future[dict[nn.Parameter, Tensor]]:
        if layer not in self._staged:
            slot = layer % _SLOTS
            for other in [one for one in self._staged if one % _SLOTS == slot]:
                del self._staged[other]  # it was never fetched, and is overwritten now
            resting = {p: p.data for p in self._layers[layer].parameters()}
            self._staged[layer] = self._worker.submit(self._fill, slot, resting)
        return self._staged[layer]

    def _fill(self, slot: int, resting: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        self._taken[slot].synchronize()
        place, filled = 0, {}
        for parameter, tensor in resting.items():
            flat = self._slots[slot][place : place + tensor.nbytes]
            filled[parameter] = flat.view(tensor.dtype).view(tensor.shape)
            filled[parameter].copy_(tensor)
            place += _room(tensor)
        return filled


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
