"""A conversion before its fine-tune: the model, the text and the plan."""

import copy
import logging
from dataclasses import dataclass, replace

from absorb.errors import AbsorbError, Say
from absorb.fold.decide import judged
from absorb.fold.gates import gates_of, refuse_ungated
from absorb.fold.graft import graft
from absorb.fold.plan import Plan
from absorb.fold.search.search import found_for
from absorb.load.opening.tokenizer import lead_of
from absorb.load.source import Source, load
from absorb.measure.outliers import Measurement, measure
from absorb.measure.prefix import find_prefix
from absorb.models.positions.windows import slide
from absorb.pipelines.needs import (
    end_needs,
    held_for,
    needs_of,
    refuse_unfit,
    seconds_of,
    shard_needs,
    streamed,
)
from absorb.pipelines.survey import inspection_from_plan, survey
from absorb.prove.prove import proved
from absorb.runtime.precision import device_of, in_bf16
from absorb.schema.findings import Trial
from absorb.schema.proof import sentence
from absorb.schema.report import Inspection
from absorb.schema.settings import Job, Purpose
from absorb.schema.training import Recipe
from absorb.ship.export.targets import config_for, route_of
from absorb.ship.plan_file import read_plan
from absorb.ship.resume import Progress
from absorb.show.tables import size_of, time_of
from absorb.text.corpus import encoded, refuse_unreadable
from absorb.text.gather import Texts, gather
from absorb.tune.recipe import refuse_minutes

_MOST_IS_LEFT_OUT = 0.5  # a share of the effect of the prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that is known of a conversion before anything of a checkpoint is made."""

    source: Source
    texts: Texts
    plan: Plan
    inspection: Inspection
    measurement: Measurement | None  # of the original; none where a plan was read
    progress: Progress | None = None
    fine_tune: Recipe | None = None  # as far as the memory allows it


def prepare(job: Job, say: Say, fine_tune: Recipe | None, resume: bool = False) -> Prepared:
    """Draw up the plan, but for its smoothing, or take that which the user names.

    Without a fine-tune there is no text to train on and none to report on.
    """
    device = device_of(job.device)
    refuse_unreadable(job.calibration.text)
    say(f"loading {job.model.name}")
    source = load(job.model, device=device, held=held_for(fine_tune), prove=proved)
    if source.proof is not None:
        say(sentence(source.proof))
    if job.to == "native":  # refused before the long work
        config_for(route_of(source.family.model_type), source.model.config, job.window)
    elif job.window is not None:
        slide(copy.deepcopy(source.model.config), source.family, job.window)
    if job.gates != "none":
        refuse_ungated(source.decoder)
    made = None if job.plan is None else read_plan(job.plan, source)
    if made is not None and made[0].gates:
        _refuse_idle_gates(job)
    progress = Progress(job, source) if resume else None
    if source.streaming:
        refuse_minutes(job.distillation)
        say("the model is larger than the memory for it, so its layers come there one by one")
    training_rows = None if fine_tune is None else fine_tune.training_rows
    if fine_tune is not None:
        fine_tune = _fitted(job, source, fine_tune, say)
    kept = progress.draft() if progress else None
    if kept is None:
        draft = planned(job, source, made, training_rows, say)
        return replace(draft, progress=progress, fine_tune=fine_tune)
    say("resumed: the text and the plan are there")
    texts, plan, inspection = kept
    return Prepared(
        source=source,
        texts=texts,
        plan=plan,
        inspection=inspection,
        measurement=None,
        progress=progress,
        fine_tune=fine_tune,
    )


def _fitted(job: Job, source: Source, fine_tune: Recipe, say: Say) -> Recipe:
    """The fine-tune as far as the memory allows it, told with what it needs and how long it takes.

    Refused where nothing would do.
    """
    needs = needs_of(source, fine_tune, job.out)
    say(f"the conversion {needs}")
    refuse_unfit(needs, job.out)
    if source.streaming:
        fine_tune = streamed(source, fine_tune, job.distillation)
        if fine_tune.trains:
            say(f"training {_end(source, fine_tune)}")
    say(f"it takes about {_time(job, source, fine_tune)}")
    return fine_tune


