"""The shape of an entry in FAMILIES: where an architecture reads and writes its stream."""

from dataclasses import dataclass
from typing import Any

from absorb.errors import AbsorbError


class UnsupportedFamilyError(AbsorbError):
    """The model's architecture has no entry in FAMILIES, or its entry does not hold for it."""


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture, with Llama's names as the defaults.

    `embedding`, `positions`, `layers` and `final_norm` are relative to the model with its language
    model head, all other names to a decoder layer. A name is that of a module or, in a mixture of
    experts, of the parameter (experts, outputs, inputs) that holds one weight for every expert.
    """

    model_type: str
    # No entry, but what was read off a model that has none: where its layers and their attention
    # are. It can be measured, and not converted.
    inferred: bool = False
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    attention: str = "self_attn"

    # A table of learned positions that is added to the embedding, where keys are not rotated
    # (RoPE). Text starts at its row `position_offset`; padding uses the rows before that.
    positions: str | None = None
    position_offset: int = 0

    # Every module whose input is the residual stream, and every one whose output is added to it,
    # the embedding, the positions and the final norm aside. Where a norm writes (Gemma, OLMo 2),
    # zeroing a column of `down` rescales all that is written.
    reads: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    writes: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")

    # Norms multiply by norm_offset + weight. An offset weight divided by a large factor lies near
    # -1, where bfloat16 keeps few digits of the sum (at a factor of 64, 4 % off): use float32.
    norm_offset: float = 0.0

    # The setting that every norm has its epsilon from, those of queries and keys among them; None
    # where norms have one that no setting changes.
    epsilon: str | None = "rms_norm_eps"

    # A norm, and the only readers of its output. A router that shares it comes last.
    feeds: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("input_layernorm", QKV),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    )

    # Whether query heads share key and value heads, as the setting num_key_value_heads says; where
    # they do not, the model ignores that setting.
    grouped: bool = True

    # The last kv_heads * head_dim rows of `value` are the values, whether they are all its rows or
    # the tail of a fused projection. Column h * head_dim + i of `output` reads value channel
    # (h // group) * head_dim + i, where group is the number of query heads to a KV head.
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"

    # The Linear whose bias is added to the keys just before RoPE, or None where a norm stands
    # between the two; it also does where the setting `key_norm` of the configuration is true. The
    # rows of the keys are its key_block-th block of kv_heads * head_dim rows from the end.
    key: str | None = "self_attn.k_proj"
    key_block: int = 1
    key_norm: str | None = None

    # An attribute of `attention` that is None or False where a layer does not rotate its keys.
    rotation: str | None = None

    # Whether a fused projection holds query, key and value of one head, then those of the next
    # (GPT-NeoX), so that "the last block" means the last block of head_dim rows of every head.
    interleaved: bool = False

    # A factor on row n of the last rows of `up` is a factor on neuron n, because the row multiplies
    # an activated gate or passes a ReLU; None where it passes another activation. Only column n of
    # `down` reads neuron n. Every expert has neurons of its own.
    up: str | None = "mlp.up_proj"
    down: str = "mlp.down_proj"

    # The `up` and `down` of an expert that every token is sent to beside those chosen for it. Its
    # neurons are smoothed; none of them is taken for a spike neuron.
    shared: tuple[str, str] | None = None

    # The `up` and `down` of layers that have no experts, in a mixture where only some layers do.
    dense: tuple[str, str] | None = None

    # Places that only some of the layers have. A layer without `attention` hands on a state from
    # token to token instead: it takes no sink, and what a prefix would leave in its state is lost.
    some: tuple[str, ...] = ()

    # Whether what the heads give passes a gate before `output` reads it. A constant value cannot be
    # folded into a bias behind the gate, so sinks keep their keys.
    gated: bool = False

    # What config.json must say for this entry to be true: a setting, and the values that it may
    # have, its default first. The width of the embedding, where it is a setting, must be that of
    # the stream, so that nothing stands between the two.
    requires: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    embedding_width: str | None = None

    @property
    def neurons(self) -> dict[str, str]:
        """Every `up` whose rows may be divided, and the `down` that reads its neurons."""
        routed = {self.up: self.down} if self.up else {}
        return routed | dict(pair for pair in (self.shared, self.dense) if pair)

    @property
    def links(self) -> dict[str, tuple[str, ...]]:
        """Every module whose output may be divided, and the readers that make up for it."""
        neurons = {up: (down,) for up, down in self.neurons.items()}
        return {**dict(self.feeds), self.value: (self.output,), **neurons}
