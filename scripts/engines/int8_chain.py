r"""The real INT8 chain: absorb, then llm-compressor, then vLLM's INT8 kernels on a CPU.

    python -m scripts.engines.int8_chain DIR --original demo --work WORK --text wikitext2_test.txt \
        --calibration c4.jsonl --json FILE

The stock model and the native export of DIR by the same recipes; where DIR is not there, it is made
by an untrained conversion first, by the clock. Perplexity is from vLLM's own log-probabilities of
the first windows of the text, each of 512 tokens. For the speed, in seconds of one core, the two
models of a recipe take turns in one process. A recipe that is in FILE already is not run again.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from absorb.cli.terminal import UserErrors
from absorb.errors import AbsorbError
from absorb.show.tables import table
from scripts import bench
from scripts.engines import subjects
from scripts.engines.compressor import VERSION, compressed, perplexity, size
from scripts.engines.environments import VLLM, asked
from scripts.engines.pairs import add_ratios
from scripts.engines.table import chain_rows

ROUNDS = 8
MODELS = ("stock", "native")


@dataclass(frozen=True)
class Recipe:
    """What llm-compressor is to do."""

    static: bool = True
    smoothing: float | None = None


RECIPES = {
    "static": Recipe(),
    "per token": Recipe(static=False),
    "static, SmoothQuant 0.8": Recipe(smoothing=0.8),
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
    folders: subjects.Folders, recipe: Recipe, rows: list[list[int]], seen: list[list[int]]
) -> dict[str, Any]:
    """Both models compressed by a recipe, and what vLLM makes of the results."""
    given = seen if recipe.static or recipe.smoothing is not None else []
    models, found = dict[str, Path](), dict[str, Any]()
    with TemporaryDirectory() as name:
        place = Path(name)
        for model in MODELS:
            models[model] = place / model
            found[model] = compressed(folders[model], models[model], asdict(recipe), given)
            found[model]["bytes"] = size(models[model])
        said = told(models, rows, place)
    for model, one in said["models"].items():
        if "refused" in one:
            raise AbsorbError(f"vLLM refuses {model}: {one['refused']}")
        found[model]["perplexity"] = perplexity(one.pop("said"))
        found[model] |= {name: one[name] for name in ("tokens_per_second", "of_stock", "spread")}
        found[model]["versions"] |= said["versions"]
    return found


def told(models: Mapping[str, Path], rows: list[list[int]], place: Path) -> Any:
    """What vLLM says of folders, and how fast, on its kernels for fixed ranges."""
    job, out = place / "job.json", place / "out.json"
    names = {model: str(folder) for model, folder in models.items()}
    job.write_text(json.dumps({"models": names, "rows": rows, "rounds": ROUNDS}))
    with plug_in() as path:
        asked(VLLM, "vllm_says.py", job, out, path=path)
    said = json.loads(out.read_text())
    add_ratios(said["models"])
    return said


@click.command()
@click.argument("converted", type=click.Path(file_okay=False, path_type=Path))
@click.option("--original", default="demo", show_default=True, help="What CONVERTED was.")
@subjects.work
@bench.texts(8)
@bench.kept_figures
def main(
    converted: Path,
    original: str,
    work: Path,
    text: Path,
    count: int,
    calibration: Path,
    out: Path,
) -> None:
    """Measure CONVERTED and its ORIGINAL in vLLM, in INT8."""
    done = {"rows": {}, **bench.read(out)}
    with UserErrors():
        if not converted.exists():
            done["convert_seconds"] = subjects.convert(original, converted, calibration)
            bench.write(out, done)
        folders = subjects.folders_of(converted, original, work, calibration)
        texts = (text, count), (calibration, bench.SEEN)
        rows, seen = subjects.rows_of(folders["native"], *texts)
        for name, recipe in RECIPES.items():
            if f"stock, {name}" in done["rows"]:
                continue
            click.echo(f"=== {name}", err=True)
            both = measured(folders, recipe, rows, seen)
            done["rows"] |= {f"{model}, {name}": one for model, one in both.items()}
            done |= {"text": text.name, "calibration": calibration.name, "windows": count}
            done |= {"llmcompressor": VERSION, "amx": torch.cpu._is_amx_tile_supported()}
            bench.write(out, done)
    click.echo(table(chain_rows(done)))


if __name__ == "__main__":
    main()
