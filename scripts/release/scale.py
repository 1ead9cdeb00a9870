"""What conversions of large models took, as a table."""

import torch

from absorb.schema.settings import Distillation
from absorb.show.tables import Row
from absorb.tune.recipe import recipe
from scripts.release.tables import Run

_END = ("the teacher reads", "fine-tuning")
_ROWS_OF_A_STEP = recipe(Distillation(), torch.device("cpu")).rows
_STAGES = {
    "fine-tune, layer by layer": ("fine-tuning layer by layer",),
    "fine-tune, end to end": _END,
    "prefix, measuring, fit, scales": (
        "choosing the prefix",
        "measuring the stream",
        "fitting sinks",
        "comparing with the teacher",
        "measuring inputs of Linears",
        "choosing exponents of scales",
    ),
    "figures before and after": ("evaluating", "the teacher", "W8A8, static per tensor"),
    "writing and hashing": ("writing", "hashing"),
}


def rows_of(runs: dict[str, Run]) -> list[Row]:
    """What conversions of real shapes took, each on a card of so many GB or on several."""
    head = ("", *(name.replace("b", "B", 1) for name in runs))
    several = list(runs.values())
    rows: list[Row] = [
        ("layers", *(str(run["layers"]) for run in several)),
        ("weights, billions", *(f"{run['weights'] / 1e9:.2f}" for run in several)),
        ("rows to train on", *(str(run["rows"]) for run in several)),
        ("GPU memory that was allowed, GB", *(_or_all(run["card"]) for run in several)),
        ("GPU memory, peak, GB", *(_peak(run["gpu"]) for run in several)),
        ("host memory, peak, GB", *(f"{run['host'] / 1e9:.1f}" for run in several)),
        ("seconds in all", *(f"{run['seconds']:.0f}" for run in several)),
    ]
    for stage, names in _STAGES.items():
        spent = (sum(run["stages"].get(name, 0) for name in names) for run in several)
        rows.append((f"- {stage}", *(f"{seconds:.0f}" for seconds in spent)))
    return [head, *rows]


def growth(runs: list[Run]) -> list[Row]:
    """How conversions of one shape grow with its layers and with the text."""
    rows = [
        (
            f"{run['layers']}",
            f"{run['steps'] * _ROWS_OF_A_STEP}",
            f"{run['seconds']:.0f}",
            f"{run['stages']['fine-tuning layer by layer']:.0f}",
            f"{added(run):.0f}",
            f"{run['read'] / 1e9:.2f}",
            f"{run['written'] / 1e9:.2f}",
        )
        for run in runs
    ]
    head = ("layers", "rows that are trained on", "seconds", "layer by layer", "end to end")
    return [(*head, "read, GB", "written, GB"), *rows]


def added(run: Run) -> float:
    """The seconds that training end to end takes after layers were trained one by one."""
    return sum(run["stages"].get(name, 0) for name in _END)


def of_one_card(runs: dict[str, Run]) -> float:
    """The time of two cards as a share of that of one, both of one hour, layer by layer."""
    one = runs["8b, then end to end"]
    share: float = runs["8b, two cards"]["seconds"] / (one["seconds"] - added(one))
    return share


def _or_all(card: float | None) -> str:
    return "all" if card is None else f"{card:g}"


def _peak(taken: int | None) -> str:
    """Nothing where other programs had the card as well."""
    return "" if taken is None else f"{taken / 1e9:.1f}"
