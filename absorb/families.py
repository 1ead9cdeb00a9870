"""Where each supported architecture reads and writes its residual stream, and what may be rescaled.

A family is pure data: names of submodules in the transformers implementation. To support a new
architecture, add one entry to FAMILIES; tests/test_families.py then builds a tiny random model of
it and proves that every name in the entry is right and that none is missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from absorb.errors import AbsorbError


class UnsupportedFamilyError(AbsorbError):
    """The model's architecture has no entry in FAMILIES."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture, with Llama's names as the defaults.

    `embedding`, `layers` and `final_norm` are relative to the model with its language model head,
    all other names to a decoder layer.
    """

    model_type: str
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    mlp: str = "mlp"

    # Every module whose input is the residual stream, and every one whose output is added to it.
    # Where a norm writes (Gemma, OLMo 2), zeroing a column of `down` rescales all that is written.
    reads: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    writes: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")

    # Norms multiply by norm_offset + weight. An offset weight divided by a large factor lies near
    # -1, where bfloat16 keeps few digits of the sum (at a factor of 64, 4 % off): use float32.
    norm_offset: float = 0.0

    # A norm, and the Linears that are the only readers of its output.
    feeds: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    )

    # The last kv_heads * head_dim rows of `value` are the values, whether they are all its rows or
    # the tail of a fused projection. Column h * head_dim + i of `output` reads value channel
    # (h // group) * head_dim + i, where group is the number of query heads to a KV head.
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"

    # The Linear whose bias is added to the keys just before RoPE, or None where a norm stands
    # between the two. The rows of the keys are its key_block-th block of kv_heads * head_dim rows
    # from the end.
    key: str | None = "self_attn.k_proj"
    key_block: int = 1

    # The last intermediate_size rows of `up` multiply the activated gate, and only the columns of
    # `down` read the product: row n and column n belong to neuron n.
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


_LLAMA = Family(model_type="llama")

_GEMMA = Family(
    model_type="gemma2",
    reads=("input_layernorm", "pre_feedforward_layernorm"),
    writes=("post_attention_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    feeds=(
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ),
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
    reads=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ),
    writes=("post_attention_layernorm", "post_feedforward_layernorm"),
    feeds=(),
    key=None,
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        _LLAMA,
        replace(_LLAMA, model_type="mistral"),
        replace(_LLAMA, model_type="qwen2"),
        replace(_LLAMA, model_type="qwen3", key=None),
        replace(_LLAMA, model_type="smollm3"),
        # Granite multiplies the embedding and each write by one scalar: every rescaling commutes.
        replace(_LLAMA, model_type="granite"),
        _PHI3,
        _GEMMA,
        replace(_GEMMA, model_type="gemma3_text", key=None),
        _OLMO2,
    )
}


def family_of(model_type: str) -> Family:
    """The entry for an architecture. Never a guess: a wrong one corrupts a model silently."""
    if model_type not in FAMILIES:
        raise UnsupportedFamilyError(
            f"absorb does not know the architecture {model_type!r}; choose a model of one that it "
            f"knows ({', '.join(sorted(FAMILIES))}) or add an entry to absorb/families.py"
        )
    return FAMILIES[model_type]
