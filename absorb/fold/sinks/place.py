"""A layer's sink → parameters of the student."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from absorb.fold.sinks.forms import KeySink, LogitSink
from absorb.models.decoder import fused_rows_of, place_at, read_by_heads, weight_at
from absorb.models.family import Family


def shift_positions(student: PreTrainedModel, family: Family, count: int) -> None:
    """Let text start at the learned position where it stood behind a prefix of `count` tokens."""
    if family.positions is None:
        return
    table: Any = student.get_submodule(family.positions)
    start = family.position_offset
    table.weight = nn.Parameter(torch.cat([table.weight[:start], table.weight[start + count :]]))
    table.num_embeddings -= count
    student.config.max_position_embeddings -= count


def place_keys(layer: nn.Module, family: Family, sink: KeySink) -> None:
    attention: Any = layer.get_submodule(family.attention)
    attention.sink_key.copy_(sink.keys)
    attention.sink_value.copy_(sink.values)


def place_logits(
    student: PreTrainedModel, family: Family, layer: nn.Module, sink: LogitSink
) -> None:
    """Sink logits, and the sink value and key bias as biases of the stock Linears.

    `Σ p_j v_j + p v = Σ p_j (v_j - v) + v` for `p + Σ p_j = 1`: v goes from the value bias to the
    output bias, and costs nothing at run time.
    """
    value, output = place_at(layer, family.value), place_at(layer, family.output)
    sink_value = sink.value.to(output.weight)
    place_at(layer, family.attention).sink.copy_(sink.logits)
    value.bias[fused_rows_of(student, family, layer, family.value, sink_value)] -= (
        sink_value.flatten()
    )
    read = read_by_heads(sink_value, student.config, family)
    output.bias += weight_at(layer, family.output) @ read
    if family.key is not None:
        key = place_at(layer, family.key)
        key_bias = sink.key_bias.to(key.bias)
        rows = fused_rows_of(student, family, layer, family.key, key_bias, family.key_block)
        key.bias[rows] += key_bias.flatten()
