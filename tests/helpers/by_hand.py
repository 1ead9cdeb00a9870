"""Sinks that are made without a fit: what a fit has to be better than."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.fold.sinks.attention import LayerAttention, layer_attention
from absorb.fold.sinks.forms import KeySink, LogitSink
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.models.decoder import Decoder
from absorb.models.families import family_of
from absorb.models.modeling_absorb import NEUTRAL
from absorb.runtime.hooks import replacing_attention

Choose = Callable[[LayerAttention, KeySink], LogitSink]


@torch.no_grad()
def sinks(
    model: PreTrainedModel, prefix: tuple[int, ...], text: Tensor, choose: Choose
) -> tuple[LogitSink, ...]:
    """The sinks that `choose` makes of each layer, on what the layers before give with theirs."""
    known, made = (
        prefix_of(Decoder(model, family_of(model.config.model_type)), torch.tensor(prefix)),
        [],
    )

    def attend(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        scene = layer_attention(module, None, *args, **kwargs)
        made.append(choose(scene, known.layers[len(made)]))
        out = scene.with_sink(made[-1].logits, made[-1].value, made[-1].key_bias)
        return out.transpose(1, 2).contiguous(), None

    with replacing_attention(model, attend):
        model.base_model(text, position_ids=known.positions(text.shape[1]), use_cache=False)
    return tuple(made)


def no_sink(scene: LayerAttention, prefix: KeySink) -> LogitSink:
    heads, value = scene.query.shape[1], torch.zeros_like(prefix.values[:, 0])
    logits = torch.full((heads,), NEUTRAL["sink"])
    return LogitSink(logits=logits, value=value, key_bias=value, error=torch.ones(()))


def best_constant(scene: LayerAttention, prefix: KeySink) -> LogitSink:
    """The logit of each head, out of many, with the least squared error of its output.

    The value is the prefix's own, weighted by what the teacher's heads give it.
    """
    scores, text = scene.scores(prefix.keys[None]), scene.text_scores()
    lse = text.logsumexp(-1)
    share = torch.sigmoid(scores.logsumexp(-1) - lse)[..., None]
    alone = scene.mix(text.softmax(-1), scene.value)
    weighted = share * scene.mix(scores.softmax(-1), prefix.values)
    value = by_kv_head(scene, weighted) / by_kv_head(scene, share)
    step = scene.spread(value[:, None]) - alone
    miss = alone - scene.with_prefix(prefix.keys, prefix.values)
    linear, square = 2 * (miss * step).sum(-1), step.square().sum(-1)
    grid = torch.linspace(float(lse.min()) - 5, float(lse.max()) + 5, 160).tolist()
    grid.append(NEUTRAL["sink"])
    taken = [torch.sigmoid(logit - lse) for logit in grid]
    errors = torch.stack([(p * linear + p.square() * square).sum((0, 2)) for p in taken])
    logits = torch.tensor(grid)[errors.argmin(0)]
    return replace(no_sink(scene, prefix), logits=logits, value=value)


def by_kv_head(scene: LayerAttention, values: Tensor) -> Tensor:
    """Sums of (rows, heads, length, n) over all but heads that do not share keys: (kv_heads, n)."""
    return values.unflatten(1, (-1, scene.groups)).sum((0, 2, 3))


def best_value(scene: LayerAttention, prefix: KeySink) -> LogitSink:
    """The same with the value that gives the least squared error for these logits."""
    sink = best_constant(scene, prefix)
    target = scene.with_prefix(prefix.keys, prefix.values)
    share, weights = scene.weights(sink.logits, scene.text_scores())
    missing = share * (target - scene.mix(weights, scene.value))
    value = by_kv_head(scene, missing) / by_kv_head(scene, share.square()).clamp_min(1e-30)
    return replace(sink, value=value)
