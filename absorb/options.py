"""What the commands' options have in common: their types, and the job that they make."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from absorb.settings import (
    CHOICES,
    RANGES,
    Calibration,
    Distillation,
    FormatName,
    Job,
    ModelRef,
    Thresholds,
)

_THRESHOLDS = {
    "sink_weight": "Mean attention weight above which a token is a sink.",
    "massive_value": "Magnitude above which an activation is massive.",
    "massive_ratio": "Multiple of the median above which it is.",
    "token_ratio": "Multiple of the median token's peak above which a token is an outlier.",
    "channel_ratio": "Multiple of the median channel's mean above which a channel is.",
    "divergence": "KL in nats per token that removing spike neurons may cost.",
}


class Number(click.FloatRange):
    """A range that has no place for NaN, which compares as neither too small nor too large."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number: float = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value} is not a number", param, ctx)
        return number


def number(name: str) -> "click.ParamType[Any]":
    """The type of an option that takes what the setting of this name does."""
    allowed = RANGES[name]
    if allowed.whole:
        most = None if allowed.most is None else int(allowed.most)
        return click.IntRange(int(allowed.least), most)
    return Number(allowed.least, allowed.most, min_open=allowed.excluded)


def choice(name: str) -> "click.ParamType[Any]":
    """The same for one that takes one of a few words."""
    return click.Choice(CHOICES[name])


def names(ctx: Any, param: Any, value: str | None) -> tuple[str, ...]:
    """Names with commas between them, without repeats."""
    found = tuple(dict.fromkeys(value.split(","))) if value is not None else ()
    if "" in found:
        raise click.BadParameter("a name between two commas is missing", ctx, param)
    return found


def format_names(ctx: Any, param: Any, value: str) -> tuple[FormatName, ...]:
    """Names of formats with commas between them, without repeats."""
    found: Any = tuple(dict.fromkeys(value.split(",")))
    for name in found:
        if name not in CHOICES["formats"]:
            known = ", ".join(CHOICES["formats"])
            raise click.BadParameter(f"{name!r} is none of {known}", ctx, param)
    return found  # type: ignore[no-any-return]


trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run tokenizer code that a model brings."
)


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that convert and inspect share."""
    for field in reversed(fields(Thresholds)):
        command = click.option(
            f"--threshold-{field.name.replace('_', '-')}",
            field.name,
            type=number(field.name),
            default=field.default,
            show_default=True,
            help=_THRESHOLDS[field.name],
        )(command)
    options = [
        click.argument("model"),
        click.option("--revision", help="Branch, tag or commit of a Hub repository."),
        trust_option,
        click.option(
            "--text",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Text to calibrate and train on: plain, or .jsonl with a field `text`.  "
            "[default: the model samples its own]",
        ),
        click.option(
            "--sink",
            type=choice("sink"),
            default="logit",
            show_default=True,
            help="How: one logit a head, which fast kernels know; the prefix's key, which is "
            "exact; or auto, which keeps the key in layers that logits do not fit.",
        ),
        click.option(
            "--residual-target",
            type=number("residual_target"),
            default=1.0,
            show_default=True,
            help="Multiple of the median channel that an outlier channel is brought down to, by a "
            "power of two.",
        ),
        click.option("--prefix", help="Text that the sinks stand for.  [default: searched for]"),
        click.option(
            "--seed",
            type=number("seed"),
            default=0,
            show_default=True,
            help="Of all randomness.",
        ),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ..."),
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def refuse_contradictions(options: dict[str, Any]) -> None:
    if options["steps"] is not None and options["minutes"] is not None:
        raise click.UsageError("--steps and --minutes both set the length; drop one of them")
    if options["plan"] is not None:
        origin = click.get_current_context().get_parameter_source
        flags = {f.name: f"--threshold-{f.name.replace('_', '-')}" for f in fields(Thresholds)}
        flags |= {n: f"--{n.replace('_', '-')}" for n in ("prefix", "sink", "residual_target")}
        for name, flag in flags.items():
            if origin(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--plan has decided what {flag} would; drop one of them")


def job_from(out: Path, force: bool, options: dict[str, Any]) -> Job:
    def chosen(names: type) -> dict[str, Any]:
        return {f.name: options[f.name] for f in fields(names) if f.name in options}

    return Job(
        model=ModelRef(name=options["model"], **chosen(ModelRef)),
        out=out,
        calibration=Calibration(**chosen(Calibration)),
        thresholds=Thresholds(**chosen(Thresholds)),
        sink=options["sink"],
        residual_target=options["residual_target"],
        distillation=Distillation(**chosen(Distillation)),
        plan=options.get("plan"),
        device=options["device"],
        force=force,
    )
