"""Plans as a conversion draws them up, for tests that judge no student."""

import torch
from torch import Tensor

from absorb.fold.decide import sinks_for
from absorb.fold.neurons import removable
from absorb.fold.plan import Plan
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.models.decoder import Decoder
from absorb.schema.findings import Findings
from absorb.schema.settings import Sink


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
