"""Text on its way through a model layer by layer, all of it through one layer before the next.

So every layer is asked for once, however much text there is. That is how a model is read whose
weights stream; while they rest at hand, text is read a few rows at once by the model itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from absorb.models.decoder import Decoder
from absorb.runtime.precision import free_memory
from absorb.runtime.reading import Subject

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments by place and by name
_SHARE = 0.1  # of the free memory of the device, that streams may wait in


def read(decoder: Decoder, parts: Sequence[Tensor], label: str) -> None:
    """Let the layers of a model read parts of text (rows, length), for those that watch them."""
    if decoder.streaming is not None:
        Walk(decoder, parts).through(label)
        return
    for part in tqdm(parts, desc=label, unit="batch"):
        decoder.model.base_model(part.to(decoder.device), use_cache=False)


def logits(
    subject: Subject,
    rows: Tensor,
    at_once: int,
    label: str,
    watching: Callable[[], AbstractContextManager[object]] = nullcontext,
    beside: bool = False,
) -> Iterator[Tensor]:
    """Logits (few, length, vocabulary) of text (rows, length), without those of the lead.

    `watching` is entered while the layers read, and not in between. `beside` others there may be no
    room for more heads than one, so a head that streams comes and goes with every part. Nothing
    here keeps the logits of a part while those of the next are made.
    """
    decoder, parts = subject.decoder, rows.split(at_once)
    if decoder.streaming is None:
        for part in tqdm(parts, desc=label, unit="batch", disable=not label):
            with watching():
                given = [subject.logits(part)]
            yield given.pop()
        return
    with watching():
        walk = Walk(decoder, [subject.led(part) for part in parts])
        walk.through(label)
    with nullcontext() if beside else walk.ended():
        for place in range(len(parts)):
            yield walk.logits(place)[:, len(subject.lead) :]


class Walk:
    """What goes into the layer that comes next, of every part (rows, length) of a text.

    It waits in the type `dtype`, or else in the one that the model computes it in.
    """

    def __init__(self, decoder: Decoder, parts: Sequence[Tensor], dtype: torch.dtype | None = None):
        self.decoder, self.dtype = decoder, dtype
        self._others: int | None = None  # what a layer gives besides the stream; None: no tuple
        size = (dtype or torch.float32).itemsize * decoder.config.hidden_size
        size *= sum(part.numel() for part in parts)
        self._stays = size < _SHARE * free_memory(decoder.device)
        self.calls: list[list[Call]] = []  # of every part, by layer: what is given besides
        self.streams: list[Tensor] = []  # (rows, length, hidden)
        self._passed = 0  # rows that have gone through a layer at which memory ran out
        with self._beginning():
            for part in parts:
                calls, stream = self._begin(part)
                self.calls.append(calls)
                self.streams.append(self._room_for(stream).copy_(stream))

    def split(self, rows: int) -> None:
        """Let no part have more rows than that from now on, wherever all of them are.

        What layers are given besides the stream depends on places alone, so the embedding is not
        asked for: memory is short where this is called.
        """
        self.streams = [piece for stream in self.streams for piece in stream.split(rows)]
        places = range(len(self.streams))
        self.calls = [self._noted(inputs_embeds=self.waiting(place))[0] for place in places]

    def _beginning(self) -> AbstractContextManager[None]:
        return self._at_hand(lambda unit: unit is self.decoder.model.get_input_embeddings())

    def _begin(self, part: Tensor) -> tuple[list[Call], Tensor]:
        """What each layer is given of a part besides the stream, and the stream of the first."""
        tokens = part.to(self.decoder.device)
        try:
            return self._noted(input_ids=tokens)
        except ValueError:  # the model unpacks what a layer gives
            self._others = 1
            return self._noted(input_ids=tokens)

    @torch.no_grad()
    def _noted(self, **given: Tensor) -> tuple[list[Call], Tensor]:
        """The same of tokens (`input_ids`) or of their embedding (`inputs_embeds`)."""
        calls: list[Call] = []
        beginning: list[Tensor] = []

        def note(layer: int, stream: Tensor, call: Call) -> Any:
            if layer == 0:
                beginning.append(stream)
            calls.append(call)
            if layer == len(self.decoder.layers) - 1:
                raise Seen
            return self._formed(stream)

        with layers_as(self.decoder, note), suppress(Seen):
            self.decoder.model(**given, use_cache=False)
        self._computed = beginning[0].dtype
        return calls, beginning[0]

    def _room_for(self, stream: Tensor) -> Tensor:
        dtype = self.dtype or stream.dtype
        if self._stays or stream.device.type != "cuda":
            return torch.empty_like(stream, dtype=dtype)
        return torch.empty(stream.shape, dtype=dtype, pin_memory=True)

    def waiting(self, place: int) -> Tensor:
        """What goes into the next layer of a part: on the device, in the type of the model."""
        stream = self.streams[place].to(self.decoder.device, non_blocking=True)
        return stream.to(self._computed)

    def given(self, layer: int, place: int) -> Tensor:
        """What a layer makes of a part, on the device, while its weights are there."""
        args, options = self.calls[place][layer]
        stream = self.waiting(place)
        out = self.decoder.layers[layer](stream, *args, **options)
        self._others = None if torch.is_tensor(out) else len(out) - 1
        found: Tensor = out if self._others is None else out[0]
        return found

    def _formed(self, stream: Tensor) -> Any:
        """A stream as a layer gives it."""
        return _formed(stream, self._others)

    @torch.no_grad()
    def pass_on(self, layer: int) -> None:
        """Let all parts go through a layer. They wait where they waited before.

        Those that have gone through it when memory runs out do not when it is asked for again.
        """
        start = 0
        with self.decoder.fetched(layer):
            for place, stream in enumerate(self.streams):
                if start >= self._passed:
                    stream.copy_(self.given(layer, place), non_blocking=True)
                    self._passed += len(stream)
                start += len(stream)
        self._passed = 0

    def through(self, label: str) -> None:
        """Let all parts go through all layers."""
        layers = range(len(self.decoder.layers))
        for layer in tqdm(layers, desc=label, unit="layer", disable=not label):
            self.pass_on(layer)

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Within it what comes after the layers is at hand."""
        with self._at_hand(lambda unit: unit is not self.decoder.model.get_input_embeddings()):
            yield

    @torch.no_grad()
    def logits(self, place: int) -> Tensor:
        """Logits (rows, length, vocabulary) of a part that has gone through all layers."""
        with self.ended():
            return self.behind(self.waiting(place))

    def behind(self, stream: Tensor) -> Tensor:
        """Logits (rows, few, vocabulary) of a stream (rows, few, hidden) of the last layer."""
        return behind_layers(self.decoder, stream, self._others)

    @contextmanager
    def _at_hand(self, wanted: Callable[[nn.Module], bool]) -> Iterator[None]:
        """The weights of units outside of the layers, lest they come anew for every part."""
        streaming = self.decoder.streaming
        with ExitStack() as stack:
            if streaming is not None:
                for unit in filter(wanted, streaming.ends):
                    stack.enter_context(streaming.fetched(unit))
            yield


