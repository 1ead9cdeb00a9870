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
@click.option(
    "--family",
    is_flag=True,
    help="Show only where absorb finds the parts of such a model, and prove it on tiny random "
    "models: from config.json alone.",
)
@json_option
def inspect(
    model: str, html: Path | None, png: Path | None, family: bool, as_json: bool, **options: Any
) -> None:
    """Show the outliers of MODEL and how they would be absorbed; write no model.

    \b
    absorb inspect demo --html outliers.html
    absorb inspect ./my-llama --text corpus.txt --json > findings.json
    absorb inspect ./my-model --family
    """
    if html is not None and html == png:
        raise click.UsageError("--html names a file and --png a folder; name two places")
    if family and (html or png):
        raise click.UsageError("--family draws nothing; drop --html and --png")
    job = settled(Job, {"name": model, "out": Path(), **options})
    with UserErrors():
        if family:
            _print_proof(job, as_json)
            return
        from absorb.pipelines import inspect as story
        from absorb.schema.codec import to_json
        from absorb.show.rows import finding_rows
        from absorb.show.tables import listing

        if html is None and png is None:
            result = story.inspect(job, say)
        else:
            result = story.picture(job, html, png, say)
        print_result(to_json(result).rstrip() if as_json else listing(finding_rows(result)))


def _print_proof(job: Job, as_json: bool) -> None:
    from absorb.pipelines.family import family_proof
    from absorb.schema.codec import to_json

    proof = family_proof(job.model, say)
    lines = [proof.entry, "", *map(str, proof.checks)]
    lines += [f"left out: {link}" for link in proof.left_out]
    print_result(to_json(proof).rstrip() if as_json else "\n".join(lines))
