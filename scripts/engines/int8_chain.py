r"""The real INT8 chain: absorb, then llm-compressor, then vLLM's INT8 kernels on a CPU.

    python -m scripts.engines.int8_chain DIR --original demo --work WORK --text wikitext2_test.txt \
        --calibration c4.jsonl --json FILE

The stock model and the native export of DIR by the same recipes. Perplexity is from vLLM's own
log-probabilities of the first windows of the text, each of 512 tokens. They are read at once for
the speed as well, which is by the seconds of one core. A row that is in FILE already is not run
again.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from absorb.cli.terminal import UserErrors
from absorb.errors import AbsorbError
from absorb.load.source import load
from absorb.schema.settings import ModelRef
from absorb.show.tables import table
from scripts import bench
from scripts.engines import subjects
from scripts.engines.environments import COMPRESSOR, VLLM, asked
from scripts.engines.table import chain_rows

ROUNDS = 1


@dataclass(frozen=True)
class Recipe:
    """What llm-compressor is to do: nothing, if it is not quantized."""

    quantized: bool = True
    static: bool = True
    smoothing: float | None = None


RECIPES = {
    "static": Recipe(),
    "per token": Recipe(static=False),
    "static, SmoothQuant 0.8": Recipe(smoothing=0.8),
    "float32": Recipe(quantized=False),
}
ROWS = {
    f"{model}, {name}": (model, recipe)
    for name, recipe in RECIPES.items()
    for model in ("stock", "native")
}


@contextmanager
def plug_in() -> Iterator[str]:
    """A folder on whose path vLLM finds inside/static_int8.py as a plug-in."""
    source = Path(__file__).with_name("inside") / "static_int8.py"
    with TemporaryDirectory() as name:
        told = Path(name, "static_int8-0.dist-info")
        told.mkdir()
        Path(name, source.name).write_text(source.read_text())
        (told / "METADATA").write_text("Metadata-Version: 2.1\nName: static_int8\nVersion: 0\n")
        entry = "[vllm.general_plugins]\nstatic_int8 = static_int8:register\n"
        (told / "entry_points.txt").write_text(entry)
        yield name


def measured(
    folder: Path, recipe: Recipe, rows: list[list[int]], seen: list[list[int]]
) -> dict[str, Any]:
    """Compress a folder by a recipe, and what vLLM makes of the result."""
    with TemporaryDirectory() as name:
        place = Path(name)
        job, out, made = place / "job.json", place / "out.json", place / "compressed"
        found: dict[str, Any] = {}
        if recipe.quantized:
            told = {"static": recipe.static, "smoothing": recipe.smoothing, "rows": seen}
            job.write_text(json.dumps({"model": str(folder), "out": str(made), **told}))
            asked(COMPRESSOR, "compress.py", job, out)
            found, folder = json.loads(out.read_text()), made
        ask = {"models": {"one": str(folder)}, "rows": rows, "rounds": ROUNDS}
        job.write_text(json.dumps(ask))
        with plug_in() as path:
            asked(VLLM, "vllm_says.py", job, out, path=path)
        said = json.loads(out.read_text())
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    one = said["models"]["one"]
    if "refused" in one:
        raise AbsorbError(f"vLLM refuses {folder}: {one['refused']}")
    versions = {**found.pop("versions", {}), **said["versions"]}
    losses = -torch.tensor(one["said"], dtype=torch.float64)
    return {
        **found,
        "perplexity": float(losses.mean().exp()),
        "bytes": size,
        "tokens_per_second": one["tokens_per_second"],
        "versions": versions,
    }


@click.command()
@click.argument("converted", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--original", default="demo", show_default=True, help="What CONVERTED was.")
@subjects.work
@bench.texts(8)
@click.option("--rows", "most", default=len(ROWS), show_default=True, help="Run so many at most.")
@bench.kept_figures
def main(
    converted: Path,
    original: str,
    work: Path,
    text: Path,
    count: int,
    calibration: Path,
    most: int,
    out: Path,
) -> None:
    """Measure CONVERTED and its ORIGINAL in vLLM, in float32 and in INT8."""
    done = {"rows": {}, **bench.read(out)}
    wanted = [row for row in ROWS if row not in done["rows"]][:most]
    with UserErrors():
        folders = subjects.folders_of(converted, original, work, calibration)
        source = load(ModelRef(name=str(folders["native"])), measured=True)
        rows, seen = (
            bench.windows(source, one, much).tolist()
            for one, much in ((text, count), (calibration, bench.SEEN))
        )
        for row in wanted:
            click.echo(f"=== {row}", err=True)
            model, recipe = ROWS[row]
            done["rows"][row] = measured(folders[model], recipe, rows, seen)
            done |= {"text": text.name, "calibration": calibration.name, "windows": count}
            done |= {"llmcompressor": COMPRESSOR.requirements[0].partition("==")[2]}
            done["amx"] = torch.cpu._is_amx_tile_supported()
            bench.write(out, done)
    print(table(chain_rows(done)))


if __name__ == "__main__":
    main()
