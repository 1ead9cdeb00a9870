"""absorb export"""

from pathlib import Path
from typing import Any

import click

from absorb.cli.options import json_option, options_from, settled
from absorb.cli.terminal import UserErrors, print_result, say
from absorb.schema.settings import Export


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@options_from(Export)
@json_option
def export(as_json: bool, **options: Any) -> None:
    """Write the converted checkpoint DIR as a model that vLLM, llama.cpp and others know.

    \b
    absorb export smollm2-absorbed --to native --out smollm2-native
    absorb export smollm2-absorbed --to gguf --type bf16 --out smollm2-gguf
    """
    request = settled(Export, options)
    with UserErrors("close other programs, or export on a larger machine"):
        from absorb.pipelines.export import export
        from absorb.schema.codec import to_json
        from absorb.ship.export.card import export_rows
        from absorb.show.tables import listing

        result = export(request, say)
        written = f"written to {request.out}, whose README.md says how each engine loads it"
        told = f"{listing(export_rows(result))}\n\n{written}"
        print_result(to_json(result).rstrip() if as_json else told)
