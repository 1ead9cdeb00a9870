r"""What a format of four bits costs where there are no outliers: as much noise as it makes then.

    absorb convert demo --text c4.jsonl --for nvfp4 --steps 0 --out NVFP4
    absorb convert demo --text c4.jsonl --for mxfp4 --steps 0 --out MXFP4
    python -m scripts.trials.noise --converted NVFP4 nvfp4 --converted MXFP4 mxfp4 \
        --text wikitext2_test.txt --json noise.json

Normally distributed numbers have no outliers, and a format leaves noise of one size on them. Added
to weights and to what they are multiplied by, in proportion to each block, it costs what no search
for scales or orders can save.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from absorb.load.source import load
from absorb.measure.score import perplexity, quantized_losses
from absorb.measure.tally import perplexity_of
from absorb.quantize.formats import FORMATS, Format
from absorb.quantize.grids import FLOAT32, Grid, rounded, unit
from absorb.runtime.reading import Subject
from absorb.schema.settings import FormatName, ModelRef
from absorb.show.tables import Row, table
from scripts import bench
from scripts.bench import windows

_NUMBERS = (4096, 1536)  # that a grid's noise is measured on
_PARTS: dict[str, tuple[bool, bool]] = {  # whether weights are rounded, and what they read
    "both": (True, True),
    "weights": (True, False),
    "what they read": (False, True),
}


@cache
def noise_of(grid: Grid) -> float:
    """The error that a grid leaves on normally distributed numbers, as a share of their size."""
    numbers = torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(0))
    return float((rounded(numbers, grid) - numbers).norm() / numbers.norm())


def noisy(grid: Grid) -> Grid:
    """No grid, but as much noise as it leaves on each block of normally distributed numbers."""
    size, draw = noise_of(grid), torch.Generator().manual_seed(0)

    def added(spans: Tensor) -> Tensor:
        rms = spans.square().mean(-1, keepdim=True).sqrt()
        noise = torch.randn(spans.shape, generator=draw).to(spans.device)
        return spans + size * rms * noise

    return replace(grid, nearest=added, top=torch.inf, scale=unit)


def part_of(form: Format, is_of: tuple[bool, bool], change: Callable[[Grid], Grid]) -> Format:
    """A format of weights, of what they read, or of both, with another grid of each."""
    weights, inputs = (
        change(grid) if wanted else FLOAT32
        for grid, wanted in zip((form.weights, form.inputs), is_of, strict=True)
    )
    return replace(form, weights=weights, inputs=inputs)


def costs(folder: Path, name: FormatName, text: Path, count: int) -> dict[str, Any]:
    """Perplexity in a format and with its noise, as multiples of that in float."""
    source = load(ModelRef(name=str(folder)), measured=True)
    subject, rows = Subject(decoder=source.decoder), windows(source, text, count)

    def in_format(form: Format) -> float:
        return perplexity_of(quantized_losses(subject, form, rows, rows))

    whole = perplexity(subject, rows, "in float")
    ratios = {
        kind: {
            part: in_format(part_of(FORMATS[name], is_of, change)) / whole
            for part, is_of in _PARTS.items()
        }
        for kind, change in (("rounded", lambda grid: grid), ("noise", noisy))
    }
    noise = noise_of(FORMATS[name].weights)
    return {"float": whole, "noise": noise, "windows": count, "ratios": ratios}


def rows_of(found: dict[str, Any]) -> list[Row]:
    """For each format what rounding costs and what noise does."""
    rows: list[Row] = [("", *_PARTS)]
    for name, cost in found.items():
        spoken = name.upper()
        for kind, label in (("rounded", spoken), ("noise", f"{spoken}, noise in its place")):
            rows.append((label, *(f"{cost['ratios'][kind][part]:.3f}" for part in _PARTS)))
    return rows


@click.command()
@click.option(
    "--converted",
    required=True,
    multiple=True,
    type=(click.Path(exists=True, path_type=Path), click.Choice(["nvfp4", "mxfp4"])),
    help="A folder, and the format it was made for.",
)
@click.option("--text", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--windows", "count", default=8, show_default=True, help="So many of the text.")
@bench.figures
def main(
    converted: tuple[tuple[Path, FormatName], ...], text: Path, count: int, out: Path | None
) -> None:
    """What rounding costs CONVERTED models, and what noise of its size does."""
    found = {name: costs(folder, name, text, count) for folder, name in converted}
    bench.write(out, found)
    print(table(rows_of(found)))


if __name__ == "__main__":
    main()
