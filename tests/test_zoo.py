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
from zoo import BOS, CLASS, HEADS, LAYERS, LEVEL, MARK, MASSIVE, ROWS, SECOND, STEADY, WIDTH

from absorb.divergence import divergence
from absorb.families import family_of
from absorb.findings import Findings, find
from absorb.fit import LogitSink
from absorb.graft import graft, smooth, twin
from absorb.measure import Measurement, measure
from absorb.plan import Plan, make_plan, residual_scales
from absorb.score import Score, Subject, evaluate
from absorb.settings import Sink, Thresholds
from absorb.smoothing import searched_scales

MARKED = {MARK: 4.0}
NOTHING = torch.tensor([], dtype=torch.long)


@dataclass(frozen=True, kw_only=True)
class Animal:
    """A planted model, and how it is read.

    lead is what it is given before a text as it is, prefix what its sinks are to stand for.
    """

    model: PreTrainedModel
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
    zoo.detect_first(model, neurons=48)
    zoo.biased(model, range(2), (0, 1, 3, 5), 10)
    zoo.sink(model, range(2, LAYERS))
    return Animal(model=model, lead=())


def sinkless() -> Animal:
    """No sink at all: BOS is a token like others.

    Models with gated attention or a softmax off by one are such. A logit has nothing to stand for,
    and must do no harm.
    """
    return Animal(model=zoo.beast("llama"))


def delimited() -> Animal:
    """The sink is the first delimiter, wherever it stands; the first token is none.

    Models without BOS do so with "." or a line break. Behind a prefix of one, no delimiter of the
    text is the first.
    """
    model = zoo.beast("llama")
    zoo.classify(model, range(3, 19))
    zoo.detect_first(model, of_class=True, heads=range(HEADS // 2))
    zoo.sink(model, range(2, LAYERS))
    return Animal(model=model, lead=(), prefix=(3,))


def doubled() -> Animal:
    """Two sinks: BOS, and the first delimiter, which other heads attend to.

    SmolLM2 is such, with its first " the". Both belong into the prefix.
    """
    model = zoo.beast("llama")
    zoo.classify(model, range(3, 19))
    zoo.mark(model, BOS)
    zoo.detect_first(model, of_class=True, heads=range(HEADS // 2))
    zoo.spike(model, 1, MARKED, {SECOND: 10}, neuron=50)
    zoo.sink(model, range(2, LAYERS), heads=range(HEADS // 2))
    zoo.sink(model, range(2, LAYERS), heads=range(HEADS // 2, HEADS), reads=SECOND)
    return Animal(model=model, prefix=(BOS, 3))


def rare() -> Animal:
    """A sink that only a few queries use: those of four tokens in sixty.

    Heads with a task of their own are such: they rest only where it does not arise. A logit takes
    weight from all queries or from none, so a form that may must keep the keys.
    """
    model = zoo.beast("llama")
    zoo.mark(model, BOS)
    zoo.classify(model, range(3, 7), LEVEL)
    zoo.spike(model, 0, MARKED, {MASSIVE: 10})
    zoo.sink(model, range(1, LAYERS), asks=CLASS)
    return Animal(model=model)


def generous() -> Animal:
    """Heads whose sink value is large: what they say at rest is a constant, and not nothing.

    Some heads of GPT-2 and Pythia are such. Dropping the value ruins them; folded into biases it
    costs nothing.
    """
    model = zoo.beast("llama")
    zoo.mark(model, BOS)
    zoo.spike(model, 0, MARKED, {MASSIVE: 10})
    zoo.sink(model, range(1, LAYERS), value=0.5)
    return Animal(model=model)


def normed() -> Animal:
    """Queries and keys pass a norm, so that no key bias can follow the prefix.

    Qwen3 and Gemma 3 are such.
    """
    model = zoo.beast("qwen3")
    zoo.mark(model, BOS)
    zoo.spike(model, 0, MARKED, {MASSIVE: 10})
    zoo.sink(model, range(1, LAYERS))
    return Animal(model=model)


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
    return Animal(model=model)


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
    zoo.tell(model, 12.0)
    return Animal(model=model)


def cancelling() -> Animal:
    """Two spike neurons that fire on delimiters and cancel: the stream never shows what they write.

    Removed alone, each would leave the other's massive activation; together they are free.
    """
    model = zoo.beast("llama")
    zoo.mark(model, BOS)
    zoo.classify(model, range(3, 7))
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
