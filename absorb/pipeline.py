"""The story of a conversion, from a model's name to a folder."""

import logging
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from absorb.checkpoint import staged
from absorb.decide import Decision, decide, judged
from absorb.device import device_of, sketch_of
from absorb.distill import Losses, distill
from absorb.exhibit import Exhibit, exhibit_of
from absorb.files import promised
from absorb.findings import find
from absorb.graft import graft, smooth
from absorb.measure import Measurement, measure
from absorb.plan import Plan, residual_scales
from absorb.plan_file import PLAN, read_plan, write_plan
from absorb.prefix import Trial, encoded, find_prefix, lead_of
from absorb.progress import Progress, forget
from absorb.quantize import FORMATS
from absorb.recipe import Recipe, recipe
from absorb.rehearse import FORMAT_FOR, rehearsing
from absorb.report import Inspection, Probe, Report, layer_figures, to_json, versions
from absorb.score import Score, Subject, evaluate
from absorb.settings import Job, Purpose
from absorb.smoothing import searched_scales, smoothing_scales
from absorb.source import Source, load
from absorb.text import Texts, gather
from absorb.write import as_stored, without_bos, write

Say = Callable[[str], None]

_MOST_IS_LEFT_OUT = 0.5  # a share of the effect of the prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A conversion before its fine-tune."""

    source: Source
    texts: Texts
    plan: Plan
    student: PreTrainedModel
    inspection: Inspection
    measurement: Measurement | None  # of the original; none where a plan was read
    progress: Progress | None = None


def convert(job: Job, say: Say, resume: bool = False) -> Report:
    """Convert a model and write the checkpoint to job.out; `say` is told what is being done.

    With `resume` what is found is kept in OUT.progress meanwhile, and gone on from if it is there.
    """
    with staged(job.out, job.force) as folder:
        fine_tune = recipe(job.distillation, device_of(job.device))
        draft = prepare(job, say, fine_tune.training_rows, resume)
        if not draft.plan.smoothing:  # a plan that was read holds the scales, and they are grafted
            scales = smoothed(draft.student, draft, fine_tune.purpose)
            draft = replace(draft, plan=replace(draft.plan, smoothing=scales))
        if draft.progress is not None:
            draft.progress.keep_draft(draft.texts, draft.plan, draft.inspection)
            say(f"kept in {draft.progress.folder}; the same command goes on from here")
        write_plan(folder / PLAN, draft.plan, draft.inspection)
        say(f"fine-tune: {fine_tune}")
        losses = fine_tuned(draft, fine_tune, job.calibration.seed)
        if losses.training and not losses.kept:
            say("no step came closer to the teacher on validation text; the model stays untrained")
        original, converted = before_and_after(draft, fine_tune.purpose)
        report = Report(
            inspection=draft.inspection,
            recipe=fine_tune,
            losses=losses,
            original=original,
            converted=converted,
            files={},
            probe=Probe(tokens=(), logits=()),
        )
        say(f"writing {job.out}")
        written = write(folder, draft.student, draft.source.tokenizer, report)
    forget(job.out)
    return written


def fine_tuned(draft: Draft, fine_tune: Recipe, seed: int) -> Losses:
    """Train the student of a draft in place: as if quantised, where that is the purpose."""
    teacher, family, student = draft.source.model, draft.source.family, draft.student
    prefix, goal = torch.tensor(draft.plan.prefix), FORMAT_FOR.get(fine_tune.purpose)
    with rehearsing(student, family, FORMATS[goal], draft.texts.scaling) if goal else nullcontext():
        return distill(teacher, student, prefix, draft.texts, fine_tune, seed, draft.progress)


def before_and_after(draft: Draft, purpose: Purpose) -> tuple[Score, Score]:
    """The original and the student on held-out text, both as they are stored."""
    source, goal = draft.source, FORMAT_FOR.get(purpose)
    as_stored(draft.student, source.dtype)
    nn.Module.to(source.model, source.dtype)  # lest rounding count against the student alone
    original, converted = evaluate(
        [
            Subject(model=source.model, lead=lead_of(source.tokenizer)),
            Subject(model=draft.student),
        ],
        Subject(model=source.model, lead=torch.tensor(draft.plan.prefix)),
        source.family,
        draft.texts.held_out,
        draft.texts.calibration,
        draft.inspection.job.thresholds,  # a plan brings its own
        ("w8a8-static", goal) if goal else ("w8a8-static",),
    )
    return original, converted


def inspect(job: Job, say: Say) -> Inspection:
    """Everything that convert finds out before the fine-tune; writes nothing."""
    return prepare(job, say, training_rows=None).inspection


def exhibit(job: Job, say: Say) -> Exhibit:
    """The same, with how the model looks before and after what convert does before a fine-tune."""
    draft = prepare(job, say, training_rows=None)
    assert draft.measurement is not None  # no plan is read to inspect
    smoothed(draft.student, draft)
    tokens, nothing = draft.texts.calibration, torch.tensor([], dtype=torch.long)
    after = measure(draft.student, draft.source.family, tokens, nothing)
    return exhibit_of(draft.inspection, draft.source, draft.measurement, after)


def picture(job: Job, html: Path | None, png: Path | None, say: Say) -> Inspection:
    """Inspect a model and write a page of it, a folder of pictures, or both."""
    from absorb.page import drawn, inspection_page  # matplotlib, which nothing else needs
    from absorb.views import sections

    with ExitStack() as files:  # places that cannot be written to are refused now
        page = None if html is None else files.enter_context(promised(html))
        data = None if png is None else files.enter_context(promised(png / "figures.json"))
        shown = exhibit(job, say)
        pictures = drawn(sections(shown))
        if page is not None:
            page.write(inspection_page(shown.inspection, pictures).encode())
        if data is not None and png is not None:
            data.write(to_json(shown).encode())
            for section, picture in pictures:
                files.enter_context(promised(png / f"{section.name}.png")).write(picture)
    return shown.inspection


