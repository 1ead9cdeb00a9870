"""The plan that holds: one whose student was grafted and seen to do what it should.

A plan is drawn up from what the original does. Only a student shows whether sinks fit well enough
together, and whether outlier tokens are left.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.fold.graft import graft
from absorb.fold.neurons import removable_after
from absorb.fold.plan import Plan, make_plan
from absorb.measure.divergence import divergence
from absorb.models.family import Family
from absorb.schema.findings import Findings
from absorb.schema.settings import Sink

# The share of the prefix's effect beyond which the form `auto` keeps a layer's keys. Further on the
# list where the student is too far from the teacher: what a share costs depends on the model.
_MOST_LEFT_OUT = (0.05, 0.01, 0.002)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A plan, the untrained student by it, and the KL of that from the teacher in nats per token.

    logit_divergence is the KL with logits in all layers, where keys are kept and logits were
    fitted.
    """

    plan: Plan
    student: PreTrainedModel
    divergence: float
    logit_divergence: float | None = None


def decide(
    model: PreTrainedModel,
    family: Family,
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
    for most in _MOST_LEFT_OUT:
        plan = make_plan(model, family, findings, residual, prefix, tokens, budget, form, most)
        plan, student = without_outlier_tokens(model, family, plan, tokens, budget)
        decision = judged(model, family, plan, student, validation)
        if form != "auto" or decision.divergence <= budget:
            break
    return decision


def without_outlier_tokens(
    model: PreTrainedModel, family: Family, plan: Plan, tokens: Tensor, budget: float
) -> tuple[Plan, PreTrainedModel]:
    """The plan and its student without the neurons that make outlier tokens of the student."""
    student, prefix = graft(model, family, plan), torch.tensor(plan.prefix)
    more = removable_after(model, student, family, prefix, tokens, budget)
    if not more:
        return plan, student
    plan = replace(plan, removals=(*plan.removals, *more))
    return plan, graft(model, family, plan)


def judged(
    model: PreTrainedModel,
    family: Family,
    plan: Plan,
    student: PreTrainedModel,
    validation: Tensor,
) -> Decision:
    """How far the student of a plan is from the teacher on text `validation` (rows, length)."""

    def gap(student: PreTrainedModel) -> float:
        return divergence(model, student, torch.tensor(plan.prefix), validation)

    logits = plan.as_logits
    mixed = plan.keyed_layers != logits.keyed_layers
    return Decision(
        plan=plan,
        student=student,
        divergence=gap(student),
        logit_divergence=gap(graft(model, family, logits)) if mixed else None,
    )
