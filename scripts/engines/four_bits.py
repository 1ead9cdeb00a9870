r"""Four bits by a quantiser that knows nothing of absorb: llm-compressor's own schemes.

    python -m scripts.engines.four_bits DIR --original demo --work WORK --text wikitext2_test.txt \
        --calibration c4.jsonl --json FILE

The stock model, the native export of DIR, and that of an untrained conversion `--for nvfp4`, which
is made in WORK. Each is quantised as llm-compressor does by default, rounded to the nearest or by
GPTQ, saved, and loaded by transformers, where compressed-tensors computes what the format would
give. Perplexity is of the first windows of the text. A row that is in FILE is not run again.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

import absorb
from absorb.cli.terminal import UserErrors
from absorb.show.tables import table
from scripts import bench
from scripts.engines import subjects
from scripts.engines.compressor import VERSION, compressed, perplexity, size
from scripts.engines.table import four_bit_rows

FITTED = "native, --for nvfp4"
MODELS = ("stock", "native", FITTED)
RECIPES: dict[str, dict[str, Any]] = {
    f"{scheme}, {'GPTQ' if gptq else 'rounded'}": {"scheme": scheme, "gptq": gptq}
    for gptq in (False, True)
    for scheme in ("NVFP4", "MXFP4")
}


def measured(
    folder: Path, recipe: dict[str, Any], rows: list[list[int]], seen: list[list[int]]
) -> dict[str, Any]:
    """Quantise a folder, and what transformers makes of the result."""
    with TemporaryDirectory() as place:
        found: dict[str, Any] = compressed(folder, Path(place, "out"), recipe, seen, rows)
        found |= {"perplexity": perplexity(found.pop("said")), "bytes": size(Path(place, "out"))}
    return found


def fitted(original: str, work: Path, calibration: Path) -> Path:
    """The native export of a conversion for the format, made if it is not there."""
    converted, native = work / "for-nvfp4", work / "native-for-nvfp4"
    if not converted.exists():
        subjects.convert(original, converted, calibration, "nvfp4")
    if not native.exists():
        absorb.export(converted, native, text=calibration)
    return native


@click.command()
@click.argument("converted", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--original", default="demo", show_default=True, help="What CONVERTED was.")
@subjects.work
@bench.texts(8)
@click.option("--model", "models", type=click.Choice(MODELS), multiple=True, default=MODELS)
@click.option(
    "--recipe", "recipes", type=click.Choice([*RECIPES]), multiple=True, default=[*RECIPES]
)
@bench.kept_figures
def main(
    converted: Path,
    original: str,
    work: Path,
    text: Path,
    count: int,
    calibration: Path,
    models: tuple[str, ...],
    recipes: tuple[str, ...],
    out: Path,
) -> None:
    """Measure CONVERTED and its ORIGINAL in four bits by llm-compressor."""
    done = {"rows": {}, **bench.read(out)}
    with UserErrors():
        folders = subjects.folders_of(converted, original, work, calibration)
        if FITTED in models:
            folders[FITTED] = fitted(original, work, calibration)
        texts = (text, count), (calibration, bench.SEEN)
        rows, seen = subjects.rows_of(folders["native"], *texts)
        for recipe, model in ((recipe, model) for recipe in recipes for model in models):
            row = f"{model}, {recipe}"
            if row in done["rows"]:
                continue
            click.echo(f"=== {row}", err=True)
            done["rows"][row] = measured(folders[model], RECIPES[recipe], rows, seen)
            done |= {"text": text.name, "calibration": calibration.name, "windows": count}
            done["llmcompressor"] = VERSION
            bench.write(out, done)
    click.echo(table(four_bit_rows(done)))


if __name__ == "__main__":
    main()
