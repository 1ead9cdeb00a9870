"""Weights that rest where there is room, and come to the device while a layer computes.

A model that is larger than the device computes one unit at a time: a unit is a decoder layer, or
another module with weights of its own (embedding, final norm, head). Its weights rest in the type
they are stored in: on the device if they fit, else in host memory or in the pages of their files,
which the system reads when they are asked for. While a unit is at work they are on the device, in
float32 unless asked for otherwise. Every forward pass is then one walk through all weights.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from absorb.models.resting.staging import Staging

Edit = Callable[[int], None]
Form = Callable[[nn.Parameter], Tensor]


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
        self.learned: dict[nn.Parameter, Tensor] = {}  # what takes the place of what has come
        self.form: Form = attrgetter("data")  # what is made of a weight that has come
        self.edits: list[Edit] = []  # what is done to a layer besides, whenever it has come
        self.dtype = torch.float32  # that weights come in
        self._settled: dict[int, dict[nn.Parameter, Tensor]] = {}  # and where it rested before
        self._resting: dict[nn.Parameter, Tensor] = {}
        self._users: Counter[nn.Module] = Counter()
        self._stage: Staging | None = None
        self._index = {layer: index for index, layer in enumerate(layers)}
        # Autocast keeps a copy of every weight that takes a gradient, as long as it lasts.
        model.requires_grad_(False)
        self.units = units_of(model, layers)
        self.ends = self.units[: -len(layers)]  # what has weights outside of the layers
        owners: dict[nn.Parameter, nn.Module] = {}
        for unit in self.units:
            for parameter in unit.parameters():
                owners.setdefault(parameter, unit)
        # A tied head comes and goes with the embedding.
        self._first = {u: next((owners[p] for p in u.parameters()), u) for u in self.units}
        for unit in self.units:
            unit.register_forward_pre_hook(lambda unit, _: self._fetch(unit))
            unit.register_forward_hook(lambda unit, *_: self._leave(unit), always_call=True)
        self._place_buffers(device)
        self._pin_ends()

    def hold(self) -> None:
        """Let the weights rest on the device, in the types they are stored in."""
        for parameter in self.model.parameters():
            resting = parameter.data
            if self.device.type == "cuda" and resting.device.type == "cpu":
                resting = resting.pin_memory()  # a GPU takes it from there twenty times as fast
            parameter.data = resting.to(self.device)

    def at_hand(self, layer: int) -> dict[str, Tensor]:
        """The weights of a layer at work, by their names in it, in the types they rest in."""
        return {
            name: p.detach().to("cpu", self._resting[p].dtype).contiguous()
            for name, p in self.layers[layer].named_parameters()
        }

    def settle(self, layer: int, file: Path) -> None:
        """Let a layer be what a file holds from now on, which is what `at_hand` gave.

        It rests on the device where it did before, and else in the file.
        """
        with self.fetched(self.layers[layer]), safe_open(file, "pt") as content:
            named = list(self.layers[layer].named_parameters())
            self._settled[layer] = {p: self._resting[p] for _, p in named}
            for name, parameter in named:
                before = self._resting[parameter]
                self._resting[parameter] = content.get_tensor(name).to(before.device)

    def unsettle(self) -> None:
        """Let all layers be again what they were before they settled."""
        for tensors in self._settled.values():
            for parameter, tensor in tensors.items():
                parameter.data = tensor
        self._settled.clear()
        if self._stage is not None:
            self._stage.forget()

    @contextmanager
    def fetched(self, unit: nn.Module) -> Iterator[None]:
        """The weights of a unit at hand, as they are while it is at work."""
        try:
            self._fetch(unit)
            yield
        finally:
            self._leave(unit)

    @contextmanager
    def arriving_in(self, dtype: torch.dtype) -> Iterator[None]:
        """All weights in another type for a while, where nothing is folded into them."""
        self.dtype, before = dtype, self.dtype
        try:
            yield
        finally:
            self.dtype = before

    @contextmanager
    def held(self, form: Form) -> Iterator[None]:
        """All weights on the device for a while, each in the `form` that is made of it there.

        Then a pass may have gradients.
        """
        with ExitStack() as stack:
            for unit in self.units:
                stack.enter_context(self.fetched(unit))
                for parameter in unit.parameters():
                    parameter.data = form(parameter)
            yield

    def _place_buffers(self, device: torch.device) -> None:
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
            exact = getattr(module, "scalar_embed_scale", None)  # Gemma's
            if exact is not None:  # in the type of the files it is rounded
                module._buffers["embed_scale"] = torch.tensor(exact, device=device)

    def _pin_ends(self) -> None:
        """Page-lock what is asked for in every pass: a GPU takes it twenty times as fast."""
        for unit in self.ends if self.device.type == "cuda" else ():
            for parameter in unit.parameters():
                if parameter.device.type == "cpu" and not parameter.is_pinned():
                    parameter.data = parameter.data.pin_memory()

    @torch.no_grad()
    def _fetch(self, unit: nn.Module) -> None:
        unit = self._first[unit]
        self._users[unit] += 1
        if self._users[unit] > 1:
            return
        layer = self._index.get(unit)
        staging = self._staging if layer is not None else None
        staged = {} if staging is None or layer is None else staging.take(layer)
        for parameter in self._weights_of(unit):
            self._resting[parameter] = parameter.data
            parameter.data = self._arrived(parameter.data, staged.get(parameter))
        if staging is not None and layer is not None:
            staging.taken(layer)
        # A pass may take its products in bfloat16; what is folded is as exact as where it stays.
        with torch.autocast(self.device.type, enabled=False):
            self._change(unit, layer)

    def _arrived(self, resting: Tensor, staged: Tensor | None) -> Tensor:
        """A weight on the device; no name here keeps what came until it is changed further."""
        here = resting if staged is None else staged
        there = here.to(self.device, non_blocking=staged is not None)
        # Types are changed on the device: what is smaller arrives sooner.
        return there.to(self.dtype, copy=there is resting)

    def _change(self, unit: nn.Module, layer: int | None) -> None:
        """Make what has come what the model has there."""
        if layer is None:
            if self.fold_end is not None:
                self.fold_end(unit)
        elif self.fold is not None and layer not in self._settled:
            self.fold(layer)
        for parameter in self._weights_of(unit):
            if parameter in self.learned:
                parameter.copy_(self.learned[parameter])
            parameter.data = self.form(parameter)
        if layer is not None:
            for edit in self.edits:
                edit(layer)

    def _weights_of(self, first: nn.Module) -> list[nn.Parameter]:
        """Those of a unit, and of others that are tied to it."""
        units = [unit for unit in self.units if self._first[unit] is first]
        return list(dict.fromkeys(p for unit in units for p in unit.parameters()))

    @property
    def _staging(self) -> Staging | None:
        """Where weights wait for the GPU: none where it has them, or there is none."""
        here = next(self.layers[0].parameters()).device
        if self.device.type != "cuda" or here.type == "cuda":
            return None
        if self._stage is None:
            with torch.inference_mode(False):  # or nobody else may fill it
                self._stage = Staging(self.layers)
        return self._stage

    def _leave(self, unit: nn.Module) -> None:
        unit = self._first[unit]
        self._users[unit] -= 1
        if not self._users[unit]:
            for parameter in self._weights_of(unit):
                if parameter in self._resting:  # all, unless memory ran out on their way
                    parameter.data = self._resting.pop(parameter)
