"""What is derived from a model is what a person wrote down of its architecture."""

from dataclasses import fields, replace

import pytest
from torch import Tensor
from transformers import AutoConfig

from absorb.models.families import FAMILIES, suited
from absorb.models.family import Family
from absorb.prove.derived.entry import derived
from absorb.prove.derived.layer import UnderivedError
from absorb.prove.shrink import LAYERS, shrunk, tiny_model
from absorb.prove.spelling import spelled
from tests.helpers.tiny import tiny

# What nothing in a model shows: which of its settings an entry depends on.
OF_SETTINGS = {"requires": (), "embedding_width": None, "key_norm": None, "epsilon": None}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
# Of layers of several kinds no entry is derived.
of_one_kind = pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES.values() if not family.some and not family.gated],
    ids=lambda family: family.model_type,
)


def plain(family: Family) -> Family:
    """The entry with the readers of a norm in any order, as they stand in none."""
    feeds = tuple((norm, tuple(sorted(readers))) for norm, readers in family.feeds)
    return replace(family, feeds=feeds, reads=tuple(sorted(family.reads)), **OF_SETTINGS)


@of_one_kind
def test_an_entry_that_is_derived_is_the_one_that_is_listed(family: Family, tokens: Tensor) -> None:
    model = tiny(family.model_type)
    found, known = derived(model, tokens), suited(family, model.config.to_dict())
    for field in fields(Family):
        theirs, ours = (getattr(plain(one), field.name) for one in (found, known))
        assert theirs == ours, field.name


@every_family
def test_an_entry_that_is_spelled_can_be_pasted(family: Family) -> None:
    text = spelled(family)
    assert eval(text, {"Family": Family}) == family
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "takes no function from outside"),
        ("bert", "do not add what matrices give"),
        ("bitnet", "what its heads give is not read by one matrix"),
        ("roberta-prelayernorm", "between its embedding and its first layer"),
        ("megatron-bert", "more than one table"),
    ],
)
def test_what_stands_in_the_way_is_said(model_type: str, reason: str, tokens: Tensor) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.for_model(model_type)
    if model_type not in ("mamba", "bitnet"):
        config.is_decoder = True
    model = tiny_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], shrunk(config))
    with pytest.raises(UnderivedError, match=reason):
        derived(model, tokens[:, :12])


def test_a_small_configuration_keeps_a_layer_of_every_kind_and_all_that_is_no_size() -> None:
    kinds = ["full_attention"] * 5 + ["sliding_attention"] + ["full_attention"] * 6
    config = AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=12, layer_types=kinds, query_pre_attn_scalar=99
    )
    small = shrunk(config)
    assert small.num_hidden_layers == len(small.layer_types) == LAYERS
    assert set(small.layer_types) == set(kinds)
    assert small.query_pre_attn_scalar == 99
    assert small.hidden_size < 64 < config.hidden_size
