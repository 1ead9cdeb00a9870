"""What the prefix does to every attention head, as sink logits, sink values and key biases.

With a prefix, a head gives `(1 - p) o + p v`, where o is its output on the text alone, v the
prefix value, and `p = sigmoid(l - lse)` with l the log-sum-exp of the prefix logits and lse that
of the text. A sink logit s replaces l, which depends on the query, by a constant. What of the
query-dependence is lost can be had back: subtracting the prefix key k from every key leaves all
ratios of weights alone and makes l zero. RoPE turns a key with its position and so forbids the
exact shift, but on the slowly turning channels a bias on k_proj comes close to it. Without RoPE
nothing is lost.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from absorb.families import Family
from absorb.watch import attending, each_layers

# The grid of starting logits reaches from "no sink" to "a sink that takes everything".
_GRID = (-15.0, 25.0, 80)
_STEPS = 60
_QUERIES = 64
_RATE = 0.1
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """What attention sees of the prefix tokens: constants, because nothing comes before them.

    keys and values hold one tensor (kv_heads, tokens, head_dim) a layer. The keys are rotated to
    the positions 0 .. tokens - 1, so text that is read with them starts at position `tokens`.
    """

    tokens: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    def positions(self, length: int) -> Tensor:
        """The positions (1, length) of text read after the prefix."""
        start = len(self.tokens)
        return torch.arange(start, start + length, device=self.keys[0].device)[None]


@torch.no_grad()
def prefix_of(model: PreTrainedModel, tokens: Tensor) -> Prefix:
    """The keys and values that the prefix `tokens` (n,) has in every layer."""
    cache = DynamicCache(config=model.config)
    model.base_model(tokens[None].to(model.device), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return Prefix(
        tokens=tokens,
        keys=[layer.keys[0].clone() for layer in layers],
        values=[layer.values[0].clone() for layer in layers],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinks:
    """logits is (layers, heads), values and key_biases are (layers, kv_heads, head_dim).

    error is the share of the prefix's effect on the attention output, in squared norm, that each
    layer's fit leaves out: (layers,).
    """

    logits: Tensor
    values: Tensor
    key_biases: Tensor
    error: Tensor


@dataclass(slots=True)
class _Scene:
    """One layer's attention on text: what a head sees, and what it gives with the prefix."""

    query: Tensor  # (rows, heads, length, head_dim)
    key: Tensor  # (rows, kv_heads, length, head_dim)
    value: Tensor
    blocked: Tensor  # (rows or 1, 1, length, length): True where a query may not look
    scaling: float
    softcap: float | None
    rotate: "_Rotate"

    @property
    def groups(self) -> int:
        """Query heads for each key and value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def moves_with_keys(self) -> bool:
        """Whether the same bias on all keys moves all logits of a query alike, the prefix's too."""
        return self.rotate.cos_sin is None and self.softcap is None

    def scores(self, keys: Tensor) -> Tensor:
        """Logits (rows, heads, length, keys) for keys (rows or 1, kv_heads, keys, head_dim)."""
        # Grouped, not repeated: each key head meets all of its query heads in one product.
        scores = (self._grouped(self.query) @ keys.mT).view(*self.query.shape[:3], -1)
        scores = scores * self.scaling
        return scores if self.softcap is None else self.softcap * (scores / self.softcap).tanh()

    def text_scores(self, key_bias: Tensor | None = None) -> Tensor:
        keys = self.key if key_bias is None else self.key + self.rotate(key_bias)
        return self.scores(keys).masked_fill(self.blocked, -torch.inf)

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """Outputs (rows, heads, length, head_dim) for weights (rows, heads, length, keys)."""
        out = self._grouped(weights) @ values
        return out.view(*weights.shape[:3], -1)

    def _grouped(self, heads: Tensor) -> Tensor:
        """(rows, heads, length, n) as (rows, kv_heads, groups * length, n)."""
        return heads.reshape(len(heads), self.key.shape[1], -1, heads.shape[-1])

    def spread(self, values: Tensor) -> Tensor:
        """Values (..., kv_heads, n, head_dim), once for each query head."""
        return values.repeat_interleave(self.groups, -3)

    def with_prefix(self, keys: Tensor, values: Tensor) -> Tensor:
        """The teacher's output (rows, heads, length, head_dim)."""
        weights = torch.cat([self.scores(keys[None]), self.text_scores()], -1).softmax(-1)
        split = keys.shape[1]
        return self.mix(weights[..., :split], values) + self.mix(weights[..., split:], self.value)

    def with_sink(self, logit: Tensor, value: Tensor, key_bias: Tensor) -> Tensor:
        """The student's output for logit (heads,), value and key_bias (kv_heads, head_dim)."""
        text = self.text_scores(key_bias)
        sink = logit[:, None, None].expand(len(text), -1, text.shape[2], 1)
        weights = torch.cat([sink, text], -1).softmax(-1)
        return weights[..., :1] * self.spread(value[:, None]) + self.mix(
            weights[..., 1:], self.value
        )

    def asked(self, index: Tensor) -> "_Scene":
        """The same scene with only the queries at the positions `index`."""
        query, blocked = self.query[:, :, index], self.blocked[:, :, index]
        return replace(self, query=query, blocked=blocked)


