"""Measurement → plan, and the record of both."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from absorb.fold.decide import Decision, decide
from absorb.fold.plan import Plan
from absorb.fold.residual import residual_scales
from absorb.load.source import Source
from absorb.measure.findings import find
from absorb.measure.outliers import Measurement
from absorb.models.positions.rope import rope_changes_at
from absorb.schema.findings import Trial
from absorb.schema.report import Inspection, LayerFigures, versions
from absorb.schema.settings import Job
from absorb.text.gather import Texts


def layer_figures(measurement: Measurement, plan: Plan) -> tuple[LayerFigures, ...]:
    """One line for every layer."""
    columns = zip(
        measurement.median.tolist(),
        measurement.token_peak.flatten(1).amax(1).tolist(),
        measurement.first_weight.mean(1).tolist(),
        plan.fit_error.tolist(),
        [sink is not None for sink in plan.sinks],
        strict=True,
    )
    return tuple(
        LayerFigures(
            median=median, peak=peak, first_weight=weight, fit_error=error, attends=attends
        )
        for median, peak, weight, error, attends in columns
    )


def survey(
    job: Job, source: Source, measurement: Measurement, texts: Texts, trials: list[Trial]
) -> tuple[Decision, Inspection]:
    """What a measurement shows, and the plan by it: for the last prefix that was tried."""
    findings = find(measurement, job.thresholds)
    decision = decide(
        source.decoder,
        findings,
        residual_scales(measurement, findings, job.residual_target),
        trials[-1].prefix,
        texts.calibration,
        texts.validation,
        job.thresholds.divergence,
        job.sink,
    )
    plan = decision.plan
    decode: Callable[[list[int]], Any] = source.tokenizer.decode
    inspection = Inspection(
        model=source.name,
        commit=source.commit,
        license=source.license,
        fingerprint=source.fingerprint,
        family=source.family.model_type,
        whole=source.whole.model_type if source.whole else None,
        dtype=str(source.dtype).removeprefix("torch."),
        layers=layer_figures(measurement, plan),
        text_origin=texts.origin,
        text_sha256=texts.fingerprint,
        prefix=plan.prefix,
        prefix_text=decode(list(plan.prefix)),
        prefix_trials=tuple(trials),
        token_text={token: decode([token]) for token in sorted(findings.tokens())},
        findings=findings,
        removals=plan.removals,
        keyed_layers=plan.keyed_layers,
        residual_scales={i: s for i, s in enumerate(plan.residual.tolist()) if s != 1},
        divergence=decision.divergence,
        rope_changes_at=rope_changes_at(source.model.config),
        logit_divergence=decision.logit_divergence,
        proof=source.proof,
        versions=versions(),
        job=recorded(job, source),
    )
    return decision, inspection


def inspection_from_plan(
    job: Job, source: Source, texts: Texts, made: Inspection, decision: Decision
) -> Inspection:
    """What was found when a plan was drawn up, in a report on this conversion by it."""
    assert job.plan is not None
    names = ("sink", "residual_target", "thresholds", "gates")
    decided = {name: getattr(made.job, name) for name in names}
    return replace(
        made,
        model=source.name,
        commit=source.commit,
        license=source.license,
        whole=source.whole.model_type if source.whole else None,
        dtype=str(source.dtype).removeprefix("torch."),
        text_origin=texts.origin,
        text_sha256=texts.fingerprint,
        divergence=decision.divergence,
        logit_divergence=decision.logit_divergence,
        proof=source.proof,
        versions=versions(),
        job=replace(recorded(job, source), **decided, plan=Path(job.plan.resolve().name)),
    )


def recorded(job: Job, source: Source) -> Job:
    """The job under the public name of its model: where a folder lay is nobody's business."""
    name = job.model.name if job.model.name == "demo" else source.name
    return replace(job, model=replace(job.model, name=name))
