"""Findings → the plan that holds: one whose student was grafted and seen to do what it should.

A plan is drawn up from what the original does. Only a student shows whether sinks fit well enough
together, and whether outlier tokens are left.
"""

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from absorb.errors import AbsorbError
from absorb.fold.graft import graft
from absorb.fold.neurons import removable, removable_after, without
from absorb.fold.plan import Plan
from absorb.fold.sinks.choose import fit_sinks
from absorb.fold.sinks.forms import KeySink, LayerSink
from absorb.fold.sinks.prefix_cache import Prefix, prefix_of
from absorb.measure.divergence import divergence
from absorb.models.decoder import Decoder
from absorb.runtime import ranks
from absorb.schema.findings import Findings, Removal
from absorb.schema.settings import Sink

# The share of the prefix's effect beyond which the form `auto` keeps a layer's keys. Further on the
# list where the student is too far from the teacher: what a share costs depends on the model.
MOST_LEFT_OUT = (0.05, 0.01, 0.002)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A plan, the untrained student by it, and the KL of that from the teacher in nats per token.

    logit_divergence is the KL with logits in all layers, where keys are kept and logits were
    fitted.
    """

    plan: Plan
    student: Decoder
    divergence: float
    logit_divergence: float | None = None


@torch.no_grad()
def decide(
    decoder: Decoder,
    findings: Findings,
    residual: Tensor,
    prefix: tuple[int, ...],
    tokens: Tensor,
    validation: Tensor,
    budget: float,
    form: Sink,
) -> Decision:
    """All of a plan but its smoothing, from text `tokens`; students are judged on `validation`.

    Both are (rows, length). `budget` is the KL in nats per token that removing neurons may cost,
    and so may the layers that `auto` leaves to logits.
    """
    known = prefix_of(decoder, torch.tensor(prefix))
    removals = removable(decoder, known, findings, tokens, budget)
    for most in MOST_LEFT_OUT if form == "auto" else (inf,):
        plan = Plan(
            prefix=prefix,
            sinks=sinks_for(decoder, known, removals, tokens, form, most),
            removals=removals,
            residual=residual,
            smoothing={},
        )
        plan, student = without_outlier_tokens(decoder, plan, tokens, budget)
        decision = judged(decoder, plan, student, validation)
        if decision.divergence <= budget:
            break
    return decision


def sinks_for(
    decoder: Decoder,
    prefix: Prefix,
    removals: tuple[Removal, ...],
    tokens: Tensor,
    form: Sink,
    most: float,
) -> tuple[LayerSink | None, ...]:
    """Each layer's sink in the form that is asked for, from text (rows, length).

    Logits are fitted with the spike neurons already gone, as the student will be. In the form
    `auto` a layer whose logits leave out more than the share `most` of the prefix's effect keeps
    the keys.
    """
    if form == "logit" and decoder.family.gated:
        raise AbsorbError(
            f"what the heads of {decoder.family.model_type} give passes a gate, so that no value "
            "folds into a bias behind it; pass --sink key, or drop --sink logit"
        )
    # The student's text starts at 0, behind the keys. With learned positions, none of which is
    # negative, the text moves instead.
    start = 0 if decoder.family.positions else -len(prefix.tokens)
    kept = prefix_of(decoder, prefix.tokens, start).layers
    if form == "key" or decoder.family.gated:
        return kept
    with without(decoder, tuple(removal.spike for removal in removals)):
        fits = fit_sinks(decoder, prefix, tokens, most if form == "auto" else inf)
    return tuple(
        replace(keys, error=fit.error, fit=fit.fit) if keys and isinstance(fit, KeySink) else fit
        for keys, fit in zip(kept, fits, strict=True)
    )


def without_outlier_tokens(
    decoder: Decoder, plan: Plan, tokens: Tensor, budget: float
) -> tuple[Plan, Decoder]:
    """The plan and its student without the neurons that make outlier tokens of the student."""
    student, prefix = graft(decoder, plan), torch.tensor(plan.prefix)
    more = removable_after(decoder, student, prefix, tokens, budget)
    if not more:
        return plan, student
    plan = replace(plan, removals=(*plan.removals, *more))
    return plan, graft(decoder, plan)


def judged(decoder: Decoder, plan: Plan, student: Decoder, validation: Tensor) -> Decision:
    """How far the student of a plan is from the teacher on text `validation` (rows, length)."""

    def gap(student: Decoder) -> float:
        return divergence(decoder, student, torch.tensor(plan.prefix), validation)

    logits = plan.as_logits
    # Of several processes all compare, or none: they meet in it.
    mixed = bool(ranks.largest(torch.tensor(int(plan.keyed_layers != logits.keyed_layers))))
    return Decision(
        plan=plan,
        student=student,
        divergence=gap(student),
        logit_divergence=gap(graft(decoder, logits)) if mixed else None,
    )
