"""What the zoo's models are made of: sinks, spikes and senses, as edits of tiny random models.

Channels of their stream that have a part to play are neither read nor written by random weights.
Others hold a code that tells tokens apart, and all the rest is as random as the weights.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import cos, sin, sqrt
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.models.families import family_of
from absorb.prove.edits import weight_of
from tests.helpers.tiny import tiny

HIDDEN, NEURONS, LAYERS, HEADS, WIDTH, VOCABULARY, POSITIONS = 64, 96, 4, 4, 16, 64, 192

# Channels of the stream. STEADY is large, and the same on every token.
MARK, MASSIVE, SECOND, STEADY, ALONE, CLASS = range(6)
CODE = range(6, 22)
SEEN = range(22, 38)  # the mean of the codes that layer 0 attends to
ROLES = [*range(6), *SEEN]
CONSTANT, TELLING = HIDDEN - 2, HIDDEN - 1  # what `outlie` makes of two ordinary channels
LEVEL = 8.0  # of STEADY, and of what is marked
OF_CLASS = 4.0  # at CLASS
SIZE = 4000.0  # of what `detect_first` writes
ALL = range(HEADS)


@dataclass(frozen=True)
class Parts:
    """Views of one layer's weights, outputs in rows and inputs in columns."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    neurons: tuple[Tensor, ...]  # what they read
    down: Tensor
    layer: Any

    @property
    def reads(self) -> tuple[Tensor, ...]:
        return (self.query, self.key, self.value, *self.neurons)

    def kv_heads(self, heads: range) -> range:
        """The key and value heads of query heads."""
        group = len(self.query) // len(self.key)
        return range(heads.start // group, -(-heads.stop // group))


def parts_of(model: PreTrainedModel) -> Iterator[Parts]:
    """The parts of each layer, first to last."""
    for layer in model.get_submodule(family_of(model.config.model_type).layers).children():
        if hasattr(layer, "attn"):  # GPT-2
            query, key, value = weight_of(layer, "attn.c_attn").split(HIDDEN)
            output, *names = weight_of(layer, "attn.c_proj"), "c_fc", "c_proj"
        else:
            heads = (weight_of(layer, f"self_attn.{name}_proj") for name in "qkvo")
            query, key, value, output = heads
            names = ["gate_proj", "up_proj", "down_proj"]
        *neurons, down = (weight_of(layer, f"mlp.{name}") for name in names)
        yield Parts(query, key, value, output, tuple(neurons), down, layer)


@torch.no_grad()
def body(model_type: str, **settings: Any) -> PreTrainedModel:
    """A model with all channels in their place, whose heads attend to text alone."""
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": NEURONS,
        "n_inner": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "head_dim": WIDTH,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "scale_attn_by_inverse_layer_idx": False,
    }
    model = tiny(model_type, torch.float32, **{**sizes, **settings})
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float(name.endswith("weight")))
    embed(model.get_input_embeddings().weight)
    for parts in parts_of(model):
        for reads in parts.reads:
            reads[:, ROLES] = 0
        parts.query.mul_(1.5)
        parts.key.mul_(1.5)
        parts.value.mul_(2)
        for writes in (parts.output, parts.down):
            writes.mul_(0.5)  # a random model whose layers write more is chaotic
            writes[ROLES] = 0
    model.get_output_embeddings().weight[:, ROLES] = 0
    return model


def embed(table: Tensor) -> None:
    """Tokens of one length, so that layer 0 sees all of them in one size."""
    table.mul_(sqrt(HIDDEN))
    table[:, CODE] = codes()
    table[:, ROLES] = 0
    rest = table[:, SEEN.stop :]
    rest.mul_(sqrt(rest.shape[1]) / rest.norm(dim=1, keepdim=True))
    table[:, STEADY] = LEVEL


