"""How far everything that a model computes reaches, on text: what must fit a narrower type."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from absorb.models.decoder import Decoder
from absorb.runtime.experts import hooking_experts
from absorb.runtime.hooks import replacing_attention, watching
from absorb.runtime.reading import Subject
from absorb.runtime.walk import logits
from absorb.text.samples import attend_plainly

STREAM, SQUARES, NORMS = "residual stream", "sums of squares in norms", "outputs of norms"
QUERIES, SCORES, ATTENDED = "queries, keys, values", "attention scores", "attended values"
GATES, NEURONS, WRITTEN = "gate and up projections", "neurons", "outputs of blocks"
LOGITS = "logits"
KINDS = (
    STREAM, SQUARES, NORMS, QUERIES, SCORES, ATTENDED, GATES, NEURONS, WRITTEN, LOGITS,
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Ranges:
    """The largest magnitudes that were seen, and where.

    read and given hold those of every channel of what Linears read and give, by name: (channels,),
    of experts (experts, channels); given has the final norm as well. peaks holds the largest of
    every kind, with its place.
    """

    read: dict[str, Tensor] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)
    peaks: dict[str, tuple[float, str]] = field(default_factory=dict)

    def see(self, kind: str, place: str, channels: Tensor) -> None:
        """Take the magnitudes of some channels, or of other parts, into account."""
        largest = float(channels.max()) if channels.numel() else 0.0
        # Whatever is no number is the largest: it compares with nothing.
        if not largest <= self.peaks.get(kind, (-1.0, ""))[0]:
            self.peaks[kind] = largest, place

    def see_read(self, kind: str, name: str, value: Tensor) -> None:
        self.see(kind, name, _widened(self.read, name, value))

    def see_given(self, kind: str, name: str, value: Tensor) -> None:
        self.see(kind, name, _widened(self.given, name, value))


def _widened(seen: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    """The magnitudes of the channels of a value (..., channels), with those seen before."""
    channels = value.abs().flatten(0, -2).amax(0).float()
    seen[name] = channels.maximum(seen[name]) if name in seen else channels
    return seen[name]


@torch.no_grad()
def ranges(decoder: Decoder, rows: Tensor, at_once: int = 1) -> Ranges:
    """What a stock model reaches on text (rows, length), which has what leads it."""
    found = Ranges()
    with _watching_all(decoder, found):
        for own in logits(Subject(decoder=decoder), rows, at_once, "measuring ranges"):
            found.see(LOGITS, "the head", own.abs())
    return found


@contextmanager
def _watching_all(decoder: Decoder, found: Ranges) -> Iterator[None]:
    family, known = decoder.family, dict(decoder.model.named_modules())
    norms = {name: m for name, m in known.items() if "Norm" in type(m).__name__}
    reads = [name for read in family.reads for name in decoder.names(read)]
    last = {family.final_norm: known[family.final_norm]}
    stream = [*(name for name in reads if name in known), family.final_norm]

    def inputs(named: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> Any:
        names = list(named)
        return watching(named.values(), lambda i, value: see(names[i], value), inputs=True)

    def outputs(named: dict[str, nn.Module], see: Callable[[str, Tensor], None]) -> Any:
        names = list(named)
        return watching(named.values(), lambda i, value: see(names[i], value))

    def see_squares(name: str, value: Tensor) -> None:
        found.see(SQUARES, name, value.float().square().sum(-1))

    def see_score(layer: str, scores: Tensor) -> None:
        found.see(SCORES, layer, scores)

    parts = (
        inputs({n: known[n] for n in stream}, lambda n, v: found.see(STREAM, n, v.abs())),
        inputs(norms, see_squares),
        outputs(norms, lambda n, v: found.see(NORMS, n, v.abs())),
        outputs(last, lambda n, v: found.see_given(NORMS, n, v)),
        inputs(decoder.linears, lambda n, v: found.see_read(_read_kind(decoder, n), n, v)),
        outputs(decoder.linears, lambda n, v: found.see_given(_given_kind(decoder, n), n, v)),
        _watching_experts(decoder, found),
        _watching_scores(decoder, see_score),
    )
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part)
        yield


def _inside(decoder: Decoder, name: str) -> str:
    """The name of a module relative to its layer."""
    return name.removeprefix(f"{decoder.family.layers}.").partition(".")[2]


def _read_kind(decoder: Decoder, name: str) -> str:
    family, inside = decoder.family, _inside(decoder, name)
    if inside in family.reads:
        return STREAM
    if inside == family.output:
        return ATTENDED
    return NEURONS if inside in _downs(decoder) else NORMS


def _given_kind(decoder: Decoder, name: str) -> str:
    family, inside = decoder.family, _inside(decoder, name)
    if inside == family.output or inside in _downs(decoder):
        return WRITTEN
    return QUERIES if inside.startswith(f"{family.attention}.") else GATES


def _downs(decoder: Decoder) -> set[str]:
    family = decoder.family
    return {family.down, *(family.shared[1:] if family.shared else ())}


@contextmanager
def _watching_experts(decoder: Decoder, found: Ranges) -> Iterator[None]:
    """What the matrices of experts give, for the tokens that are sent to each."""

    def before(up: str, down: str) -> Callable[..., None]:
        def look(experts: Any, args: tuple[Tensor, ...]) -> None:
            stream, chosen, _ = args
            gates, neurons, written = _of_experts(experts, stream.detach(), chosen)
            found.see_read(NORMS, up, stream)
            found.see_given(GATES, up, gates)
            found.see_read(NEURONS, down, neurons)
            found.see(WRITTEN, down, written)

        return look

    with hooking_experts(decoder, before):
        yield


def _of_experts(experts: Any, stream: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest magnitudes of `gate_up`, of neurons and of outputs: (1, experts, channels)."""
    found: tuple[list[Tensor], ...] = ([], [], [])
    for expert, (up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        sent = stream[(chosen == expert).any(-1)]
        both = sent @ up.mT
        gate, value = both.chunk(2, -1)
        neurons = experts.act_fn(gate) * value
        for kept, part in zip(found, (both, neurons, neurons @ down.mT), strict=True):
            zero = part.new_zeros(1, part.shape[-1])  # for an expert that nothing is sent to
            kept.append(torch.cat([zero, part]).abs().amax(0))
    gates, neurons, written = (torch.stack(kept)[None] for kept in found)
    return gates, neurons, written


def _watching_scores(decoder: Decoder, see: Callable[[str, Tensor], None]) -> Any:
    """Call see(place, scores) with the magnitudes that every layer's softmax is taken of.

    Those that a mask hides as well: they are computed first, and infinity cannot be hidden.
    """
    names = {id(m): n for m, n in zip(*_attentions(decoder), strict=True)}

    def attend(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        see(names[id(module)], (query @ keys.mT * scaling).abs())
        return attend_plainly(module, query, key, *args, **options)

    return replacing_attention(decoder.model, attend)


def _attentions(decoder: Decoder) -> tuple[list[Any], list[str]]:
    attention = decoder.family.attention
    return decoder.each(attention), decoder.names(attention)
