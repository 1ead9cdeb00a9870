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
    layers: tuple[KeySink, ...]

    def positions(self, length: int) -> Tensor:
        """The positions (1, length) of text read after the prefix."""
        start = self.start + len(self.tokens)
        return torch.arange(start, start + length, device=self.layers[0].keys.device)[None]


@torch.no_grad()
def prefix_of(decoder: Decoder, tokens: Tensor, start: int = 0) -> Prefix:
    """The keys and values that the prefix `tokens` (n,) has in every layer, read from `start` on.

    With RoPE a start of -n is no mistake: only distances count.
    """
    cache, arguments = new_cache(decoder.model)
    positions = torch.arange(start, start + len(tokens), device=decoder.device)[None]
    decoder.model.base_model(tokens[None].to(decoder.device), position_ids=positions, **arguments)
    layers: list[Any] = cache.layers
    return Prefix(
        tokens=tokens,
        start=start,
        layers=tuple(
            KeySink(keys=layer.keys[0].clone(), values=layer.values[0].clone()) for layer in layers
        ),
    )


@contextmanager
def prefixed(decoder: Decoder, prefix: Prefix) -> Iterator[None]:
    """Let a stock model attend to the prefix without reading it: the teacher, exactly.

    Text must be read at `prefix.positions`.
    """
    layers = {m: i for i, m in enumerate(decoder.each(decoder.family.attention))}

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        layer = prefix.layers[layers[module]]
        scene = layer_attention(module, None, *args, **kwargs)
        return heads_last(scene.with_prefix(layer.keys, layer.values)), None

    with replacing_attention(decoder.model, attend):
        yield


def heads_last(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous()
