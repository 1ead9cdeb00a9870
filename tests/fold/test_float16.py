"""A rescaled model says what the original says, by numbers that float16 holds.

In float64 powers of two change nothing but where a norm computes in float32, whose epsilon then is
rounded anew: some 1e-6 of the largest logit. A wrong step moves them by more than 1e-3.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from absorb.fold import float16
from absorb.fold.float16 import Rescaling, rescale, rescaling
from absorb.measure.headroom import SQUARES, ranges
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.resting.streaming import Streaming
from tests.helpers.tiny import EXPERTS, HEAD_DIM, HIDDEN, INTERMEDIATE, LAYERS, kv_heads, tiny

SAME, OTHER = 1e-5, 1e-3
FAMILY_NAMES = sorted(name for name, family in FAMILIES.items() if not family.some)
# With norms of their own in front of the scores, where that is a setting.
MORE: dict[str, list[dict[str, Any]]] = {
    "cohere": [{"use_qk_norm": True}],
    "stablelm": [{"qk_layernorm": True}],
    "phi": [{"qk_layernorm": True}],
    "llama": [{"tie_word_embeddings": True}],
    "gemma2": [{"tie_word_embeddings": True}],
    "gpt2": [{"tie_word_embeddings": True}],
}
CASES = [(name, more) for name in FAMILY_NAMES for more in [{}, *MORE.get(name, [])]]
every_case = pytest.mark.parametrize(("name", "more"), CASES, ids=lambda part: str(part))
STREAM = 64.0


def decoder_of(name: str, **settings: Any) -> Decoder:
    """A tiny model whose epsilon is seen in its logits."""
    family = FAMILIES[name]
    if family.epsilon is not None:
        settings = {family.epsilon: 0.1, **settings}
    model = tiny(name, **settings)
    if family.key_norm is not None and getattr(model.config, family.key_norm, False):
        family = replace(family, key=None)
    return Decoder(model, family)


def powers(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    return 2.0 ** torch.randint(0, 5, shape, generator=draw).double()


def by_all(decoder: Decoder) -> Rescaling:
    """Something of everything: the stream where a family allows it, and every link."""
    family, sizes = decoder.family, {}
    for link in family.links:
        if link == family.value:
            sizes[link] = (kv_heads(family.model_type) * HEAD_DIM,)
        elif link in family.neurons:
            experts = [EXPERTS] if decoder.site(0, link).is_of_experts else []
            sizes[link] = (*experts, INTERMEDIATE)
        else:
            sizes[link] = (HIDDEN,)
    return Rescaling(
        stream=1.0 if family.epsilon is None else STREAM,
        channels={link: powers(LAYERS, *size) for link, size in sizes.items()},
    )


@torch.no_grad()
def drift(decoder: Decoder, tokens: Tensor, by: Rescaling) -> float:
    before = decoder.model(tokens).logits
    rescale(decoder, by)
    after = decoder.model(tokens).logits
    return ((after - before).abs().max() / before.abs().max()).item()


@every_case
def test_every_family_says_the_same_rescaled(
    name: str, more: dict[str, Any], tokens: Tensor
) -> None:
    decoder = decoder_of(name, **more)
    assert drift(decoder, tokens, by_all(decoder)) < SAME


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "mixtral"])
@torch.no_grad()
def test_a_model_whose_layers_come_one_by_one_is_rescaled_as_a_whole_one_is(
    name: str, tokens: Tensor
) -> None:
    whole, parts = (
        Decoder(tiny(name, torch.float32, tie_word_embeddings=True), FAMILIES[name])
        for _ in range(2)
    )
    parts = Decoder(
        parts.model, parts.family, Streaming(parts.model, parts.layers, torch.device("cpu"))
    )
    seen = [ranges(decoder, tokens).peaks for decoder in (whole, parts)]
    reached = [{kind: peak for kind, (peak, _) in peaks.items()} for peaks in seen]
    assert reached[0] == pytest.approx(reached[1], rel=SAME)  # rows are summed in other batches
    before = parts.model(tokens).logits
    for decoder in (whole, parts):
        rescale(decoder, by_all(decoder))
    assert torch.equal(whole.model(tokens).logits, parts.model(tokens).logits)
    assert (parts.model(tokens).logits - before).abs().max() < SAME * before.abs().max()


# Mistakes


@pytest.mark.parametrize(
    "name", [name for name in FAMILY_NAMES if FAMILIES[name].epsilon is not None]
)
def test_leaving_the_epsilon_as_it_is_shows(
    name: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float16, "_divide_epsilon", lambda *_: None)
    decoder = decoder_of(name)
    assert drift(decoder, tokens, Rescaling(stream=STREAM, channels={})) > OTHER


@pytest.mark.parametrize("norm", [*float16._NORMED])
def test_leaving_out_what_a_norm_of_heads_reads_shows(
    norm: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {name: read for name, read in float16._NORMED.items() if name != norm}
    monkeypatch.setattr(float16, "_NORMED", kept)
    layered = norm.endswith("layernorm")
    decoder = decoder_of("phi", qk_layernorm=True) if layered else decoder_of("qwen3")
    assert drift(decoder, tokens, Rescaling(stream=STREAM, channels={})) > OTHER


# Planted overflow


def planted(name: str, **settings: Any) -> Decoder:
    """A tiny model that says what it always did, by numbers far beyond float16."""
    decoder = Decoder(tiny(name, **settings), FAMILIES[name])
    small = by_all(decoder)
    channels = {link: 2.0**-18 * scale for link, scale in small.channels.items()}
    stream = 1.0 if decoder.family.epsilon is None else 2.0**-16
    rescale(decoder, Rescaling(stream=stream, channels=channels))
    return decoder


def half(decoder: Decoder, tokens: Tensor) -> Tensor:
    """What the model says in float16. It stays in it."""
    module: nn.Module = decoder.model
    module.half()
    logits: Tensor = decoder.model(tokens).logits
    return logits.double()


@pytest.mark.parametrize("name", FAMILY_NAMES)
@torch.no_grad()
def test_a_planted_overflow_is_gone(name: str, tokens: Tensor) -> None:
    expected = tiny(name)(tokens).logits
    assert not half(planted(name), tokens).isfinite().all()
    decoder = planted(name)
    before = ranges(decoder, tokens)
    rescale(decoder, rescaling(decoder, before))
    after = ranges(decoder, tokens)
    assert max(peak for peak, _ in before.peaks.values()) > float16.MOST
    above = {kind for kind, (peak, _) in after.peaks.items() if peak > float16.LIMIT}
    # A norm that writes with an offset would lose digits.
    assert above == ({SQUARES} if name in ("gemma2", "gemma3_text") else set())
    plain = half(Decoder(tiny(name), FAMILIES[name]), tokens)
    assert off(half(decoder, tokens), expected) < 4 * off(plain, expected)


def off(logits: Tensor, expected: Tensor) -> Tensor:
    """By how much at a usual token: in a mixture rounding sends some to another expert."""
    return (logits - expected).abs().amax(-1).median()
