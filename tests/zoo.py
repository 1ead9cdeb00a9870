"""The anatomy of the zoo: what strange models are made of, as edits of tiny random ones.

The stream of each has channels with a part to play, which random weights neither read nor write,
channels with a code that tells tokens apart, and channels for all else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import cos, sin, sqrt
from typing import Any

import torch
from edits import weight_of
from tiny import tiny
from torch import Tensor
from transformers import PreTrainedModel

from absorb.families import family_of
from absorb.fit import KeySink, LogitSink
from absorb.modeling_absorb import NEUTRAL
from absorb.scene import Scene, scene_of
from absorb.sinks import prefix_of
from absorb.watch import attending

HIDDEN, NEURONS, LAYERS, HEADS, WIDTH, VOCABULARY = 64, 96, 4, 4, 16, 64
ROWS, LENGTH = 16, 96
BOS, POINT, SPECIAL = 1, 3, (0, 1, 2, 3)

# Channels of the stream. STEADY is large, and the same on every token.
MARK, MASSIVE, SECOND, STEADY, CROWD, CLASS = range(6)
CODE = slice(6, 22)  # one of 64 codes, by which tokens are told apart
SEEN = slice(22, 38)  # the mean of the codes that a head of layer 0 attends to
ROLES = [*range(6), *range(22, 38)]
LEVEL = 8.0  # of STEADY
OF_CLASS = 4.0  # at CLASS, of tokens of the class


@dataclass(frozen=True)
class Parts:
    """Views of one layer's weights, outputs in rows and inputs in columns."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    gate: Tensor | None
    up: Tensor
    down: Tensor
    layer: Any


def parts_of(model: PreTrainedModel) -> Iterator[Parts]:
    for layer in model.get_submodule(family_of(model.config.model_type).layers).children():
        if hasattr(layer, "attn"):
            query, key, value = weight_of(layer, "attn.c_attn").split(HIDDEN)
            output, gate = weight_of(layer, "attn.c_proj"), None
            up, down = (weight_of(layer, f"mlp.{name}") for name in ("c_fc", "c_proj"))
        else:
            heads = (weight_of(layer, f"self_attn.{name}_proj") for name in "qkvo")
            query, key, value, output = heads
            gate, up, down = (weight_of(layer, f"mlp.{n}_proj") for n in ("gate", "up", "down"))
        yield Parts(query, key, value, output, gate, up, down, layer)


@torch.no_grad()
def beast(model_type: str, **settings: Any) -> PreTrainedModel:
    """A model with all channels in their place, whose heads attend to text alone.

    Every token's embedding is of one length, so that layer 0 sees it as it is.
    """
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": NEURONS,
        "n_inner": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "head_dim": WIDTH,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2 * LENGTH,
        "scale_attn_by_inverse_layer_idx": False,
    }
    model = tiny(model_type, torch.float32, **{**sizes, **settings})
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float("norm" in name or ".ln_" in name) * name.endswith("weight"))
    embedding = model.get_input_embeddings().weight
    embedding.mul_(sqrt(HIDDEN))
    embedding[:, CODE] = codes()
    embedding[:, ROLES] = 0
    rest = embedding[:, SEEN.stop :]
    rest.mul_(sqrt(rest.shape[1]) / rest.norm(dim=1, keepdim=True))
    embedding[:, STEADY] = LEVEL
    for parts in parts_of(model):
        for reads in (parts.query, parts.key, parts.value, parts.gate, parts.up):
            if reads is not None:
                reads[:, ROLES] = 0
        parts.output[ROLES], parts.down[ROLES] = 0, 0
        parts.query.mul_(1.5)
        parts.key.mul_(1.5)
        parts.value.mul_(2)
        parts.output.mul_(0.5)
        parts.down.mul_(0.5)
    model.get_output_embeddings().weight[:, ROLES] = 0
    return model