def codes() -> Tensor:
    """64 codes of 16 signs, two of which agree in 10 places at most, and most in 8 or fewer.

    They are the rows of a Hadamard matrix, their opposites, and both times a bent function.
    """
    square = torch.ones(1, 1)
    while len(square) < len(CODE):
        square = torch.cat([torch.cat([square, square], 1), torch.cat([square, -square], 1)])
    both = torch.cat([square, -square])
    bits = torch.arange(len(CODE))[:, None] >> torch.arange(4) & 1
    bent = 1 - 2 * ((bits[:, 0] & bits[:, 1]) ^ (bits[:, 2] & bits[:, 3]))
    return torch.cat([both, both * bent])


def rows_of(heads: Iterable[int]) -> list[int]:
    return [row for head in heads for row in range(head * WIDTH, (head + 1) * WIDTH)]


def slow(heads: Iterable[int]) -> list[int]:
    """The row of each head that RoPE hardly turns."""
    return [head * WIDTH + WIDTH // 2 - 1 for head in heads]


@torch.no_grad()
def mark(model: PreTrainedModel, token: int) -> None:
    model.get_input_embeddings().weight[token, MARK] = LEVEL


@torch.no_grad()
def classify(model: PreTrainedModel, tokens: range, size: float = OF_CLASS) -> None:
    """Tokens that CLASS tells from others."""
    model.get_input_embeddings().weight[tokens, CLASS] = size


@torch.no_grad()
def spike(
    model: PreTrainedModel,
    layer: int,
    neuron: int,
    reads: dict[int, float],
    writes: dict[int, float],
) -> None:
    """A neuron with weights for a few channels. It fires where the sum is well above zero."""
    parts = list(parts_of(model))[layer]
    for rows in parts.neurons:
        rows[neuron] = 0
        rows[neuron, list(reads)] = torch.tensor(list(reads.values())).float()
    parts.down[:, neuron] = 0
    parts.down[list(writes), neuron] = torch.tensor(list(writes.values())).float()


@torch.no_grad()
def sink(
    model: PreTrainedModel,
    layers: range,
    heads: range = ALL,
    *,
    reads: int = MASSIVE,
    asks: int = STEADY,
    logit: float = 7.0,
    value: float = 0.02,
) -> None:
    """Heads that attend to tokens with `reads`, and do so for queries with `asks`.

    The logit is about `logit`, depends a little on the rest of a query too, and is that of a norm
    whose channel is all of the token. `value` says how large the token's value is.
    """
    draw = torch.Generator().manual_seed(4)
    pull = sqrt(logit * sqrt(WIDTH) / (sqrt(HIDDEN) * 5.5))  # a norm makes LEVEL about 5.5
    for parts in list(parts_of(model))[layers.start : layers.stop]:
        kv_heads = parts.kv_heads(heads)
        rows = rows_of(kv_heads)
        parts.key[rows, reads] = 0.1 * torch.randn(len(rows), generator=draw)
        parts.value[rows, reads] = value * torch.randn(len(rows), generator=draw)
        parts.query[slow(heads)] = 0
        parts.query[slow(heads), asks] = pull
        parts.key[slow(kv_heads)] = 0
        parts.key[slow(kv_heads), reads] = pull


@torch.no_grad()
def see_codes(model: PreTrainedModel, heads: range, of_class: bool) -> None:
    """Heads of layer 0 write the mean code of all tokens so far, or of those of a class, to SEEN.

    How far the mean is from zero goes to ALONE, by neurons that square.
    """
    parts = next(parts_of(model))
    kv_heads = parts.kv_heads(heads)
    asking, asked = rows_of(heads), rows_of(kv_heads)
    parts.query[asking], parts.key[asked], parts.value[asked] = 0, 0, 0
    if of_class:
        parts.query[slow(heads), STEADY] = 2
        parts.key[slow(kv_heads), CLASS] = 2
    parts.output[:, asking], parts.output[SEEN] = 0, 0
    for head in kv_heads:
        parts.value[rows_of([head]), CODE] = 1
    for head in heads:
        parts.output[SEEN, rows_of([head])] = 1 / len(heads)
    for place, channel in enumerate(SEEN):
        for side, sign in enumerate((4.0, -4.0)):
            spike(model, 0, NEURONS - 1 - 2 * place - side, {channel: sign}, {ALONE: 0.1})


@torch.no_grad()
def detect_first(
    model: PreTrainedModel,
    heads: range = ALL,
    *,
    of_class: bool = False,
    neurons: int = 1,
    fires_from: float = 0.75,
) -> None:
    """A massive activation on the first token of a text, or on the first one of a class.

    It has nothing but itself to attend to. The mean of two codes is half as far from zero, in
    squares, so layer 1 fires from a share in between. Tokens that repeat from the start are alone
    as well, as they are in real models. So many neurons write the activation.
    """
    see_codes(model, heads, of_class)
    marks = model.get_input_embeddings().weight[:, CLASS] > 0
    texts = (marks if of_class else torch.arange(VOCABULARY) > 2).nonzero()
    far = float(stream_of(model, texts, 0)[..., ALONE].mean())
    reads = {ALONE: 20.0, STEADY: -20.0 * fires_from * far / LEVEL}
    if of_class:
        reads |= {CLASS: 20.0 * LEVEL / OF_CLASS, STEADY: reads[STEADY] - 20.0}
    for neuron in range(neurons):
        spike(model, 1, neuron, reads, {MASSIVE: 1.0})
    gate_and_up, down = list(parts_of(model))[1].neurons, list(parts_of(model))[1].down
    gate_and_up[-1][:neurons] = 0
    gate_and_up[-1][:neurons, STEADY] = 1
    down[MASSIVE, :neurons] = SIZE / stream_of(model, texts, 1)[..., MASSIVE].mean()


@torch.no_grad()
def stream_of(model: PreTrainedModel, tokens: Tensor, layer: int) -> Tensor:
    """What a layer hands on: (rows, length, hidden)."""
    return model(tokens, output_hidden_states=True).hidden_states[layer + 1]


@torch.no_grad()
def look_back(
    model: PreTrainedModel, layers: range, distances: tuple[float, ...], size: float
) -> None:
    """q and k biases by which each head looks back so far: two of RoPE's frequencies agree there.

    The logits of the biases alone reach from -size² / 2 to size² / 2.
    """
    theta = model.config.rope_parameters["rope_theta"]
    for parts in list(parts_of(model))[layers.start : layers.stop]:
        attention = parts.layer.self_attn
        for pair in (0, 1):
            attention.k_proj.bias[pair::WIDTH] = size
            turn = theta ** (-2 * pair / WIDTH)
            for head, distance in enumerate(distances):
                row = head * WIDTH + pair
                attention.q_proj.bias[row] = size * cos(turn * distance)
                attention.q_proj.bias[row + WIDTH // 2] = -size * sin(turn * distance)


@torch.no_grad()
def stand_first(model: PreTrainedModel) -> None:
    """Learned positions that matter little, save that MARK tells the first one."""
    table = model.get_submodule(str(family_of(model.config.model_type).positions)).weight
    table.mul_(0.3)
    table[:, ROLES] = 0
    table[0, MARK] = LEVEL


@torch.no_grad()
def outlie(model: PreTrainedModel, size: float) -> None:
    """Two outlier channels: of one size on all tokens, and with the sign of a token's own."""
    table = model.get_input_embeddings().weight
    table[:, CONSTANT], table[:, TELLING] = size, size * table[:, TELLING].sign()
    for parts in parts_of(model):
        for reads in parts.reads:
            reads[:, [CONSTANT, TELLING]] /= size
    model.get_output_embeddings().weight[:, [CONSTANT, TELLING]] /= size


@torch.no_grad()
def stretch(model: PreTrainedModel, size: float) -> None:
    """Norms of queries and keys that favour the channel by which a sink is known."""
    for parts in parts_of(model):
        for norm in (parts.layer.self_attn.q_norm, parts.layer.self_attn.k_norm):
            norm.weight[slow(range(1))] = size
