"""One layer's attention on text, taken apart: what the heads see and what they would give."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class LayerAttention:
    """One layer's attention on text: what a head sees, and what it gives with the prefix."""

    query: Tensor  # (rows, heads, length, head_dim)
    key: Tensor  # (rows, kv_heads, length, head_dim)
    value: Tensor
    blocked: Tensor  # (rows or 1, 1, length, length): True where a query may not look
    scaling: float
    softcap: float | None
    rotate: "Rotate"
    turned: bool = True  # keys are, by RoPE
    window: int | None = None  # how many keys back a query sees, its own included

    @property
    def groups(self) -> int:
        """Query heads for each key and value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def moves_with_keys(self) -> bool:
        """Whether the same bias on all keys moves all logits of a query alike, the prefix's too."""
        return not self.turned and self.softcap is None

    def scores(self, keys: Tensor) -> Tensor:
        """Logits (rows, heads, length, keys) for keys (rows or 1, kv_heads, keys, head_dim)."""
        # Grouped, not repeated: each key head meets all of its query heads in one product.
        scores = (self._grouped(self.query) @ keys.mT).view(*self.query.shape[:3], -1)
        scores = scores * self.scaling
        return scores if self.softcap is None else self.softcap * (scores / self.softcap).tanh()

    def of_row(self, row: int) -> "LayerAttention":
        """The same scene in one row of text."""
        one = slice(row, row + 1)
        query, key, value = self.query[one], self.key[one], self.value[one]
        blocked = self.blocked if len(self.blocked) == 1 else self.blocked[one]
        rotate = self.rotate.of_row(row)
        return replace(self, query=query, key=key, value=value, blocked=blocked, rotate=rotate)

    def by_row(self, find: Callable[["LayerAttention"], Tensor]) -> Tensor:
        """What `find` makes of every row: the weights of all heads in all rows are large."""
        return torch.cat([find(self.of_row(row)) for row in range(len(self.query))])

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

    def weights(self, logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """What sinks (heads,) and text with `scores` get: (rows, heads, queries, 1 and keys)."""
        sink = logits[:, None, None].expand(len(scores), -1, scores.shape[2], 1)
        weights = torch.cat([sink, scores], -1).softmax(-1)
        return weights[..., :1], weights[..., 1:]

    def steepness(self, scores: Tensor) -> Tensor | float:
        """What `scores` grow by when a query's product with a key does by one."""
        if self.softcap is None:
            return self.scaling
        # Clamped because the scores of hidden keys are -inf.
        capped = scores.clamp_min(-self.softcap) / self.softcap
        return self.scaling * (1 - capped.square())

    def leaves(self, count: int) -> bool:
        """Whether a prefix of so many tokens is outside the window of any query."""
        return self.window is not None and self.query.shape[2] + count > self.window

    def prefix_scores(self, keys: Tensor) -> Tensor:
        """Logits (rows, heads, length, keys) of a prefix, -inf where it has left the window."""
        scores = self.scores(keys[None])
        if self.window is None or not self.leaves(scores.shape[3]):
            return scores
        query, key = (torch.arange(n, device=scores.device) for n in scores.shape[2:])
        distance = query[:, None] + len(key) - key
        return scores.masked_fill(distance >= self.window, -torch.inf)

    def with_prefix(self, keys: Tensor, values: Tensor) -> Tensor:
        """The teacher's output (rows, heads, length, head_dim)."""

        def out(one: LayerAttention) -> Tensor:
            weights = torch.cat([one.prefix_scores(keys), one.text_scores()], -1).softmax(-1)
            first, rest = weights.tensor_split([keys.shape[1]], -1)
            return one.mix(first, values) + one.mix(rest, one.value)

        return self.by_row(out)

    def with_sink(self, logits: Tensor, value: Tensor, key_bias: Tensor) -> Tensor:
        """The student's output for logits (heads,), value and key_bias (kv_heads, head_dim)."""

        def out(one: LayerAttention) -> Tensor:
            sink, weights = one.weights(logits, one.text_scores(key_bias))
            return sink * one.spread(value[:, None]) + one.mix(weights, one.value)

        return self.by_row(out)

    def alone(self, key_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The log-sum-exp of the text's logits, and the output on it: (rows, heads, length, n)."""

        def both(one: LayerAttention) -> Tensor:
            scores = one.text_scores(key_bias)
            return torch.cat(
                [scores.logsumexp(-1, True), one.mix(scores.softmax(-1), one.value)], 3
            )

        lse, out = self.by_row(both).tensor_split([1], 3)
        return lse, out

    def asked(self, index: Tensor) -> "LayerAttention":
        """The same scene with only the queries at the positions `index` (rows, queries)."""
        blocked = self.blocked.expand(len(index), -1, -1, -1)
        return replace(self, query=at(self.query, index), blocked=at(blocked, index))


def at(parts: Tensor, index: Tensor) -> Tensor:
    """Of parts (rows, heads, length, n) those at the positions `index` (rows, queries)."""
    wanted = index[:, None, :, None].expand(-1, parts.shape[1], -1, parts.shape[3])
    return parts.gather(2, wanted)


class Rotate:
    """Turns a key bias (kv_heads, head_dim) as RoPE turns keys: (rows, kv_heads, length, head_dim).

    There is one row where all have the same positions.

    Where a layer has no RoPE there is no `cos_sin`, and nothing turns.
    """

    def __init__(
        self, module: nn.Module, cos_sin: tuple[Tensor, Tensor] | None, length: int
    ) -> None:
        self.module, self.cos_sin, self.length = module, cos_sin, length

    @property
    def rows(self) -> int:
        """How many rows have positions of their own."""
        return 1 if self.cos_sin is None else self.cos_sin[0].shape[-3]

    def of_row(self, row: int) -> "Rotate":
        """The same for one row of text: all of them are large where there are many key channels."""
        if self.cos_sin is None or self.rows == 1:
            return self
        cos, sin = (part[..., row : row + 1, :, :] for part in self.cos_sin)
        return Rotate(self.module, (cos, sin), self.length)

    def __call__(self, key_bias: Tensor) -> Tensor:
        keys = key_bias[None, :, None].expand(self.rows, -1, self.length, -1)
        if self.cos_sin is None:
            return keys
        apply = sys.modules[type(self.module).__module__].apply_rotary_pos_emb
        # RoPE may turn the first channels only.
        turned, rest = keys.tensor_split([self.cos_sin[0].shape[-1]], -1)
        return torch.cat([apply(turned, turned, *self.cos_sin)[1], rest], -1)


Rotations = dict[nn.Module, tuple[Tensor, Tensor] | None]


@contextmanager
def rotations_of(modules: list[nn.Module]) -> Iterator[Rotations]:
    """The rotation that each attention module was last called with, if any."""
    seen: Rotations = {}

    def see(module: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        seen[module] = kwargs.get("position_embeddings")

    handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def layer_attention(
    module: nn.Module,
    cos_sin: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> LayerAttention:
    """The scene of a call to an attention function, and of RoPE as the module was called."""
    length = query.shape[2]
    # Hastened Linears give bfloat16; what the fit adds up must not be rounded to it.
    dtype = next(module.parameters()).dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    mask = attention_mask  # by this name some layers give it
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    rotate = Rotate(module, cos_sin, length)
    turned = rotate.cos_sin is not None
    return LayerAttention(
        query, key, value, ~mask, scaling, softcap, rotate, turned, sliding_window
    )
