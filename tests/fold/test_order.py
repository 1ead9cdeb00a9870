"""Channels in another order compute the same, in every family.

Tolerances are those of test_identity.py, and for its reason: norms and routers are float32 inside.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from absorb.fold import order
from absorb.fold.graft import graft
from absorb.fold.order import stays_as
from absorb.fold.plan import STREAM
from absorb.fold.smoothing import smoothing_scales
from absorb.models.decoder import Decoder, Site, site_at
from absorb.models.families import FAMILIES, INSIDE
from absorb.models.family import Family
from absorb.schema.findings import Removal, SpikeNeuron
from absorb.schema.settings import Sink
from tests.fold.test_identity import TOLERANCE, drift, planned, powers_of_two, tolerance
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


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "opt", "cohere", "nemotron"])
@torch.no_grad()
def test_a_head_that_is_the_embedding_is_put_in_order_once(model_type: str, tokens: Tensor) -> None:
    family = FAMILIES[model_type]
    decoder = Decoder(tiny(model_type, tie_word_embeddings=True), family)
    plan = neutral_plan(family, residual=powers_of_two(), orders=of_stream(decoder))
    after = graft(decoder, plan).model(tokens).logits
    assert drift(after, decoder.model(tokens).logits) < TOLERANCE


@ORDERED
@torch.no_grad()
def test_a_forgotten_reader_of_the_ordered_stream_is_noticed(
    family: Family, tokens: Tensor
) -> None:
    wrong = replace(family, reads=family.reads[1:])
    assert moved(wrong, tokens, of_stream) > 0.01


@pytest.mark.parametrize("form", ["key", "logit", "auto"])
@torch.no_grad()
def test_sinks_smoothing_and_removed_neurons_go_along(form: Sink, tokens: Tensor) -> None:
    family = FAMILIES["llama"]
    decoder = Decoder(tiny("llama"), family)
    neuron = SpikeNeuron(layer=1, neuron=5, contribution=1.0)
    plan = replace(
        planned(decoder.model, family, form, tokens),
        residual=powers_of_two(),
        removals=(Removal(spike=neuron, divergence=0.0),),
        smoothing=smoothing_scales(decoder, tokens),
    )
    orders = of_stream(decoder) | of_neurons(decoder) | of_values(decoder)
    plain, ordered = (graft(decoder, one).model for one in (plan, replace(plan, orders=orders)))
    assert drift(ordered(tokens).logits, plain(tokens).logits) < TOLERANCE
    down = site_at(Decoder(ordered, family).layers[1], family.down).weight
    place = orders[family.down][1].tolist().index(5)
    assert not down[:, place].any()


@pytest.mark.parametrize("model_type", sorted(WEIGHTLESS))
def test_a_stream_whose_readers_have_no_name_stays_as_it_is(model_type: str) -> None:
    assert "no weight" in str(stays_as(Decoder(tiny(model_type), FAMILIES[model_type])))


def test_a_stream_that_pictures_enter_stays_as_it_is() -> None:
    decoder = Decoder(tiny("qwen2_vl_text"), INSIDE["qwen2_vl_text"])
    assert stays_as(decoder) is None
    decoder.is_part = True
    assert "pictures" in str(stays_as(decoder))


class Largest(TorchDispatchMode):
    """How many entries the largest tensor has that an operation gives."""

    entries = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out):
            self.entries = max(self.entries, out.numel())
        return out


@torch.no_grad()
def test_a_table_is_reordered_few_rows_at_once() -> None:
    """In float32 that of a large vocabulary takes two gigabytes, and so would a copy of it."""
    table, by = nn.Embedding(10_000, 8), shuffled(8)
    wanted = table.weight[:, by]
    with Largest() as largest:
        order.reorder_input(Site(table), by)
    assert torch.equal(table.weight, wanted)
    assert largest.entries == order._ROWS * 8
