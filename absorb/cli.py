"""The command line. Results on stdout, progress on stderr; exit code 1 for a refusal, 2 for misuse.

torch takes seconds to import, so everything that needs it is imported inside the commands.
"""

import logging
import re
import sys
from contextlib import ExitStack
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

from absorb import __version__
from absorb.errors import AbsorbError
from absorb.files import promised
from absorb.memory import keep_freed_memory
from absorb.options import options_from, settled
from absorb.refusals import Refusals
from absorb.settings import Destination, Evaluation, Job, ModelRef, Survey
from absorb.threads import share_cores

# transformers imports torchao if it is there, which then tells of kernels that this machine cannot
# use, and of what a later torch will say to it.
_NOISY = ("torchao", "torch.utils._pytree")

_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


class _Absorb(click.Group):
    """Refuses arguments that are no text or empty, whichever option they are of."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for argument in args:
            if "\0" in argument or argument != argument.encode(errors="ignore").decode():
                raise click.UsageError(f"{argument!r} is not text in UTF-8", ctx)
            # As a path it would be the current folder.
            if not argument or re.fullmatch(r"--[a-z-]+=", argument):
                raise click.UsageError("an argument is empty; name what is meant, or drop it", ctx)
        return super().parse_args(ctx, args)


@click.group(
    cls=_Absorb, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__)
def main() -> None:
    """Move the outliers of a language model into explicit parameters.

    MODEL is a Hub id (owner/name), a folder, a .gguf file, or `demo` (SmolLM2-135M-Instruct).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a locale may know no more than ASCII
            stream.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    share_cores()
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


@main.command()
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@options_from(Job)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from OUT.progress, and keep what is found there (--train all: 16 bytes a weight).",
)
@click.option("--push-to-hub", metavar="REPO", help="Then upload it there, as `absorb push` does.")
@_json_option
def convert(
    model: str, out: Path, resume: bool, push_to_hub: str | None, as_json: bool, **options: Any
) -> None:
    """Convert MODEL and write a checkpoint that loads with trust_remote_code=True.

    \b
    absorb convert demo --out smollm2-absorbed
    absorb convert Qwen/Qwen3-0.6B --out DIR --text corpus.jsonl --steps 400 --for int8
    """
    job = settled(Job, {"name": model, "out": out, **options})
    stopped = f"run the same command again, and it goes on from {out}.progress"
    with Refusals(interrupted=stopped) if resume else Refusals():
        from absorb import hub, pipeline, report

        if push_to_hub is not None:
            hub.admitted(Destination(repository=push_to_hub))  # refused before the long work
        result = pipeline.convert(job, _say, resume)
        written = f"written to {out}; load it with from_pretrained(..., trust_remote_code=True)"
        _print(report.to_json(result).rstrip() if as_json else f"{_story(result)}\n\n{written}")
        if (worse := report.verdict(result)) is not None:
            _say(worse)
    if push_to_hub is not None:
        with _uploading():
            uploaded = _uploaded(hub.push(out, Destination(repository=push_to_hub), _say))
            (_say if as_json else _print)(uploaded)


@main.command()
@click.argument("model")
@options_from(Survey)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Also draw it, before and after, into this page, which needs no network. A file that is "
    "there is replaced.",
)
@click.option(
    "--png",
    type=click.Path(path_type=Path),
    help="Also draw it into this folder, as PNG files beside a figures.json. Files of the same "
    "names are replaced.",
)
@_json_option
def inspect(model: str, html: Path | None, png: Path | None, as_json: bool, **options: Any) -> None:
    """Show the outliers of MODEL and how they would be absorbed; write no model.

    \b
    absorb inspect demo --html outliers.html
    absorb inspect ./my-llama --text corpus.txt --json > findings.json
    """
    if html is not None and html == png:
        raise click.UsageError("--html names a file and --png a folder; name two places")
    job = settled(Job, {"name": model, "out": Path(), **options})
    with Refusals():
        from absorb import pipeline, report

        if html is None and png is None:
            result = pipeline.inspect(job, _say)
        else:
            result = pipeline.picture(job, html, png, _say)
        _print(
            report.to_json(result).rstrip()
            if as_json
            else report.listing(report.finding_rows(result))
        )


