"""The story of a conversion, from a model's name to a folder."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from absorb.errors import Say
from absorb.fold.graft import graft
from absorb.load.opening.tokenizer import lead_of, leads_left
from absorb.measure.score import evaluate, perplexity
from absorb.models.decoder import Decoder
from absorb.models.positions.windows import slide
from absorb.pipelines.prepare import Prepared, completed, prepare
from absorb.quantize.formats import FORMATS
from absorb.quantize.training import FORMAT_FOR, fake_quantized
from absorb.runtime import ranks
from absorb.runtime.precision import as_stored, device_of, in_one_type
from absorb.runtime.reading import Subject
from absorb.schema.report import Lead, Probe, Report, sentence, verdict
from absorb.schema.scores import Score
from absorb.schema.settings import Job, Purpose
from absorb.schema.training import Losses, Recipe
from absorb.ship.plan_file import PLAN, read_plan, write_plan
from absorb.ship.resume import forget
from absorb.ship.staging import staged
from absorb.ship.write import help_write, write
from absorb.tune.blockwise import distill_layers
from absorb.tune.distill import distill
from absorb.tune.end_to_end import distill_held
from absorb.tune.nudge import nudge, nudges
from absorb.tune.recipe import recipe


def convert(job: Job, say: Say, resume: bool = False) -> Report:
    """Convert a model and write the checkpoint to job.out; `say` is told what is being done.

    With `resume` what is found is kept in OUT.progress meanwhile, and gone on from if it is there.
    """
    with ranks.joined(job.device), _place(job) as folder:
        report, is_first = fill(folder, job, say, resume), ranks.is_first()
    if is_first:
        forget(job.out)
    return report


@contextmanager
def _place(job: Job) -> Iterator[Path]:
    """Where to write: what becomes the checkpoint, or a place of its own for one that helps."""
    with staged(job.out, job.force) if ranks.is_first() else TemporaryDirectory() as folder:
        yield Path(folder)


def of_first(draft: Prepared, folder: Path) -> Prepared:
    """The same plan for all processes that convert together."""
    if ranks.count() == 1:
        return draft
    file = folder / "agreed.safetensors"
    write_plan(file, draft.plan, draft.inspection)
    own = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    size = int(ranks.of_first(torch.tensor(len(own))))
    theirs = ranks.of_first(own if ranks.is_first() else own.new_zeros(size))
    file.write_bytes(theirs.numpy().tobytes())
    plan, inspection = read_plan(file, draft.source)
    file.unlink()
    return replace(draft, plan=plan, inspection=inspection)


def fill(folder: Path, job: Job, say: Say, resume: bool) -> Report:
    """Write the checkpoint into an empty folder."""
    wish = recipe(job.distillation, device_of(job.device), tied=job.to == "native")
    prepared = prepare(job, say, wish, resume)
    draft, fine_tune = of_first(completed(prepared, wish.purpose), folder), prepared.fine_tune
    assert fine_tune is not None
    if draft.progress is not None:
        draft.progress.keep_draft(draft.texts, draft.plan, draft.inspection)
        say(f"kept in {draft.progress.folder}; the same command goes on from here")
    write_plan(folder / PLAN, draft.plan, draft.inspection)
    student = graft(draft.source.decoder, draft.plan)
    say(f"fine-tune: {fine_tune}")
    losses = fine_tuned(student, draft, fine_tune, job.calibration.seed, folder)
    if fine_tune.trains and not losses.kept:
        say("no step came closer to the teacher on validation text; the model stays untrained")
    original, converted = before_and_after(student, draft, fine_tune.purpose)
    report = Report(
        inspection=draft.inspection,
        recipe=fine_tune,
        losses=losses,
        original=original,
        converted=converted,
        files={},
        probe=Probe(tokens=(), logits=()),
        leads=left_before_text(student, draft),
    )
    if job.window is not None and job.to == "absorbed":
        slide(student.config, student.family, job.window)
    if not ranks.is_first():
        help_write(folder, student, draft.source)
        return report
    say(f"writing {job.out}")
    return write(folder, student, draft.source, report)


def fine_tuned(
    student: Decoder, draft: Prepared, fine_tune: Recipe, seed: int, folder: Path
) -> Losses:
    """Train a student in place: as if quantised, where that is the purpose.

    Then its weights are nudged, where that serves the purpose.
    """
    losses = _trained(student, draft, fine_tune, seed, folder)
    goal = FORMAT_FOR.get(fine_tune.purpose)
    if goal is None or not nudges(FORMATS[goal]):
        return losses
    with _scratch(draft, folder) as place:
        return replace(losses, nudged=nudge(student, draft.texts.scaling, FORMATS[goal], place))


def _trained(
    student: Decoder, draft: Prepared, fine_tune: Recipe, seed: int, folder: Path
) -> Losses:
    """Train a student in place.

    Layers that are trained one by one rest in files, in `folder` unless a later run may need them.
    """
    texts, prefix = draft.texts, torch.tensor(draft.plan.prefix)
    goal = FORMAT_FOR.get(fine_tune.purpose)
    if student.streaming and fine_tune.trains:
        form, source = FORMATS[goal] if goal else None, draft.source.decoder
        with _scratch(draft, folder) as place:
            if fine_tune.sharded:
                from absorb.tune.sharded import distill_sharded  # FSDP takes a second to import

                kept = draft.progress.shards if draft.progress else None
                return distill_sharded(source, student, prefix, texts, fine_tune, seed, kept, place)
            losses = distill_layers(source, student, draft.plan, texts, fine_tune, form, place)
        if not fine_tune.end_steps:
            return losses
        few = fine_tune.at_the_end
        more = distill_held(source, student, prefix, texts, few, form, seed, draft.progress)
        return _joined(losses, more)
    with fake_quantized(student, FORMATS[goal], texts.scaling) if goal else nullcontext():
        teacher = draft.source.decoder
        return distill(teacher, student, prefix, texts, fine_tune, seed, draft.progress)


def _joined(first: Losses, more: Losses) -> Losses:
    """The losses of layers that were trained one by one, and then of all at once.

    In between the student is measured twice: as its layers were trained, and as it goes on from
    there, which is untrained where they were no better.
    """
    start = first.held_out[-1][0]

    def later(values: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        return tuple((start + step, value) for step, value in values)

    return replace(
        first,
        training=later(more.training),
        held_out=(*first.held_out, *later(more.held_out)),
        kept=start + more.kept if more.kept else first.kept,
    )


@contextmanager
def _scratch(draft: Prepared, folder: Path) -> Iterator[Path]:
    """Where layers rest: on the disk of the output, for processes that help as well."""
    if draft.progress is not None:
        yield draft.progress.layers
        return
    with TemporaryDirectory(dir=folder) as place:
        yield ranks.path_of_first(Path(place))
        ranks.meet()  # the first one removes it


def left_before_text(student: Decoder, draft: Prepared) -> tuple[Lead, ...]:
    """What the tokenizer and its chat templates cannot be told to leave out, and what it costs."""
    rows, found = draft.texts.held_out, []
    for by, ids in leads_left(draft.source.tokenizer, draft.plan.prefix).items():
        led = Subject(decoder=student, lead=torch.tensor(ids))
        values = [perplexity(one, rows, by) for one in (Subject(decoder=student), led)]
        text = "".join(draft.source.tokenizer.convert_ids_to_tokens([*ids]))
        found.append(Lead(by=by, text=text, cost=values[1] / values[0] - 1))
        logging.getLogger("absorb").warning(sentence(found[-1]))
    return tuple(found)


def before_and_after(student: Decoder, draft: Prepared, purpose: Purpose) -> tuple[Score, Score]:
    """The original and the student on held-out text, both as they are stored."""
    source, goal = draft.source, FORMAT_FOR.get(purpose)
    for decoder in (student, source.decoder):  # lest rounding count for one alone
        as_stored(decoder, source.dtype, source.types)
        if not decoder.streaming:
            in_one_type(decoder.model)
    original, converted = evaluate(
        [
            Subject(decoder=source.decoder, lead=lead_of(source.tokenizer)),
            Subject(decoder=student),
        ],
        Subject(decoder=source.decoder, lead=torch.tensor(draft.plan.prefix)),
        draft.texts.held_out,
        draft.texts.calibration,
        draft.inspection.job.thresholds,  # a plan brings its own
        ("w8a8-static", goal) if goal else ("w8a8-static",),
    )
    return original, converted


def warn_of_loss(report: Report) -> None:
    """Say where the converted model is worse than the original in float, and what helps."""
    if (worse := verdict(report)) is not None:
        logging.getLogger("absorb").warning(worse)
