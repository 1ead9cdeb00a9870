"""Tiny random models of every family: 28,000 parameters, none of them a trivial 0 or 1."""

import copy
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from absorb.models.family import Family
from absorb.models.whole import with_head
from absorb.prove.shrink import randomise
from absorb.schema.findings import Findings

LAYERS = 3
HIDDEN = 32
INTERMEDIATE = 48
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 8
EXPERTS = 4
VOCABULARY = 64
POSITIONS = 64
_SEED = 4
# What is found in a model without outliers.
NOTHING = Findings(
    sink_heads=(),
    sink_tokens=(),
    massive_activations=(),
    spike_neurons=(),
    outlier_channels=(),
    outlier_tokens=0,
)

COMMON = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

# A window as long as the positions hides nothing: pass a smaller `sliding_window` to see it work.
GEMMA = {
    "head_dim": HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "sliding_window": POSITIONS,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

# How many of the frequencies are those of time, height and width.
THREE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "ministral": {"head_dim": HEAD_DIM, "sliding_window": POSITIONS},
    "cwm": {
        "head_dim": HEAD_DIM,
        "sliding_window": POSITIONS,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "olmo3": {"sliding_window": POSITIONS},
    "exaone4": {"sliding_window": POSITIONS, "sliding_window_pattern": 3},
    "glm": {"head_dim": HEAD_DIM, "attention_bias": True},
    "glm4": {"head_dim": HEAD_DIM, "attention_bias": True},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {
        "head_dim": HEAD_DIM,
        "logit_scale": 0.5,
        "sliding_window": POSITIONS,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "seed_oss": {"head_dim": HEAD_DIM},
    "ernie4_5": {"head_dim": HEAD_DIM},
    "stablelm": {"use_qkv_bias": True},
    "arcee": {"head_dim": HEAD_DIM},
    "jais2": {"head_dim": HEAD_DIM},
    "nemotron": {"head_dim": HEAD_DIM},
    "gemma": {"head_dim": HEAD_DIM},
    "gpt2": {"n_inner": INTERMEDIATE, "scale_attn_by_inverse_layer_idx": True},
    "opt": {"ffn_dim": INTERMEDIATE},
    "qwen3_moe": {
        "head_dim": HEAD_DIM,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INTERMEDIATE,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INTERMEDIATE,
        "shared_expert_intermediate_size": INTERMEDIATE,
    },
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "minimax_m2": {
        "head_dim": HEAD_DIM,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
    },
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "granitemoe": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "qwen3": {"head_dim": HEAD_DIM},
    "phi3": {"original_max_position_embeddings": POSITIONS},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen2_vl_text": {"rope_parameters": THREE},
    "qwen2_5_vl_text": {"rope_parameters": THREE},
    "qwen3_vl_text": {"head_dim": HEAD_DIM, "rope_parameters": THREE},
    "glm4v_text": {"rope_parameters": THREE},
    "glm_ocr_text": {"head_dim": HEAD_DIM, "rope_parameters": THREE},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "vaultgemma": GEMMA,
}

SPECIAL["qwen3_vl_moe_text"] = {**SPECIAL["qwen3_moe"], "rope_parameters": THREE}
# One layer has no experts.
MIXED = {
    "head_dim": HEAD_DIM,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": INTERMEDIATE,
    "num_experts_per_tok": 2,
}
STATES = ["linear_attention", "full_attention", "linear_attention"]
DELTA = {
    "head_dim": HEAD_DIM,
    "layer_types": STATES,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
SPECIAL |= {
    "glm4_moe": MIXED,
    "glm4v_moe_text": {**MIXED, "rope_parameters": {**THREE, "partial_rotary_factor": 1.0}},
    "dots1": {**MIXED, "layer_types": ["full_attention"] * LAYERS},
    "exaone_moe": {
        "head_dim": HEAD_DIM,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INTERMEDIATE,
        "sliding_window": POSITIONS,
    },
    "afmoe": {
        "head_dim": HEAD_DIM,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INTERMEDIATE,
        "num_dense_layers": 1,
        "sliding_window": POSITIONS,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "ernie4_5_moe": {
        "head_dim": HEAD_DIM,
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_intermediate_size": INTERMEDIATE,
    },
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**SPECIAL["qwen2_moe"], **DELTA},
    "qwen3_next": {**SPECIAL["qwen2_moe"], **DELTA},
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INTERMEDIATE,
        "num_dense_layers": 1,
    },
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "jamba": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "granitemoehybrid": {
        **SPECIAL["granitemoe"],
        **MAMBA,
        "layer_types": STATES,
        "shared_intermediate_size": INTERMEDIATE,
    },
}

# Families in which every query head has a key and value head of its own.
ONE_TO_ONE = {"gpt2", "gpt_neox", "opt"}


def attending(family: Family) -> list[int]:
    """The layers of a tiny model that attend: only the second where most hand on a state."""
    return [1] if family.attention in family.some else [*range(LAYERS)]


def kv_heads(model_type: str) -> int:
    return HEADS if model_type in ONE_TO_ONE else KV_HEADS


def tiny(model_type: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> PreTrainedModel:
    """A small causal language model in eval mode, the same at every call.

    `overrides` go to the config. In another dtype the parameters are the float64 ones, rounded.
    """
    known = (model_type, dtype, repr(sorted(overrides.items())))
    if known not in _MADE:
        _MADE[known] = _made(model_type, dtype, overrides)
    return copy.deepcopy(_MADE[known])


# Copied in a third of the time that one takes to be made, by some thousands of tests.
_MADE: dict[tuple[str, torch.dtype, str], PreTrainedModel] = {}


def _made(model_type: str, dtype: torch.dtype, overrides: dict[str, Any]) -> PreTrainedModel:
    settings = copy.deepcopy({**COMMON, **SPECIAL.get(model_type, {}), **overrides})
    config = AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)  # for what a class draws itself, and `randomise` leaves
        model = causal_class(config)._from_config(config, dtype=dtype).eval()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        # transformers 5.17 lets SDPA leave out the softcap, and says nothing.
        model.set_attn_implementation("eager")
    # The grouped product of torch has no float64.
    model.set_experts_implementation("eager")
    randomise(model)
    return model


def causal_class(config: PretrainedConfig) -> Any:
    """The class of transformers, or its body with a head."""
    kind = type(config)
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING
    return MODEL_FOR_CAUSAL_LM_MAPPING[kind] if known else with_head(MODEL_MAPPING[kind])
