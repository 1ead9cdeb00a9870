"""A bias on all keys, for what a constant logit forgets: how the prefix depends on the query.

Subtracting the prefix's key from every key would keep that exactly. RoPE turns keys with their
position, so a bias on k_proj does it for slowly turning channels alone. From there a few damped
Gauss-Newton steps (Levenberg 1944, Marquardt 1963) go on, on logits, values and biases together.
Their queries are drawn by error: a prefix may matter to a handful of queries only. All queries
decide whether a step is taken, and none that makes the error of any head larger is.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from absorb.fold.sinks.attention import LayerAttention, at
from absorb.fold.sinks.constants import Effect, by_key_head, constants, errors_of, is_better, split
from absorb.fold.sinks.forms import KeySink

# Channels that count as slow: the cosine of the widest angle that they turn by in the text.
_SLOW = (0.98, 0.5)
# Queries of every row in a Gauss-Newton step, and the share of them that is drawn by error.
_QUERIES = 16
_BY_ERROR = 0.5
_STEPS = 3
_GOES_ON = 0.95  # what a step must leave of the error at most, or it was the last
_DAMPING = 1e-2
_FLOOR = 1e-4  # of the damping, as a share of the steepest direction: some lead nowhere
# What a key bias must take off the error of its heads. Less is what chance finds in any text.
_PAYS = 0.01
_SEED = 0


def shifted(
    scene: LayerAttention,
    effect: Effect,
    prefix: KeySink,
    start: Tensor,
    error: Tensor,
    most: Tensor,
) -> Tensor:
    """A better start where a bias takes from all keys what the prefix has in slow channels.

    Less a key that does not turn, the prefix has the logit zero for every query. RoPE turns all
    channels, some by a hundredth in a text: of these it is nearly true. `error` is that of the
    parameters `start`, and `most` what no head may exceed: (heads,).
    """
    width = scene.key.shape[-1]
    key = by_key_head(scene, effect.share * (effect.within @ scene.spread(prefix.keys)))
    key = key / by_key_head(scene, effect.share).clamp_min(1e-12)
    every, rotate = torch.eye(width).to(key), scene.rotate
    cosines = (rotate.of_row(row)(every)[0].diagonal(dim1=0, dim2=2) for row in range(rotate.rows))
    turned = torch.stack([one.amin(0) for one in cosines]).amin(0)
    for least in _SLOW:
        bias = -key * (turned >= least)
        lse, alone = scene.alone(bias)
        tried, less, _ = constants(scene, replace(effect, lse=lse, alone=alone))
        tried[:, -width:] = bias
        won = is_better(less, error, most, scene.groups)
        start = torch.where(won[:, None], tried, start)
        error = torch.where(won.repeat_interleave(scene.groups), less, error)
    return start


def descended(
    scene: LayerAttention, target: Tensor, start: Tensor, most: Tensor
) -> tuple[Tensor, Tensor]:
    """Parameters after the steps that made the output better, and their error: (heads,)."""
    draw = torch.Generator().manual_seed(_SEED)
    parameters = start
    error, by_query = errors_of(scene, target, start)
    damping = error.new_full((len(start),), _DAMPING)
    for _ in range(_STEPS):
        before = error
        curvature, slope = _normal(*_drawn(scene, target, by_query, draw), parameters)
        for _ in range(2):
            better = parameters - _step(curvature, slope, damping)
            less, less_by_query = errors_of(scene, target, better)
            won = is_better(less, error, most, scene.groups)
            parameters = torch.where(won[:, None], better, parameters)
            heads = won.repeat_interleave(scene.groups)
            error = torch.where(heads, less, error)
            by_query = torch.where(heads[:, None], less_by_query, by_query)
            damping = torch.where(won, damping / 5, damping * 10)
            if won.all():
                break
        if error.sum() > _GOES_ON * before.sum():
            break
    return parameters, error


def where_it_pays(
    scene: LayerAttention, without: Tensor, error: Tensor, biased: Tensor, less: Tensor
) -> Tensor:
    """Of two sets of parameters, by their errors (heads,), the one with key biases if better."""
    had, left = (part.view(-1, scene.groups).sum(1) for part in (error, less))
    return torch.where((left < (1 - _PAYS) * had)[:, None], biased, without)


def _drawn(
    scene: LayerAttention, target: Tensor, by_query: Tensor, draw: torch.Generator
) -> tuple[LayerAttention, Tensor, Tensor]:
    """A few queries of each row, what their output should be, and how many each stands for.

    Half of them are drawn by their share of the error, of which a few queries may have nearly all.
    by_query is (rows, heads, length); the weights are (rows, queries).
    """
    rows, _, length = by_query.shape
    by_key_head = by_query.view(rows, -1, scene.groups, length).sum(2)
    share = by_key_head / by_key_head.sum((0, 2), keepdim=True).clamp_min(1e-30)
    share = share.mean(1) / share.mean(1).sum(1, keepdim=True).clamp_min(1e-30)
    chance = (_BY_ERROR * share + (1 - _BY_ERROR) / length).cpu()
    index = torch.multinomial(chance, _QUERIES, replacement=True, generator=draw)
    weight = (1 / (_QUERIES * chance.gather(1, index))).to(target)
    index = index.to(target.device)
    return scene.asked(index), at(target, index), weight


def _step(curvature: Tensor, slope: Tensor, damping: Tensor) -> Tensor:
    """The damped Gauss-Newton step (kv_heads, parameters), to be subtracted."""
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    steepest = diagonal.amax(1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
    damped = curvature + torch.diag_embed(damping[:, None] * diagonal + _FLOOR * steepest)
    step: Tensor = torch.linalg.solve(damped, slope)
    return step


def _normal(
    scene: LayerAttention, target: Tensor, weight: Tensor, parameters: Tensor
) -> tuple[Tensor, Tensor]:
    """JᵀJ (kv_heads, parameters, parameters) and Jᵀr (kv_heads, parameters) of the output error.

    weight (rows, queries) is how often each query counts.
    """
    size = parameters.shape[1]
    curvature = parameters.new_zeros(len(parameters), size, size)
    slope = torch.zeros_like(parameters)
    for row, kv_head, jacobian, residual in _jacobians(scene, target, parameters):
        counts = weight[row].repeat(len(residual) // weight.shape[1])
        weighted = jacobian.T * counts
        curvature[kv_head] += weighted @ jacobian
        slope[kv_head] += weighted @ residual
    return curvature, slope


def _jacobians(
    scene: LayerAttention, target: Tensor, parameters: Tensor
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For each row and key head: both indices, J (head_dim * n, parameters) and r (head_dim * n,).

    n counts the queries of all the query heads that share the key head. Apart from them the parts
    would not fit into a cache.
    """
    logits, value, key_bias = split(parameters, scene.groups)
    width, groups, asked = value.shape[1], scene.groups, target.shape[2]
    scores = scene.text_scores(key_bias)
    sink, weights = scene.weights(logits, scores)
    out = scene.mix(weights, scene.value) + sink * scene.spread(value[:, None])
    residual = out - target
    pull = weights * scene.steepness(scores)
    every = torch.eye(key_bias.shape[1]).to(key_bias)
    head = torch.eye(groups).to(value).repeat_interleave(asked, 0)
    for row in range(len(target)):
        turned = scene.rotate.of_row(row)(every)[0]
        for kv_head in range(len(value)):
            mine = slice(kv_head * groups, (kv_head + 1) * groups)
            given, taken = out[row, mine].flatten(0, 1).T, sink[row, mine].flatten()
            jacobian = parameters.new_zeros(width, len(taken), parameters.shape[1])
            by_logit = taken * (value[kv_head][:, None] - given)
            jacobian[..., :groups] = by_logit[..., None] * head
            jacobian[..., groups : groups + width].diagonal(dim1=0, dim2=2).copy_(taken[:, None])
            query, pulled = scene.query[row, mine].flatten(0, 1), pull[row, mine].flatten(0, 1)
            read = scene.value[row, kv_head]
            by_key_bias = _by_key_bias(query, pulled, read, given, turned)
            jacobian[..., groups + width :] = by_key_bias
            residuals = residual[row, mine].flatten(0, 1).T.flatten()
            yield row, kv_head, jacobian.flatten(0, 1), residuals


def _by_key_bias(
    query: Tensor, pull: Tensor, value: Tensor, given: Tensor, turned: Tensor
) -> Tensor:
    """How the output (head_dim, n) moves with the key bias: (head_dim, n, key channels).

    `Σ_j w_j (v_j - o) (q · R_j e_i)`, with query (n, key channels), pull = w times the slope of the
    scores (n, length), value (length, head_dim), given o (head_dim, n) and turned R_j e_i (key
    channels, length, key channels).
    """
    length, channels = len(value), len(turned)
    moved = turned.transpose(0, 1).reshape(-1, channels) @ query.T  # q · R_j e_i
    moved = moved.view(length, channels, -1) * pull.T[:, None].to(moved.dtype)
    summed = torch.cat([value, torch.ones_like(value[:, :1])], 1).T @ moved.flatten(1)
    summed = summed.view(-1, channels, len(query))
    return (summed[:-1] - given[:, None] * summed[-1]).transpose(1, 2)
