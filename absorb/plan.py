"""Findings → Plan: what will be changed, decided before anything is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.families import Family
from absorb.findings import Findings, SpikeNeuron
from absorb.quantize import input_peaks
from absorb.sinks import Prefix, Sinks, fit_sinks, prefix_of, prefixed
from absorb.watch import each_layers, each_name, led

# Sink tokens are among the first of a text, and on them spike neurons write.
_ROWS, _BEGINNING = 4, 128
_ALPHA = 0.5  # SmoothQuant's exponent (arXiv 2211.10438): activations and weights share the range


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """A spike neuron, and the divergence in nats per token once it and those before it are gone."""

    spike: SpikeNeuron
    divergence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that the graft changes.

    residual holds λ, one power of two for each channel of the stream: (hidden,). smoothing holds,
    for the name of each module whose output is divided, the divisors: (layers, channels).
    """

    prefix: tuple[int, ...]
    sinks: Sinks
    removals: tuple[Removal, ...]
    residual: Tensor
    smoothing: dict[str, Tensor]


@torch.no_grad()
def make_plan(
    model: PreTrainedModel,
    family: Family,
    findings: Findings,
    prefix_tokens: tuple[int, ...],
    tokens: Tensor,
    budget: float,
) -> Plan:
    """All of a plan but its smoothing, which needs the grafted model, from text (rows, length).

    The sinks are fitted with the spike neurons already gone, as the student will be.
    """
    prefix = prefix_of(model, torch.tensor(prefix_tokens))
    removals = removable(model, family, prefix, findings, tokens, budget)
    with without(model, family, tuple(removal.spike for removal in removals)):
        sinks = fit_sinks(model, family, prefix, tokens)
    return Plan(
        prefix=prefix_tokens,
        sinks=sinks,
        removals=removals,
        residual=residual_scales(findings, model.config.hidden_size),
        smoothing={},
    )


@contextmanager
def without(
    model: PreTrainedModel, family: Family, neurons: tuple[SpikeNeuron, ...]
) -> Iterator[None]:
    """The model with the down_proj columns of `neurons` at zero, for a while."""
    down = each_layers(model, family, family.down)
    with torch.no_grad():
        before = [down[spike.layer].weight[:, spike.neuron].clone() for spike in neurons]
        for spike in neurons:
            down[spike.layer].weight[:, spike.neuron] = 0
        try:
            yield
        finally:
            for spike, column in zip(neurons, before, strict=True):
                down[spike.layer].weight[:, spike.neuron] = column


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
    text = tokens[:_ROWS, :_BEGINNING].to(model.device)
    teacher = model(led(text, prefix.tokens)).logits[:, len(prefix.tokens) :].log_softmax(-1)
    removals: tuple[Removal, ...] = ()
    for spike in tqdm(findings.spike_neurons, desc="removing spike neurons", unit="neuron"):
        candidates = (*(removal.spike for removal in removals), spike)
        with without(model, family, candidates), prefixed(model, family, prefix):
            positions = prefix.positions(text.shape[1])
            student = model(text, position_ids=positions, use_cache=False).logits.log_softmax(-1)
        divergence = float(kl(teacher, student).mean())
        if divergence <= budget:
            removals = (*removals, Removal(spike=spike, divergence=divergence))
    return removals


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher | student) in nats, from log-probabilities (..., vocabulary): (...)."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def residual_scales(findings: Findings, hidden: int) -> Tensor:
    """λ: for each outlier channel the power of two that brings it near the median channel."""
    scales = torch.ones(hidden)
    for found in findings.outlier_channels:
        scales[found.channel] = 2.0 ** round(log2(found.ratio))
    return scales


def smoothing_scales(student: PreTrainedModel, family: Family, tokens: Tensor) -> dict[str, Tensor]:
    """SmoothQuant scales (layers, channels) by the name of the module whose output they divide.

    Links are norm → Linears, value → output and up → down. Each scale is
    `max|x|^α / max|W|^(1-α)`, with the inputs x seen on calibration text (rows, length).
    """
    peaks = input_peaks(student, family, tokens)
    links = {**dict(family.feeds), family.value: (family.output,), family.up: (family.down,)}
    scales = {}
    for name, linears in links.items():
        peak = torch.stack([peaks[linear] for linear in each_name(student, family, linears[0])])
        weight = torch.stack([_reach(student, family, linear) for linear in linears]).amax(0)
        if name == family.value:
            peak, weight = (_shared(part, student) for part in (peak, weight))
        scale = peak.clamp_min(1e-5) ** _ALPHA / weight.clamp_min(1e-5) ** (1 - _ALPHA)
        scales[name] = scale.clamp(1e-3, 1e3).cpu()
    return scales


def _reach(student: PreTrainedModel, family: Family, name: str) -> Tensor:
    """The largest weight of every input channel of a Linear: (layers, channels)."""
    return torch.stack(
        [m.weight.detach().abs().amax(0) for m in each_layers(student, family, name)]
    )


def _shared(channels: Tensor, student: PreTrainedModel) -> Tensor:
    """The largest over the query heads (layers, heads * head_dim) that read one value channel."""
    heads, kv_heads = student.config.num_attention_heads, student.config.num_key_value_heads
    grouped = channels.view(len(channels), kv_heads, heads // kv_heads, -1)
    return grouped.amax(2).flatten(1)
