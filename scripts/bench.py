"""What benchmarks and trials share: their options, windows of text, and files of figures."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from absorb.text.gather import WINDOW
from absorb.text.windows import windows as cut

SEEN = 8  # windows that fixed ranges are taken from: more text has more extremes

windows = partial(cut, length=WINDOW)  # of text, as `absorb eval` cuts them by default

Options = Callable[[Callable[..., Any]], Callable[..., Any]]
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OUT = click.Path(dir_okay=False, path_type=Path)

device = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
figures = click.option("--json", "out", type=_OUT, help="Also write the figures there.")
kept_figures = click.option(
    "--json", "out", type=_OUT, required=True, help="Figures; rows that it has are not run again."
)


def texts(count: int, *, several: bool = False) -> Options:
    """The options `text`, `count` (of its windows, this many by default) and `calibration`.

    With `several`, `calibration` is a tuple of files.
    """
    ranges = "Text that fixed ranges are taken from."
    if several:
        ranges = "Ranges are from the first. Given twice, one row is calibrated on the second."
    text = click.option("--text", type=_FILE, required=True, help="Text to measure on.")
    windows = click.option(
        "--windows", "count", default=count, show_default=True, help="So many of the text."
    )
    calibration = click.option(
        "--calibration", type=_FILE, required=True, multiple=several, help=ranges
    )
    return lambda command: text(windows(calibration(command)))


def write(out: Path | None, found: dict[str, Any]) -> None:
    """Write figures to the file of the option `figures`, if one is given."""
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


def read(out: Path) -> dict[str, Any]:
    """The figures that an earlier run left: none if there was none."""
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    return found
