"""What is refused by name really has the property that the sentence says."""

import inspect
import sys
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from absorb.models.families import FAMILIES, family_of
from absorb.models.family import UnsupportedFamilyError
from absorb.models.refused import REFUSED
from tests.helpers.tiny import tiny

# Of the classes and names of modules that hand on a state.
STATEFUL = ("mamba", "linear_attn", "conv", "recurrent", "lightning")


def those(words: str) -> pytest.MarkDecorator:
    """The architectures whose reason has these words."""
    names = [name for name, reason in REFUSED.items() if words in reason]
    assert names
    return pytest.mark.parametrize("model_type", names)


@cache
def shapes(model_type: str) -> PreTrainedModel:
    """A model without memory for its weights, in the settings of the architecture."""
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type)
        return AutoModelForCausalLM.from_config(config)


def layers_of(model: nn.Module) -> nn.ModuleList:
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return max(lists, key=lambda stack: sum(p.numel() for p in stack.parameters()))


def names(module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in module.named_parameters())


def test_nothing_is_refused_that_has_an_entry_or_that_transformers_lacks() -> None:
    assert not REFUSED.keys() & FAMILIES.keys()
    assert REFUSED.keys() <= {*CONFIG_MAPPING}


@pytest.mark.parametrize("model_type", REFUSED)
def test_the_sentence_names_the_property(model_type: str) -> None:
    with pytest.raises(UnsupportedFamilyError) as caught:
        family_of(model_type)
    assert f"does not convert the architecture {model_type!r}, as " in str(caught.value)
    assert REFUSED[model_type] in str(caught.value)


@those("from one latent vector")
def test_keys_and_values_come_from_a_latent_vector(model_type: str) -> None:
    assert any("kv_a_proj_with_mqa" in name for name in names(shapes(model_type)))
    assert not any("v_proj" in name for name in names(shapes(model_type)))


@those("sinks of its own")
def test_sinks_are_parameters_already(model_type: str) -> None:
    ends = {name.rpartition(".")[2] for name in names(shapes(model_type))}
    assert any("sink" in end for end in ends)


@those("no function from outside")
def test_attention_is_not_dispatched(model_type: str) -> None:
    source = inspect.getsource(sys.modules[type(shapes(model_type)).__module__])
    assert "ALL_ATTENTION_FUNCTIONS" not in source


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("hunyuan_v1_dense", {"head_dim": 8}),
        (
            "ministral3",
            {
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "llama_4_scaling_beta": 0.1,
                    "original_max_position_embeddings": 4,
                },
            },
        ),
    ],
)
@torch.no_grad()
def test_where_text_stands_changes_what_is_said(
    model_type: str, settings: dict[str, Any], tokens: Tensor
) -> None:
    assert "not on their distances alone" in REFUSED[model_type]
    assert moves(tiny(model_type, **settings), tokens) > 1e-2
    assert moves(tiny("llama"), tokens) < 1e-5


def moves(model: PreTrainedModel, tokens: Tensor) -> float:
    """How far logits move where the text does, by seven positions, relative to the largest."""
    positions = torch.arange(tokens.shape[1])[None]
    here, there = (model(tokens, position_ids=positions + by).logits for by in (0, 7))
    return float((there - here).abs().max() / here.abs().max())


@those("several streams")
def test_the_stream_has_a_dimension_more(model_type: str) -> None:
    assert shapes(model_type).config.altup_num_inputs > 1


@those("a state from token to token")
def test_something_hands_on_a_state(model_type: str) -> None:
    parts = layers_of(shapes(model_type)).named_modules()
    told = [f"{name} {type(module).__name__}".lower() for name, module in parts]
    assert any(word in each for each in told for word in STATEFUL)
