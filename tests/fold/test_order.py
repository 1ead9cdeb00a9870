"""Channels in another order compute the same, in every family.

Tolerances are those of test_identity.py, and for its reason: norms and routers are float32 inside.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.fold import order
from absorb.fold.graft import graft
from absorb.fold.order import has_stream_order
from absorb.fold.plan import STREAM, Plan
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES, INSIDE
from absorb.models.family import Family
from tests.fold.test_identity import drift, planned, powers_of_two, tolerance
from tests.helpers.plans import neutral_plan
from tests.helpers.tiny import HEAD_DIM, HIDDEN, LAYERS, kv_heads, tiny


def those(admits: Callable[[Family], object]) -> pytest.MarkDecorator:
    families = [f for f in (*FAMILIES.values(), *INSIDE.values()) if admits(f)]
    return pytest.mark.parametrize("family", families, ids=lambda family: family.model_type)


WEIGHTLESS = {"olmo"}  # norms that feed Linears whose names are not in the entry
EVERY = those(lambda family: True)
ORDERED = those(lambda family: family.model_type not in WEIGHTLESS)
UNGATED = those(lambda family: not family.gated)


def shuffled(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.rand(*shape, generator=draw).argsort(-1)


def of_stream(decoder: Decoder) -> dict[str, Tensor]:
    return {STREAM: shuffled(HIDDEN)}


def of_neurons(decoder: Decoder) -> dict[str, Tensor]:
    found = {}
    for down in order.downs(decoder.family):
        *experts, _, neurons = decoder.sites(down)[0].weight.shape
        found[down] = shuffled(LAYERS, *experts, neurons)
    return found


def of_values(decoder: Decoder) -> dict[str, Tensor]:
    heads = kv_heads(decoder.family.model_type)
    first = HEAD_DIM * torch.arange(heads)[:, None]
    return {decoder.family.output: (shuffled(LAYERS, heads, HEAD_DIM) + first).flatten(1)}


@torch.no_grad()
def moved(family: Family, tokens: Tensor, orders: Callable[..., dict[str, Tensor]]) -> float:
    """How far orders, with scales of the stream beside them, move the logits."""
    decoder = Decoder(tiny(family.model_type), family)
    plan = neutral_plan(family, residual=powers_of_two(), orders=orders(decoder))
    return drift(graft(decoder, plan).model(tokens).logits, decoder.model(tokens).logits)


@ORDERED
def test_an_order_of_the_stream_changes_nothing(family: Family, tokens: Tensor) -> None:
    assert moved(family, tokens, of_stream) < tolerance(family)


@EVERY
def test_an_order_of_neurons_changes_nothing(family: Family, tokens: Tensor) -> None:
    assert moved(family, tokens, of_neurons) < tolerance(family)


@UNGATED
def test_an_order_of_values_changes_nothing(family: Family, tokens: Tensor) -> None:
    assert moved(family, tokens, of_values) < tolerance(family)
