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
_QWEN2_MOE = replace(
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
MIXTURES = (
    _QWEN3_MOE,
    replace(_QWEN3_MOE, model_type="mixtral", key="self_attn.k_proj", requires=()),
    _QWEN2_MOE,
    replace(_QWEN3_MOE, model_type="olmoe", requires=(("clip_qkv", (None,)),)),
    replace(_QWEN3_MOE, model_type="minimax_m2", requires=()),
    _GRANITE_MOE,
)
