"""The forms that one layer's sink may have."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitSink:
    """One layer's sink as constants that were fitted to the prefix.

    error is the share of the prefix's effect on the output, in squared norm, that they leave out:
    1 where they do nothing.
    """

    logits: Tensor  # (heads,)
    value: Tensor  # (kv_heads, head_dim)
    key_bias: Tensor  # (kv_heads, head_dim)
    error: Tensor  # ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySink:
    """One layer's sink as the prefix itself, which is exact.

    Only a window is too short for it: the teacher's prefix leaves one, and error says what of its
    effect that changes. fit is what logits make of the prefix, for who needs them later.
    """

    keys: Tensor  # (kv_heads, tokens, head_dim), rotated where there is RoPE
    values: Tensor  # (kv_heads, tokens, head_dim)
    error: Tensor = field(default_factory=lambda: torch.zeros(()))  # ()
    fit: LogitSink | None = None


LayerSink = KeySink | LogitSink
