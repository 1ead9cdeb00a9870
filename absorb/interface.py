"""The Python interface: what the commands do, with the same defaults, and plain data as a result.

What is being done goes to the logger `absorb`, as a warning where the result may disappoint;
what is refused raises an AbsorbError.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from absorb import pipeline
from absorb.compare import compare
from absorb.errors import AbsorbError
from absorb.report import Inspection, Report
from absorb.settings import (
    Calibration,
    Distillation,
    Dtype,
    Evaluation,
    FormatName,
    Job,
    ModelRef,
    Purpose,
    Sink,
    Thresholds,
    Train,
)
from absorb.standing import Comparison

_say = logging.getLogger("absorb").info
_FORMATS: tuple[FormatName, ...] = get_args(FormatName)


def convert(
    model: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    text: str | Path | None = None,
    sink: Sink = "logit",
    residual_target: float = 1.0,
    prefix: str | None = None,
    thresholds: Thresholds = Thresholds(),  # noqa: B008 - it is immutable
    plan: str | Path | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    train: Train | None = None,
    purpose: Purpose = "none",
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
) -> Report:
    """Convert a model and write the checkpoint to `out`, complete or not at all.

    `model` is a Hub id, a folder, a .gguf file or "demo"; `purpose` is the command's --for. The
    report is what absorb.json holds. Raises an AbsorbError for what cannot be converted.
    """
    if steps is not None and minutes is not None:
        raise AbsorbError("steps and minutes both set the length; drop one of them")
    if plan is not None and (sink, residual_target, prefix, thresholds) != _UNDECIDED:
        raise AbsorbError(
            "a plan has decided sink, residual_target, prefix and thresholds; drop them, or plan"
        )
    job = _job(
        model,
        revision=revision,
        trust_remote_code=trust_remote_code,
        text=text,
        sink=sink,
        residual_target=residual_target,
        prefix=prefix,
        thresholds=thresholds,
        seed=seed,
        device=device,
    )
    job = replace(
        job,
        out=Path(out),
        plan=_path(plan),
        distillation=Distillation(
            steps=steps, minutes=minutes, train=train, purpose=purpose, seed=seed
        ),
        force=force,
    )
    return pipeline.convert(job, _say, resume)


def inspect(
    model: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    text: str | Path | None = None,
    sink: Sink = "logit",
    residual_target: float = 1.0,
    prefix: str | None = None,
    thresholds: Thresholds = Thresholds(),  # noqa: B008 - it is immutable
    seed: int = 0,
    device: str = "auto",
) -> Inspection:
    """Find the outliers of a model, and how they would be absorbed; writes nothing."""
    job = _job(
        model,
        revision=revision,
        trust_remote_code=trust_remote_code,
        text=text,
        sink=sink,
        residual_target=residual_target,
        prefix=prefix,
        thresholds=thresholds,
        seed=seed,
        device=device,
    )
    return pipeline.inspect(job, _say)


def evaluate(
    model: str | Path,
    *,
    against: Sequence[str | Path] = (),
    trust_remote_code: bool = False,
    text: str | Path | None = None,
    calibration: str | Path | None = None,
    windows: int | None = None,
    length: int | None = None,
    formats: Sequence[FormatName] = _FORMATS,
    tasks: Sequence[str | Path] = (),
    limit: int | None = None,
    dtype: Dtype = "float32",
    device: str = "auto",
) -> Comparison:
    """Measure models, originals and converted ones, side by side on so many windows of one text.

    The first of `against` is the reference. Fixed ranges of formats are those of `calibration`, or
    of other rows of the text. `formats` are low-precision formats to measure in, and
    `tasks` what is asked in each: names that lm-evaluation-harness knows, or .jsonl files, `limit`
    questions of each.
    """
    wish = Evaluation(
        model=str(model),
        against=tuple(map(str, against)),
        trust_remote_code=trust_remote_code,
        text=_text(text),
        calibration=_text(calibration, "calibration"),
        windows=windows,
        length=length,
        formats=tuple(formats),
        tasks=tuple(map(str, tasks)),
        limit=limit,
        dtype=dtype,
        device=device,
    )
    if text is None and (windows or length):
        raise AbsorbError("windows and length are of text; add it, or drop them")
    if limit is not None and not tasks:
        raise AbsorbError("limit is of the questions of tasks; add some, or drop limit")
    return compare(wish, _say)


_UNDECIDED = ("logit", 1.0, None, Thresholds())


def _job(
    model: str | Path,
    *,
    revision: str | None,
    trust_remote_code: bool,
    text: str | Path | None,
    sink: Sink,
    residual_target: float,
    prefix: str | None,
    thresholds: Thresholds,
    seed: int,
    device: str,
) -> Job:
    """What convert and inspect have in common; it has no place to write to."""
    return Job(
        model=ModelRef(name=str(model), revision=revision, trust_remote_code=trust_remote_code),
        out=Path(),
        calibration=Calibration(text=_text(text), prefix=prefix, seed=seed),
        thresholds=thresholds,
        sink=sink,
        residual_target=residual_target,
        device=device,
    )


def _path(name: str | Path | None) -> Path | None:
    return None if name is None else Path(name)


def _text(name: str | Path | None, argument: str = "text") -> Path | None:
    if name is not None and not Path(name).is_file():
        raise AbsorbError(f"{name} is no file to read text from; check {argument}")
    return _path(name)
