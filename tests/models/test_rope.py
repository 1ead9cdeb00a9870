"""Keys of a prefix are rotated once: where a long text changes the frequencies, their form ends."""

from typing import Any

import pytest
import torch

from absorb.fold.graft import graft
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.positions.rope import rope_changes_at
from absorb.runtime.reading import led
from tests.helpers.plans import neutral_plan
from tests.helpers.tiny import GEMMA, POSITIONS, VOCABULARY, tiny

LIMIT = 24
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 6.0, 8.0]}
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}
        | {"original_max_position_embeddings": LIMIT},
    },
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0},
        "max_position_embeddings": LIMIT,
    },
    "yarn": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
        | {"original_max_position_embeddings": LIMIT},
    },
    "default": {},
}


def keys_drift(rope: str, length: int) -> float:
    """How far a converted model is from its teacher, on a text of so many tokens."""
    model = tiny("llama", **ROPES[rope])
    decoder, prefix = Decoder(model, FAMILIES["llama"]), torch.tensor([1])
    sinks = prefix_of(decoder, prefix, -len(prefix)).layers
    student = graft(decoder, neutral_plan(decoder.family, prefix=(1,), sinks=sinks)).model
    text = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(led(text, prefix)).logits[:, 1:]
        return float((student(text).logits - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("rope", ROPES)
def test_keys_are_the_prefix_up_to_where_the_frequencies_change(rope: str) -> None:
    changes = rope_changes_at(tiny("llama", **ROPES[rope]).config)
    assert changes == (LIMIT if rope in ("longrope", "dynamic") else None)
    assert keys_drift(rope, LIMIT - 1) < 2e-6  # the teacher reads the prefix as well
    assert (keys_drift(rope, LIMIT + 8) > 1e-3) == (changes is not None)


def test_a_set_of_frequencies_for_each_kind_of_layer_is_looked_into() -> None:
    config = tiny("gemma3_text", **GEMMA).config
    assert rope_changes_at(config) is None
    config.rope_parameters["full_attention"] = {"rope_type": "dynamic", "factor": 2.0}
    assert rope_changes_at(config) == POSITIONS


def test_learned_positions_have_none() -> None:
    assert rope_changes_at(tiny("gpt2").config) is None
