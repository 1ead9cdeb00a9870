"""A sliding window in every layer, by settings that stock models have.

Sinks are no tokens, so no window leaves them behind: a cache of the last tokens is enough.
"""

from typing import Any

from absorb.errors import AbsorbError
from absorb.models.family import Family

# Where one setting gives a window to all layers, and where each layer says whether it has it.
# Elsewhere a window would change more: in Gemma 3 the RoPE of a layer, in Cohere 2 whether it has
# any.
_EVERY_LAYER = ("mistral", "mixtral", "phi3", "starcoder2")
_BY_LAYER = ("ministral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3", "gemma2")
WINDOWED = (*_EVERY_LAYER, *_BY_LAYER)


def refuse_windowless(family: Family) -> None:
    """Refuse a family whose models have no setting for a window in every layer."""
    if family.model_type not in WINDOWED:
        raise AbsorbError(
            f"{family.model_type} models have no setting for a window in every layer; drop "
            f"--window, or pass --to native if {family.model_type} has such a target"
        )


def slide(config: Any, family: Family, window: int) -> None:
    """Let every layer of a model with this configuration see so many tokens, itself among them."""
    refuse_windowless(family)
    own = getattr(config, "sliding_window", None)
    refuse_wider(own, window)
    config.sliding_window = window
    if family.model_type in _BY_LAYER:
        config.use_sliding_window = True
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers


def refuse_wider(own: int | None, window: int) -> None:
    """Refuse a window that is wider than the one that layers of the model were trained with."""
    if own and own < window:  # some say 0 where there is none
        raise AbsorbError(
            f"layers of this model have a window of {own} tokens and never saw more; pass "
            f"--window {own} or less"
        )