@main.command("eval")
@click.argument("model")
@options_from(Evaluation)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Also write the table and a chart of perplexities into this page. A file that is there is "
    "replaced.",
)
@_json_option
def evaluate(html: Path | None, as_json: bool, **options: Any) -> None:
    """Measure MODEL, which may be a folder that absorb wrote: how good, how quantisable.

    \b
    absorb eval smollm2-absorbed --against demo
    absorb eval ./my-llama --text corpus.txt --formats w8a8-static,nvfp4 --json
    absorb eval smollm2-absorbed --against demo --tasks piqa,questions.jsonl --limit 200
    """
    wish = settled(Evaluation, options)
    with Refusals("evaluate fewer models at once, or pass --device cpu"), ExitStack() as files:
        from absorb import compare, report, standing

        file = None if html is None else files.enter_context(promised(html))
        result = compare.compare(wish, _say)
        if file is not None:
            from absorb.page import comparison_page  # matplotlib, which nothing else needs

            file.write(comparison_page(result).encode())
        rows = standing.comparison_rows(result)
        _print(report.to_json(result).rstrip() if as_json else report.table(rows))


@main.command()
@click.argument("model", metavar="DIR|REPO")
@options_from(ModelRef, "revision")
@_json_option
def verify(model: str, revision: str | None, as_json: bool) -> None:
    """Check that a checkpoint is what absorb wrote: its files, its code, its report, its logits.

    The model is loaded in an isolated process, once files and code are known to be absorb's. The
    exit code is 1, with a reason on stderr, where anything is wrong.

    \b
    absorb verify smollm2-absorbed
    absorb verify someone/smollm2-absorbed --revision 0123abc
    """
    with Refusals("close other programs, or verify on a larger machine"):
        from absorb import report
        from absorb import verify as checks

        result = checks.verify(ModelRef(name=model, revision=revision), _say)
        rows = checks.check_rows(result)
        _print(report.to_json(result).rstrip() if as_json else report.listing(rows))
    for reason in result.wrong:
        _say(f"absorb: {reason}")
    sys.exit(1 if result.wrong else 0)


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO")
@options_from(Destination)
@_json_option
def push(folder: Path, as_json: bool, **options: Any) -> None:
    """Upload a checkpoint to the Hub, in one commit, once it is verified.

    REPO is owner/name, or a name of your own. It is made unless it is there; one that absorb did
    not fill is not touched. Repeated after an interruption, the command uploads what is missing.

    \b
    absorb push smollm2-absorbed someone/smollm2-absorbed --private
    absorb push smollm2-absorbed their-lab/smollm2-absorbed --create-pr
    """
    destination = settled(Destination, options)
    with _uploading():
        from absorb import hub, report

        result = hub.push(folder, destination, _say)
        _print(report.to_json(result).rstrip() if as_json else _uploaded(result))


def _uploading() -> Refusals:
    return Refusals(
        "close other programs, or push from a larger machine",
        "run `absorb push` again, and only what is missing is uploaded",
    )


def _uploaded(pushed: Any) -> str:
    return f"uploaded to {pushed.url}; pin it by revision={pushed.commit!r}"


def _say(sentence: str) -> None:
    click.echo(sentence, err=True)


def _print(result: str) -> None:
    """Results go to stdout. By now whatever was to be written is."""
    try:
        click.echo(result)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise AbsorbError(
            f"the result could not be printed ({error.strerror}); check where the output goes"
        ) from error


def _story(result: Any) -> str:
    from absorb import report

    found = report.finding_rows(result.inspection)
    scores = report.score_rows(result.original, result.converted)
    return f"{report.listing(found)}\n\n{report.table(scores)}"
