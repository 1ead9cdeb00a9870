"""Where the frequencies of RoPE change with the length of a text."""

from typing import Any


def rope_changes_at(config: Any) -> int | None:
    """The longest text, in tokens, that RoPE rotates by the frequencies it has; None if any.

    Beyond it longrope takes another set, and dynamic NTK one for every length:
    transformers.modeling_rope_utils.dynamic_rope_update.
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    # One set, or one for each kind of layer.
    sets = [rope] if "rope_type" in rope else [one for one in rope.values() if one]
    kinds = {one["rope_type"]: one for one in sets}
    limits = []
    if "longrope" in kinds:
        limits.append(kinds["longrope"]["original_max_position_embeddings"])
    if "dynamic" in kinds:
        limits.append(config.max_position_embeddings)
    return min(limits, default=None)
