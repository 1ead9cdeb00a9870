"""One layer's sinks, fitted to what its heads give with the prefix.

A grid finds the best constant logit of each head. From there logit, value and key bias go on
together, a few damped Gauss-Newton steps (Levenberg 1944, Marquardt 1963) on the squared error of
the output: three steps reach what takes gradient descent hundreds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from absorb.scene import Scene

# The grid of starting logits reaches from "no sink" to "a sink that takes everything".
_GRID = (-15.0, 25.0, 80)
# Queries of every row in each step: two rough ones, then a better one.
_QUERIES = (8, 8, 16)
# Other queries decide whether a step is taken, lest it fit its own too closely.
_JUDGES = 64
_DAMPING = 1e-2
_FLOOR = 1e-4  # of the damping, as a share of the steepest direction: some lead nowhere
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySink:
    """One layer's sink as the prefix itself, which is exact."""

    keys: Tensor  # (kv_heads, tokens, head_dim), rotated where there is RoPE
    values: Tensor  # (kv_heads, tokens, head_dim)

    @property
    def error(self) -> Tensor:
        """A zero: nothing of the prefix's effect is left out."""
        return self.keys.new_zeros(())


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitSink:
    """One layer's sink as constants that were fitted to the prefix.

    error is the share of the prefix's effect on the output, in squared norm, that they leave out.
    """

    logits: Tensor  # (heads,)
    value: Tensor  # (kv_heads, head_dim)
    key_bias: Tensor  # (kv_heads, head_dim)
    error: Tensor  # ()


LayerSink = KeySink | LogitSink


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What the prefix does to the output of every head: (rows, heads, length, 1 or head_dim)."""

    lse: Tensor  # log-sum-exp of the text's logits
    share: Tensor  # the weight that the prefix takes
    alone: Tensor  # the output on the text alone, on the prefix alone, and on both
    absorbed: Tensor
    target: Tensor


def effect_of(scene: Scene, prefix: KeySink) -> Effect:
    """The effect of a prefix on one layer's attention."""
    text, scores = scene.text_scores(), scene.scores(prefix.keys[None])
    lse, alone = text.logsumexp(-1, keepdim=True), scene.mix(text.softmax(-1), scene.value)
    share = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - lse)
    absorbed = scene.mix(scores.softmax(-1), prefix.values)
    target = alone + share * (absorbed - alone)
    return Effect(lse=lse, share=share, alone=alone, absorbed=absorbed, target=target)


def fit_layer(scene: Scene, prefix: KeySink, with_key_bias: bool) -> tuple[LogitSink, Tensor]:
    """The fit to the prefix, and the output (rows, heads, length, head_dim) with it."""
    effect = effect_of(scene, prefix)
    if with_key_bias and scene.moves_with_keys and prefix.keys.shape[1] == 1:
        # Less its key, the prefix has the logit zero for every query.
        zero = prefix.keys.new_zeros(len(prefix.keys), scene.groups)
        parameters = torch.cat([zero, prefix.values[:, 0], -prefix.keys[:, 0]], 1)
    else:
        value = mean_value(scene, effect)
        logits = best_logits(effect, scene.spread(value[:, None]))
        start = torch.cat([logits.view(len(value), -1), value, torch.zeros_like(value)], 1)
        parameters = _descend(scene, effect.target, start, with_key_bias)
    return fitted(scene, effect, *_split(parameters, scene.groups))


def fitted(
    scene: Scene, effect: Effect, logits: Tensor, value: Tensor, key_bias: Tensor
) -> tuple[LogitSink, Tensor]:
    """Constants as a sink, and the output (rows, heads, length, head_dim) with them."""
    out = scene.with_sink(logits, value, key_bias)
    whole = (effect.alone - effect.target).square().sum().clamp_min(1e-30)
    error = (out - effect.target).square().sum() / whole
    return LogitSink(logits=logits, value=value, key_bias=key_bias, error=error), out


