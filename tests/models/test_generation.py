"""generate() with sinks: the same tokens, however it is asked and whatever it keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, cache_utils

from tests.helpers.tiny import HEADS, HIDDEN, LAYERS, VOCABULARY
from tests.models.test_attention import (
    EVERY,
    FAMILIES,
    LENGTH,
    drift,
    generated,
    logits,
    padded,
    sinked,
    subject,
    texts,
)

FORM = pytest.mark.parametrize("form", ["logit", "key"])
NEW = 8


@EVERY
@FORM
@pytest.mark.parametrize("beams", [1, 2])
def test_sampling_draws_the_tokens_of_eager(family: str, form: str, beams: int) -> None:
    model, draws = subject(family, form), []
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        settings = {"do_sample": True, "num_beams": beams, "implementation": implementation}
        draws.append(generated(model, **settings))
    assert torch.equal(*draws)


def greedily(model: Any, **arguments: Any) -> Tensor:
    """What follows one text or its embeddings: the text where it was given as tokens, and on."""
    model.set_attn_implementation("sdpa")
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    return model.generate(**{**settings, **arguments})


@EVERY
@FORM
def test_generation_goes_on_from_a_cache(family: str, form: str) -> None:
    model = subject(family, form)
    settings = {"max_new_tokens": NEW - 3, "return_dict_in_generate": True}
    first: Any = greedily(model, input_ids=texts(), **settings)
    # Or a token of padding among those that were generated would be taken for padding.
    seen = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    second = greedily(model, **seen, past_key_values=first.past_key_values, max_new_tokens=3)
    assert torch.equal(second, greedily(model, input_ids=texts()))


@EVERY
@FORM
def test_embeddings_give_what_their_tokens_give(family: str, form: str) -> None:
    model = subject(family, form)
    embedded = model.get_input_embeddings()(texts()).detach()
    expected = greedily(model, input_ids=texts())[:, LENGTH:]
    assert torch.equal(greedily(model, inputs_embeds=embedded), expected)
    static = greedily(model, inputs_embeds=embedded, cache_implementation="static")
    assert torch.equal(static, expected)


@EVERY
@FORM
def test_guessed_tokens_change_nothing(family: str, form: str) -> None:
    """Several queries behind a cache, some of which are taken back again."""
    model, one = subject(family, form), texts()[:1].repeat(1, 2)
    expected = greedily(model, input_ids=one)
    assert torch.equal(greedily(model, input_ids=one, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(greedily(model, input_ids=one, assistant_model=model), expected)


@EVERY
@FORM
@torch.no_grad()
def test_a_mask_of_ones_own_is_kept_to(family: str, form: str) -> None:
    """Of shape (batch, 1, queries, keys), as a tree of guesses has it."""
    model = subject(family, form)
    if getattr(model.config, "sliding_window", None):
        pytest.skip("a mask of one's own takes the place of the sliding window")
    inputs = padded(left=True)
    real = inputs["attention_mask"].bool()
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & real[:, None, None]
    expected = logits(model, "eager", inputs)
    given = model(**inputs | {"attention_mask": allowed}).logits
    assert drift(given[real], expected) < 2e-5


@EVERY
@FORM
def test_generation_shows_what_it_computed(family: str, form: str) -> None:
    settings = {"output_attentions": True, "output_hidden_states": True, "output_logits": True}
    out: Any = generated(
        subject(family, form), implementation="eager", return_dict_in_generate=True, **settings
    )
    assert len(out.attentions) == len(out.hidden_states) == len(out.logits) == NEW
    for step, (attentions, states) in enumerate(
        zip(out.attentions, out.hidden_states, strict=True)
    ):
        queries = 1 if step else LENGTH
        assert [a.shape[:3] for a in attentions] == [(2, HEADS, queries)] * LAYERS
        assert [s.shape for s in states] == [(2, queries, HIDDEN)] * (LAYERS + 1)
        assert all((a.sum(-1) < 1).all() for a in attentions)
    assert out.logits[0].shape == (2, VOCABULARY)


@pytest.mark.parametrize(
    ("family", "form", "settings"),
    [
        ("llama", "key", {"num_hidden_layers": 1}),
        pytest.param(
            "gemma2",
            "logit",
            {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_static_cache_compiles_without_a_break(
    family: str, form: str, settings: dict[str, Any]
) -> None:
    torch.compiler.reset()
    model = sinked(family, form, **settings)
    compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True  # else only on a GPU
    expected = generated(model)
    for _ in range(2):
        given = generated(model, cache_implementation="static", compile_config=compiled)
        assert torch.equal(given, expected)
    assert hasattr(model, "_compiled_call")


# --- quantised caches ----------------------------------------------------------------------------

# The settings of each backend, the package it comes from, and how far it moves logits.
QUANTISED: dict[str, tuple[dict[str, int], str | None, float]] = {
    "fp8": ({}, None, 0.2),
    "quanto": ({"nbits": 4, "q_group_size": 8, "residual_length": 4}, "optimum.quanto", 0.3),
    "hqq": ({"nbits": 8, "q_group_size": 8, "residual_length": 4}, "hqq", 0.05),
}


def read_in_steps(model: PreTrainedModel, cache: Any) -> Tensor:
    """The logits of the second half of the texts, read token by token behind the first."""
    half = LENGTH // 2
    model(texts()[:, :half], past_key_values=cache, use_cache=True)
    steps = [
        model(texts()[:, at : at + 1], past_key_values=cache, use_cache=True).logits
        for at in range(half, LENGTH)
    ]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("backend", QUANTISED)
@pytest.mark.parametrize(
    "family", [f for f, settings in FAMILIES.items() if "sliding_window" not in settings]
)
@FORM
@torch.no_grad()
def test_a_quantised_cache_changes_little(backend: str, family: str, form: str) -> None:
    settings, package, most = QUANTISED[backend]
    if package is not None:
        pytest.importorskip(package)
    elif not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no cache in FP8")
    model = subject(family, form)
    whole = logits(model, "eager", {"input_ids": texts()}).view(2, LENGTH, -1)[:, LENGTH // 2 :]
    caches = [cache_utils.QuantizedCache(backend, model.config, **settings) for _ in range(2)]
    eager = read_in_steps(model, caches[0])
    model.set_attn_implementation("sdpa")
    given = read_in_steps(model, caches[1])
    assert drift(given, eager) < 0.01  # the last digit may round the other way
    assert 0 < drift(given, whole) < most
    asked = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **settings}}
    assert generated(model, **asked).shape == (2, LENGTH + NEW)
