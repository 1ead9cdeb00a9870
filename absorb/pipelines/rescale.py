"""A stock model → the same architecture in float16, rescaled so that nothing overflows."""

from dataclasses import replace
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

from absorb.errors import AbsorbError, Say
from absorb.fold.float16 import MOST, Rescaling, rescale, rescaling
from absorb.load.opening.tokenizer import lead_of
from absorb.load.source import Source, load
from absorb.measure.headroom import KINDS, SQUARES, Ranges, ranges
from absorb.runtime.precision import device_of
from absorb.runtime.quiet import quiet
from absorb.runtime.reading import led
from absorb.schema.codec import to_json
from absorb.schema.declared import typed
from absorb.schema.exported import Reach, Rescaled
from absorb.schema.report import Probe, versions
from absorb.schema.settings import Job
from absorb.schema.training import LENGTH
from absorb.ship.export.rescaled import card
from absorb.ship.isolated import probe_tokens
from absorb.ship.staging import REPORT, digests, staged
from absorb.ship.stranger import said_in_isolation
from absorb.ship.weights import save
from absorb.text.corpus import refuse_unreadable
from absorb.text.gather import refuse_short_model
from absorb.text.samples import LATEST_START, sampled
from absorb.text.windows import windows

# Text that ranges are taken from: largest values need more of it than averages do.
_ROWS = 16
_JUDGED = 4  # rows of it, on which the result is compared with the original


def rescaled(job: Job, say: Say) -> Rescaled:
    """Write the rescaled model, complete or not at all; `say` is told what is being done.

    An AbsorbError says what would still overflow.
    """
    device = device_of(job.device)
    refuse_unreadable(job.calibration.text)
    with staged(job.out, job.force) as place:
        say(f"loading {job.model.name}")
        source = load(job.model, device=device)
        _refuse_several_kinds(source)
        rows, origin = _text(job, source)
        say("measuring how far it reaches")
        before = ranges(source.decoder, rows)
        with TemporaryDirectory() as apart:
            reference = Path(apart, "reference.safetensors")
            _keep_logits(source, rows[:_JUDGED], reference)
            by = rescaling(source.decoder, before)
            rescale(source.decoder, by)
            reaches = _reaches(before, ranges(source.decoder, rows))
            _refuse_overflow(reaches, source)
            say(f"writing {job.out}")
            _write(place, source)
            say("comparing it with the original, in float32 and in float16")
            made = _record(job, source, by, reaches, origin)
            made = _compared(made, place, reference, source.model.config.vocab_size)
        (place / "README.md").write_text(card(made), encoding="utf-8")
        made = replace(made, files=digests(place))
        (place / REPORT).write_text(to_json(made), encoding="utf-8")
    return made


def _refuse_several_kinds(source: Source) -> None:
    if source.family.some or source.whole is not None:
        what = "layers of several kinds" if source.family.some else "parts besides a language model"
        raise AbsorbError(
            f"{source.name} has {what}, for which no rescaling is known; convert it without --to"
        )


def _text(job: Job, source: Source) -> tuple[Tensor, str]:
    """Rows that begin as the tokenizer begins a text, and where they are from."""
    refuse_short_model(source, LENGTH + LATEST_START + 1)
    calibration = job.calibration
    if calibration.text is None:
        rows = sampled(source, _ROWS, LENGTH, calibration.seed).rows
        origin = "sampled from the model"
    else:
        rows = windows(source, calibration.text, _ROWS, LENGTH)
        origin = typed(calibration.text)
    return led(rows, lead_of(source.tokenizer)).contiguous(), origin


@torch.no_grad()
def _keep_logits(source: Source, rows: Tensor, file: Path) -> None:
    device = source.decoder.device
    logits = [source.model(r[None].to(device), use_cache=False).logits.float().cpu() for r in rows]
    save_file({"tokens": rows.contiguous(), "logits": torch.cat(logits)}, file)


def _reaches(before: Ranges, after: Ranges) -> tuple[Reach, ...]:
    return tuple(
        Reach(
            kind=kind,
            before=before.peaks[kind][0],
            after=after.peaks[kind][0],
            place=after.peaks[kind][1],
            bound=kind != SQUARES,
        )
        for kind in KINDS
    )


def _refuse_overflow(reaches: tuple[Reach, ...], source: Source) -> None:
    """Refuse what no exact rescaling brings into float16, intermediates and weights alike."""
    for reach in reaches:
        if reach.bound and not reach.after <= MOST:
            raise AbsorbError(
                f"the {reach.kind} of {source.name} reach {reach.after:,.0f} ({reach.place}), "
                f"float16 holds {MOST:,.0f}, and nothing exact makes them smaller in "
                f"{source.family.model_type}; use the model in bfloat16"
            )
    if source.streaming is None:
        for name, parameter in source.model.named_parameters():
            if not parameter.detach().abs().max() <= MOST:
                raise AbsorbError(
                    f"{name} of {source.name} does not fit float16, though what is computed of it "
                    "does; use the model in bfloat16"
                )


def _write(place: Path, source: Source) -> None:
    with quiet():
        save(source.decoder, place, torch.float16, {})
        source.model.config.dtype = torch.float16
        source.model.config.save_pretrained(place)
        source.tokenizer.save_pretrained(place)


def _record(
    job: Job, source: Source, by: Rescaling, reaches: tuple[Reach, ...], origin: str
) -> Rescaled:
    return Rescaled(
        architecture=source.family.model_type,
        family=source.family.model_type,
        model=source.name,
        commit=source.commit,
        license=source.license,
        stream=by.stream,
        channels={link: int((scale > 1).sum()) for link, scale in by.channels.items()},
        reaches=reaches,
        rounding=0.0,
        divergence=0.0,
        text_origin=origin,
        versions=versions(),
        job=job,
        files={},
        probe=Probe(tokens=(), logits=()),
    )


def _compared(made: Rescaled, place: Path, reference: Path, vocabulary: int) -> Rescaled:
    """The record with what a stranger gets of the folder, in float32 and in float16."""
    probe = probe_tokens(vocabulary)
    whole = said_in_isolation(place, probe, reference)
    half = said_in_isolation(place, probe, reference, "float16")
    if half.divergence is None or not isfinite(half.divergence):
        raise AbsorbError(
            f"{made.model} gives no numbers in float16, though nothing that was measured overflows "
            "there; use it in bfloat16, and please report this model to absorb"
        )
    return replace(
        made,
        rounding=whole.divergence or 0.0,
        divergence=half.divergence,
        probe=Probe(tokens=probe, logits=tuple(map(tuple, whole.logits))),
    )
