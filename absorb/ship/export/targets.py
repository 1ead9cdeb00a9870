"""Which stock architecture holds a converted model, and how its settings are called there.

ROUTES is a table, as FAMILIES is: to export another family, add an entry. tests/ship/test_export.py
then proves by logits that nothing is lost on the way, and that no entry is idle.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from absorb.errors import AbsorbError
from absorb.models.families import FAMILIES
from absorb.models.positions.windows import refuse_wider

# Where the window of a family is: in every layer once it is set, or in the layers that slide.
Windows = Literal["none", "every layer", "layer_types"]
# Settings that mean the same everywhere.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "attention_dropout",
    "use_cache",
    "dtype",
)
# A window that hides nothing: text may be longer than max_position_embeddings says.
_WIDE = 2**24
_SLIDES, _SEES_ALL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A stock architecture whose attention has a sink logit for each head, and biases."""

    model_type: str
    since: str  # the first transformers that has it
    # Kinds of RoPE, by their names in transformers.
    rotations: frozenset[str] = frozenset(
        {"default", "linear", "dynamic", "yarn", "llama3", "longrope"}
    )
    # A layer is rotated where it slides, and nowhere else.
    rotates_where_it_slides: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How one family is told in the words of its target."""

    family: str
    target: Target
    # What the family may set beside _SHARED; others have the defaults of the target.
    settings: tuple[str, ...] = ()
    windows: Windows = "none"
    # The setting that has 0 for each layer without RoPE.
    rotated_layers: str | None = None
    # Fused projections of a layer, and what their rows are, in this order.
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()


_GRANITE = Target(model_type="granite_swa", since="5.17")
_FLINT = Target(model_type="flint", since="5.21", rotates_where_it_slides=True)
_MULTIPLIERS = (
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
_LLAMA = Route(family="llama", target=_GRANITE, settings=("mlp_bias",))
ROUTES: Mapping[str, Route] = {
    route.family: route
    for route in (
        _LLAMA,
        replace(_LLAMA, family="granite", settings=("mlp_bias", *_MULTIPLIERS)),
        Route(family="mistral", target=_GRANITE, windows="every layer"),
        Route(family="ministral", target=_GRANITE, windows="layer_types"),
        Route(family="qwen2", target=_GRANITE, windows="layer_types"),
        replace(_LLAMA, family="smollm3", windows="layer_types", rotated_layers="no_rope_layers"),
        Route(
            family="phi3",
            target=_GRANITE,
            windows="every layer",
            fused=(
                ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
                ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
            ),
        ),
        Route(family="qwen3", target=_FLINT, windows="layer_types"),
    )
}
assert ROUTES.keys() <= FAMILIES.keys()


def route_of(family: str) -> Route:
    """The way from a family to a stock architecture, if there is one that can be used here."""
    if family not in ROUTES:
        raise AbsorbError(
            f"no stock architecture has a place for the sinks of {family} models; absorb exports "
            f"{', '.join(sorted(ROUTES))}, and other families run in transformers and vLLM as they "
            "are converted"
        )
    route = ROUTES[family]
    if route.target.model_type not in CONFIG_MAPPING:
        raise AbsorbError(
            f"{family} is exported as {route.target.model_type}, which transformers "
            f"{transformers.__version__} does not have; install {route.target.since} or newer"
        )
    return route


def config_for(
    route: Route, config: PretrainedConfig, window: int | None = None
) -> PretrainedConfig:
    """The configuration of the exported model, from that of a converted one.

    With a window every layer slides. An AbsorbError names what the target cannot hold.
    """
    _refuse_rotation(route.target, config)
    settings = settings_for(route, config)
    if window is not None:
        refuse_wider(windows_of(route, config)[1], window)
        settings["layer_types"] = [_SLIDES] * config.num_hidden_layers
        settings["sliding_window"] = window
    return CONFIG_MAPPING[route.target.model_type](**settings)


def settings_for(route: Route, config: PretrainedConfig) -> dict[str, Any]:
    """All that the configuration of the exported model is told."""
    place = _placed_where_it_slides if route.target.rotates_where_it_slides else _placed
    return {
        **place(route, config),
        **{name: getattr(config, name) for name in (*_SHARED, *route.settings)},
        "head_dim": head_dim_of(config),
        "attention_bias": True,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[route.target.model_type]],
    }


def head_dim_of(config: PretrainedConfig) -> int:
    dim: int | None = getattr(config, "head_dim", None)
    return dim or config.hidden_size // config.num_attention_heads


def _refuse_rotation(target: Target, config: PretrainedConfig) -> None:
    rotation: dict[str, Any] = config.rope_parameters
    kind = rotation.get("rope_type")
    if kind not in target.rotations:
        raise AbsorbError(
            f"this model has RoPE of the kind {kind}, and {target.model_type} was proved with "
            f"{', '.join(sorted(target.rotations))}; use it as converted"
        )
    share = rotation.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise AbsorbError(
            f"this model rotates {share:g} of each head, and {target.model_type} rotates all of "
            "it; use it as converted"
        )


def windows_of(route: Route, config: PretrainedConfig) -> tuple[list[str], int | None]:
    """What each layer sees, in the words of `layer_types`, and the window of those that slide."""
    count: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    if route.windows == "none" or window is None:
        return [_SEES_ALL] * count, None
    types = [_SLIDES] * count if route.windows == "every layer" else list(config.layer_types)
    return types, window if _SLIDES in types else None


def _placed(route: Route, config: PretrainedConfig) -> dict[str, Any]:
    """Windows, RoPE and the scale of attention in granite_swa."""
    types, window = windows_of(route, config)
    if window is None:
        # llama.cpp demands that a layer slides, and transformers a window.
        types, window = [_SLIDES, *types[1:]], _WIDE
    theta = config.rope_parameters["rope_theta"]
    rotated = getattr(config, route.rotated_layers) if route.rotated_layers else None
    return {
        "layer_types": types,
        "sliding_window": window,
        "layer_rope_theta": [
            theta if rotated is None or rotated[layer] else 0 for layer in range(len(types))
        ],
        "attention_multiplier": head_dim_of(config) ** -0.5,
    }


def _placed_where_it_slides(route: Route, config: PretrainedConfig) -> dict[str, Any]:
    """Windows in flint, where all layers must slide to be rotated; none of them has experts."""
    types, window = windows_of(route, config)
    if len({*types}) > 1:
        raise AbsorbError(
            f"this model has a window in some layers and not in others, and "
            f"{route.target.model_type} rotates only what has one; use it as converted"
        )
    return {
        "layer_types": [_SLIDES] * len(types),
        "sliding_window": window or _WIDE,
        "mlp_only_layers": list(range(len(types))),
    }