def _refuse_idle_gates(job: Job) -> None:
    """Refuse a plan with gates where they have no place, or nobody trains them."""
    if job.to == "native":
        raise AbsorbError(
            f"the plan in {job.plan} has gates, and --to native has no place for them; drop --to, "
            "or take a plan without gates"
        )
    if job.distillation.steps == 0:
        raise AbsorbError(
            f"the plan in {job.plan} has gates, which do nothing without a fine-tune; drop "
            "--steps 0, or take a plan without gates"
        )


def _end(source: Source, fine_tune: Recipe) -> str:
    if fine_tune.sharded:
        size = size_of(shard_needs(source, fine_tune))
        return f"end to end needs about {size} of memory in each of {fine_tune.sharded} processes"
    needs = f"end to end needs about {size_of(end_needs(source, fine_tune))} of memory"
    return needs if fine_tune.end_steps else f"{needs}, so layers are only trained one by one"


def _time(job: Job, source: Source, fine_tune: Recipe) -> str:
    told = time_of(seconds_of(source, fine_tune, plan_is_read=job.plan is not None))
    return told if job.calibration.text else f"{told} once its text is sampled"


def planned(
    job: Job,
    source: Source,
    made: tuple[Plan, Inspection] | None,
    training_rows: int | None,
    say: Say,
) -> Prepared:
    """A draft by the plan that is `made`, or by one of its own."""
    decoder = source.decoder
    texts, trials = read(job, source, training_rows)
    measurement = None
    if made is None:
        measurement = measure(decoder, texts.calibration, lead_of(source.tokenizer))
        decision, inspection = survey(job, source, measurement, texts, trials)
    else:
        plan, found = made
        say(f"plan: read from {job.plan}, so nothing is measured or fitted")
        decision = judged(decoder, plan, graft(decoder, plan), texts.validation)
        inspection = inspection_from_plan(job, source, texts, found, decision)
    warn_of_misfits(inspection)
    say(f"KL from the teacher after the graft, untrained: {_nats(inspection)}")
    return Prepared(
        source=source,
        texts=texts,
        plan=decision.plan,
        inspection=inspection,
        measurement=measurement,
    )


def completed(draft: Prepared, purpose: Purpose = "none") -> Prepared:
    """The draft with a plan that has its smoothing, orders and gates, for what is to come after it.

    They depend on what a student reads.
    """
    if draft.plan.smoothing:  # as that of a plan that was read
        return draft
    student = graft(draft.source.decoder, draft.plan)
    is_listed = draft.source.proof is None
    found = found_for(student, draft.texts.scaling, purpose, is_listed)
    plan = replace(draft.plan, smoothing=found.smoothing, orders=found.orders)
    if draft.inspection.job.gates != "none":
        outliers = [channel.channel for channel in draft.inspection.findings.outlier_channels]
        plan = replace(plan, gates=gates_of(student, draft.texts.scaling, outliers))
    return replace(draft, plan=plan, inspection=replace(draft.inspection, orders=found.reported))


def _nats(inspection: Inspection) -> str:
    only = inspection.logit_divergence
    more = "" if only is None else f" (with logits in all layers: {only:z.4f})"
    return f"{inspection.divergence:z.4f} nats per token{more}"


def warn_of_misfits(inspection: Inspection) -> None:
    """Name the layers whose sinks leave out most of what the prefix does, to Python users too."""
    errors = {i: layer.fit_error for i, layer in enumerate(inspection.layers)}
    poor = [f"{i} ({error:.2f})" for i, error in errors.items() if error > _MOST_IS_LEFT_OUT]
    if poor:
        remedy = "--sink auto keeps the keys of the prefix in such layers"
        if inspection.job.sink != "logit":
            remedy = "its keys do no better there, as a sliding window leaves the prefix behind"
        logging.getLogger("absorb").warning(
            "the sinks of layers %s leave out more than half of what the prefix does there (the "
            "share in brackets); %s",
            ", ".join(poor),
            remedy,
        )


def read(job: Job, source: Source, training_rows: int | None) -> tuple[Texts, list[Trial]]:
    """The text, and the prefixes that were tried on it: none where a plan has the prefix."""
    text = job.calibration.prefix
    wish = None if text is None else encoded(source, text)  # refused before any text is sampled
    with in_bf16(source.decoder) as model:
        sketch = replace(source, model=model)
        texts = gather(sketch, job.calibration, training_rows).of_first()
        if job.plan is not None:
            return texts, []
        return texts, find_prefix(sketch, wish, texts.calibration, job.thresholds)
