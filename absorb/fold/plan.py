"""Findings → Plan: what will be changed, decided before anything is."""

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.fold.neurons import removable, without
from absorb.fold.sinks.choose import fit_sinks
from absorb.fold.sinks.forms import KeySink, LayerSink, LogitSink
from absorb.fold.sinks.prefix_cache import Prefix, prefix_of
from absorb.models.family import Family
from absorb.schema.findings import Findings, Removal
from absorb.schema.settings import Sink


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
