"""absorb convert"""

from pathlib import Path
from typing import Any

import click

from absorb.cli.hub import uploaded_sentence, uploading
from absorb.cli.options import json_option, options_from, settled
from absorb.cli.terminal import UserErrors, print_result, say
from absorb.schema.settings import Destination, Job


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
    absorb convert Qwen/Qwen3-0.6B --out DIR --text corpus.jsonl --steps 400 --for int8
    """
    job = settled(Job, {"name": model, "out": out, **options})
    stopped = f"run the same command again, and it goes on from {out}.progress"
    with UserErrors(interrupted=stopped) if resume else UserErrors():
        from absorb.pipelines.convert import convert, warn_of_loss
        from absorb.schema.codec import to_json
        from absorb.ship import hub

        if push_to_hub is not None:
            hub.checked_target(Destination(repository=push_to_hub))  # refused before the long work
        result = convert(job, say, resume)
        written = f"written to {out}; load it with from_pretrained(..., trust_remote_code=True)"
        print_result(to_json(result).rstrip() if as_json else f"{_story(result)}\n\n{written}")
        warn_of_loss(result)
    if push_to_hub is not None:
        with uploading():
            uploaded = uploaded_sentence(hub.push(out, Destination(repository=push_to_hub), say))
            (say if as_json else print_result)(uploaded)


def _story(result: Any) -> str:
    from absorb.show.rows import finding_rows, score_rows
    from absorb.show.tables import listing, table

    found = finding_rows(result.inspection)
    scores = score_rows(result.original, result.converted)
    return f"{listing(found)}\n\n{table(scores)}"
