"""Scores agree with computations that share no code with them."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.fold.graft import twin
from absorb.measure.divergence import divergence
from absorb.measure.score import evaluate
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.runtime.losses import kl
from absorb.runtime.reading import Subject
from absorb.schema.scores import Score
from absorb.schema.settings import Thresholds
from tests.helpers.tiny import tiny

NOTHING = torch.tensor([], dtype=torch.long)
BOS = torch.tensor([1])
LLAMA = FAMILIES["llama"]


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama", torch.float32)


def score(
    model: PreTrainedModel, text: Tensor, lead: Tensor, teacher: Subject, **changes: float
) -> Score:
    thresholds = replace(Thresholds(), **changes)
    [found] = evaluate(
        [Subject(decoder=Decoder(model, LLAMA), lead=lead)], teacher, text, text, thresholds, ()
    )
    return found


@torch.no_grad()
def test_perplexity_is_the_exponential_of_the_loss_in_transformers(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    found = score(model, tokens, NOTHING, Subject(decoder=Decoder(model, LLAMA), lead=NOTHING))
    loss = model(tokens, labels=tokens).loss
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


@torch.no_grad()
def test_a_lead_is_read_and_not_counted(model: PreTrainedModel, tokens: Tensor) -> None:
    found = score(model, tokens, BOS, Subject(decoder=Decoder(model, LLAMA), lead=BOS))
    rows = torch.cat([BOS.expand(len(tokens), 1), tokens], 1)
    labels = rows.clone()
    labels[:, :2] = -100  # the first token of the text is not counted either
    loss = model(rows, labels=labels).loss
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.divergence == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_divergence_is_that_of_torch(model: PreTrainedModel, tokens: Tensor) -> None:
    found = score(model, tokens, NOTHING, Subject(decoder=Decoder(model, LLAMA), lead=BOS))
    rows = torch.cat([BOS.expand(len(tokens), 1), tokens], 1)
    teacher = model(rows).logits[:, 1:].log_softmax(-1)
    student = model(tokens).logits.log_softmax(-1)
    both = (part[:, :-1].flatten(0, 1) for part in (student, teacher))
    expected = torch.nn.functional.kl_div(*both, log_target=True, reduction="batchmean")
    assert found.divergence == pytest.approx(float(expected), rel=1e-5)
    assert float(kl(teacher, student).mean()) > 0


@torch.no_grad()
def test_massive_activations_are_counted_by_token(model: PreTrainedModel, tokens: Tensor) -> None:
    spiked = int(tokens[0, 5])
    embedding = model.get_input_embeddings().weight
    embedding[spiked, 9] = 1e6
    found = score(model, tokens, NOTHING, Subject(decoder=Decoder(model, LLAMA), lead=NOTHING))
    assert found.stream_peak == pytest.approx(1e6, rel=0.01)
    assert found.massive_tokens == int((tokens == spiked).sum())


@torch.no_grad()
def test_the_thresholds_decide_which_activations_are_massive(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    teacher = Subject(decoder=Decoder(model, LLAMA), lead=NOTHING)
    limits = {"massive_value": 0.0, "massive_ratio": 0.0}
    assert score(model, tokens, NOTHING, teacher, **limits).massive_tokens == tokens.numel()
    for name in limits:
        fewer = score(model, tokens, NOTHING, teacher, **{**limits, name: 1e9})
        assert fewer.massive_tokens == 0


@torch.no_grad()
def test_the_weight_on_the_first_token_is_a_mean_over_queries_after_it(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    found = score(model, tokens, NOTHING, Subject(decoder=Decoder(model, LLAMA), lead=NOTHING))
    model.set_attn_implementation("eager")
    weights = model(tokens, output_attentions=True).attentions
    expected = torch.stack(weights)[:, :, :, 1:, 0].mean()
    assert found.first_weight == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_a_neutral_twin_scores_like_its_original(model: PreTrainedModel, tokens: Tensor) -> None:
    teacher = Subject(decoder=Decoder(model, LLAMA), lead=NOTHING)
    student = Subject(decoder=twin(Decoder(model, LLAMA)), lead=NOTHING)
    original, converted = evaluate(
        [teacher, student], teacher, tokens, tokens, Thresholds(), ("w8a8-static", "nvfp4")
    )
    assert converted.perplexity == pytest.approx(original.perplexity, rel=1e-5)
    assert converted.quantized == pytest.approx(original.quantized, rel=1e-3)


@pytest.mark.parametrize("scored", [False, True], ids=["compared", "scored"])
def test_logits_of_one_part_are_gone_before_the_next_are_made(
    scored: bool, model: PreTrainedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of two models meet. Of a large vocabulary more than these may not fit."""
    made, alive, give = list[weakref.ref[Tensor]](), list[int](), Subject.logits

    def logits(subject: Subject, part: Tensor) -> Tensor:
        alive.append(sum(one() is not None for one in made))
        found = give(subject, part)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Subject, "logits", logits)
    monkeypatch.setattr("absorb.measure.score._TOKENS", tokens.shape[1])
    monkeypatch.setattr("absorb.measure.divergence.rows_at_once", lambda *_: 1)
    decoder = Decoder(model, LLAMA)
    if scored:
        score(model, tokens, NOTHING, Subject(decoder=decoder, lead=BOS))
    else:
        divergence(decoder, decoder, BOS, tokens)
    assert alive == [0, 1] * len(tokens)