def smoothed(
    student: PreTrainedModel, draft: Draft, purpose: Purpose = "none"
) -> dict[str, Tensor]:
    """Smooth a student of the draft in place; the scales, as a plan holds them."""
    family, text, goal = draft.source.family, draft.texts.scaling, FORMAT_FOR.get(purpose)
    if goal and FORMATS[goal].rotates:
        scales = smoothing_scales(student, family, text, order=2)
    else:
        scales = searched_scales(student, family, text)
    smooth(student, family, scales)
    return scales


def fresh(draft: Draft, purpose: Purpose = "none") -> PreTrainedModel:
    """Another untrained student, smoothed, for those who make several of one draft."""
    student = graft(draft.source.model, draft.source.family, draft.plan)
    smoothed(student, draft, purpose)
    return student


def prepare(job: Job, say: Say, training_rows: int | None, resume: bool = False) -> Draft:
    """Plan the conversion, or take the plan that the user names, and graft it onto a copy."""
    device = device_of(job.device)
    say(f"loading {job.model.name}")
    source = load(job.model)
    without_bos(source.tokenizer)  # refused now rather than after an hour
    made = None if job.plan is None else read_plan(job.plan, source)
    progress = Progress(job, source) if resume else None
    nn.Module.to(source.model, device)
    kept = progress.draft() if progress else None
    if kept is None:
        return replace(planned(job, source, made, training_rows, say), progress=progress)
    say("resumed: the text and the plan are there")
    texts, plan, inspection = kept
    return Draft(
        source=source,
        texts=texts,
        plan=plan,
        student=graft(source.model, source.family, plan),
        inspection=inspection,
        measurement=None,
        progress=progress,
    )


def planned(
    job: Job,
    source: Source,
    made: tuple[Plan, Inspection] | None,
    training_rows: int | None,
    say: Say,
) -> Draft:
    """A draft by the plan that is `made`, or by one of its own."""
    model, family = source.model, source.family
    texts, trials = read(job, source, training_rows)
    measurement = None
    if made is None:
        measurement = measure(model, family, texts.calibration, lead_of(source.tokenizer))
        decision, inspection = survey(job, source, measurement, texts, trials)
    else:
        plan, found = made
        say(f"plan: read from {job.plan}, so nothing is measured or fitted")
        decision = judged(model, family, plan, graft(model, family, plan), texts.validation)
        inspection = recalled(job, source, texts, found, decision)
    warn_of_misfits(inspection)
    say(f"KL from the teacher after the graft, untrained: {_nats(inspection)}")
    return Draft(
        source=source,
        texts=texts,
        plan=decision.plan,
        student=decision.student,
        inspection=inspection,
        measurement=measurement,
    )


def _nats(inspection: Inspection) -> str:
    only = inspection.logit_divergence
    more = "" if only is None else f" (with logits in all layers: {only:.4f})"
    return f"{inspection.divergence:.4f} nats per token{more}"


def warn_of_misfits(inspection: Inspection) -> None:
    """Name the layers whose sinks leave out most of what the prefix does, to Python users too."""
    errors = {i: layer.fit_error for i, layer in enumerate(inspection.layers)}
    poor = [f"{i} ({error:.2f})" for i, error in errors.items() if error > _MOST_IS_LEFT_OUT]
    if poor:
        logging.getLogger("absorb").warning(
            "the sinks of layers %s leave out more than half of what the prefix does there (the "
            "share in brackets); --sink auto keeps the keys of the prefix in such layers",
            ", ".join(poor),
        )


def read(job: Job, source: Source, training_rows: int | None) -> tuple[Texts, list[Trial]]:
    """The text, and the prefixes that were tried on it: none where a plan has the prefix."""
    text = job.calibration.prefix
    wish = None if text is None else encoded(source, text)  # refused before any text is sampled
    sketch = replace(source, model=sketch_of(source.model))
    texts = gather(sketch, job.calibration, training_rows)
    if job.plan is not None:
        return texts, []
    return texts, find_prefix(sketch, wish, texts.calibration, job.thresholds)


def survey(
    job: Job, source: Source, measurement: Measurement, texts: Texts, trials: list[Trial]
) -> tuple[Decision, Inspection]:
    """What a measurement shows, and the plan by it: for the last prefix that was tried."""
    findings = find(measurement, job.thresholds)
    decision = decide(
        source.model,
        source.family,
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
        logit_divergence=decision.logit_divergence,
        versions=versions(),
        job=recorded(job, source),
    )
    return decision, inspection


def recalled(
    job: Job, source: Source, texts: Texts, made: Inspection, decision: Decision
) -> Inspection:
    """What was found when a plan was drawn up, in a report on this conversion by it."""
    assert job.plan is not None
    decided = {n: getattr(made.job, n) for n in ("sink", "residual_target", "thresholds")}
    return replace(
        made,
        model=source.name,
        commit=source.commit,
        license=source.license,
        dtype=str(source.dtype).removeprefix("torch."),
        text_origin=texts.origin,
        text_sha256=texts.fingerprint,
        divergence=decision.divergence,
        logit_divergence=decision.logit_divergence,
        versions=versions(),
        job=replace(recorded(job, source), **decided, plan=Path(job.plan.resolve().name)),
    )


def recorded(job: Job, source: Source) -> Job:
    """The job under the public name of its model: where a folder lay is nobody's business."""
    name = job.model.name
    public = source.commit is not None or name == "demo"
    return replace(job, model=replace(job.model, name=name if public else source.name))
