"""Spike neurons: which can go, and a model without them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from absorb.fold.plan import Plan
from absorb.fold.sinks.prefix_cache import Prefix, prefixed
from absorb.measure.findings import neurons_behind_outliers
from absorb.measure.outliers import measure
from absorb.models.decoder import Decoder
from absorb.runtime import ranks
from absorb.runtime.losses import mean_kl
from absorb.runtime.reading import Subject
from absorb.schema.findings import Findings, Removal, SpikeNeuron

# Sink tokens are among the first of a text, and on them spike neurons write.
_ROWS, _BEGINNING = 4, 128


@contextmanager
def without(decoder: Decoder, neurons: tuple[SpikeNeuron, ...]) -> Iterator[None]:
    """The model with what reads `neurons` at zero, for a while."""

    def columns(layer: int) -> list[Tensor]:
        return [_column(decoder, spike).detach() for spike in neurons if spike.layer == layer]

    def edit(layer: int) -> None:
        for column in columns(layer):
            column.zero_()

    with decoder.edited(edit, columns):
        yield


@torch.no_grad()
def removable(
    decoder: Decoder,
    prefix: Prefix,
    findings: Findings,
    tokens: Tensor,
    budget: float,
) -> tuple[Removal, ...]:
    """The spike neurons that can go, largest first, while the divergence stays within `budget`.

    Divergence is KL(teacher | without them) in nats per token on the beginnings of a few rows. Both
    have the prefix as constant keys and values, so that the neurons alone make the difference.
    """
    text = _beginnings(decoder, tokens)

    def logits() -> Tensor:
        with prefixed(decoder, prefix):
            positions = prefix.positions(text.shape[1])
            found: Tensor = decoder.model(text, position_ids=positions, use_cache=False).logits
        return found

    teacher = Subject(decoder=decoder, lead=prefix.tokens).logits(text)
    return _removed(decoder, findings.spike_neurons, teacher, logits, budget)


@torch.no_grad()
def removable_after(
    teacher: Decoder,
    student: Decoder,
    prefix: Tensor,
    tokens: Tensor,
    budget: float,
) -> tuple[Removal, ...]:
    """Neurons that make outlier tokens of a grafted student, and that it can do without, likewise.

    Where a logit cannot stand for the prefix in the first layers, the first token of a text looks
    as if nothing were before it, and smaller neurons make a sink of it again.
    """
    text = _beginnings(student, tokens)
    spikes = neurons_behind_outliers(measure(student, text, tokens.new_empty(0)))
    if not spikes:
        return ()

    def logits() -> Tensor:
        return Subject(decoder=student).logits(text)

    target = Subject(decoder=teacher, lead=prefix).logits(text)
    most = ranks.mean(float(mean_kl(target, logits()))) + budget
    return _removed(student, spikes, target, logits, most)


def _beginnings(decoder: Decoder, tokens: Tensor) -> Tensor:
    return tokens[:_ROWS, :_BEGINNING].to(decoder.device)


def _removed(
    decoder: Decoder,
    spikes: tuple[SpikeNeuron, ...],
    teacher: Tensor,
    logits: Callable[[], Tensor],
    budget: float,
) -> tuple[Removal, ...]:
    """Those of `spikes` without which `logits` stay within `budget` of the teacher's.

    All of them if they can go together: some cancel each other, and are missed one by one.
    """

    def divergence(removed: tuple[SpikeNeuron, ...]) -> float:
        with without(decoder, removed):
            return ranks.mean(float(mean_kl(teacher, logits())))

    removals: tuple[Removal, ...] = ()
    with tqdm(total=len(spikes), desc="removing spike neurons", unit="neuron") as bar:
        if spikes and (together := divergence(spikes)) <= budget:
            bar.update(len(spikes))
            return tuple(Removal(spike=spike, divergence=together) for spike in spikes)
        for spike in spikes:
            found = divergence((*(removal.spike for removal in removals), spike))
            bar.update()
            if found <= budget:
                removals = (*removals, Removal(spike=spike, divergence=found))
    return removals


def write(student: Decoder, plan: Plan, layer: int) -> None:
    """Zero what reads the spike neurons of a layer that can go."""
    for removal in plan.removals:
        if removal.spike.layer == layer:
            _column(student, removal.spike).zero_()


def _column(decoder: Decoder, spike: SpikeNeuron) -> Tensor:
    """What reads a spike neuron: (hidden,), a view."""
    return decoder.down(spike.layer).column(spike.neuron)
