"""The table of `scripts.benchmarks.int8`, from the JSON that it wrote."""

from typing import Any

from absorb.show.tables import Row

HEAD = ("", "perplexity", "parameters, MB", "tokens per second of one core")


def int8_rows(done: dict[str, Any]) -> list[Row]:
    """A row for every model in every arithmetic that has been measured."""
    return [HEAD, *(_row(name, run) for name, run in done["rows"].items())]


def _row(name: str, run: dict[str, Any]) -> Row:
    speed, megabytes = run["tokens_per_second"], run["bytes"] / 1e6
    return (name, f"{run['perplexity']:.2f}", f"{megabytes:,.0f}", f"{speed:,.0f}")
