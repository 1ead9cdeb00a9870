"""What the prefix does to every attention head, as sink logits, sink values and key biases.

With a prefix, a head gives `(1 - p) o + p v`, where o is its output on the text alone, v the
prefix value, and `p = sigmoid(l - lse)` with l the log-sum-exp of the prefix logits and lse that
of the text. A sink logit s replaces l, which depends on the query, by a constant. What of the
query-dependence is lost can be had back: subtracting the prefix key k from every key leaves all
ratios of weights alone and makes l zero. RoPE turns a key with its position and so forbids the
exact shift, but on the slowly turning channels a bias on k_proj comes close to it. Without RoPE
nothing of a prefix of one token is lost.
"""

from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from absorb.fold.sinks.attention import layer_attention, rotations_of
from absorb.fold.sinks.distances import spread_positions
from absorb.fold.sinks.fit import sink_of
from absorb.fold.sinks.forms import LayerSink
from absorb.fold.sinks.prefix_cache import Prefix, heads_last
from absorb.models.decoder import Decoder
from absorb.runtime.hooks import replacing_attention
from absorb.runtime.precision import autocast_bf16


@torch.no_grad()
def fit_sinks(
    decoder: Decoder, prefix: Prefix, tokens: Tensor, most: float = inf
) -> list[LayerSink | None]:
    """Each layer's sink, fitted to what the prefix does to its attention on text (rows, length).

    One forward pass: each layer is fitted on what the layers before it give with their sinks in
    place, so later layers make up for what earlier ones could not match. A layer whose logits leave
    out more than the share `most` keeps the prefix's keys, if these leave out less. Linears are
    hastened; attention is not, as logits in the hundreds would be rounded to whole numbers.
    """
    model: Any = decoder.model
    family = decoder.family
    layers = decoder.having(family.attention)
    sinks: list[LayerSink | None] = [None] * len(decoder.layers)
    bar = tqdm(total=len(layers), desc="fitting sinks", unit="layer")
    ahead = iter(layers)

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        with torch.autocast(decoder.device.type, enabled=False):
            scene = layer_attention(module, rotations.get(module), *args, **kwargs)
            layer = next(ahead)
            known = prefix.layers[layer]
            assert known is not None
            sinks[layer], out = sink_of(scene, known, family.key is not None, most)
        bar.update()
        return heads_last(out), None

    turned = rotations_of(decoder.rotating)
    with bar, replacing_attention(model, attend), turned as rotations:
        read = tokens.to(decoder.device)
        with autocast_bf16(decoder.device):
            model.base_model(
                read,
                # Else positions that are not one after another mean texts of their own.
                attention_mask=torch.ones_like(read),
                position_ids=spread_positions(decoder, prefix, tokens),
                use_cache=False,
            )
    return sinks
