"""What the prefix does to every attention head, as sink logits, sink values and key biases.

With a prefix, a head gives `(1 - p) o + p v`, where o is its output on the text alone, v the
prefix value, and `p = sigmoid(l - lse)` with l the log-sum-exp of the prefix logits and lse that
of the text. A sink logit s replaces l, which depends on the query, by a constant. What of the
query-dependence is lost can be had back: subtracting the prefix key k from every key leaves all
ratios of weights alone and makes l zero. RoPE turns a key with its position and so forbids the
exact shift, but on the slowly turning channels a bias on k_proj comes close to it. Without RoPE
nothing of a prefix of one token is lost.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.device import hastened
from absorb.families import Family
from absorb.fit import sink_of
from absorb.forms import KeySink, LayerSink
from absorb.scene import rotations_of, scene_of
from absorb.watch import attending, each_layers, remembering


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
def prefix_of(model: PreTrainedModel, tokens: Tensor, start: int = 0) -> Prefix:
    """The keys and values that the prefix `tokens` (n,) has in every layer, read from `start` on.

    With RoPE a start of -n is no mistake: only distances count.
    """
    cache, arguments = remembering(model)
    positions = torch.arange(start, start + len(tokens), device=model.device)[None]
    model.base_model(tokens[None].to(model.device), position_ids=positions, **arguments)
    layers: list[Any] = cache.layers
    return Prefix(
        tokens=tokens,
        start=start,
        layers=tuple(
            KeySink(keys=layer.keys[0].clone(), values=layer.values[0].clone()) for layer in layers
        ),
    )


@contextmanager
def prefixed(model: PreTrainedModel, family: Family, prefix: Prefix) -> Iterator[None]:
    """Let a stock model attend to the prefix without reading it: the teacher, exactly.

    Text must be read at `prefix.positions`.
    """
    layers = {m: i for i, m in enumerate(each_layers(model, family, family.attention))}

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        layer = prefix.layers[layers[module]]
        scene = scene_of(module, None, *args, **kwargs)
        return _heads_last(scene.with_prefix(layer.keys, layer.values)), None

    with attending(model, attend):
        yield


@torch.no_grad()
def fit_sinks(
    model: PreTrainedModel, family: Family, prefix: Prefix, tokens: Tensor, most: float = inf
) -> list[LayerSink]:
    """Each layer's sink, fitted to what the prefix does to its attention on text (rows, length).

    One forward pass: each layer is fitted on what the layers before it give with their sinks in
    place, so later layers make up for what earlier ones could not match. A layer whose logits leave
    out more than the share `most` keeps the prefix's keys, if these leave out less. Linears are
    hastened; attention is not, as logits in the hundreds would be rounded to whole numbers.
    """
    modules = each_layers(model, family, family.attention)
    sinks: list[LayerSink] = []
    bar = tqdm(total=len(modules), desc="fitting sinks", unit="layer")

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        with torch.autocast(model.device.type, enabled=False):
            scene = scene_of(module, rotations.get(module), *args, **kwargs)
            layer = prefix.layers[len(sinks)]
            sink, out = sink_of(scene, layer, family.key is not None, most)
        sinks.append(sink)
        bar.update()
        return _heads_last(out), None

    turned = modules if family.positions is None else []
    with bar, attending(model, attend), rotations_of(turned) as rotations:
        positions = prefix.positions(tokens.shape[1])
        with hastened(model.device):
            model.base_model(tokens.to(model.device), position_ids=positions, use_cache=False)
    return sinks


def _heads_last(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous()
