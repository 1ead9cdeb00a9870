"""The prefix as constant keys and values: what the teacher attends to, exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from absorb.fold.sinks.attention import layer_attention
from absorb.fold.sinks.forms import KeySink
from absorb.models.decoder import Decoder
from absorb.runtime.hooks import replacing_attention
from absorb.runtime.reading import new_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """What attention sees of the prefix tokens: constants, because nothing comes before them.

    The keys of all layers are rotated to positions from `start` on, so text that is read with them
    starts at `start` + tokens.
    """

    tokens: Tensor
    start: int
    layers: tuple[KeySink | None, ...]  # None where there is no attention

    def positions(self, length: int) -> Tensor:
        """The positions (1, length) of text read after the prefix."""
        start = self.start + len(self.tokens)
        device = next(layer.keys.device for layer in self.layers if layer)
        return torch.arange(start, start + length, device=device)[None]


@torch.no_grad()
def prefix_of(decoder: Decoder, tokens: Tensor, start: int = 0) -> Prefix:
    """The keys and values that the prefix `tokens` (n,) has in every layer, read from `start` on.

    With RoPE a start of -n is no mistake: only distances count.
    """
    cache, arguments = new_cache(decoder.model)
    positions = torch.arange(start, start + len(tokens), device=decoder.device)[None]
    decoder.model.base_model(tokens[None].to(decoder.device), position_ids=positions, **arguments)
    held: list[Any] = cache.layers
    layers: list[KeySink | None] = [None] * len(decoder.layers)
    for index in decoder.having(decoder.family.attention):
        keys, values = held[index].keys[0], held[index].values[0]
        layers[index] = KeySink(keys=keys.clone(), values=values.clone())
    return Prefix(tokens=tokens, start=start, layers=tuple(layers))


@contextmanager
def prefixed(decoder: Decoder, prefix: Prefix) -> Iterator[None]:
    """Let a stock model attend to the prefix without reading it: the teacher, exactly.

    Text must be read at `prefix.positions`.
    """
    known = [layer for layer in prefix.layers if layer]
    layers = dict(zip(decoder.each(decoder.family.attention), known, strict=True))

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        layer = layers[module]
        scene = layer_attention(module, None, *args, **kwargs)
        return heads_last(scene.with_prefix(layer.keys, layer.values)), None

    with replacing_attention(decoder.model, attend):
        yield


def heads_last(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous()
