"""A field guide to strange models: each has one trait that real ones have, planted in a tiny one.

Each entry says what the trait is, which models have it, and what is right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import sqrt

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.helpers import anatomy
from tests.helpers.anatomy import CLASS, HEADS, LAYERS, LEVEL, MARK, MASSIVE, SECOND, VOCABULARY

BOS, POINT, SPECIAL = 1, 3, (0, 1, 2, 3)  # none of the special ones is written
DELIMITERS, WORDS = range(POINT, 19), range(4, 8)
ROWS, LENGTH = 16, 96
WINDOW = 24
NATS = 2.0

MARKED = {MARK: 4.0}
FIRST_HALF, SECOND_HALF = range(HEADS // 2), range(HEADS // 2, HEADS)


@dataclass(frozen=True, kw_only=True)
class Animal:
    """A planted model, and how it is read.

    lead is what it is given before a text as it is, prefix what its sinks are to stand for, and
    constant says whether one logit a head can do so, and leaves whether text gets so far that the
    prefix has left the window of some layers, which no form can follow. layers are those with heads
    that give most of their weight to the first token.
    """

    model: PreTrainedModel
    lead: tuple[int, ...] = (BOS,)
    prefix: tuple[int, ...] = (BOS,)
    constant: bool = True
    leaves: bool = False
    layers: frozenset[int] = frozenset(range(1, LAYERS))


def with_house_sink(model: PreTrainedModel, **of_sink: float) -> PreTrainedModel:
    """BOS is massive from layer 0 on, and the heads of all later layers attend to it."""
    anatomy.mark(model, BOS)
    anatomy.spike(model, 0, 0, MARKED, {MASSIVE: 10})
    anatomy.sink(model, range(1, LAYERS), **of_sink)
    return model


def common() -> Animal:
    """The house sink, for comparison: BOS is massive, and most heads attend to it.

    Llama 2 and Mistral 7B are such. A constant logit replaces it nearly exactly.
    """
    return Animal(model=with_house_sink(anatomy.body("llama")))


def biased() -> Animal:
    """Query and key biases of ±10 in the first two layers, no BOS, and the first token is a sink.

    Qwen2 0.5B is such. Its early heads look back so far and no further, so only the first tokens of
    a text attend to the prefix. But if the very first does not see it as it should, it takes itself
    for a first token again, and becomes massive: 48 small neurons see to that, none of which is
    large enough to be removed.
    """
    model = anatomy.body("qwen2")
    anatomy.detect_first(model, neurons=48, fires_from=0.71)
    anatomy.look_back(model, range(2), (0, 1, 3, 5), 10)
    anatomy.sink(model, range(2, LAYERS))
    return Animal(model=model, lead=(), layers=frozenset({2, 3}))


def sinkless() -> Animal:
    """No sink at all: BOS is a token like others.

    Models with gated attention are such. A logit has nothing to stand for, and must do no harm.
    """
    return Animal(model=anatomy.body("llama"), constant=False, layers=frozenset())


def delimited() -> Animal:
    """The sink is the first delimiter, wherever it stands; other first tokens are none.

    Models without BOS do so with "." or a line break. Behind a prefix of one, no delimiter of the
    text is the first.
    """
    model = anatomy.body("llama")
    anatomy.classify(model, DELIMITERS)
    anatomy.detect_first(model, FIRST_HALF, of_class=True)
    anatomy.sink(model, range(2, LAYERS))
    return Animal(model=model, lead=(), prefix=(POINT,), layers=frozenset())


def doubled() -> Animal:
    """Two sinks: BOS, and the first delimiter, which other heads attend to.

    SmolLM2 is such, with its first " the". Both belong into the prefix.
    """
    model = anatomy.body("llama")
    anatomy.mark(model, BOS)
    anatomy.classify(model, DELIMITERS)
    anatomy.detect_first(model, FIRST_HALF, of_class=True)
    anatomy.spike(model, 1, 50, MARKED, {SECOND: 10})
    anatomy.sink(model, range(2, LAYERS), FIRST_HALF)
    anatomy.sink(model, range(2, LAYERS), SECOND_HALF, reads=SECOND)
    return Animal(model=model, prefix=(BOS, POINT), layers=frozenset({2, 3}))


def rare() -> Animal:
    """A sink that only a few queries use: those of four words in sixty.

    Heads with a rare task are such the other way about: they rest unless it arises. One logit takes
    weight from all queries or from none, so a form that may must keep the keys.
    """
    model = anatomy.body("llama")
    anatomy.classify(model, WORDS, LEVEL)
    with_house_sink(model, asks=CLASS)
    return Animal(model=model, constant=False, layers=frozenset())


def generous() -> Animal:
    """Heads whose sink value is large: what they say at rest is not nothing.

    Some heads of GPT-2 and Pythia are such. Folded into biases the value costs nothing, but small
    errors of its weight do: what a query takes of it must be right to the percent.
    """
    return Animal(model=with_house_sink(anatomy.body("llama"), logit=12, value=0.5), constant=False)


def normed() -> Animal:
    """Queries and keys pass a norm, so that no key bias can follow the prefix.

    Qwen3 and Gemma 3 are such. Where a layer has no sink, there is only the logit to make up for
    what queries read of BOS.
    """
    model = anatomy.body("qwen3")
    anatomy.stretch(model, 3.0)
    return Animal(model=with_house_sink(model), constant=False)


def windowed() -> Animal:
    """Every other layer sees the last 24 tokens only: later text has no sink there.

    Gemma 2 and 3 and gpt-oss alternate so, with windows of 512 and more. An absorbed prefix never
    leaves a window: keys are exact inside it alone, and the fit keeps what does least harm beyond.
    """
    kinds = ["full_attention", "sliding_attention"] * (LAYERS // 2)
    windows = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": kinds}
    model = with_house_sink(anatomy.body("qwen2", **windows))
    return Animal(model=model, constant=False, leaves=True, layers=frozenset({2}))


def positioned() -> Animal:
    """Learned positions, and a sink wherever the first of them is.

    GPT-2 is such. The table loses its first row, and with it the sink.
    """
    model = anatomy.body("gpt2")
    anatomy.stand_first(model)
    anatomy.spike(model, 0, 0, {MARK: 8.0}, {MASSIVE: 100})
    anatomy.sink(model, range(1, LAYERS))
    return Animal(model=model, lead=())


def outlying() -> Animal:
    """Two outlier channels: one is constant, and the other one carries information.

    SmolLM2 is such: channels 247 and 507 hardly vary, others do. Both are scaled, neither is lost.
    """
    model = with_house_sink(anatomy.body("llama"), logit=14)
    anatomy.outlie(model, 16.0)
    return Animal(model=model)


def cancelling() -> Animal:
    """Two spike neurons that fire on four words and cancel: the stream never shows what they write.

    Removed alone, each would leave the other's massive activation; together they are free.
    """
    model = anatomy.body("llama")
    anatomy.classify(model, WORDS)
    anatomy.spike(model, 1, 1, {CLASS: 8.0}, {SECOND: 10})
    anatomy.spike(model, 1, 2, {CLASS: 8.0}, {SECOND: -9.99})
    return Animal(model=with_house_sink(model))


Make = Callable[[], Animal]
ANIMALS: tuple[Make, ...] = (
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


@cache
def caught(make: Make) -> tuple[Animal, Tensor, Tensor]:
    """An animal that predicts, and two texts (ROWS, LENGTH) of its own."""
    animal = make()
    peak(animal.model, animal.prefix)
    calibration, unseen = own_text(animal.model, animal.prefix).split(ROWS)
    return animal, calibration, unseen


@torch.no_grad()
def peak(model: PreTrainedModel, prefix: tuple[int, ...]) -> None:
    """Scale the head until what it predicts of random text has an entropy of NATS on average."""
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(len(SPECIAL), VOCABULARY, (4, LENGTH), generator=draw)
    logits = model(torch.cat([torch.tensor([prefix] * 4), tokens], 1)).logits[:, len(prefix) :]
    least, most = 0.01, 100.0
    for _ in range(30):
        middle = sqrt(least * most)
        entropy = torch.distributions.Categorical(logits=logits * middle).entropy().mean()
        least, most = (middle, most) if entropy > NATS else (least, middle)
    model.get_output_embeddings().weight.mul_(middle)


def own_text(model: PreTrainedModel, prefix: tuple[int, ...]) -> Tensor:
    """What the model writes after the prefix: (2 ROWS, LENGTH)."""
    torch.manual_seed(6)
    rows = torch.tensor([prefix] * (2 * ROWS))
    written = model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        do_sample=True,
        top_k=0,
        min_new_tokens=LENGTH,
        max_new_tokens=LENGTH,
        suppress_tokens=list(SPECIAL),
    )
    return written[:, len(prefix) :]