def codes() -> Tensor:
    """64 codes of 16 signs, two of which agree in 10 places at most, the half of them in 8.

    They are the rows of a Hadamard matrix, their opposites, and both times a bent function.
    """
    square = torch.ones(1, 1)
    while len(square) < 16:
        square = torch.cat([torch.cat([square, square], 1), torch.cat([square, -square], 1)])
    twice = torch.cat([square, -square])
    bits = torch.arange(16)[:, None] >> torch.arange(4) & 1
    bent = 1 - 2 * ((bits[:, 0] & bits[:, 1]) ^ (bits[:, 2] & bits[:, 3]))
    return torch.cat([twice, twice * bent])


def slow(heads: range) -> list[int]:
    """The channel of each head that RoPE hardly turns."""
    return [head * WIDTH + WIDTH // 2 - 1 for head in heads]


@torch.no_grad()
def mark(model: PreTrainedModel, token: int, size: float = LEVEL) -> None:
    model.get_input_embeddings().weight[token, MARK] = size


@torch.no_grad()
def spike(
    model: PreTrainedModel,
    layer: int,
    reads: dict[int, float],
    writes: dict[int, float],
    neuron: int = 0,
) -> None:
    """A neuron that fires where the sum of what it reads, by channel, is well above zero."""
    parts = list(parts_of(model))[layer]
    for rows in (parts.gate, parts.up):
        if rows is not None:
            rows[neuron] = 0
            for channel, weight in reads.items():
                rows[neuron, channel] = weight
    parts.down[:, neuron] = 0
    for channel, weight in writes.items():
        parts.down[channel, neuron] = weight


@torch.no_grad()
def sink(
    model: PreTrainedModel,
    layers: range,
    heads: range = range(HEADS),
    reads: int = MASSIVE,
    logit: float = 7.0,
    varies: float = 0.1,
    value: float = 0.02,
    asks: int = STEADY,
) -> None:
    """Heads that attend to what is large at channel `reads`, asked for by what has `asks`.

    varies is how far the logit depends on the query besides, and value how large the sink's is.
    """
    draw = torch.Generator().manual_seed(4)
    pull = sqrt(logit * sqrt(WIDTH) / (sqrt(HIDDEN) * 5.5))
    for index, parts in enumerate(parts_of(model)):
        if index not in layers:
            continue
        group = len(parts.query) // len(parts.key)
        kv_heads = range(heads.start // group, -(-heads.stop // group))
        rows = [r for h in kv_heads for r in range(h * WIDTH, (h + 1) * WIDTH)]
        parts.key[rows, reads] = varies * torch.randn(len(rows), generator=draw)
        parts.value[rows, reads] = value * torch.randn(len(rows), generator=draw)
        parts.query[slow(heads)] = 0
        parts.query[slow(heads), asks] = pull
        parts.key[slow(kv_heads), :] = 0
        parts.key[slow(kv_heads), reads] = pull


@torch.no_grad()
def detect_first(
    model: PreTrainedModel, of_class: bool = False, neurons: int = 1, heads: range = range(HEADS), share: float = 0.75
) -> None:
    """A massive activation on the first token of a text, or on the first one of a class.

    Layer 0 takes the mean of the codes that it attends to, and adds up the squares. Only the first
    token has nothing but itself to attend to; the square of a mean of two codes is half as large.
    Layer 1 fires on three quarters and more. Tokens that repeat from the start are firsts as well.
    """
    first, second = list(parts_of(model))[:2]
    spots = range(SEEN.start, SEEN.stop)
    group = len(first.query) // len(first.key)
    kv_heads = range(heads.start // group, -(-heads.stop // group))
    asking = [row for head in heads for row in range(head * WIDTH, (head + 1) * WIDTH)]
    asked = [row for head in kv_heads for row in range(head * WIDTH, (head + 1) * WIDTH)]
    first.query[asking], first.key[asked] = 0, 0
    first.output[:, asking], first.output[SEEN] = 0, 0
    if of_class:
        first.query[slow(heads), STEADY] = 2
        first.key[slow(kv_heads), CLASS] = 2
    first.value[asked] = 0
    for head in kv_heads:
        first.value[range(head * WIDTH, (head + 1) * WIDTH), range(CODE.start, CODE.stop)] = 1
    for head in heads:
        first.output[spots, range(head * WIDTH, (head + 1) * WIDTH)] = 1 / len(heads)
    for index, channel in enumerate(spots):
        for sign in (1.0, -1.0):
            neuron = NEURONS - 1 - 2 * index - int(sign > 0)
            spike(model, 0, {channel: 4 * sign}, {CROWD: 0.1}, neuron)
    tokens = firsts(model, of_class)
    level = float(stream_of(model, tokens, 0)[..., CROWD].mean())
    for neuron in range(neurons):
        reads = {CROWD: 20.0, STEADY: -20.0 * share * level / LEVEL}
        spike(model, 1, reads, {MASSIVE: 1.0}, neuron)
        second.up[neuron] = 0
        second.up[neuron, STEADY] = 1.0
        if of_class:
            second.gate[neuron, CLASS] = 20.0 * LEVEL / OF_CLASS
            second.gate[neuron, STEADY] -= 20.0
    unscaled = float(stream_of(model, tokens, 1)[..., MASSIVE].mean())
    second.down[MASSIVE, :neurons] = 4000 / unscaled


@torch.no_grad()
def stream_of(model: PreTrainedModel, tokens: Tensor, layer: int) -> Tensor:
    """What a layer hands on: (rows, length, hidden)."""
    return model(tokens, output_hidden_states=True).hidden_states[layer + 1]


def firsts(model: PreTrainedModel, of_class: bool) -> Tensor:
    """Texts of one token each: (rows, 1)."""
    size = model.get_input_embeddings().weight[:, CLASS]
    chosen = size > 0 if of_class else torch.arange(VOCABULARY) >= len(SPECIAL)
    return chosen.nonzero()


@torch.no_grad()
def biased(
    model: PreTrainedModel, layers: range, distances: tuple[float, ...], size: float
) -> None:
    """q and k biases by which each head looks back so far: two of RoPE's frequencies agree there.

    Logits of the biases alone reach from -size² / 2 to size² / 2.
    """
    theta = model.config.rope_parameters["rope_theta"]
    for layer in layers:
        parts = list(parts_of(model))[layer]
        query, key = parts.layer.self_attn.q_proj.bias, parts.layer.self_attn.k_proj.bias
        for pair in (0, 1):
            turn = theta ** (-2 * pair / WIDTH)
            for head, distance in enumerate(distances):
                query[head * WIDTH + pair] = size * cos(turn * distance)
                query[head * WIDTH + pair + WIDTH // 2] = -size * sin(turn * distance)
            key[pair::WIDTH] = size


@torch.no_grad()
def peaked(model: PreTrainedModel, prefix: tuple[int, ...], nats: float = 2.0) -> PreTrainedModel:
    """The same model with a head that leaves `nats` of entropy on average, as real ones do."""
    head = model.get_output_embeddings().weight
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(len(SPECIAL), VOCABULARY, (4, LENGTH), generator=draw)
    logits = model(torch.cat([torch.tensor([prefix] * 4), tokens], 1)).logits[:, len(prefix) :]
    least, most = 0.01, 100.0
    for _ in range(30):
        middle = sqrt(least * most)
        if torch.distributions.Categorical(logits=logits * middle).entropy().mean() > nats:
            least = middle
        else:
            most = middle
    head.mul_(middle)
    return model


@torch.no_grad()
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


@torch.no_grad()
def classify(model: PreTrainedModel, tokens: range, size: float = OF_CLASS) -> None:
    """Tokens that CLASS tells from others."""
    model.get_input_embeddings().weight[list(tokens), CLASS] = size


@torch.no_grad()
def stand_first(model: PreTrainedModel) -> None:
    """Positions that matter little, save that MARK tells the first one."""
    table = model.get_submodule(str(family_of(model.config.model_type).positions)).weight
    table.mul_(0.3)
    table[:, ROLES] = 0
    table[0, MARK] = LEVEL


@torch.no_grad()
def outlie(model: PreTrainedModel, size: float) -> None:
    """Two outlier channels: of one size on all tokens, and with the sign of a token's own."""
    embedding, constant, telling = model.get_input_embeddings().weight, HIDDEN - 2, HIDDEN - 1
    embedding[:, constant] = size
    embedding[:, telling] = size * embedding[:, telling].sign()
    for parts in parts_of(model):
        for reads in (parts.query, parts.key, parts.value, parts.gate, parts.up):
            reads[:, [constant, telling]] /= size
    model.get_output_embeddings().weight[:, [constant, telling]] /= size


@torch.no_grad()
def stretch(model: PreTrainedModel, size: float) -> None:
    """Norms of queries and keys that favour the channels by which a sink is known."""
    for parts in parts_of(model):
        for norm in (parts.layer.self_attn.q_norm, parts.layer.self_attn.k_norm):
            norm.weight[slow(range(1))] = size


Choose = Callable[[Scene, KeySink], LogitSink]


@torch.no_grad()
def by_hand(
    model: PreTrainedModel, prefix: tuple[int, ...], text: Tensor, choose: Choose
) -> tuple[LogitSink, ...]:
    """The sinks that `choose` makes of each layer, on what the layers before give with theirs."""
    known, sinks = prefix_of(model, torch.tensor(prefix)), []

    def attend(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        scene = scene_of(module, None, *args, **kwargs)
        sinks.append(choose(scene, known.layers[len(sinks)]))
        out = scene.with_sink(sinks[-1].logits, sinks[-1].value, sinks[-1].key_bias)
        return out.transpose(1, 2).contiguous(), None

    with attending(model, attend):
        model.base_model(text, position_ids=known.positions(text.shape[1]), use_cache=False)
    return tuple(sinks)


def no_sink(scene: Scene, prefix: KeySink) -> LogitSink:
    heads, value = scene.query.shape[1], torch.zeros_like(prefix.values[:, 0])
    logits = torch.full((heads,), NEUTRAL["sink"])
    return LogitSink(logits=logits, value=value, key_bias=value, error=torch.ones(()))


def best_constant(scene: Scene, prefix: KeySink) -> LogitSink:
    """The logit of each head, out of many, with the least squared error of its output.

    The value is the prefix's own, weighted by what the teacher's heads give it.
    """
    scores, text = scene.scores(prefix.keys[None]), scene.text_scores()
    lse = text.logsumexp(-1)
    share = torch.sigmoid(scores.logsumexp(-1) - lse)[..., None]
    alone = scene.mix(text.softmax(-1), scene.value)
    weighted = share * scene.mix(scores.softmax(-1), prefix.values)
    value = by_kv_head(scene, weighted) / by_kv_head(scene, share)
    step = scene.spread(value[:, None]) - alone
    miss = alone - scene.with_prefix(prefix.keys, prefix.values)
    linear, square = 2 * (miss * step).sum(-1), step.square().sum(-1)
    grid = torch.linspace(float(lse.min()) - 5, float(lse.max()) + 5, 160).tolist()
    grid.append(NEUTRAL["sink"])
    taken = [torch.sigmoid(logit - lse) for logit in grid]
    errors = torch.stack([(p * linear + p.square() * square).sum((0, 2)) for p in taken])
    logits = torch.tensor(grid)[errors.argmin(0)]
    return replace(no_sink(scene, prefix), logits=logits, value=value)


def by_kv_head(scene: Scene, values: Tensor) -> Tensor:
    """Sums of (rows, heads, length, n) over all but heads that do not share keys: (kv_heads, n)."""
    return values.unflatten(1, (-1, scene.groups)).sum((0, 2, 3))


def best_value(scene: Scene, prefix: KeySink) -> LogitSink:
    """The same with the value that gives the least squared error for these logits."""
    sink = best_constant(scene, prefix)
    target = scene.with_prefix(prefix.keys, prefix.values)
    share, weights = scene.weights(sink.logits, scene.text_scores())
    missing = share * (target - scene.mix(weights, scene.value))
    value = by_kv_head(scene, missing) / by_kv_head(scene, share.square()).clamp_min(1e-30)
    return replace(sink, value=value)
