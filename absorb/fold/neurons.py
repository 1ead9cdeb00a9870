"""Spike neurons: which can go, and a model without them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.fold.sinks.prefix_cache import Prefix, prefixed
from absorb.measure.findings import neurons_behind_outliers
from absorb.measure.outliers import measure
from absorb.models.decoder import column, layers_of, weight_at
from absorb.models.family import Family
from absorb.runtime.losses import mean_kl
from absorb.runtime.reading import led
from absorb.schema.findings import Findings, Removal, SpikeNeuron

# Sink tokens are among the first of a text, and on them spike neurons write.
_ROWS, _BEGINNING = 4, 128


@contextmanager
def without(
    model: PreTrainedModel, family: Family, neurons: tuple[SpikeNeuron, ...]
) -> Iterator[None]:
    """The model with what reads `neurons` at zero, for a while."""
    down = [weight_at(layer, family.down) for layer in layers_of(model, family)]
    columns = [column(down[spike.layer].detach(), spike.neuron) for spike in neurons]
    before = [part.clone() for part in columns]
    for part in columns:
        part.zero_()
    try:
        yield
    finally:
        for part, kept in zip(columns, before, strict=True):
            part.copy_(kept)


@torch.no_grad()
def removable(
    model: PreTrainedModel,
    family: Family,
    prefix: Prefix,
    findings: Findings,
    tokens: Tensor,
    budget: float,
) -> tuple[Removal, ...]:
    """The spike neurons that can go, largest first, while the divergence stays within `budget`.

    Divergence is KL(teacher | without them) in nats per token on the beginnings of a few rows. Both
    have the prefix as constant keys and values, so that the neurons alone make the difference.
    """
    text = _beginnings(model, tokens)

    def logits() -> Tensor:
        with prefixed(model, family, prefix):
            positions = prefix.positions(text.shape[1])
            found: Tensor = model(text, position_ids=positions, use_cache=False).logits
        return found

    teacher = _teacher_logits(model, prefix.tokens, text)
    return _removed(model, family, findings.spike_neurons, teacher, logits, budget)


@torch.no_grad()
def removable_after(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    family: Family,
    prefix: Tensor,
    tokens: Tensor,
    budget: float,
) -> tuple[Removal, ...]:
    """Neurons that make outlier tokens of a grafted student, and that it can do without, likewise.

    Where a logit cannot stand for the prefix in the first layers, the first token of a text looks
    as if nothing were before it, and smaller neurons make a sink of it again.
    """
    text = _beginnings(student, tokens)
    spikes = neurons_behind_outliers(measure(student, family, text, tokens.new_empty(0)))
    if not spikes:
        return ()

    def logits() -> Tensor:
        found: Tensor = student(text, use_cache=False).logits
        return found

    target = _teacher_logits(teacher, prefix, text)
    most = float(mean_kl(target, logits())) + budget
    return _removed(student, family, spikes, target, logits, most)


def _beginnings(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return tokens[:_ROWS, :_BEGINNING].to(model.device)


def _teacher_logits(model: PreTrainedModel, prefix: Tensor, text: Tensor) -> Tensor:
    logits: Tensor = model(led(text, prefix), use_cache=False).logits
    return logits[:, len(prefix) :]


def _removed(
    model: PreTrainedModel,
    family: Family,
    spikes: tuple[SpikeNeuron, ...],
    teacher: Tensor,
    logits: Callable[[], Tensor],
    budget: float,
) -> tuple[Removal, ...]:
    """Those of `spikes` without which `logits` stay within `budget` of the teacher's.

    All of them if they can go together: some cancel each other, and are missed one by one.
    """

    def divergence(removed: tuple[SpikeNeuron, ...]) -> float:
        with without(model, family, removed):
            return float(mean_kl(teacher, logits()))

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


def remove_neurons(student: PreTrainedModel, family: Family, removals: tuple[Removal, ...]) -> None:
    layers = layers_of(student, family)
    for removal in removals:
        weight = weight_at(layers[removal.spike.layer], family.down)
        column(weight, removal.spike.neuron).zero_()
