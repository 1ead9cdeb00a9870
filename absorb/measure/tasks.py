"""Tasks of lm-evaluation-harness, or in a file: asked and scored by the harness itself."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.schema.codec import parse_json

# As the harness asks its own tasks of this kind, arc_easy and piqa.
_MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in ("acc", "acc_norm")
    ],
    "num_fewshot": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A name that the harness knows, or questions that it is given."""

    name: str
    questions: tuple[dict[str, Any], ...] = ()


def tasks_of(names: tuple[str, ...]) -> list[Task]:
    """The tasks that a user names, or an AbsorbError; a name that ends in .jsonl is a file."""
    if not names:
        return []
    if find_spec("lm_eval") is None:
        raise AbsorbError(
            "--tasks needs lm-evaluation-harness, which is not installed; "
            "pip install 'absorb-llm[eval]'"
        )
    tasks = [
        Task(name=Path(name).stem, questions=questions_in(Path(name)))
        if name.endswith(".jsonl")
        else Task(name=name)
        for name in names
    ]
    _refuse_same_names(tasks)
    for task in tasks:
        if not task.questions:
            _fetch(task.name)
    return tasks


def _fetch(name: str) -> None:
    """Have the harness fetch a task now: it will find it in its cache."""
    if name not in _manager(True).all_tasks:
        raise AbsorbError(
            f"lm-evaluation-harness has no task {name}; name one that `lm_eval ls tasks` lists, or "
            "a .jsonl file"
        )
    try:
        with _quiet():
            _manager(True).load([name])
    except (OSError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise AbsorbError(
            f"the task {name} cannot be loaded ({reason}); give a .jsonl file where there is no "
            "network"
        ) from error


@cache
def _manager(known: bool) -> Any:
    """What finds tasks for the harness: without those that it knows, in a moment."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=known)


def _refuse_same_names(tasks: list[Task]) -> None:
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise AbsorbError(f"two tasks are called {name}; rename one of the files")


def questions_in(path: Path) -> tuple[dict[str, Any], ...]:
    """The questions of a .jsonl file: a line is an object with question, choices and label."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise AbsorbError(f"{path} cannot be read as UTF-8 text: {error}") from None
    found = tuple(_question(path, n, line) for n, line in enumerate(lines, 1) if line.strip())
    if not found:
        raise AbsorbError(f"{path} holds no question; give a line for each")
    return found


def _question(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        fields = parse_json(line)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise AbsorbError(f"{path}, line {number}: not a JSON object")
    for name in ("question", "choices", "label"):
        if name not in fields:
            raise AbsorbError(f"{path}, line {number}: the field `{name}` is missing")
    question, choices, label = fields["question"], fields["choices"], fields["label"]
    if not isinstance(question, str) or not question.strip():
        raise AbsorbError(f"{path}, line {number}: `question` is not a text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise AbsorbError(f"{path}, line {number}: `choices` is not a list of two texts or more")
    if type(label) is not int or not 0 <= label < len(choices):
        raise AbsorbError(
            f"{path}, line {number}: `label` is not the place of a choice, 0 to {len(choices) - 1}"
        )
    return {"question": question, "choices": choices, "label": label}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Task],
    limit: int | None,
    rows: int,
) -> dict[str, dict[str, float]]:
    """What the harness says of each task, by its metrics; `rows` of text are read at once.

    `limit` is how many questions of each task are asked.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        subject = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=rows, softmax_dtype="float32"
        )
        found = simple_evaluate(
            model=subject,
            tasks=[_given(task) for task in tasks],
            limit=limit,
            log_samples=False,
            task_manager=_manager(not all(task.questions for task in tasks)),
        )
    return {task: _metrics(figures) for task, figures in found["results"].items()}


def _given(task: Task) -> Any:
    """What the harness is given for a task."""
    if not task.questions:
        return task.name

    def data(**_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list(list(task.questions))}

    return {**_MULTIPLE_CHOICE, "task": task.name, "custom_dataset": data}


def _metrics(figures: dict[str, Any]) -> dict[str, float]:
    """Its `acc,none` is our acc: what is behind the comma is the filter of answers, if any."""
    return {
        name.removesuffix(",none"): value
        for name, value in figures.items()
        if "," in name and isinstance(value, float | int)
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness without what it says about its settings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
