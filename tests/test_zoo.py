"""A field guide to strange models: each has one trait that real ones have, and comes out alive.

Each animal is planted in a tiny random model, writes its own text, and is converted untrained in
every form. The tests ask for what a user may ask for: never worse than doing nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import zoo
from torch import Tensor
from transformers import PreTrainedModel
from zoo import BOS, CLASS, HEADS, LAYERS, LEVEL, MARK, MASSIVE, POINT, ROWS, SECOND, STEADY

from absorb.divergence import divergence
from absorb.families import family_of
from absorb.findings import Findings, find
from absorb.graft import graft, smooth
from absorb.measure import Measurement, measure
from absorb.plan import Plan, make_plan, residual_scales
from absorb.score import Score, Subject, evaluate
from absorb.settings import Sink, Thresholds
from absorb.sinks import prefix_of
from absorb.smoothing import searched_scales

MARKED = {MARK: 4.0}

# How many times the original's perplexity a converted model's may be, untrained: one per cent is
# what the mildest INT8 costs. Where no constant can stand for the prefix, logits may cost five, and
# other forms no more for that.
ENOUGH, HARD = 1.01, 1.05
# KL in nats per token. Keys are exact, and neurons that no text makes fire are free; what auto
# leaves to logits must not add up to what a budget allows for removing neurons; logits get twice
# that.
FAR: dict[Sink, float] = {"key": 1e-3, "auto": 5e-3, "logit": 2e-2}
# The largest entry of the stream: no larger than the original's, where there is nothing to absorb,
# and in no form twice what is left where all is exact.
ROUNDING, TWICE = 1.02, 2.0
# What a fit to one text may lose on other text, and the KL that float32 leaves.
LUCK, ROUNDED_KL = 1.05, 1e-5


@dataclass(frozen=True, kw_only=True)
class Animal:
    """A planted model, and how it is read.

    lead is what it is given before a text as it is, prefix what its sinks are to stand for, and
    constant says whether one logit a head can do so.
    """

    model: PreTrainedModel
    constant: bool = True
    lead: tuple[int, ...] = (BOS,)
    prefix: tuple[int, ...] = (BOS,)


def common() -> Animal:
    """The house sink, for comparison: BOS is massive from layer 0 on, and heads attend to it.

    Llama 2 and Mistral 7B are such. A constant logit replaces it nearly exactly.
    """
    model = zoo.beast("llama")
    zoo.mark(model, BOS)
    zoo.spike(model, 0, MARKED, {MASSIVE: 10})
    zoo.sink(model, range(1, LAYERS))
    return Animal(model=model)


def biased() -> Animal:
    """Query and key biases of ±10 in the first two layers, no BOS, and a first token that is a sink.

    Qwen2 0.5B is such. Its early heads look back so far and no further, and so only the first
    few tokens of a text attend to the prefix; but a first text token that does not will take itself
    for a first token again, and no neuron can be removed: many small ones write the activation.
    """
    model = zoo.beast("qwen2")
    zoo.detect_first(model, neurons=48, share=0.68)
    zoo.biased(model, range(2), (0, 1, 3, 5), 10)
    zoo.sink(model, range(2, LAYERS))
    return Animal(model=model, lead=())


def sinkless() -> Animal:
    """No sink at all: BOS is a token like others.

    Models with gated attention or a softmax off by one are such. A logit has nothing to stand for,
    and must do no harm.
    """
    return Animal(model=zoo.beast("llama"), constant=False)


def delimited() -> Animal:
    """The sink is the first delimiter, wherever it stands; the first token is none.

    Models without BOS do so with "." or a line break. Behind a prefix of one, no delimiter of the
    text is the first.
    """
    model = zoo.beast("llama")
    zoo.classify(model, range(POINT, 19))
    zoo.detect_first(model, of_class=True, heads=range(HEADS // 2))
    zoo.sink(model, range(2, LAYERS))
    return Animal(model=model, lead=(), prefix=(POINT,))


def doubled() -> Animal:
    """Two sinks: BOS, and the first delimiter, which other heads attend to.

    SmolLM2 is such, with its first " the". Both belong into the prefix.
    """
    model = zoo.beast("llama")
    zoo.classify(model, range(POINT, 19))
    zoo.mark(model, BOS)
    zoo.detect_first(model, of_class=True, heads=range(HEADS // 2))
    zoo.spike(model, 1, MARKED, {SECOND: 10}, neuron=50)
    zoo.sink(model, range(2, LAYERS), heads=range(HEADS // 2))
    zoo.sink(model, range(2, LAYERS), heads=range(HEADS // 2, HEADS), reads=SECOND)
    return Animal(model=model, prefix=(BOS, POINT))


def rare() -> Animal:
    """A sink that only a few queries use: those of four tokens in sixty.

    Heads with a task of their own are such: they rest only where it does not arise. A logit takes
    weight from all queries or from none, so a form that may must keep the keys.
    """
    model = zoo.beast("llama")
    zoo.mark(model, BOS)
    zoo.classify(model, range(4, 8), LEVEL)
    zoo.spike(model, 0, MARKED, {MASSIVE: 10})
    zoo.sink(model, range(1, LAYERS), asks=CLASS)
    return Animal(model=model, constant=False)


def generous() -> Animal:
    """Heads whose sink value is large: what they say at rest is a constant, and not nothing.

    Some heads of GPT-2 and Pythia are such. Dropping the value ruins them; folded into biases it
    costs nothing.
    """
    model = zoo.beast("llama")
    zoo.mark(model, BOS)
    zoo.spike(model, 0, MARKED, {MASSIVE: 10})
    zoo.sink(model, range(1, LAYERS), logit=12, value=0.5)
    return Animal(model=model, constant=False)


def normed() -> Animal:
    """Queries and keys pass a norm, so that no key bias can follow the prefix.

    Qwen3 and Gemma 3 are such.
    """
    model = zoo.beast("qwen3")
    zoo.stretch(model, 3.0)
    zoo.mark(model, BOS)
    zoo.spike(model, 0, MARKED, {MASSIVE: 10})
    zoo.sink(model, range(1, LAYERS))
    return Animal(model=model, constant=False)


def windowed() -> Animal:
    """Every other layer sees the last 24 tokens only: later text has no sink there.

    Gemma 2 and 3 and gpt-oss alternate so. An absorbed prefix never leaves a window, and where
    the real one did, the student must not be given what the model never had.
    """
    kinds = ["full_attention", "sliding_attention"] * 2
    model = zoo.beast("qwen2", use_sliding_window=True, sliding_window=24, layer_types=kinds)
    zoo.mark(model, BOS)
    zoo.spike(model, 0, MARKED, {MASSIVE: 10})
    zoo.sink(model, range(1, LAYERS))
    return Animal(model=model, constant=False)


def positioned() -> Animal:
    """Learned positions, and a sink wherever the first of them is.

    GPT-2 is such. The table loses its first row, and with it the sink.
    """
    model = zoo.beast("gpt2")
    zoo.stand_first(model)
    zoo.spike(model, 0, {MARK: 8.0}, {MASSIVE: 100})
    zoo.sink(model, range(1, LAYERS))
    return Animal(model=model, lead=())


def outlying() -> Animal:
    """Two outlier channels: one is constant, and the other one carries information.

    SmolLM2 is such: channels 247 and 507 hardly vary, others do. Both are scaled, neither is lost.
    """
    model = zoo.beast("llama")
    zoo.mark(model, BOS)
    zoo.spike(model, 0, MARKED, {MASSIVE: 10})
    zoo.sink(model, range(1, LAYERS))
    zoo.outlie(model, 16.0)
    return Animal(model=model)


def cancelling() -> Animal:
    """Two spike neurons that fire on delimiters and cancel: the stream never shows what they write.

    Removed alone, each would leave the other's massive activation; together they are free.
    """
    model = zoo.beast("llama")
    zoo.mark(model, BOS)
    zoo.classify(model, range(4, 8))
    zoo.spike(model, 0, MARKED, {MASSIVE: 10})
    zoo.spike(model, 1, {CLASS: 8.0}, {SECOND: 10}, neuron=1)
    zoo.spike(model, 1, {CLASS: 8.0}, {SECOND: -9.99}, neuron=2)
    zoo.sink(model, range(1, LAYERS))
    return Animal(model=model)


ANIMALS: tuple[Callable[[], Animal], ...] = (
    common,
    biased,
    sinkless,
    delimited,
    doubled,
    rare,
    generous,
    normed,
    windowed,
    positioned,
    outlying,
    cancelling,
)
EVERY = pytest.mark.parametrize("make", ANIMALS, ids=lambda make: make.__name__)
FORMS = pytest.mark.parametrize("form", ["logit", "auto", "key"])


@dataclass(frozen=True, kw_only=True)
class Catch:
    """An animal with a head on, its text, and what was found in it."""

    animal: Animal
    calibration: Tensor
    unseen: Tensor
    measurement: Measurement
    findings: Findings


@cache
def caught(make: Callable[[], Animal]) -> Catch:
    animal = make()
    zoo.peaked(animal.model, animal.prefix)
    text = zoo.own_text(animal.model, animal.prefix)
    family = family_of(animal.model.config.model_type)
    lead = torch.tensor(animal.lead, dtype=torch.long)
    measurement = measure(animal.model, family, text[:ROWS], lead)
    return Catch(
        animal=animal,
        calibration=text[:ROWS],
        unseen=text[ROWS:],
        measurement=measurement,
        findings=find(measurement, Thresholds()),
    )


def planned(catch: Catch, form: Sink) -> Plan:
    model, family = catch.animal.model, family_of(catch.animal.model.config.model_type)
    scales = residual_scales(catch.measurement, catch.findings, target=1)
    budget = Thresholds().divergence
    return make_plan(
        model,
        family,
        catch.findings,
        scales,
        catch.animal.prefix,
        catch.calibration,
        budget=budget,
        form=form,
    )


def grafted(catch: Catch, plan: Plan) -> PreTrainedModel:
    """The student by a plan, with the smoothing that a conversion gives it."""
    model, family = catch.animal.model, family_of(catch.animal.model.config.model_type)
    student = graft(model, family, plan)
    smooth(student, family, searched_scales(student, family, catch.calibration))
    return student


def judged(catch: Catch, subject: Subject) -> Score:
    model = catch.animal.model
    teacher = Subject(model=model, lead=torch.tensor(catch.animal.prefix))
    family = family_of(model.config.model_type)
    text = catch.unseen, catch.calibration
    [score] = evaluate([subject], teacher, family, *text, Thresholds(), ["w8a8-static"])
    return score


@cache
def original(make: Callable[[], Animal]) -> Score:
    catch = caught(make)
    lead = torch.tensor(catch.animal.lead, dtype=torch.long)
    return judged(catch, Subject(model=catch.animal.model, lead=lead))


@cache
def converted(make: Callable[[], Animal], form: Sink) -> Score:
    catch = caught(make)
    return judged(catch, Subject(model=grafted(catch, planned(catch, form))))


# What each animal is


def layers_with_sinks(make: Callable[[], Animal]) -> set[int]:
    return {head.layer for head in caught(make).findings.sink_heads}


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (common, {1, 2, 3}),
        (biased, {2, 3}),
        (sinkless, set()),
        (doubled, {2, 3}),
        (generous, {1, 2, 3}),
        (normed, {1, 2, 3}),
        (windowed, {2}),  # from those with a window it is gone when most of a text is read
        (positioned, {1, 2, 3}),
        (outlying, {1, 2, 3}),
        (cancelling, {1, 2, 3}),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_first_tokens_are_sinks_where_it_was_planted(
    make: Callable[[], Animal], layers: set[int]
) -> None:
    assert layers_with_sinks(make) == layers
    massive = {
        (found.position, found.channel) for found in caught(make).findings.massive_activations
    }
    assert bool(massive & {(0, MASSIVE), (0, SECOND)}) == bool(layers)


def test_the_biases_of_early_layers_rule_and_no_neuron_alone_is_massive() -> None:
    early, *_, last = caught(biased).animal.model.model.layers
    assert early.self_attn.q_proj.bias.abs().max() == pytest.approx(10, rel=0.01)
    assert not last.self_attn.q_proj.bias.any()
    assert not caught(biased).findings.spike_neurons


def test_first_delimiters_are_sinks_wherever_they_stand() -> None:
    found = caught(delimited).findings
    delimiters = set(range(POINT, 19))
    assert {sink.token for sink in found.sink_tokens} - {-1} <= delimiters
    assert len(found.sink_tokens) > 3
    assert {massive.token for massive in found.massive_activations} - {-1} <= delimiters
    both = caught(doubled).findings
    assert {massive.channel for massive in both.massive_activations} == {MASSIVE, SECOND}


@torch.no_grad()
def test_only_a_few_queries_use_the_rare_sink() -> None:
    catch = caught(rare)
    model, text = catch.animal.model, catch.unseen
    model.set_attn_implementation("eager")
    rows = torch.cat([torch.full_like(text[:, :1], BOS), text], 1)
    weight = model(rows, output_attentions=True).attentions[2][:, :, 20:, 0].mean(1)
    asks = model.get_input_embeddings().weight[rows[:, 20:], CLASS] > 0
    assert 0.02 < asks.float().mean() < 0.2
    assert weight[asks].mean() > 0.8
    assert weight[~asks].mean() < 0.1


def test_the_generous_sink_says_more_than_text_does() -> None:
    catch = caught(generous)
    model = catch.animal.model
    layer = prefix_of(model, torch.tensor(catch.animal.prefix)).layers[1]
    usual = prefix_of(model, catch.unseen[0]).layers[1].values[:, 1:].norm(dim=-1).median()
    assert layer.values.norm(dim=-1).min() > 2 * usual


def test_one_outlier_channel_is_constant_and_one_tells_tokens_apart() -> None:
    found = {channel.channel for channel in caught(outlying).findings.outlier_channels}
    constant, telling = zoo.HIDDEN - 2, zoo.HIDDEN - 1
    assert {constant, telling} <= found
    stream = zoo.stream_of(caught(outlying).animal.model, caught(outlying).unseen, 1)
    steadiness = stream.mean((0, 1)).abs() / stream.std((0, 1))
    assert steadiness[constant] > 6
    assert steadiness[telling] < 1


def test_neurons_that_cancel_are_spikes_that_the_stream_does_not_show() -> None:
    found = caught(cancelling).findings
    assert {(1, 1), (1, 2)} < {(spike.layer, spike.neuron) for spike in found.spike_neurons}
    assert {massive.channel for massive in found.massive_activations} == {MASSIVE}
    removed = {r.spike.neuron for r in planned(caught(cancelling), "key").removals}
    assert len(removed & {1, 2}) != 1


# What becomes of them


@FORMS
@EVERY
def test_no_form_is_worse_than_doing_nothing(make: Callable[[], Animal], form: Sink) -> None:
    before, after = original(make), converted(make, form)
    cannot = form == "logit" and not caught(make).animal.constant
    assert after.perplexity < before.perplexity * (HARD if cannot else ENOUGH)
    int8 = "w8a8-static"
    assert after.quantised[int8] < before.quantised[int8] * (HARD if cannot else ENOUGH)
    assert after.divergence < FAR[form]


@FORMS
@EVERY
def test_nothing_massive_is_left_in_the_stream(make: Callable[[], Animal], form: Sink) -> None:
    after = converted(make, form)
    assert after.massive_tokens == 0
    assert after.stream_ratio < original(make).stream_ratio * ROUNDING
    assert after.stream_ratio < TWICE * converted(make, "key").stream_ratio


@EVERY
def test_fitted_logits_are_no_worse_than_constants_by_hand(make: Callable[[], Animal]) -> None:
    catch = caught(make)
    plan, model = planned(catch, "logit"), catch.animal.model
    others = [
        replace(plan, sinks=zoo.by_hand(model, catch.animal.prefix, catch.calibration, choose))
        for choose in (zoo.no_sink, zoo.best_constant, zoo.best_value)
    ]
    fitted, *by_hand = (gap(catch, each) for each in (plan, *others))
    assert fitted < min(by_hand) * LUCK + ROUNDED_KL


def gap(catch: Catch, plan: Plan) -> float:
    model, prefix = catch.animal.model, torch.tensor(catch.animal.prefix)
    student = graft(model, family_of(model.config.model_type), plan)
    return divergence(model, student, prefix, catch.unseen)


@FORMS
def test_inside_the_window_nothing_is_lost(form: Sink) -> None:
    catch = caught(windowed)
    inside = replace(catch, unseen=catch.unseen[:, :22])
    assert gap(inside, planned(catch, form)) < FAR[form]
