"""Where each supported architecture reads and writes its residual stream, and what may be rescaled.

A family is pure data: names of submodules in the transformers implementation. To support a new
architecture, add one entry to FAMILIES, which `absorb inspect MODEL --family` prints where it can;
tests/models/test_families.py then builds a tiny random model of it and proves that every name in
the entry is right and that none is missing. Without one, absorb/prove does so for each model anew.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from absorb.models.family import QKV, Family, UnsupportedFamilyError
from absorb.models.hybrids import HYBRIDS
from absorb.models.mixtures import GLM4V_MOE, MIXTURES
from absorb.models.refused import REFUSED

_LLAMA = Family(model_type="llama")
_GEMMA = Family(
    model_type="gemma2",
    reads=("input_layernorm", "pre_feedforward_layernorm"),
    writes=("post_attention_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    feeds=(
        ("input_layernorm", QKV),
        ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    requires=(("use_bidirectional_attention", (False, None)),),
)
_PHI3 = replace(
    _LLAMA,
    model_type="phi3",
    feeds=(
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ),
    value="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
    key_block=2,
    up="mlp.gate_up_proj",
)
# OLMo 2 normalises what a block writes, not what it reads, so Linears read the raw stream.
_OLMO2 = Family(
    model_type="olmo2",
    reads=(*QKV, "mlp.gate_proj", "mlp.up_proj"),
    writes=("post_attention_layernorm", "post_feedforward_layernorm"),
    feeds=(),
    key=None,
)
# LayerNorm without a weight leaves nothing to divide, so no smoothing of what it feeds.
_OLMO = replace(
    _LLAMA, model_type="olmo", feeds=(), epsilon=None, requires=(("clip_qkv", (None,)),)
)
_GLM4 = replace(
    _LLAMA,
    model_type="glm4",
    writes=("post_self_attn_layernorm", "post_mlp_layernorm"),
    feeds=(
        ("input_layernorm", QKV),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ),
    up="mlp.gate_up_proj",
)
# No gate: the neurons are those of one matrix, behind an activation that bends them.
_APERTUS = replace(
    _LLAMA,
    model_type="apertus",
    reads=("attention_layernorm", "feedforward_layernorm"),
    feeds=(
        ("attention_layernorm", QKV),
        ("feedforward_layernorm", ("mlp.up_proj",)),
    ),
    key=None,
    up=None,
)
_ARCEE = replace(
    _LLAMA,
    model_type="arcee",
    feeds=(
        ("input_layernorm", QKV),
        ("post_attention_layernorm", ("mlp.up_proj",)),
    ),
    up=None,
)
_NEMOTRON = replace(_ARCEE, model_type="nemotron", norm_offset=1.0, epsilon="norm_eps")
_STARCODER2 = replace(
    _LLAMA,
    model_type="starcoder2",
    epsilon="norm_epsilon",
    writes=("self_attn.o_proj", "mlp.c_proj"),
    feeds=(
        ("input_layernorm", QKV),
        ("post_attention_layernorm", ("mlp.c_fc",)),
    ),
    up=None,
    down="mlp.c_proj",
)
# In Cohere and Phi, attention and MLP stand side by side behind one norm.
_COHERE = replace(
    _LLAMA,
    model_type="cohere",
    epsilon="layer_norm_eps",
    reads=("input_layernorm",),
    feeds=(("input_layernorm", (*QKV, "mlp.gate_proj", "mlp.up_proj")),),
    key_norm="use_qk_norm",
)
_PHI = replace(
    _LLAMA,
    model_type="phi",
    epsilon="layer_norm_eps",
    final_norm="model.final_layernorm",
    reads=("input_layernorm",),
    writes=("self_attn.dense", "mlp.fc2"),
    feeds=(("input_layernorm", (*QKV, "mlp.fc1")),),
    output="self_attn.dense",
    key_norm="qk_layernorm",
    up=None,
    down="mlp.fc2",
)
# Conv1D, fused projections and a table of positions; attention may also be scaled by the layer.
_GPT2 = Family(
    model_type="gpt2",
    epsilon="layer_norm_epsilon",
    embedding="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    attention="attn",
    reads=("ln_1", "ln_2"),
    writes=("attn.c_proj", "mlp.c_proj"),
    feeds=(("ln_1", ("attn.c_attn",)), ("ln_2", ("mlp.c_fc",))),
    grouped=False,
    value="attn.c_attn",
    output="attn.c_proj",
    key="attn.c_attn",
    key_block=2,
    up=None,
    down="mlp.c_proj",
    requires=(("add_cross_attention", (False,)),),
)
_OPT = Family(
    model_type="opt",
    epsilon=None,
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    position_offset=2,
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    reads=("self_attn_layer_norm", "final_layer_norm"),
    writes=("self_attn.out_proj", "fc2"),
    feeds=(
        ("self_attn_layer_norm", QKV),
        ("final_layer_norm", ("fc1",)),
    ),
    grouped=False,
    output="self_attn.out_proj",
    up="fc1",
    down="fc2",
    requires=(
        ("activation_function", ("relu",)),
        ("do_layer_norm_before", (True,)),
        ("layer_norm_elementwise_affine", (True,)),
        ("_remove_final_layer_norm", (False,)),
    ),
    embedding_width="word_embed_proj_dim",
)
# Whether MLP and attention stand side by side or one behind the other is a setting, and does not
# matter: each has a norm of its own that reads the stream.
_GPT_NEOX = Family(
    model_type="gpt_neox",
    epsilon="layer_norm_eps",
    embedding="gpt_neox.embed_in",
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    attention="attention",
    writes=("attention.dense", "mlp.dense_4h_to_h"),
    feeds=(
        ("input_layernorm", ("attention.query_key_value",)),
        ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    ),
    grouped=False,
    value="attention.query_key_value",
    output="attention.dense",
    key="attention.query_key_value",
    key_block=2,
    interleaved=True,
    up=None,
    down="mlp.dense_4h_to_h",
)
FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        _LLAMA,
        replace(_LLAMA, model_type="mistral"),
        replace(_LLAMA, model_type="ministral"),
        replace(_LLAMA, model_type="cwm"),
        replace(_LLAMA, model_type="qwen2"),
        replace(_LLAMA, model_type="qwen3", key=None),
        replace(_LLAMA, model_type="smollm3", rotation="use_rope"),
        # Granite multiplies the embedding and each write by one scalar: every rescaling commutes.
        replace(_LLAMA, model_type="granite"),
        replace(_LLAMA, model_type="seed_oss"),
        replace(_LLAMA, model_type="ernie4_5"),
        replace(
            _LLAMA,
            model_type="stablelm",
            epsilon="layer_norm_eps",
            key_norm="qk_layernorm",
            requires=(("use_parallel_residual", (False,)),),
        ),
        _ARCEE,
        replace(_ARCEE, model_type="jais2", epsilon="layer_norm_eps"),
        _NEMOTRON,
        _APERTUS,
        _PHI3,
        replace(_LLAMA, model_type="gemma", norm_offset=1.0, requires=_GEMMA.requires),
        _GEMMA,
        replace(_GEMMA, model_type="gemma3_text", key=None),
        replace(_GEMMA, model_type="vaultgemma", writes=_LLAMA.writes, requires=()),
        _OLMO,
        _OLMO2,
        replace(_OLMO2, model_type="olmo3"),
        replace(_OLMO2, model_type="exaone4"),
        replace(_GLM4, model_type="glm", writes=_LLAMA.writes),
        _GLM4,
        _STARCODER2,
        _COHERE,
        replace(_COHERE, model_type="cohere2", key_norm=None, rotation="sliding_window"),
        _PHI,
        _GPT2,
        _GPT_NEOX,
        _OPT,
        *MIXTURES,
        *HYBRIDS,
    )
}

# Language models that transformers has inside of models that read pictures and nowhere else. Their
# RoPE turns keys by three positions (time, height and width), and those of a word are equal: keys
# of a prefix, turned to -n .. -1 in all three, are as far from a patch as behind that prefix.
INSIDE: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        replace(_LLAMA, model_type="qwen2_vl_text"),
        replace(_LLAMA, model_type="qwen2_5_vl_text"),
        replace(_LLAMA, model_type="qwen3_vl_text", key=None),
        replace(FAMILIES["qwen3_moe"], model_type="qwen3_vl_moe_text"),
        replace(_GLM4, model_type="glm4v_text"),
        replace(_GLM4, model_type="glm_ocr_text"),
        GLM4V_MOE,
    )
}


def family_of(model_type: str) -> Family:
    """The entry for an architecture. Never a guess: a wrong one corrupts a model silently."""
    if model_type in REFUSED:
        raise UnsupportedFamilyError(
            f"absorb does not convert the architecture {model_type!r}, as {REFUSED[model_type]}; "
            f"choose a model of one that it knows ({', '.join(sorted(FAMILIES))})"
        )
    found = FAMILIES.get(model_type) or INSIDE.get(model_type)
    if found is None:
        raise UnsupportedFamilyError(
            f"absorb does not know the architecture {model_type!r}; choose a model of one that it "
            f"knows ({', '.join(sorted(FAMILIES))}) or add an entry to absorb/models/families.py"
        )
    return found


def suited(family: Family, settings: Mapping[str, Any]) -> Family:
    """The entry as it holds for a model with these settings in its config.json."""
    demands = list(family.requires)
    if family.embedding_width is not None:
        demands.append((family.embedding_width, (settings.get("hidden_size"), None)))
    for setting, values in demands:
        value = settings.get(setting, values[0])
        if value not in values:
            raise UnsupportedFamilyError(
                f"absorb knows {family.model_type} only with {setting} {values[0]!r}, and this "
                f"model has {value!r}; choose another model"
            )
    if family.key_norm is not None and settings.get(family.key_norm):
        return replace(family, key=None)
    return family
