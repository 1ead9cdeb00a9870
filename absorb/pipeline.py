"""The story of a conversion, from a model's name to a folder."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from absorb.checkpoint import staged
from absorb.device import device_of, sketch_of
from absorb.distill import distill, divergence, recipe
from absorb.evaluate import Subject, evaluate
from absorb.findings import find
from absorb.graft import graft, smooth
from absorb.measure import measure
from absorb.plan import Plan, make_plan, smoothing_scales
from absorb.prefix import find_prefix, lead_of
from absorb.report import Inspection, Report, layer_figures, versions
from absorb.settings import Job
from absorb.source import Source, load
from absorb.text import Texts, gather
from absorb.write import as_stored, without_bos, write

Say = Callable[[str], None]
_NOTHING = torch.tensor([], dtype=torch.long)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A conversion before its fine-tune."""

    source: Source
    texts: Texts
    plan: Plan
    student: PreTrainedModel
    inspection: Inspection


def convert(job: Job, say: Say) -> Report:
    """Convert a model and write the checkpoint to job.out; `say` is told what is being done."""
    with staged(job.out, job.force) as folder:
        fine_tune = recipe(job.distillation, device_of(job.device))
        draft = prepare(job, say, fine_tune.training_rows)
        source, student = draft.source, draft.student
        smooth(
            student,
            source.family,
            smoothing_scales(student, source.family, draft.texts.calibration),
        )
        prefix = torch.tensor(draft.plan.prefix)
        say(f"fine-tune: {fine_tune}")
        losses = distill(
            source.model, student, prefix, draft.texts, fine_tune, job.distillation.seed
        )
        as_stored(student, source.dtype)
        nn.Module.to(source.model, source.dtype)  # lest rounding count against the student alone
        original, converted = evaluate(
            [
                Subject(model=source.model, lead=lead_of(source.tokenizer)),
                Subject(model=student, lead=_NOTHING),
            ],
            Subject(model=source.model, lead=prefix),
            source.family,
            draft.texts.held_out,
            draft.texts.calibration,
        )
        report = Report(
            inspection=draft.inspection,
            recipe=fine_tune,
            losses=losses,
            original=original,
            converted=converted,
        )
        say(f"writing {job.out}")
        write(folder, student, source.tokenizer, report)
    return report


def inspect(job: Job, say: Say) -> Inspection:
    """Everything that convert finds out before the fine-tune; writes nothing."""
    return prepare(job, say, training_rows=None).inspection


def prepare(job: Job, say: Say, training_rows: int | None) -> Draft:
    """Measure the model, plan its conversion and graft the plan onto a copy of it."""
    device = device_of(job.device)
    say(f"loading {job.model.name}")
    source = load(job.model)
    model, family = source.model, source.family
    without_bos(source.tokenizer)  # refused now rather than after an hour
    nn.Module.to(model, device)
    sketch = replace(source, model=sketch_of(model))
    texts = gather(sketch, job.calibration, training_rows)
    measurement = measure(model, family, texts.calibration, lead_of(source.tokenizer))
    findings = find(measurement, job.thresholds)
    trials = find_prefix(sketch, job.calibration.prefix, texts.calibration, job.thresholds)
    del sketch
    budget = job.thresholds.divergence
    plan = make_plan(
        model, family, findings, trials[-1].prefix, texts.calibration, budget, job.sink
    )
    student = graft(model, family, plan)
    gap = divergence(model, student, torch.tensor(plan.prefix), texts.validation)
    say(f"KL from the teacher after the graft, untrained: {gap:.4f} nats per token")
    decode: Callable[[list[int]], Any] = source.tokenizer.decode
    inspection = Inspection(
        model=source.name,
        commit=source.commit,
        license=source.license,
        family=family.model_type,
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
        residual_scales={i: s for i, s in enumerate(plan.residual.tolist()) if s != 1},
        divergence=gap,
        versions=versions(),
        arguments=asdict(job),
    )
    return Draft(source=source, texts=texts, plan=plan, student=student, inspection=inspection)
