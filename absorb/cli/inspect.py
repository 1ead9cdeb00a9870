"""absorb inspect"""

from pathlib import Path
from typing import Any

import click

from absorb.cli.options import json_option, options_from, settled
from absorb.cli.terminal import UserErrors, print_result, say
from absorb.schema.settings import Job, Survey


@click.command()
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
@json_option
def inspect(model: str, html: Path | None, png: Path | None, as_json: bool, **options: Any) -> None:
    """Show the outliers of MODEL and how they would be absorbed; write no model.

    \b
    absorb inspect demo --html outliers.html
    absorb inspect ./my-llama --text corpus.txt --json > findings.json
    """
    if html is not None and html == png:
        raise click.UsageError("--html names a file and --png a folder; name two places")
    job = settled(Job, {"name": model, "out": Path(), **options})
    with UserErrors():
        from absorb.pipelines import inspect as story
        from absorb.schema.codec import to_json
        from absorb.show.rows import finding_rows
        from absorb.show.tables import listing

        if html is None and png is None:
            result = story.inspect(job, say)
        else:
            result = story.picture(job, html, png, say)
        print_result(to_json(result).rstrip() if as_json else listing(finding_rows(result)))