def behind_layers(decoder: Decoder, stream: Tensor, others: int | None) -> Tensor:
    """Logits (rows, few, vocabulary) of a stream (rows, few, hidden) that has left the layers.

    A layer of this model gives a tuple with so many `others` behind the stream, or no tuple.
    """
    with layers_as(decoder, lambda *_: _formed(stream, others)):
        found: Tensor = decoder.model(inputs_embeds=stream, use_cache=False).logits
    return found


def _formed(stream: Tensor, others: int | None) -> Any:
    return stream if others is None else (stream, *[None] * others)


@contextmanager
def layers_as(decoder: Decoder, act: Callable[[int, Tensor, Call], Any]) -> Iterator[None]:
    """Let `act` take the place of every layer for a while: of its hooks as well."""
    held = decoder.model.get_submodule(decoder.family.layers)
    names = [name for name, _ in held.named_children()]
    for index, (name, layer) in enumerate(zip(names, decoder.layers, strict=True)):
        held._modules[name] = _InPlaceOf(layer, index, act)
    try:
        yield
    finally:
        for name, layer in zip(names, decoder.layers, strict=True):
            held._modules[name] = layer


class _InPlaceOf(nn.Module):
    """Stands where a layer was, and has all that a model may ask of it."""

    def __init__(self, layer: nn.Module, index: int, act: Callable[[int, Tensor, Call], Any]):
        super().__init__()
        self.__dict__["layer"] = layer  # no submodule of this one
        self.index, self.act = index, act

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        return self.act(self.index, hidden_states, (args, options))


class Seen(Exception):  # noqa: N818
    """Ends a pass of which no more is needed."""
