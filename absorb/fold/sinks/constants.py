"""Constants that stand for a prefix: a logit for every query head, a value for every key head.

A head's error is the squared error of its output on every query of the calibration text. Its logit
is the best of a grid, or that of no sink where none is better. Values follow by least squares.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from absorb.fold.sinks.attention import LayerAttention
from absorb.fold.sinks.forms import KeySink
from absorb.models.modeling_absorb import NEUTRAL

# Logits that are tried, from the median log-sum-exp of the text on: from "a sink that takes next to
# nothing" to "one that takes everything". Then closer ones, around the best.
_GRID = (-15.0, 25.0, 80)
_CLOSER = (-0.5, 0.5, 21)
_ROUNDS = 3  # of logits and values, each fitted to the other
# Rounding moves errors by this share, and an effect on the output below that other share is none.
_ROUNDING = 1e-5
_NOTHING = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What the prefix does to the output of every head: (rows, heads, length, 1 or head_dim)."""

    lse: Tensor  # log-sum-exp of the text's logits
    share: Tensor  # the weight that the prefix takes
    within: Tensor  # how its tokens divide that: (rows, heads, length, tokens)
    alone: Tensor  # the output on the text alone, on the prefix alone, and on both
    absorbed: Tensor
    target: Tensor


def effect_of(scene: LayerAttention, prefix: KeySink) -> Effect:
    """The effect of a prefix on one layer's attention."""
    (lse, alone), scores = scene.alone(), scene.prefix_scores(prefix.keys)
    share = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - lse)
    # Of no number where all of the prefix has left the window, and its share is zero.
    within = scores.softmax(-1).nan_to_num()
    absorbed = scene.mix(within, prefix.values)
    target = alone + share * (absorbed - alone)
    return Effect(
        lse=lse, share=share, within=within, alone=alone, absorbed=absorbed, target=target
    )


def left_out(effect: Effect, out: Tensor) -> Tensor:
    """The share of the effect that an output (rows, heads, length, head_dim) lacks: ()."""
    # An effect that is lost in rounding is none: nothing can be said of shares of it.
    least = _NOTHING * effect.target.square().sum()
    whole = (effect.alone - effect.target).square().sum().maximum(least).clamp_min(1e-30)
    return (out - effect.target).square().sum() / whole


def split(parameters: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (heads,), value and key bias (kv_heads, head_dim).

    parameters is (kv_heads, groups + head_dim + head_dim): the logits of the query heads that share
    a key head, the value and the key bias.
    """
    width = (parameters.shape[1] - groups) // 2
    logits, value, key_bias = parameters.split([groups, width, width], 1)
    return logits.flatten(), value, key_bias


def errors_of(scene: LayerAttention, target: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The squared error of the output, of every head and query: (heads,), (rows, heads, length)."""
    out = scene.with_sink(*split(parameters, scene.groups))
    by_query = (out - target).square().sum(-1)
    return by_query.sum((0, 2)), by_query


def constants(scene: LayerAttention, effect: Effect) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters without a key bias, their error (heads,), and the one that no head may exceed.

    That is the error of the best constant logit with the mean value of the prefix, or of no sink.
    """
    value = mean_value(scene, effect)
    logits, _ = best_logits(effect, scene.spread(value[:, None]), _around(effect.lse))
    logits, most = best_logits(effect, scene.spread(value[:, None]), _close_to(logits))
    error = most
    for _ in range(_ROUNDS):
        better = _best_value(scene, effect, logits, value)
        closer, less = best_logits(effect, scene.spread(better[:, None]), _close_to(logits))
        won = is_better(less, error, most, scene.groups)
        value = torch.where(won[:, None], better, value)
        won = won.repeat_interleave(scene.groups)
        logits, error = torch.where(won, closer, logits), torch.where(won, less, error)
    unused = (logits == NEUTRAL["sink"]).view(len(value), -1).all(1)
    value = value.masked_fill(unused[:, None], 0)
    parts = logits.view(len(value), -1), value, torch.zeros_like(value)
    return torch.cat(parts, 1), error, most


def mean_value(scene: LayerAttention, effect: Effect) -> Tensor:
    """The prefix value (kv_heads, head_dim), weighted by the share that the prefix takes."""
    total = by_key_head(scene, effect.share * effect.absorbed)
    return total / by_key_head(scene, effect.share).clamp_min(1e-12)


def _best_value(scene: LayerAttention, effect: Effect, logits: Tensor, value: Tensor) -> Tensor:
    """The value (kv_heads, head_dim) with the least squared error; `value` where there is none."""
    share = torch.sigmoid(logits[:, None, None] - effect.lse)
    wanted = by_key_head(scene, share * (effect.target - (1 - share) * effect.alone))
    known = by_key_head(scene, share.square())
    return torch.where(known > 1e-9, wanted / known.clamp_min(1e-9), value)


def by_key_head(scene: LayerAttention, parts: Tensor) -> Tensor:
    """The sum over all queries that share a key head, of parts (rows, heads, length, n)."""
    rows, heads, length, _ = parts.shape
    return parts.view(rows, heads // scene.groups, scene.groups, length, -1).sum((0, 2, 3))


def _around(lse: Tensor) -> Tensor:
    """Logits to try (heads, n), from what the text weighs: lse (rows, heads, length, 1)."""
    middle = lse[..., 0].transpose(0, 1).flatten(1).median(1).values
    return middle[:, None] + torch.linspace(*_GRID, device=lse.device)


def _close_to(logits: Tensor) -> Tensor:
    """Logits to try (heads, n) around the best of a wider choice (heads,)."""
    return logits[:, None] + torch.linspace(*_CLOSER, device=logits.device)


def best_logits(effect: Effect, value: Tensor, tried: Tensor) -> tuple[Tensor, Tensor]:
    """The best of the logits `tried` (heads, n), and its squared error in the output: (heads,).

    It is that of no sink where none is better. value is what the sink gives: (heads, 1, head_dim).
    """
    # |(1 - p) o + p v - t|^2 = |o - t|^2 + 2 p (o - t)(v - o) + p^2 |v - o|^2
    step, missing = value - effect.alone, effect.alone - effect.target
    linear, square = 2 * (missing * step).sum(-1), step.square().sum(-1)
    tried = torch.cat([torch.full_like(tried[:, :1], NEUTRAL["sink"]), tried], 1)
    changes = []
    for logits in tried.T:
        share = torch.sigmoid(logits[:, None] - effect.lse[..., 0])
        changes.append((share * linear + share.square() * square).sum((0, 2)))
    change, best = torch.stack(changes).min(0)
    whole = missing.square().sum((0, 2, 3))
    return tried.gather(1, best[:, None])[:, 0], (whole + change).clamp_min(0)


def is_better(less: Tensor, error: Tensor, most: Tensor, groups: int) -> Tensor:
    """Where errors `less` (heads,) are better than `error`, and no head's is above `most`.

    (kv_heads,), as query heads that share a key head change together.
    """
    total = (less - error).view(-1, groups).sum(1)
    return (total < 0) & (less <= most * (1 + _ROUNDING)).view(-1, groups).all(1)
