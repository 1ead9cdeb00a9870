"""absorb convert"""

from pathlib import Path
from typing import Any

import click

from absorb.cli.hub import uploaded_sentence, uploading
from absorb.cli.options import json_option, options_from, settled
from absorb.cli.terminal import SPEAKS, UserErrors, print_result, say
from absorb.schema.places import Destination, expanded
from absorb.schema.settings import Job


@click.command()
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@options_from(Job)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from OUT.progress, and keep what is found there (--train all: 16 bytes a weight).",
)
@click.option("--push-to-hub", metavar="REPO", help="Then upload it there, as `absorb push` does.")
@json_option
def convert(
    model: str, out: Path, resume: bool, push_to_hub: str | None, as_json: bool, **options: Any
) -> None:
    """Convert MODEL and write a checkpoint that loads with trust_remote_code=True.

    \b
    absorb convert demo --out smollm2-absorbed
    absorb convert Qwen/Qwen3-0.6B --out DIR --text corpus.jsonl --for int8
    absorb convert google/gemma-3-1b-it --out DIR --to stock
    """
    job = settled(Job, {"name": model, "out": out, **options})
    stopped = f"run the same command again, and it goes on from {out}.progress"
    with UserErrors(interrupted=stopped) if resume else UserErrors():
        from absorb.pipelines.convert import warn_of_loss
        from absorb.pipelines.produce import produce
        from absorb.schema.codec import to_json
        from absorb.schema.report import Report
        from absorb.ship import hub

        if push_to_hub is not None:
            hub.checked_target(Destination(repository=push_to_hub))  # refused before the long work
        result = produce(job, say, resume)
        print_result(to_json(result).rstrip() if as_json else _STORIES[job.to](result, out))
        if isinstance(result, Report):
            warn_of_loss(result)
    if push_to_hub is not None and SPEAKS:
        with uploading():
            uploaded = uploaded_sentence(hub.push(out, Destination(repository=push_to_hub), say))
            (say if as_json else print_result)(uploaded)


def _converted(result: Any, out: Path) -> str:
    from absorb.show.rows import finding_rows, score_rows
    from absorb.show.tables import listing, table

    found, scores = finding_rows(result.inspection), score_rows(result.original, result.converted)
    written = f"written to {out}; load it with from_pretrained(..., trust_remote_code=True)"
    return f"{listing(found)}\n\n{table(scores)}\n\n{written}"


def _native(result: Any, out: Path) -> str:
    from absorb.pipelines.export import CONVERSION
    from absorb.schema.codec import from_json
    from absorb.schema.report import Report
    from absorb.ship.export.card import export_rows
    from absorb.show.rows import score_rows
    from absorb.show.tables import listing, table

    report = from_json(Report, (expanded(out) / CONVERSION).read_text(encoding="utf-8"))
    scores = table(score_rows(report.original, report.converted))
    written = f"written to {out}, whose README.md says how each engine loads it"
    return f"{scores}\n\n{listing(export_rows(result))}\n\n{written}"


def _rescaled(result: Any, out: Path) -> str:
    from absorb.ship.export.rescaled import reach_rows, rescaled_rows
    from absorb.show.tables import listing, table

    reached, done = table(reach_rows(result)), listing(rescaled_rows(result))
    return f"{reached}\n\n{done}\n\nwritten to {out}; load it with dtype=torch.float16"


_STORIES = {"absorbed": _converted, "native": _native, "stock": _rescaled}
