"""Architectures that no entry can describe as entries are, and the property that stands in the way.

One with several such properties is listed under the first.
"""

from collections.abc import Mapping

_LATENT = (
    "its heads draw keys and values from one latent vector, "
    "and an entry names a matrix that gives values alone"
)
_OWN_SINKS = "its attention has sinks of its own already"
_CLOSED = "its attention takes no function from outside, so that no sink gets into it"
_PLACES = (
    "its attention depends on where tokens stand and not on their distances alone, "
    "so that text cannot move up to where the prefix stood"
)
_STATES = "layers of it hand on a state from token to token instead of attending"
_STREAMS = "its layers carry several streams side by side"
_BORROWED = "layers of it attend to keys and values of other layers"

_OF: Mapping[str, tuple[str, ...]] = {
    _LATENT: ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"),
    _OWN_SINKS: ("gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"),
    _CLOSED: ("falcon", "bloom", "mpt", "gpt_neo", "xglm"),
    _PLACES: ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral3", "llama4_text"),
    _STATES: (
        "falcon_h1",
        "nemotron_h",
        "recurrent_gemma",
        "minimax",
        "kimi_linear",
        "olmo_hybrid",
    ),
    _STREAMS: ("gemma3n_text",),
    _BORROWED: ("gemma4_text",),
}
REFUSED: Mapping[str, str] = {
    model_type: reason for reason, model_types in _OF.items() for model_type in model_types
}
