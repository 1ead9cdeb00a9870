"""absorb verify and absorb push"""

import sys
from pathlib import Path
from typing import Any

import click

from absorb.cli.options import json_option, options_from, settled
from absorb.cli.terminal import UserErrors, print_result, say
from absorb.schema.places import Destination, Endpoint
from absorb.schema.settings import ModelRef


@click.command()
@click.argument("model", metavar="DIR|REPO")
@options_from(ModelRef, "revision")
@options_from(Endpoint)
@json_option
def verify(model: str, revision: str | None, as_json: bool, **options: Any) -> None:
    """Check that a checkpoint or export is what absorb wrote: files, code, report, logits.

    The model is loaded in an isolated process, once files and code are known to be absorb's. The
    exit code is 1, with a reason on stderr, where anything is wrong.

    With --endpoint a server that runs somewhere is asked for log-probabilities, and what it drops
    of the checkpoint is named: sinks, biases or scales.

    \b
    absorb verify smollm2-absorbed
    absorb verify someone/smollm2-absorbed --revision 0123abc
    absorb verify smollm2-absorbed --endpoint http://localhost:8000
    """
    wish = settled(Endpoint, options)
    endpoint = wish if wish.url is not None else None
    with UserErrors("close other programs, or verify on a larger machine"):
        from absorb.schema.codec import to_json
        from absorb.ship import verify as checks
        from absorb.show.tables import listing

        result = checks.verify(ModelRef(name=model, revision=revision), say, endpoint)
        rows = checks.check_rows(result)
        print_result(to_json(result).rstrip() if as_json else listing(rows))
    for reason in result.wrong:
        say(f"absorb: {reason}")
    sys.exit(1 if result.wrong else 0)


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO")
@options_from(Destination)
@json_option
def push(folder: Path, as_json: bool, **options: Any) -> None:
    """Upload a checkpoint or an export to the Hub, in one commit, once it is verified.

    REPO is owner/name, or a name of your own. It is made unless it is there; one that absorb did
    not fill is not touched. Repeated after an interruption, the command uploads what is missing.

    \b
    absorb push smollm2-absorbed someone/smollm2-absorbed --private
    absorb push smollm2-gguf someone/smollm2-absorbed-gguf
    absorb push smollm2-absorbed their-lab/smollm2-absorbed --create-pr
    """
    destination = settled(Destination, options)
    with uploading():
        from absorb.schema.codec import to_json
        from absorb.ship import hub

        result = hub.push(folder, destination, say)
        print_result(to_json(result).rstrip() if as_json else uploaded_sentence(result))


def uploading() -> UserErrors:
    return UserErrors(
        "close other programs, or push from a larger machine",
        "run `absorb push` again, and only what is missing is uploaded",
    )


def uploaded_sentence(pushed: Any) -> str:
    return f"uploaded to {pushed.url}; pin it by revision={pushed.commit!r}"
