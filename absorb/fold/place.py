"""Sinks → parameters of the student."""

from typing import Any

import torch
from torch import nn

from absorb.fold.plan import Plan
from absorb.fold.sinks.forms import KeySink, LogitSink
from absorb.models.decoder import Decoder


def write(student: Decoder, plan: Plan, layer: int) -> None:
    """Give a layer its sink."""
    sink = plan.sinks[layer]
    if isinstance(sink, KeySink):
        _place_keys(student, layer, sink)
    elif sink is not None:
        _place_logits(student, layer, sink)


def shift_positions(student: Decoder, count: int) -> None:
    """Let text start at the learned position where it stood behind a prefix of `count` tokens."""
    if student.family.positions is None:
        return
    table: Any = student.model.get_submodule(student.family.positions)
    start = student.family.position_offset
    table.weight = nn.Parameter(torch.cat([table.weight[:start], table.weight[start + count :]]))
    table.num_embeddings -= count
    student.config.max_position_embeddings -= count


def _place_keys(student: Decoder, layer: int, sink: KeySink) -> None:
    attention = student.site(layer, student.family.attention).module
    attention.sink_key.copy_(sink.keys)
    attention.sink_value.copy_(sink.values)


def _place_logits(student: Decoder, layer: int, sink: LogitSink) -> None:
    """Sink logits, and the sink value and key bias as biases of the stock Linears.

    `Σ p_j v_j + p v = Σ p_j (v_j - v) + v` for `p + Σ p_j = 1`: v goes from the value bias to the
    output bias, and costs nothing at run time.
    """
    family = student.family
    value, output = student.site(layer, family.value), student.site(layer, family.output)
    sink_value = sink.value.to(output.weight)
    student.site(layer, family.attention).module.sink.copy_(sink.logits)
    value.module.bias[student.rows_of(value, sink_value)] -= sink_value.flatten()
    output.module.bias += output.weight @ student.read_by_heads(sink_value)
    if family.key is not None:
        key = student.site(layer, family.key)
        key_bias = sink.key_bias.to(key.weight)
        rows = student.rows_of(key, key_bias, family.key_block)
        key.module.bias[rows] += key_bias.flatten()
