"""End-to-end distillation of a model whose weights stream: few parameters, and one frozen copy.

The teacher reads all text once, layer after layer, and what leaves its last layer waits until its
head is asked. The student's layers are held in the type of products, and each is computed anew for
its gradients. Logits are those of few tokens at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from absorb.models.decoder import Decoder, is_linear
from absorb.quantize.formats import Format
from absorb.quantize.simulate import quantized
from absorb.runtime import ranks
from absorb.runtime.losses import mean_kl
from absorb.runtime.precision import autocast_bf16, free_memory, product_type, with_fewer_rows
from absorb.runtime.reading import led
from absorb.runtime.walk import Call, Seen, Walk, behind_layers, layers_as
from absorb.schema.training import LENGTH, Losses, Recipe
from absorb.text.gather import Texts
from absorb.tune.distill import Keeper, train
from absorb.tune.optimizer import choose

_SHARE = 0.25  # of the free memory, for what is computed with its gradients
_ROWS = 8  # that the teacher reads at once
_TOKENS = 512  # whose logits are there at once
_LOGITS = 5  # copies of them, with what the loss and its gradient make of them

again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def distill_held(
    teacher: Decoder,
    student: Decoder,
    prefix: Tensor,
    texts: Texts,
    fine_tune: Recipe,
    form: Format | None,
    seed: int,
    keeper: Keeper | None,
) -> Losses:
    """Train few parameters of a student whose weights stream, all layers at once, as `train` says.

    With a format the student computes as if quantized. Its layers come with what they have learned
    from then on.
    """
    streaming = student.streaming
    assert streaming is not None
    ranges = {} if form is None or form.ranges is None else form.ranges(student, texts.scaling)
    rows = torch.cat([texts.training, texts.validation])
    targets = Targets(teacher, prefix, rows)
    few = choose(student.model, fine_tune)
    narrow = matrices(student)

    def form_of(parameter: nn.Parameter) -> Tensor:
        kept = parameter not in narrow or any(parameter is one for one in few)
        return parameter.data if kept else parameter.data.to(product_type(student.device))

    with (
        quantized(student, form, ranges) if form else nullcontext(),
        streaming.held(form_of),
        targets.at_hand(),
    ):
        own = _Student(student)
        room = ranks.for_each(free_memory(student.device), student.device)
        at_once = rows_in(room, fine_tune, row_bytes(student, LENGTH))
        loss = partial(loss_of, own, targets, rows)
        losses = train(student.model, loss, numbered(texts), fine_tune, seed, keeper, at_once)
        if losses.kept:
            streaming.learned |= {parameter: parameter.detach().clone() for parameter in few}
    return losses


def numbered(texts: Texts) -> Texts:
    """Texts whose rows are their own numbers, (rows, 1): first those to train on."""
    numbers = torch.arange(len(texts.training) + len(texts.validation))[:, None]
    training, validation = numbers.split([len(texts.training), len(texts.validation)])
    return replace(texts, training=training, validation=validation)


def matrices(decoder: Decoder) -> set[nn.Parameter]:
    """The weights that are in products, and the rows of tokens."""
    embedding = decoder.model.get_input_embeddings()
    modules: list[Any] = [m for m in decoder.model.modules() if is_linear(m) or m is embedding]
    found: set[nn.Parameter] = {module.weight for module in modules}
    layers = range(len(decoder.layers))
    return found | {weight for layer in layers for weight in decoder.expert_weights(layer)}


def held_bytes(decoder: Decoder, length: int, rows: int) -> int:
    """What `distill_held` takes for a model and text (rows, length), a row of it at a time."""
    narrow, size = matrices(decoder), product_type(decoder.device).itemsize
    held = sum(w.numel() * (size if w in narrow else 16) for w in decoder.model.parameters())
    waiting = waiting_bytes(decoder, length, rows)
    return int(held + waiting + row_bytes(decoder, length) / _SHARE)


def waiting_bytes(decoder: Decoder, length: int, rows: int) -> int:
    """What waits of the teacher for text (rows, length), its head, and logits of few tokens."""
    config = decoder.config
    end = 4 * config.vocab_size * (config.hidden_size + _LOGITS * _TOKENS)
    return int(end + rows * length * config.hidden_size * product_type(decoder.device).itemsize)


def row_bytes(decoder: Decoder, length: int) -> int:
    """The stream before every layer, and what one layer computes with its gradients."""
    config = decoder.config
    inner = getattr(config, "intermediate_size", config.hidden_size)
    streams = (len(decoder.layers) + 12) * config.hidden_size
    return int(4 * length * (streams + 6 * inner))


def bytes_with_logits(decoder: Decoder) -> int:
    """The same with all logits of the row, and their gradients."""
    return row_bytes(decoder, LENGTH) + 8 * int(decoder.config.vocab_size) * LENGTH


def rows_in(room: float, fine_tune: Recipe, row: int) -> int:
    """Rows, of so many bytes each, in a share of the room: a divisor of those of a step."""
    step = max(1, fine_tune.rows // ranks.count())
    most = max(1, min(int(_SHARE * room // row), step))
    return ranks.least(max(rows for rows in range(1, most + 1) if step % rows == 0))


class Targets:
    """The teacher's logits of rows of text (rows, length), without those of its lead."""

    def __init__(self, teacher: Decoder, lead: Tensor, rows: Tensor):
        def ended(few: int) -> Walk:
            walk = Walk(teacher, [led(part, lead) for part in rows.split(few)], dtype)
            with autocast_bf16(teacher.device):
                walk.through("the teacher reads")
            return walk

        dtype = torch.bfloat16 if teacher.device.type == "cuda" else torch.float32
        self.walk, self.lead = with_fewer_rows(ended, _ROWS), len(lead)
        self.few = len(self.walk.streams[0])
        self.walk.calls.clear()

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Within it there are logits."""
        with self.walk.ended():
            yield

    def streams(self, numbers: list[int]) -> Tensor:
        """What leaves the last layer of rows of the text: (rows, length, hidden)."""
        places = (divmod(number, self.few) for number in numbers)
        found = [self.walk.streams[part][row, self.lead :] for part, row in places]
        return torch.stack(found).to(self.walk.decoder.device)

    @torch.no_grad()
    def logits(self, streams: Tensor) -> Tensor:
        """Logits (rows, few, vocabulary) of some of it."""
        return self.walk.behind(streams.float())


class Predicts(Protocol):
    """A model in two parts: what it makes of text, and logits of that."""

    device: torch.device

    def stream(self, tokens: Tensor) -> Tensor: ...
    def logits(self, stream: Tensor) -> Tensor: ...


class _Student:
    """The student up to the end of its layers, and from there on."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.device = decoder, decoder.device
        self.others: int | None = None

    def stream(self, tokens: Tensor) -> Tensor:
        """What leaves the last layer of text (rows, length): (rows, length, hidden)."""
        found: list[Tensor] = []
        layers: list[Any] = self.decoder.layers

        def act(layer: int, stream: Tensor, call: Call) -> Any:
            args, options = call
            out = again(layers[layer], stream, *args, **options)
            if layer < len(layers) - 1:
                return out
            self.others = None if torch.is_tensor(out) else len(out) - 1
            found.append(out if torch.is_tensor(out) else out[0])
            raise Seen

        with _wide_entrance(self.decoder), layers_as(self.decoder, act), suppress(Seen):
            self.decoder.model(tokens.to(self.decoder.device), use_cache=False)
        return found[0]

    def logits(self, stream: Tensor) -> Tensor:
        """Logits (rows, few, vocabulary) of some of it."""
        return behind_layers(self.decoder, stream, self.others)


@contextmanager
def _wide_entrance(decoder: Decoder) -> Iterator[None]:
    """The stream is float32 from its beginning on, and so are positions, which have its type."""
    embedding: nn.Module = decoder.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, __, rows: rows.float())
    try:
        yield
    finally:
        handle.remove()


def loss_of(student: Predicts, targets: Targets, rows: Tensor, numbers: Tensor) -> Tensor:
    """Mean KL(teacher | student) in nats on rows of text, by their numbers (few, 1)."""
    chosen = numbers[:, 0].tolist()

    def part(own: Tensor, theirs: Tensor) -> Tensor:
        return mean_kl(targets.logits(theirs), student.logits(own)) * own.shape[1]

    with autocast_bf16(student.device):
        streams = student.stream(rows[chosen]), targets.streams(chosen)
        few = max(1, _TOKENS // len(chosen))
        pairs = zip(*(stream.split(few, 1) for stream in streams), strict=True)
        sums = [again(part, *pair) for pair in pairs]
    return torch.stack(sums).sum() / rows.shape[1]
