"""The entries of FAMILIES in which most layers hand on a state and some attend.

Residual scales and smoothing are for all of their layers, sinks for those that attend.
"""

from dataclasses import replace

from absorb.models.family import QKV, Family
from absorb.models.mixtures import QWEN2_MOE

_ATTENTION = ("self_attn", *QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_DELTA = tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a"))
_QWEN3_5 = Family(
    model_type="qwen3_5_text",
    writes=("self_attn.o_proj", "linear_attn.out_proj", "mlp.down_proj"),
    norm_offset=1.0,
    feeds=(("input_layernorm", (*QKV, *_DELTA)), ("post_attention_layernorm", _MLP)),
    key=None,
    some=(*_ATTENTION, *_DELTA, "linear_attn.out_proj"),
    gated=True,
)
_EXPERTS = QWEN2_MOE.feeds[1]
_QWEN3_5_MOE = replace(
    _QWEN3_5,
    model_type="qwen3_5_moe_text",
    writes=(*_QWEN3_5.writes[:2], *QWEN2_MOE.writes[1:]),
    feeds=(_QWEN3_5.feeds[0], _EXPERTS),
    up=QWEN2_MOE.up,
    down=QWEN2_MOE.down,
    shared=QWEN2_MOE.shared,
)
_FUSED = ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba")
_QWEN3_NEXT = replace(
    _QWEN3_5_MOE,
    model_type="qwen3_next",
    feeds=(("input_layernorm", (*QKV, *_FUSED)), _EXPERTS),
    some=(*_ATTENTION, *_FUSED, "linear_attn.out_proj"),
    requires=QWEN2_MOE.requires,
)
_LFM2 = Family(
    model_type="lfm2",
    final_norm="model.embedding_norm",
    reads=("operator_norm", "ffn_norm"),
    writes=("self_attn.out_proj", "conv.out_proj", "feed_forward.w2"),
    feeds=(
        ("operator_norm", (*QKV, "conv.in_proj")),
        ("ffn_norm", ("feed_forward.w1", "feed_forward.w3")),
    ),
    output="self_attn.out_proj",
    key=None,
    up="feed_forward.w3",
    down="feed_forward.w2",
    some=("self_attn", *QKV, "self_attn.out_proj", "conv.in_proj", "conv.out_proj"),
)
_LFM2_MLP = ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
_LFM2_EXPERTS = ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
_LFM2_MOE = replace(
    _LFM2,
    model_type="lfm2_moe",
    writes=(*_LFM2.writes, "feed_forward.experts.down_proj"),
    feeds=(
        _LFM2.feeds[0],
        ("ffn_norm", (_LFM2_EXPERTS[0], *_LFM2_MLP[:2], "feed_forward.gate")),
    ),
    up=_LFM2_EXPERTS[0],
    down=_LFM2_EXPERTS[1],
    dense=_LFM2_MLP[1:],
    some=(*_LFM2.some, *_LFM2_MLP, *_LFM2_EXPERTS, "feed_forward.gate"),
)
_BAMBA = Family(
    model_type="bamba",
    final_norm="model.final_layernorm",
    reads=("input_layernorm", "pre_ff_layernorm"),
    writes=("self_attn.o_proj", "mamba.out_proj", "feed_forward.down_proj"),
    feeds=(
        ("input_layernorm", (*QKV, "mamba.in_proj")),
        ("pre_ff_layernorm", ("feed_forward.gate_proj", "feed_forward.up_proj")),
    ),
    up="feed_forward.up_proj",
    down="feed_forward.down_proj",
    some=(*_ATTENTION, "mamba.in_proj", "mamba.out_proj"),
)
_JAMBA_MLP = ("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj")
_JAMBA_EXPERTS = ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
_JAMBA = replace(
    _BAMBA,
    model_type="jamba",
    writes=(*_BAMBA.writes, _JAMBA_EXPERTS[1]),
    feeds=(
        _BAMBA.feeds[0],
        ("pre_ff_layernorm", (_JAMBA_EXPERTS[0], *_JAMBA_MLP[:2], "feed_forward.router")),
    ),
    up=_JAMBA_EXPERTS[0],
    down=_JAMBA_EXPERTS[1],
    dense=_JAMBA_MLP[1:],
    some=(*_BAMBA.some, *_JAMBA_MLP, *_JAMBA_EXPERTS, "feed_forward.router"),
)
_GRANITE_EXPERTS = (
    "block_sparse_moe.experts.gate_up_proj",
    "block_sparse_moe.experts.down_proj",
    "block_sparse_moe.router",
)
# The block that every token is sent to stands beside the experts, where there are any.
_GRANITE = replace(
    _BAMBA,
    model_type="granitemoehybrid",
    final_norm="model.norm",
    reads=("input_layernorm", "post_attention_layernorm"),
    writes=(
        "self_attn.o_proj",
        "mamba.out_proj",
        "shared_mlp.output_linear",
        _GRANITE_EXPERTS[1],
    ),
    feeds=(
        _BAMBA.feeds[0],
        (
            "post_attention_layernorm",
            (_GRANITE_EXPERTS[0], "shared_mlp.input_linear", _GRANITE_EXPERTS[2]),
        ),
    ),
    up=_GRANITE_EXPERTS[0],
    down=_GRANITE_EXPERTS[1],
    shared=("shared_mlp.input_linear", "shared_mlp.output_linear"),
    some=_BAMBA.some,
)
HYBRIDS = (
    _QWEN3_5,
    _QWEN3_5_MOE,
    _QWEN3_NEXT,
    _LFM2,
    _LFM2_MOE,
    _BAMBA,
    _JAMBA,
    _GRANITE,
)
