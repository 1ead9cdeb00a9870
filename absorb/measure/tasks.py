"""Tasks of lm-evaluation-harness, or in a file: asked and scored by the harness itself."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.schema.codec import parse_json

# Bytes of the logits, in float32, of texts that are read at once.
_LOGITS = {"cpu": 1e8, "cuda": 1e9}

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the harness says of a task, and of each question by the metrics that are means."""

    metrics: dict[str, float]
    marks: dict[str, Tensor]  # (questions,), float64

    def minus(self, other: "Answers") -> dict[str, float]:
        """The difference of each such metric, and its standard error, from pairs of marks.

        A question that is hard for both says nothing of the difference, so the error is less than
        that of two models which were asked different questions.
        """
        found = {}
        for name in (name for name in self.marks if name in other.marks):
            apart = self.marks[name] - other.marks[name]
            found[name] = float(apart.mean())
            if len(apart) > 1:
                found[f"{name}_stderr"] = float(apart.std()) / math.sqrt(len(apart))
        return found


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


def refuse_unmarked(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer without BOS and EOS: the harness begins a text by one of them."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise AbsorbError(
            f"the tokenizer of {name} has neither a BOS nor an EOS, and the harness needs one; "
            "name one in tokenizer_config.json, or drop --tasks"
        )


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Task],
    limit: int | None,
    rows: int,
) -> dict[str, Answers]:
    """What the harness says of each task; so many `rows` are continued at once, where any are.

    `limit` is how many questions of each task are asked.
    """
    from lm_eval import simple_evaluate

    with _quiet():
        found = simple_evaluate(
            model=_subject(model, tokenizer, rows),
            tasks=[_given(task) for task in tasks],
            limit=limit,
            task_manager=_manager(not all(task.questions for task in tasks)),
        )
    return {
        task: _answers(metrics, found["samples"].get(task, []))
        for task, figures in found["results"].items()
        if (metrics := _metrics(figures))  # of some groups of tasks there are none
    }


def _subject(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> Any:
    """A model for the harness, which scores texts of one length at once: none is padded."""
    from lm_eval.models.huggingface import HFLM

    tokens = _LOGITS[model.device.type] / (4 * model.config.get_text_config().vocab_size)

    class OfOneLength(HFLM):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: list[Any], *_: Any, **__: Any) -> list[Any]:
            places: dict[int, list[int]] = {}
            for place, (_, context, continuation) in enumerate(requests):
                _refuse_long(len(continuation), self.max_length)
                places.setdefault(len(context) + len(continuation), []).append(place)
            found: dict[int, Any] = {}
            with tqdm(total=len(requests), desc="asking questions", unit="choice") as bar:
                for length, same in sorted(places.items(), reverse=True):
                    self.batch_size_per_gpu = max(1, int(tokens / length))
                    given = [requests[place] for place in same]
                    answers = super()._loglikelihood_tokens(given, disable_tqdm=True)
                    found.update(zip(same, answers, strict=True))
                    bar.update(len(same))
            self.batch_size_per_gpu = rows
            return [found[place] for place in range(len(requests))]

    return OfOneLength(
        pretrained=model, tokenizer=tokenizer, batch_size=rows, softmax_dtype="float32"
    )


def _refuse_long(tokens: int, most: int) -> None:
    """Refuse an answer of which a model cannot read all: the harness would only cut questions."""
    if tokens > most:
        raise AbsorbError(
            f"an answer in the tasks is {tokens} tokens long, and the model reads {most}; drop it, "
            "or ask a model that reads more"
        )


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


def _answers(metrics: dict[str, float], samples: list[dict[str, Any]]) -> Answers:
    """With the marks of each question, of which the harness gives a sample by each filter."""
    found: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for name in sample["metrics"] if sample["filter"] == "none" else ():
            found.setdefault(name, []).append(sample[name])
    marks = {
        name: torch.tensor(each, dtype=torch.float64)
        for name, each in found.items()
        if name in metrics and all(isinstance(mark, float | int) for mark in each)
    }
    means = {n: m for n, m in marks.items() if math.isclose(m.mean(), metrics[n], abs_tol=1e-9)}
    return Answers(metrics=metrics, marks=means)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness without what it says about its settings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
