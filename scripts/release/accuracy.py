"""Rows of tables from what `absorb eval --tasks --json` printed of the demo and two conversions."""

from math import hypot
from typing import Any

from absorb.show.tables import Row

_METRIC = "acc_norm"
_95 = 1.96  # standard errors on either side of a mean of many questions
# The models of the command in EVIDENCE.md: the first is named before the original.
_CONVERTED = ("converted", "converted, `--text` C4 `--for int8`")
_TASKS = {
    "arc_easy_test": "ARC easy",
    "arc_challenge_test": "ARC challenge",
    "piqa_valid": "PIQA",
    "openbookqa_test": "OpenBookQA",
}

Run = dict[str, Any]
Found = dict[str, dict[str, float]]  # by task, what each metric says


def accuracies(run: Run) -> list[Row]:
    """Accuracy in each task and their mean, and by how much a conversion is above the original."""
    rows = [
        row
        for name, model in named(run).items()
        for place, found in model["tasks"].items()
        for row in (
            (f"{name}, {_spoken(place)}", *_cells(found, "")),
            ("- above the original", *_cells(model["task_differences"].get(place, {}), "+")),
        )
        if any(row[1:])
    ]
    return [("", *_TASKS.values(), "mean"), *rows]


def headline(run: Run) -> list[Row]:
    """Perplexity and mean accuracy, each in float and in every format."""
    models = named(run)
    places = list(models["original"]["tasks"])
    rows = [
        (
            name,
            *(f"{_perplexities(model)[place]:.2f}" for place in places),
            *(_mean(model["tasks"][place], "") for place in places),
        )
        for name, model in models.items()
    ]
    spoken = [*map(_spoken, places)]
    return [
        ("", *(f"perplexity, {one}" for one in spoken), *(f"tasks, {s}" for s in spoken)),
        *rows,
    ]


def means(runs: dict[str, Run]) -> list[Row]:
    """The mean accuracy of each row of a trial that was asked, in float and in formats."""
    asked = {name: run["tasks"] for name, run in runs.items() if run["tasks"]}
    places = list(next(iter(asked.values())))
    rows = [(name, *(_mean(found[place], "") for place in places)) for name, found in asked.items()]
    return [("", *map(_spoken, places)), *rows]


def _perplexities(model: Run) -> dict[str, float]:
    return {"float": model["perplexity"], **model["formats"]}


def named(run: Run) -> dict[str, Run]:
    """The models by what tables call them."""
    original = [model for model in run["models"] if not model["converted"]]
    converted = [model for model in run["models"] if model["converted"]]
    names = ("original", *_CONVERTED)
    return dict(zip(names, [*original, *converted], strict=True))


def _spoken(place: str) -> str:
    return {"float": "float", "w8a8-static": "W8A8 static", "nvfp4": "NVFP4"}[place]


def _cells(found: Found, sign: str) -> Row:
    if not found:
        return ("",) * (len(_TASKS) + 1)
    each = ((found[task][_METRIC], found[task][f"{_METRIC}_stderr"]) for task in _TASKS)
    return (*(_percent(*one, sign) for one in each), _mean(found, sign))


def _mean(found: Found, sign: str) -> str:
    """Of all tasks alike. They have no question in common, so the squares of errors add up."""
    value = sum(found[task][_METRIC] for task in _TASKS) / len(_TASKS)
    error = hypot(*(found[task][f"{_METRIC}_stderr"] for task in _TASKS)) / len(_TASKS)
    return _percent(value, error, sign)


def _percent(value: float, error: float, sign: str) -> str:
    """With half of the interval in which it is in 95 of 100 cases."""
    return f"{100 * value:{sign}.1f} ± {100 * _95 * error:.1f}"
