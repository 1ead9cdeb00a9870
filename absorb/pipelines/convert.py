"""The story of a conversion, from a model's name to a folder."""

import logging
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from absorb.errors import Say
from absorb.load.tokenizer import lead_of, leads_left
from absorb.measure.score import evaluate, perplexity
from absorb.pipelines.prepare import Draft, prepare, smoothed
from absorb.quantize.formats import FORMATS
from absorb.quantize.training import FORMAT_FOR, rehearsing
from absorb.runtime.precision import as_stored, device_of
from absorb.runtime.reading import Subject
from absorb.schema.report import Lead, Probe, Report, sentence
from absorb.schema.scores import Score
from absorb.schema.settings import Job, Purpose
from absorb.schema.training import Losses, Recipe
from absorb.ship.plan_file import PLAN, write_plan
from absorb.ship.resume import forget
from absorb.ship.staging import staged
from absorb.ship.write import write
from absorb.tune.distill import distill
from absorb.tune.recipe import recipe


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
            leads=left_before_text(draft),
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


def left_before_text(draft: Draft) -> tuple[Lead, ...]:
    """What the tokenizer and its chat templates cannot be told to leave out, and what it costs."""
    rows, found = draft.texts.held_out, []
    for by, ids in leads_left(draft.source.tokenizer, draft.plan.prefix).items():
        led = Subject(model=draft.student, lead=torch.tensor(ids))
        values = [perplexity(one, rows, by) for one in (Subject(model=draft.student), led)]
        text = "".join(draft.source.tokenizer.convert_ids_to_tokens([*ids]))
        found.append(Lead(by=by, text=text, cost=values[1] / values[0] - 1))
        logging.getLogger("absorb").warning(sentence(found[-1]))
    return tuple(found)


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
