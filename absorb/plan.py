"""Findings → Plan: what will be changed, decided before anything is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, log2

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.families import Family
from absorb.findings import Findings, SpikeNeuron, neurons_behind_outliers
from absorb.forms import KeySink, LayerSink, LogitSink
from absorb.logits import mean_kl
from absorb.measure import Measurement, measure
from absorb.settings import Sink
from absorb.sinks import Prefix, fit_sinks, prefix_of, prefixed
from absorb.watch import layers_of, led
from absorb.weights import column, weight_at

# Sink tokens are among the first of a text, and on them spike neurons write.
_ROWS, _BEGINNING = 4, 128
# Half of the largest number in float16: other text may reach further than that of the calibration.
_FLOAT16 = 2.0**15


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """A spike neuron, and the KL in nats per token once it, and those gone with it, are gone."""

    spike: SpikeNeuron
    divergence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that the graft changes.

    sinks holds one for each layer. residual holds λ, one power of two for each channel of the
    stream: (hidden,). smoothing holds, for the name of all that is divided, the divisors: (layers,
    channels), with experts (layers, experts, channels).
    """

    prefix: tuple[int, ...]
    sinks: tuple[LayerSink, ...]
    removals: tuple[Removal, ...]
    residual: Tensor
    smoothing: dict[str, Tensor]

    @property
    def fit_error(self) -> Tensor:
        """The share of the prefix's effect that each layer's sinks leave out: (layers,)."""
        return torch.stack([sink.error for sink in self.sinks])

    @property
    def as_logits(self) -> "Plan":
        """The same with the fitted logits in place of keys, for engines that know no others."""
        sinks = (s.fit if isinstance(s, KeySink) and s.fit else s for s in self.sinks)
        return replace(self, sinks=tuple(sinks))

    @property
    def keyed_layers(self) -> tuple[int, ...]:
        """The layers whose sinks are the keys and values of the prefix itself."""
        return tuple(i for i, sink in enumerate(self.sinks) if isinstance(sink, KeySink))


@torch.no_grad()
def make_plan(
    model: PreTrainedModel,
    family: Family,
    findings: Findings,
    residual: Tensor,
    prefix_tokens: tuple[int, ...],
    tokens: Tensor,
    budget: float,
    form: Sink = "logit",
    most: float = 0.05,
) -> Plan:
    """All of a plan but its smoothing, which needs the grafted model, from text (rows, length).

    In the form `auto` a layer whose logits leave out more than the share `most` of the prefix's
    effect keeps the keys.
    """
    prefix = prefix_of(model, torch.tensor(prefix_tokens))
    removals = removable(model, family, prefix, findings, tokens, budget)
    return Plan(
        prefix=prefix_tokens,
        sinks=sinks_for(model, family, prefix, removals, tokens, form, most),
        removals=removals,
        residual=residual,
        smoothing={},
    )


def sinks_for(
    model: PreTrainedModel,
    family: Family,
    prefix: Prefix,
    removals: tuple[Removal, ...],
    tokens: Tensor,
    form: Sink,
    most: float = inf,
) -> tuple[LayerSink, ...]:
    """Each layer's sink in the form that is asked for, from text (rows, length).

    Logits are fitted with the spike neurons already gone, as the student will be.
    """
    # The student's text starts at 0, behind the keys. With learned positions, none of which is
    # negative, the text moves instead.
    start = 0 if family.positions else -len(prefix.tokens)
    kept = prefix_of(model, prefix.tokens, start).layers
    if form == "key":
        return kept
    with without(model, family, tuple(removal.spike for removal in removals)):
        fits = fit_sinks(model, family, prefix, tokens, most if form == "auto" else inf)
    return tuple(
        fit if isinstance(fit, LogitSink) else replace(keys, error=fit.error, fit=fit.fit)
        for keys, fit in zip(kept, fits, strict=True)
    )


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


def residual_scales(measurement: Measurement, findings: Findings, target: float) -> Tensor:
    """λ, powers of two not below one: (hidden,).

    Each brings an outlier channel near `target` times the median channel, and the largest magnitude
    of any channel, seen on calibration text, below _FLOAT16.
    """
    scales = 2.0 ** (measurement.channel_peak / _FLOAT16).log2().ceil()
    for found in findings.outlier_channels:
        level = 2.0 ** round(log2(found.ratio / target))
        scales[found.channel] = scales[found.channel].clamp_min(level)
    return scales.clamp_min(1)
