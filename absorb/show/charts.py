"""What a chart is made of, in the terms of what is seen. Pure."""

import hashlib
import json
from dataclasses import asdict, dataclass

from absorb.show.tables import Row

Layers = tuple[tuple[float, ...], ...]  # numbers of every layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One map of lines by layers, and what is written beside some of its lines."""

    title: str
    values: Layers  # (layers, lines)
    labels: tuple[tuple[int, str], ...]  # line and text, the most important first


@dataclass(frozen=True, slots=True, kw_only=True)
class Maps:
    """Maps on one scale of colours: logarithmic, or from 0 to 1."""

    lines: str  # what a line is
    unit: str
    logarithmic: bool
    panels: tuple[Panel, ...]
    dotted: float | None  # fields above it have a dot
    floor: float = 0  # where the colours of a logarithmic scale start


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Before and after as bars for every layer, in a panel for each name."""

    unit: str
    panels: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Bars with a label before them, and a number and a note behind: one below the other.

    Without a number there is no bar.
    """

    unit: str
    rows: tuple[tuple[str, float | None, str], ...]
    group: int = 1  # bars that stand together


Chart = Maps | Pairs | Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A chart, the same in words, and its figures. The first row of the table is its head."""

    name: str
    title: str
    words: str
    chart: Chart
    table: list[Row]


def digest(chart: Chart) -> str:
    """SHA-256 of everything that is drawn."""
    return hashlib.sha256(json.dumps(asdict(chart)).encode()).hexdigest()


def number(value: float) -> str:
    """A magnitude, in three digits or more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