def _split(parameters: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (heads,), value and key bias (kv_heads, head_dim).

    parameters is (kv_heads, groups + head_dim + head_dim): the logits of the query heads that share
    a key head, the value and the key bias.
    """
    width = (parameters.shape[1] - groups) // 2
    logits, value, key_bias = parameters.split([groups, width, width], 1)
    return logits.flatten(), value, key_bias


def mean_value(scene: Scene, effect: Effect) -> Tensor:
    """The prefix value (kv_heads, head_dim), weighted by the share that the prefix takes."""
    rows, heads, length, _ = effect.absorbed.shape
    grouped = (rows, heads // scene.groups, scene.groups, length, -1)
    total = (effect.share * effect.absorbed).view(grouped).sum((0, 2, 3))
    return total / effect.share.view(grouped).sum((0, 2, 3)).clamp_min(1e-12)


def best_logits(effect: Effect, value: Tensor) -> Tensor:
    """The logit (heads,) of a grid with the least squared error of the output.

    value is what the sink gives: (heads, 1, head_dim).
    """
    # |(1 - p) o + p v - t|^2 = |o - t|^2 + 2 p (o - t)(v - o) + p^2 |v - o|^2
    step, lse = value - effect.alone, effect.lse[..., 0]
    linear = 2 * ((effect.alone - effect.target) * step).sum(-1)
    square = step.square().sum(-1)
    middle = lse.transpose(0, 1).flatten(1).median(1).values
    grid = middle[:, None] + torch.linspace(*_GRID, device=lse.device)
    errors = []
    for logits in grid.T:
        share = torch.sigmoid(logits[:, None] - lse)
        errors.append((share * linear + share.square() * square).sum((0, 2)))
    best = torch.stack(errors).argmin(0)
    return grid.gather(1, best[:, None])[:, 0]


def _descend(scene: Scene, target: Tensor, parameters: Tensor, with_key_bias: bool) -> Tensor:
    """Parameters after the Gauss-Newton steps that made the output better."""
    draw = torch.Generator().manual_seed(_SEED)

    def some(count: int) -> tuple[Scene, Tensor]:
        index = torch.randperm(target.shape[2], generator=draw)[:count].to(target.device)
        return scene.asked(index), target[:, :, index]

    jury, wanted = some(_JUDGES)
    error = _errors(jury, wanted, parameters)
    damping = torch.full_like(error, _DAMPING)
    for count in _QUERIES:
        curvature, slope = _normal(*some(count), parameters, with_key_bias)
        for _ in range(2):
            better = parameters - _step(curvature, slope, damping)
            less = _errors(jury, wanted, better)
            won = less < error
            parameters = torch.where(won[:, None], better, parameters)
            error = torch.where(won, less, error)
            damping = torch.where(won, damping / 5, damping * 10)
            if won.all():
                break
    return parameters


def _errors(scene: Scene, target: Tensor, parameters: Tensor) -> Tensor:
    """The squared error of the output, by the key head that it depends on: (kv_heads,)."""
    out = scene.with_sink(*_split(parameters, scene.groups))
    return (out - target).square().sum((0, 2, 3)).view(-1, scene.groups).sum(1)


def _step(curvature: Tensor, slope: Tensor, damping: Tensor) -> Tensor:
    """The damped Gauss-Newton step (kv_heads, parameters), to be subtracted."""
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    steepest = diagonal.amax(1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
    damped = curvature + torch.diag_embed(damping[:, None] * diagonal + _FLOOR * steepest)
    step: Tensor = torch.linalg.solve(damped, slope)
    return step


def _normal(
    scene: Scene, target: Tensor, parameters: Tensor, with_key_bias: bool
) -> tuple[Tensor, Tensor]:
    """JᵀJ (kv_heads, parameters, parameters) and Jᵀr (kv_heads, parameters) of the output error."""
    size = parameters.shape[1]
    curvature = parameters.new_zeros(len(parameters), size, size)
    slope = torch.zeros_like(parameters)
    for kv_head, jacobian, residual in _jacobians(scene, target, parameters, with_key_bias):
        curvature[kv_head] += jacobian.T @ jacobian
        slope[kv_head] += jacobian.T @ residual
    return curvature, slope


def _jacobians(
    scene: Scene, target: Tensor, parameters: Tensor, with_key_bias: bool
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each row and key head: its index, J (head_dim * n, parameters) and r (head_dim * n,).

    n counts the queries of all the query heads that share the key head. Apart from them the parts
    would not fit into a cache.
    """
    logits, value, key_bias = _split(parameters, scene.groups)
    width, groups, asked = value.shape[1], scene.groups, target.shape[2]
    scores = scene.text_scores(key_bias)
    sink, weights = scene.weights(logits, scores)
    out = scene.mix(weights, scene.value) + sink * scene.spread(value[:, None])
    residual = out - target
    pull = weights * scene.steepness(scores)
    turned = scene.rotate(torch.eye(key_bias.shape[1]).to(key_bias))[0]
    head = torch.eye(groups).to(value).repeat_interleave(asked, 0)
    for row in range(len(target)):
        for kv_head in range(len(value)):
            mine = slice(kv_head * groups, (kv_head + 1) * groups)
            given, taken = out[row, mine].flatten(0, 1).T, sink[row, mine].flatten()
            jacobian = parameters.new_zeros(width, len(taken), parameters.shape[1])
            by_logit = taken * (value[kv_head][:, None] - given)
            jacobian[..., :groups] = by_logit[..., None] * head
            jacobian[..., groups : groups + width].diagonal(dim1=0, dim2=2).copy_(taken[:, None])
            if with_key_bias:
                query, pulled = scene.query[row, mine].flatten(0, 1), pull[row, mine].flatten(0, 1)
                read = scene.value[row, kv_head]
                by_key_bias = _by_key_bias(query, pulled, read, given, turned)
                jacobian[..., groups + width :] = by_key_bias
            yield kv_head, jacobian.flatten(0, 1), residual[row, mine].flatten(0, 1).T.flatten()


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
