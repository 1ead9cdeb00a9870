"""absorb eval"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from absorb.cli.options import json_option, options_from, settled
from absorb.cli.terminal import UserErrors, print_result, say
from absorb.schema.settings import Evaluation
from absorb.ship.files import atomic_file


@click.command("eval")
@click.argument("model")
@options_from(Evaluation)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Also write the table and a chart of perplexities into this page. A file that is there is "
    "replaced.",
)
@json_option
def evaluate(html: Path | None, as_json: bool, **options: Any) -> None:
    """Measure MODEL, which may be a folder that absorb wrote: how good, how quantisable.

    \b
    absorb eval smollm2-absorbed --against demo
    absorb eval ./my-llama --text corpus.txt --formats w8a8-static,nvfp4 --json
    absorb eval smollm2-absorbed --against demo --tasks piqa,questions.jsonl --limit 200
    """
    request = settled(Evaluation, options)
    with UserErrors("evaluate fewer models at once, or pass --device cpu"), ExitStack() as files:
        from absorb.pipelines.compare import compare
        from absorb.schema.codec import to_json
        from absorb.show.rows import comparison_rows
        from absorb.show.tables import table

        file = None if html is None else files.enter_context(atomic_file(html))
        result = compare(request, say)
        if file is not None:
            from absorb.show.page import comparison_page  # matplotlib, which nothing else needs

            file.write(comparison_page(result).encode())
        rows = comparison_rows(result)
        print_result(to_json(result).rstrip() if as_json else table(rows))
