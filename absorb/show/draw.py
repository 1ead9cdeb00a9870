"""Charts → PNG, by matplotlib. Nothing in them is told by colour alone."""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from absorb.show.charts import Chart, Maps, Pairs, Panel, Ranks, digest, number

# As wide as a phone shows without making the letters too small, in inches.
_WIDTH = 5.0
_DOTS_PER_INCH = 200
_LINE = 0.16
_LEAST, _MOST_TICKS = 2.0, 12
_FONT = "DejaVu Sans"
_DIGEST = "Figures"
_DARK, _LIGHT = "#1b3a5c", "#e3c58d"
_STYLE: Any = {
    "font.family": _FONT,
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "image.cmap": "cividis",  # the same to all kinds of colour vision, and in grey
    "image.interpolation": "nearest",
    "text.parse_math": False,  # tokens may hold dollar signs
}


def png(chart: Chart) -> bytes:
    """The picture of a chart, with the digest of its figures among its metadata."""
    with _styled():
        figure = _DRAWN_BY[type(chart)](chart)
        file = io.BytesIO()
        figure.savefig(file, dpi=_DOTS_PER_INCH, metadata={_DIGEST: digest(chart)})
    return file.getvalue()


@contextmanager
def _styled() -> Iterator[None]:
    with matplotlib.rc_context():  # whatever the user has set up
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _maps(chart: Maps) -> Figure:
    heights = [max(_LEAST, _LINE * len(_spaced(panel))) for panel in chart.panels]
    size = (_WIDTH, sum(heights) + 0.5 * len(heights) + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights, sharex=True)
    axes = list(chain(*grid))
    scale = _scale(chart)
    for ax, panel in zip(axes, chart.panels, strict=True):
        image = _map(ax, panel, chart, scale)
    axes[-1].set_xlabel("layer")
    bar = figure.colorbar(image, ax=axes, label=chart.unit, aspect=40, pad=0.02)
    if chart.logarithmic:
        _in_decades(bar.ax.yaxis, *bar.ax.get_ylim())
    return figure


def _in_decades(axis: Axis, low: float, high: float) -> None:
    """Plain numbers at the powers of ten of a logarithmic axis, or also between if it is short."""
    axis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _span(values: Iterable[float]) -> tuple[float, float]:
    """From the smallest to the largest of those that a logarithmic axis can show."""
    positive = [value for value in values if value > 0] or [1.0]
    return min(positive), max(positive)


def _scale(chart: Maps) -> Normalize:
    if not chart.logarithmic:
        return Normalize(0, 1)
    least, most = _span(chain(*chain(*(panel.values for panel in chart.panels))))
    low = max(least, chart.floor, most * 1e-6)
    return LogNorm(low, max(most, low * 1.001), clip=True)


def _map(ax: Axes, panel: Panel, chart: Maps, scale: Normalize) -> Any:
    lines = list(zip(*panel.values, strict=True))
    image = ax.imshow(lines, norm=scale, aspect="auto")
    ax.set_title(panel.title)
    ax.set_ylabel(chart.lines)
    labels = _spaced(panel)
    ax.set_yticks([line for line, _ in labels], [_drawable(text) for _, text in labels])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.dotted is not None:
        dots = [
            (layer, line)
            for line, values in enumerate(lines)
            for layer, value in enumerate(values)
            if value > chart.dotted
        ]
        across, down = zip(*dots, strict=True) if dots else ((), ())
        ax.scatter(across, down, s=3, c="white", edgecolors="black", linewidths=0.4)
    return image


def _spaced(panel: Panel) -> list[tuple[int, str]]:
    """As many labels as have room, without those that would lie on a more important one."""
    count = len(panel.values[0])
    room = _LINE * count / _LEAST if len(panel.labels) < count or count > 4 * _MOST_TICKS else 0
    kept: list[tuple[int, str]] = []
    for line, text in panel.labels:
        if all(abs(line - other) >= room for other, _ in kept):
            kept.append((line, text))
    return kept


def _pairs(chart: Pairs) -> Figure:
    count = len(chart.panels)
    figure = Figure(figsize=(_WIDTH, 1.35 * count + 0.6), layout="constrained")
    grid = figure.subplots(count, 1, squeeze=False, sharex=True)
    for ax, (name, before, after) in zip(chain(*grid), chart.panels, strict=True):
        layers = range(len(before))
        ax.bar(layers, before, 0.9, color=_LIGHT, edgecolor="black", lw=0.4, hatch="////")
        ax.bar(layers, after, 0.45, color=_DARK)
        least, most = _span((*before, *after))
        ax.set_ylim(least / 2, most * 1.2)  # the bars start somewhat below the shortest
        ax.set_yscale("log")
        _in_decades(ax.yaxis, least, most)
        ax.set_title(name)
        ax.set_ylabel(chart.unit)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    bars = ax.containers
    ax.set_xlabel("layer")
    figure.legend(
        bars, ["before", "after the graft, smoothed"], loc="outside upper center", ncols=2
    )
    return figure


def _ranks(chart: Ranks) -> Figure:
    groups = len(chart.rows) // chart.group
    height = 0.2 * len(chart.rows) + 0.1 * groups * (chart.group > 1) + 0.7
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    ax = figure.subplots()
    gap = 0.5 if chart.group > 1 else 0
    places = [row + gap * (row // chart.group) for row in range(len(chart.rows))]
    values = [value or 0 for _, value, _ in chart.rows]
    ax.barh(places, values, color=_DARK, height=0.7)
    ax.set_yticks(places, [_drawable(label) for label, _, _ in chart.rows])
    ax.margins(y=0.02)
    ax.invert_yaxis()
    least, most = _span(values)
    # What stands behind the longest bar has room.
    ax.set_xlim(least / 2, most * (2 * most / least) ** 0.5)
    ax.set_xscale("log")
    _in_decades(ax.xaxis, *ax.get_xlim())
    ax.set_xlabel(chart.unit)
    for place, (_, value, note) in zip(places, chart.rows, strict=True):
        ax.annotate(
            f"{'' if value is None else number(value)}  {note}".strip(),
            (max(value or 0, least / 2), place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
        )
    return figure


_DRAWN_BY: dict[type, Any] = {Maps: _maps, Pairs: _pairs, Ranks: _ranks}


def _drawable(text: str) -> str:
    """The text with an escape for every character that the font lacks."""
    known = FT2Font(findfont(_FONT)).get_charmap()
    return "".join(
        letter if ord(letter) in known else letter.encode("ascii", "backslashreplace").decode()
        for letter in text
    )
