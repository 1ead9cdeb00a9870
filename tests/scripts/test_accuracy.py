"""The tables of tasks: means, intervals, and whose rows they are."""

from typing import Any

import pytest

from scripts.release.accuracy import accuracies, headline

TASKS = ("arc_easy_test", "arc_challenge_test", "piqa_valid", "openbookqa_test")


def found(value: float, error: float) -> dict[str, dict[str, float]]:
    steps = zip(TASKS, (-0.1, 0.1, 0.2, -0.2), strict=True)
    return {task: {"acc_norm": value + step, "acc_norm_stderr": error} for task, step in steps}


def model(value: float, *, converted: bool) -> dict[str, Any]:
    tasks = {"float": found(value, 0.015), "nvfp4": found(value - 0.1, 0.015)}
    apart = {place: found(-0.01, 0.005) for place in tasks} if converted else {}
    figures = {"perplexity": 20.0, "formats": {"w8a8-token": 25.0, "nvfp4": 30.0}}
    return {"converted": converted, "tasks": tasks, "task_differences": apart, **figures}


RUN = {
    "models": [
        model(0.49, converted=True),
        model(0.5, converted=False),
        model(0.51, converted=True),
    ]
}


def test_a_mean_has_the_interval_of_independent_tasks() -> None:
    head, original, first, second = headline(RUN)
    assert head[1:] == ("perplexity, float", "perplexity, NVFP4", "tasks, float", "tasks, NVFP4")
    # 1.96 * 1.5 % / sqrt(4 tasks)
    assert original == ("original", "20.00", "30.00", "50.0 ± 1.5", "40.0 ± 1.5")
    assert first[3:] == ("49.0 ± 1.5", "39.0 ± 1.5")
    assert second[3:] == ("51.0 ± 1.5", "41.0 ± 1.5")


def test_a_conversion_has_its_differences_under_it_and_the_original_has_none() -> None:
    head, *rows = accuracies(RUN)
    assert len(head) == len(TASKS) + 2
    names = [row[0] for row in rows]
    assert names[:4] == [
        "original, float",
        "original, NVFP4",
        "converted, float",
        "- above the original",
    ]
    assert names.count("- above the original") == 4
    assert rows[3][1:] == ("-11.0 ± 1.0", "+9.0 ± 1.0", "+19.0 ± 1.0", "-21.0 ± 1.0", "-1.0 ± 0.5")


def test_a_model_too_few_is_no_table() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        headline({"models": RUN["models"][:2]})
