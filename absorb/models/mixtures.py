"""The entries of FAMILIES that are mixtures of experts, whose router reads what experts read."""

from dataclasses import replace

from absorb.models.family import QKV, Family

_QWEN3_MOE = Family(
    model_type="qwen3_moe",
    writes=("self_attn.o_proj", "mlp.experts.down_proj"),
    feeds=(
        ("input_layernorm", QKV),
        ("post_attention_layernorm", ("mlp.experts.gate_up_proj", "mlp.gate")),
    ),
    key=None,
    up="mlp.experts.gate_up_proj",
    down="mlp.experts.down_proj",
    requires=(("mlp_only_layers", ([], None)), ("decoder_sparse_step", (1,))),
)
# Beside the chosen experts one answers every token, as loud as a gate of its own says.
QWEN2_MOE = replace(
    _QWEN3_MOE,
    model_type="qwen2_moe",
    writes=("self_attn.o_proj", "mlp.shared_expert.down_proj", "mlp.experts.down_proj"),
    feeds=(
        ("input_layernorm", QKV),
        (
            "post_attention_layernorm",
            (
                "mlp.experts.gate_up_proj",
                "mlp.shared_expert.gate_proj",
                "mlp.shared_expert.up_proj",
                "mlp.shared_expert_gate",
                "mlp.gate",
            ),
        ),
    ),
    key="self_attn.k_proj",
    shared=("mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"),
)
_GRANITE_MOE = Family(
    model_type="granitemoe",
    writes=("self_attn.o_proj", "block_sparse_moe.experts.down_proj"),
    feeds=(
        ("input_layernorm", QKV),
        (
            "post_attention_layernorm",
            ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.router"),
        ),
    ),
    up="block_sparse_moe.experts.gate_up_proj",
    down="block_sparse_moe.experts.down_proj",
)
# The first layers have no experts but one block for every token, as wide as they like.
_DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SHARED = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
_GLM4_MOE = replace(
    _QWEN3_MOE,
    model_type="glm4_moe",
    writes=(
        "self_attn.o_proj",
        "mlp.down_proj",
        "mlp.shared_experts.down_proj",
        "mlp.experts.down_proj",
    ),
    feeds=(
        ("input_layernorm", QKV),
        (
            "post_attention_layernorm",
            ("mlp.experts.gate_up_proj", *_DENSE[:2], *_SHARED, "mlp.gate"),
        ),
    ),
    key="self_attn.k_proj",
    key_norm="use_qk_norm",
    shared=("mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"),
    dense=_DENSE[1:],
    some=(
        *_DENSE,
        *_SHARED,
        "mlp.shared_experts.down_proj",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        "mlp.gate",
    ),
    requires=(),
)
# What the heads give passes a gate, and norms write to the stream.
_AFMOE = replace(
    _GLM4_MOE,
    model_type="afmoe",
    reads=("input_layernorm", "pre_mlp_layernorm"),
    writes=("post_attention_layernorm", "post_mlp_layernorm"),
    feeds=(
        ("input_layernorm", (*QKV, "self_attn.gate_proj")),
        (
            "pre_mlp_layernorm",
            ("mlp.experts.gate_up_proj", *_DENSE[:2], *_SHARED, "mlp.router.gate"),
        ),
    ),
    key=None,
    key_norm=None,
    some=(*_GLM4_MOE.some[:-1], "mlp.router.gate"),
    gated=True,
)
MIXTURES = (
    _QWEN3_MOE,
    replace(_QWEN3_MOE, model_type="mixtral", key="self_attn.k_proj", requires=()),
    QWEN2_MOE,
    replace(_QWEN3_MOE, model_type="olmoe", requires=(("clip_qkv", (None,)),)),
    replace(_QWEN3_MOE, model_type="minimax_m2", requires=()),
    _GRANITE_MOE,
    _GLM4_MOE,
    replace(_GLM4_MOE, model_type="dots1", key=None, key_norm=None),
    replace(_GLM4_MOE, model_type="ernie4_5_moe", key_norm=None),
    replace(_GLM4_MOE, model_type="exaone_moe", key=None, key_norm=None),
    _AFMOE,
)
# Inside of a model that reads pictures, and nowhere else.
GLM4V_MOE = replace(_GLM4_MOE, model_type="glm4v_moe_text", key_norm=None)
