"""Plans as a conversion draws them up, for tests that judge no student."""

from dataclasses import replace

import torch
from torch import Tensor

from absorb.fold.decide import sinks_for
from absorb.fold.neurons import removable
from absorb.fold.plan import Plan
from absorb.fold.sinks.forms import LogitSink
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.models.decoder import Decoder
from absorb.models.family import Family
from absorb.models.modeling_absorb import NEUTRAL
from absorb.schema.findings import Findings
from absorb.schema.settings import Sink
from tests.helpers.tiny import HEAD_DIM, HEADS, HIDDEN, LAYERS, attending, kv_heads


@torch.no_grad()
def plan_of(
    decoder: Decoder,
    findings: Findings,
    residual: Tensor,
    prefix: tuple[int, ...],
    tokens: Tensor,
    budget: float,
    form: Sink = "logit",
    most: float = 0.05,
) -> Plan:
    """All of a plan but its smoothing, from text (rows, length)."""
    known = prefix_of(decoder, torch.tensor(prefix))
    removals = removable(decoder, known, findings, tokens, budget)
    sinks = sinks_for(decoder, known, removals, tokens, form, most)
    return Plan(prefix=prefix, sinks=sinks, removals=removals, residual=residual, smoothing={})


def neutral_plan(family: Family, **changes: object) -> Plan:
    """A plan that changes nothing in a tiny model, but for what is asked for."""
    nothing = torch.zeros(kv_heads(family.model_type), HEAD_DIM, dtype=torch.float64)
    sink = LogitSink(
        logits=torch.full((HEADS,), NEUTRAL["sink"]),
        value=nothing,
        key_bias=nothing,
        error=torch.zeros(()),
    )
    sinks = tuple(sink if layer in attending(family) else None for layer in range(LAYERS))
    plan = Plan(prefix=(), sinks=sinks, removals=(), residual=torch.ones(HIDDEN), smoothing={})
    return replace(plan, **changes)