class _Rotate:
    """Turns a key bias (kv_heads, head_dim) as RoPE turns keys: (1, kv_heads, length, head_dim)."""

    def __init__(
        self, module: nn.Module, cos_sin: tuple[Tensor, Tensor] | None, length: int
    ) -> None:
        # SmolLM3 has layers without RoPE, with this flag.
        self.cos_sin = cos_sin if getattr(module, "use_rope", True) else None
        self.module, self.length = module, length

    def __call__(self, key_bias: Tensor) -> Tensor:
        keys = key_bias[None, :, None].expand(-1, -1, self.length, -1)
        if self.cos_sin is None:
            return keys
        apply = sys.modules[type(self.module).__module__].apply_rotary_pos_emb
        # RoPE may turn the first channels only.
        turned, rest = keys.tensor_split([self.cos_sin[0].shape[-1]], -1)
        return torch.cat([apply(turned, turned, *self.cos_sin)[1], rest], -1)


@contextmanager
def _cos_sin(modules: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """The rotation that each attention module was last called with."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def see(module: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        seen[module] = kwargs["position_embeddings"]

    handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def prefixed(model: PreTrainedModel, family: Family, prefix: Prefix) -> Iterator[None]:
    """Let a stock model attend to the prefix without reading it: the teacher, exactly.

    Text must be read at `prefix.positions`.
    """
    layers = {m: i for i, m in enumerate(each_layers(model, family, family.attention))}

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        layer = layers[module]
        scene = _scene(module, None, *args, **kwargs)
        return _heads_last(scene.with_prefix(prefix.keys[layer], prefix.values[layer])), None

    with attending(model, attend):
        yield


@torch.no_grad()
def fit_sinks(model: PreTrainedModel, family: Family, prefix: Prefix, tokens: Tensor) -> Sinks:
    """Fit sinks to what the prefix does to attention outputs on text `tokens` (rows, length).

    One forward pass: each layer is fitted on what the layers before it give with their sinks in
    place, so later layers make up for what earlier ones could not match.
    """
    modules = each_layers(model, family, family.attention)
    fits: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    bar = tqdm(total=len(modules), desc="fitting sinks", unit="layer")

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        scene = _scene(module, rotations.get(module), *args, **kwargs)
        layer = len(fits)
        fit, out = _fit(scene, prefix.keys[layer], prefix.values[layer], family.key is not None)
        fits.append(fit)
        bar.update()
        return _heads_last(out), None

    turned = modules if family.positions is None else []
    with bar, attending(model, attend), _cos_sin(turned) as rotations:
        positions = prefix.positions(tokens.shape[1])
        model.base_model(tokens.to(model.device), position_ids=positions, use_cache=False)
    logits, values, key_biases, errors = (torch.stack(part) for part in zip(*fits, strict=True))
    return Sinks(logits=logits, values=values, key_biases=key_biases, error=errors)


def _scene(
    module: nn.Module,
    cos_sin: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> _Scene:
    length = query.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    rotate = _Rotate(module, cos_sin, length)
    return _Scene(query, key, value, ~mask, scaling, softcap, rotate)


def _heads_last(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous()


def _fit(
    scene: _Scene, keys: Tensor, values: Tensor, with_key_bias: bool
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The fit (logit, value, key bias, error) of one layer and the output it gives."""
    target = scene.with_prefix(keys, values)
    alone = scene.mix(scene.text_scores().softmax(-1), scene.value)
    if with_key_bias and scene.moves_with_keys and keys.shape[1] == 1:
        logit = scene.query.new_zeros(scene.query.shape[1])
        value, key_bias = values[:, 0], -keys[:, 0]
    else:
        logit, value = _start(scene, keys, values, alone, target)
        start = (logit, value, torch.zeros_like(value))
        logit, value, key_bias = _descend(scene, target, alone, start, with_key_bias)
    out = scene.with_sink(logit, value, key_bias)
    error = (out - target).square().sum() / (alone - target).square().sum().clamp_min(1e-30)
    return (logit, value, key_bias, error), out


def _start(
    scene: _Scene, keys: Tensor, values: Tensor, alone: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """The best constant logit (heads,) of a grid; the mean prefix value (kv_heads, head_dim)."""
    lse = scene.text_scores().logsumexp(-1)
    scores = scene.scores(keys[None])
    weight = torch.sigmoid(scores.logsumexp(-1) - lse)[..., None]
    prefix_out = scene.mix(scores.softmax(-1), values)
    rows, heads, length, _ = alone.shape
    grouped = (rows, heads // scene.groups, scene.groups, length, -1)
    total = (weight * prefix_out).view(grouped).sum((0, 2, 3))
    value = total / weight.view(grouped).sum((0, 2, 3)).clamp_min(1e-12)

    # |(1 - p) o + p v - t|^2 = |o - t|^2 + 2 p (o - t)(v - o) + p^2 |v - o|^2
    step = scene.spread(value[:, None]) - alone
    linear, square = 2 * ((alone - target) * step).sum(-1), step.square().sum(-1)
    middle = lse.transpose(0, 1).flatten(1).median(1).values
    grid = middle[:, None] + torch.linspace(*_GRID, device=lse.device)
    errors = []
    for logits in grid.T:
        share = torch.sigmoid(logits[:, None] - lse)
        errors.append((share * linear + share.square() * square).sum((0, 2)))
    best = torch.stack(errors).argmin(0)
    return grid.gather(1, best[:, None])[:, 0], value


@torch.enable_grad()
def _descend(
    scene: _Scene,
    target: Tensor,
    alone: Tensor,
    start: tuple[Tensor, Tensor, Tensor],
    with_key_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logit, value and key bias together, by gradient descent on the output error."""
    logit, value, key_bias = (part.clone().requires_grad_() for part in start)
    scale = float(value.detach().abs().mean()) + 1e-3
    groups: list[dict[str, Any]] = [
        {"params": [logit], "lr": _RATE},
        {"params": [value], "lr": _RATE * scale},
    ]
    if with_key_bias:
        groups.append({"params": [key_bias], "lr": _RATE})
    optimizer = torch.optim.Adam(groups)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, _STEPS, pct_start=0.1)
    unit = (alone - target).square().mean().clamp_min(1e-30)
    draw = torch.Generator().manual_seed(_SEED)
    for _ in range(_STEPS):
        index = torch.randperm(target.shape[2], generator=draw)[:_QUERIES].to(target.device)
        out = scene.asked(index).with_sink(logit, value, key_bias)
        loss = (out - target[:, :, index]).square().mean() / unit
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return logit.detach(), value.detach(), key_bias.detach()
