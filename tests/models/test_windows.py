"""A window in every layer hides what is older and nothing else, sinks least of all.

Both sides are the same float64 model under masks made in two ways: they differ by the rounding of
norms and softmax, which compute in float32.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from absorb.errors import AbsorbError
from absorb.fold.graft import graft
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.positions.windows import WINDOWED, slide
from absorb.runtime.reading import new_cache
from tests.helpers.plans import plan_of
from tests.helpers.tiny import HIDDEN, NOTHING, tiny

WINDOW = 5
SAME = 1e-5


@torch.no_grad()
def absorbed(name: str, tokens: Tensor) -> PreTrainedModel:
    """A tiny converted model, with a sink for a prefix of two tokens."""
    decoder = Decoder(tiny(name), FAMILIES[name])
    plan = plan_of(decoder, NOTHING, torch.ones(HIDDEN), (1, 9), tokens, 0.0)
    return graft(decoder, plan).model


def saved_with_window(model: PreTrainedModel, name: str, folder: Path) -> PreTrainedModel:
    slide(model.config, FAMILIES[name], WINDOW)
    model.save_pretrained(folder)
    kind = AutoModelForCausalLM
    loaded: Any = kind.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    loaded.set_attn_implementation("eager")
    loaded.set_experts_implementation("eager")
    return loaded.eval()


def within(count: int) -> Tensor:
    """What is added to scores so that a query sees itself and what is less than WINDOW ago."""
    place = torch.arange(count)
    ago = place[:, None] - place
    hidden = (ago < 0) | (ago >= WINDOW)
    return torch.zeros(count, count, dtype=torch.float64).masked_fill(hidden, -1e9)[None, None]


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_a_converted_model_has_a_window_in_every_layer(
    name: str, tokens: Tensor, tmp_path: Path
) -> None:
    model = absorbed(name, tokens)
    model.set_attn_implementation("eager")
    whole = model(tokens).logits
    mask = within(tokens.shape[1]).expand(len(tokens), -1, -1, -1)
    expected = model(tokens, attention_mask=mask).logits
    windowed = saved_with_window(model, name, tmp_path)
    logits, most = windowed(tokens).logits, whole.abs().max()
    assert (logits - expected).abs().max() < SAME * most
    assert (logits - whole)[:, :WINDOW].abs().max() < SAME * most
    assert (logits - whole)[:, WINDOW:].abs().max() > 10 * SAME * most


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
@torch.no_grad()
def test_its_cache_holds_the_window_alone(name: str, tokens: Tensor, tmp_path: Path) -> None:
    windowed = saved_with_window(absorbed(name, tokens), name, tmp_path)
    expected = windowed(tokens).logits
    cache: DynamicCache
    cache, remember = new_cache(windowed)
    parts = [windowed(token, **remember).logits for token in tokens.split(1, 1)]
    assert (torch.cat(parts, 1) - expected).abs().max() < SAME * expected.abs().max()
    assert all(layer.keys.shape[-2] < WINDOW for layer in cache.layers)


def test_what_has_no_such_setting_or_a_smaller_window_is_refused() -> None:
    with pytest.raises(AbsorbError, match="llama models have no setting for a window"):
        slide(tiny("llama").config, FAMILIES["llama"], WINDOW)
    config = tiny("mistral", sliding_window=WINDOW - 1).config
    with pytest.raises(AbsorbError, match=f"pass --window {WINDOW - 1} or less"):
        slide(config, FAMILIES["mistral"], WINDOW)
