"""The command line. Results on stdout, progress on stderr; exit code 1 for a refusal, 2 for misuse.

torch takes seconds to import, so everything that needs it is imported inside the commands.
"""

import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args

import click
from click.core import ParameterSource

from absorb import __version__
from absorb.errors import AbsorbError
from absorb.settings import (
    Calibration,
    Distillation,
    Evaluation,
    FormatName,
    Job,
    ModelRef,
    Thresholds,
)

_FORMATS = get_args(FormatName)
_THRESHOLDS = {
    "sink_weight": "Mean attention weight above which a token is a sink.",
    "massive_value": "Magnitude above which an activation is massive.",
    "massive_ratio": "Multiple of the median above which it is.",
    "token_ratio": "Multiple of the median token's peak above which a token is an outlier.",
    "channel_ratio": "Multiple of the median channel's mean above which a channel is.",
    "divergence": "KL in nats per token that removing spike neurons may cost.",
}


class _Number(click.FloatRange):
    """A range that has no place for NaN, which compares as neither too small nor too large."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number: float = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value} is not a number", param, ctx)
        return number


def _names(ctx: Any, param: Any, value: str) -> tuple[FormatName, ...]:
    """Names of formats with commas between them, without repeats."""
    names: Any = tuple(dict.fromkeys(value.split(",")))
    for name in names:
        if name not in _FORMATS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(_FORMATS)}", ctx, param)
    return names  # type: ignore[no-any-return]


def _model_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that convert and inspect share."""
    for field in reversed(fields(Thresholds)):
        command = click.option(
            f"--threshold-{field.name.replace('_', '-')}",
            field.name,
            type=_Number(min=0),
            default=field.default,
            show_default=True,
            help=_THRESHOLDS[field.name],
        )(command)
    options = [
        click.argument("model"),
        click.option("--revision", help="Branch, tag or commit of a Hub repository."),
        click.option(
            "--trust-remote-code", is_flag=True, help="Run tokenizer code that the model brings."
        ),
        click.option(
            "--text",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Text to calibrate and train on: plain, or .jsonl with a field `text`.  "
            "[default: the model samples its own]",
        ),
        click.option(
            "--sink",
            type=click.Choice(["logit", "key", "auto"]),
            default="logit",
            show_default=True,
            help="How: one logit a head, which fast kernels know; the prefix's key, which is "
            "exact; or auto, which keeps the key in layers that logits do not fit.",
        ),
        click.option(
            "--residual-target",
            type=_Number(0.001, 1e6),
            default=1.0,
            show_default=True,
            help="Multiple of the median channel that an outlier channel is brought down to, by a "
            "power of two.",
        ),
        click.option("--prefix", help="Text that the sinks stand for.  [default: searched for]"),
        click.option(
            "--seed",
            type=click.IntRange(0, 10**9),
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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Move the outliers of a language model into explicit parameters.

    MODEL is a Hub id (owner/name), a folder, a .gguf file, or `demo` (SmolLM2-135M-Instruct).
    """


@main.command()
@_model_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace the checkpoint that is in --out.")
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    help="Of the fine-tune; 0 for none.  [default: 400 on a GPU, 12 on a CPU]",
)
@click.option(
    "--minutes",
    type=_Number(0, 1e6, min_open=True),
    help="Length of the fine-tune in place of --steps. Loading, sampling, planning and evaluating "
    "take their time beside it.",
)
@click.option(
    "--train",
    type=click.Choice(["sinks", "scales", "all"]),
    help="What to train: sinks and their biases, residual scales too, or all weights.  "
    "[default: all on a GPU, sinks on a CPU]",
)
@click.option(
    "--for",
    "purpose",
    type=click.Choice(["int8", "none"]),
    default="none",
    show_default=True,
    help="int8: what Linears read is on fixed INT8 grids during the fine-tune, so that the model "
    "learns to be quantised to W8A8.",
)
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    help="Folder of a checkpoint, or the plan.safetensors in it: convert the same model as then, "
    "without measuring or fitting anything.",
)
def convert(out: Path, force: bool, as_json: bool, **options: Any) -> None:
    """Convert MODEL and write a checkpoint that loads with trust_remote_code=True.

    \b
    absorb convert demo --out smollm2-absorbed
    absorb convert Qwen/Qwen3-0.6B --out DIR --text corpus.jsonl --steps 400 --for int8
    """
    _refuse_contradictions(options)
    job = _job(out, force, options)
    with _Refusals():
        from absorb import pipeline, report

        result = pipeline.convert(job, _say)
        click.echo(report.to_json(result).rstrip() if as_json else _story(result))
    if not as_json:
        click.echo(f"\nwritten to {out}; load it with from_pretrained(..., trust_remote_code=True)")


@main.command()
@_model_options
def inspect(as_json: bool, **options: Any) -> None:
    """Show the outliers of MODEL and how they would be absorbed; write nothing.

    \b
    absorb inspect demo
    absorb inspect ./my-llama --text corpus.txt --json > findings.json
    """
    job = _job(Path(), False, options)
    with _Refusals():
        from absorb import pipeline, report

        result = pipeline.inspect(job, _say)
        click.echo(
            report.to_json(result).rstrip()
            if as_json
            else report.listing(report.finding_rows(result))
        )


@main.command("eval")
@click.argument("model")
@click.option(
    "--against",
    multiple=True,
    metavar="MODEL",
    help="Measure this model as well; may be repeated. The first of them is the reference.",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to measure on: plain, or .jsonl with a field `text`.  [default: MODEL samples it]",
)
@click.option(
    "--formats",
    metavar="A,B,C",
    callback=_names,
    default=",".join(_FORMATS),
    show_default=True,
    help="Low-precision formats to measure the perplexity in.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def evaluate(as_json: bool, **options: Any) -> None:
    """Measure MODEL, which may be a folder that absorb wrote: how good, how quantisable.

    \b
    absorb eval smollm2-absorbed --against demo
    absorb eval ./my-llama --text corpus.txt --formats w8a8-static,nvfp4 --json
    """
    with _Refusals("evaluate fewer models at once, or pass --device cpu"):
        from absorb import compare, report

        result = compare.compare(Evaluation(**options), _say)
        rows = compare.comparison_rows(result)
        click.echo(report.to_json(result).rstrip() if as_json else report.table(rows))


def _refuse_contradictions(options: dict[str, Any]) -> None:
    if options["steps"] is not None and options["minutes"] is not None:
        raise click.UsageError("--steps and --minutes both set the length; drop one of them")
    if options["plan"] is not None:
        origin = click.get_current_context().get_parameter_source
        flags = {f.name: f"--threshold-{f.name.replace('_', '-')}" for f in fields(Thresholds)}
        flags |= {n: f"--{n.replace('_', '-')}" for n in ("prefix", "sink", "residual_target")}
        for name, flag in flags.items():
            if origin(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--plan has decided what {flag} would; drop one of them")


def _job(out: Path, force: bool, options: dict[str, Any]) -> Job:
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


def _say(sentence: str) -> None:
    click.echo(sentence, err=True)


def _story(result: Any) -> str:
    from absorb import report

    found = report.finding_rows(result.inspection)
    scores = report.score_rows(result.original, result.converted)
    return f"{report.listing(found)}\n\n{report.table(scores)}"


class _Refusals:
    """Turns an AbsorbError into one sentence and exit code 1, and a signal into an exit."""

    def __init__(self, frugal: str = "pass --train sinks, which needs least, or --device cpu"):
        self.frugal = frugal  # what to do where memory is short

    def __enter__(self) -> None:
        # Unlike the default of SIGTERM, an exception lets every `finally` clean up.
        signal.signal(signal.SIGTERM, _terminated)

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, AbsorbError):
            click.echo(f"absorb: {error}", err=True)
            sys.exit(1)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            click.echo(
                f"absorb: the memory is full, so nothing was written; {self.frugal}", err=True
            )
            sys.exit(1)
        if isinstance(error, KeyboardInterrupt):
            click.echo("absorb: interrupted; nothing was written", err=True)
            sys.exit(130)


def _terminated(*_: Any) -> NoReturn:
    sys.exit(143)
