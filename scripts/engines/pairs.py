"""Speeds of models that took turns: medians, and ratios to the one that they are measured by."""

from collections.abc import Mapping
from statistics import median, quantiles
from typing import Any


def add_ratios(models: Mapping[str, dict[str, Any]], by: str = "stock") -> None:
    """Medians of tokens per second, and how many times those of the model `by` they are.

    `tokens_per_second` comes with one figure for each round, by the name of the work. A round meets
    all models, so its ratio is not of what else the machine did. `spread` has the quartiles of the
    ratios.
    """
    reference = models[by]["tokens_per_second"]
    for one in models.values():
        rounds = one.get("tokens_per_second", {})
        ratios = {
            work: [ours / theirs for ours, theirs in zip(each, reference[work], strict=True)]
            for work, each in rounds.items()
        }
        one["of_stock"] = {work: median(each) for work, each in ratios.items()}
        one["spread"] = {work: quartiles(each) for work, each in ratios.items()}
    for one in models.values():
        rounds = one.get("tokens_per_second", {})
        one["tokens_per_second"] = {work: median(each) for work, each in rounds.items()}


def quartiles(ratios: list[float]) -> tuple[float, float]:
    """The lower and the upper one."""
    if len(ratios) == 1:
        return ratios[0], ratios[0]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return low, high


def cell(one: Mapping[str, Any], work: str) -> str:
    """Tokens per second, and beside the stock model: the median of rounds, and its quartiles.

    Files from before these were kept have the median alone.
    """
    if work not in one["tokens_per_second"]:
        return ""
    spread = ""
    if "spread" in one:
        low, high = one["spread"][work]
        spread = f", {low:.2f} to {high:.2f}"
    return f"{one['tokens_per_second'][work]:,.0f} ({one['of_stock'][work]:.2f} x{spread})"
