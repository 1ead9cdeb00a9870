"""`absorb eval --tasks`: lm-evaluation-harness asks and scores, and agrees on perplexities."""

import json
import math
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from absorb.cli.main import main
from absorb.measure import timing
from absorb.measure.score import losses
from absorb.measure.tasks import answered, questions_in, tasks_of
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.pipelines import compare
from absorb.quantize.formats import FORMATS
from absorb.quantize.simulate import quantized
from absorb.runtime.reading import Subject
from tests.helpers.tiny import POSITIONS, tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": "which is it", "choices": ["a b c", "d e"], "label": 0},
    {"question": "and now", "choices": ["x", "y z", "w w w w"], "label": 2},
    {"question": "the last of them", "choices": ["g", "h"], "label": 1},
    {"question": "once more", "choices": ["k l", "m n o p"], "label": 1},
]


def file_of(folder: Path, lines: list[Any], name: str = "riddles.jsonl") -> Path:
    path = folder / name
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "model"
    tiny("llama", torch.float32).save_pretrained(out)
    tiny_tokenizer().save_pretrained(out)
    (tmp_path / "text.txt").write_text("abcdefghijklm nop qrstuvwxyz" * 60)
    return out


def run(folder: Path, *arguments: object) -> Result:
    command = ["eval", folder, "--text", folder.parent / "text.txt", "--formats", "w4a4"]
    return CliRunner().invoke(main, [str(part) for part in (*command, *arguments)])


@torch.no_grad()
def log_likelihood(model: nn.Module, question: str, choice: str) -> float:
    """Of the choice, when the question is asked as the harness asks it."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(f"Question: {question}\nAnswer: {choice}")["input_ids"]
    start = len(tokenizer(f"Question: {question}\nAnswer:")["input_ids"])
    logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logs[at - 1, ids[at]]) for at in range(start, len(ids)))


def accuracy(model: nn.Module, *, by_length: bool) -> float:
    right = answers_of(model, by_length=by_length)
    return sum(right) / len(right)


def answers_of(
    model: nn.Module, questions: list[dict[str, Any]] = QUESTIONS, *, by_length: bool
) -> list[bool]:
    """Which of the questions are answered rightly."""
    right = []
    for asked in questions:
        choices: list[str] = asked["choices"]
        marks = [
            log_likelihood(model, asked["question"], c) / (len(c) if by_length else 1)
            for c in choices
        ]
        right.append(marks.index(max(marks)) == asked["label"])
    return right


def test_questions_of_a_file_are_answered_in_float_and_in_a_format(
    folder: Path, tmp_path: Path
) -> None:
    path = file_of(tmp_path, QUESTIONS)
    result = run(folder, "--tasks", path, "--json")
    assert result.exit_code == 0, result.output
    [found] = json.loads(result.stdout)["models"]
    assert found["tasks"].keys() == {"float", "w4a4"}
    model = tiny("llama", torch.float32)
    for place in found["tasks"]:
        if place in FORMATS:
            with quantized(Decoder(model, FAMILIES["llama"]), FORMATS["w4a4"], {}):
                expected = [accuracy(model, by_length=by_length) for by_length in (False, True)]
        else:
            expected = [accuracy(model, by_length=by_length) for by_length in (False, True)]
        scores = found["tasks"][place]["riddles"]
        assert [scores["acc"], scores["acc_norm"]] == expected
    lines = [line for line in run(folder, "--tasks", path).stdout.splitlines() if "riddles" in line]
    assert [line.split(", ")[1].split("  ")[0] for line in lines] == [
        "acc_norm",
        "acc_norm in W4A4",
    ]


def test_only_so_many_questions_are_asked_as_wished(folder: Path, tmp_path: Path) -> None:
    asked = file_of(tmp_path, [QUESTIONS[0], *QUESTIONS[:1] * 5, *QUESTIONS[1:]])
    [task] = tasks_of((str(asked),))
    model = tiny("llama", torch.float32)
    found = answered(model, tiny_tokenizer(), [task], 6, 2)["riddles"]
    assert found.metrics["acc"] in (0, 1)  # the first six are the same
    assert found.metrics["acc_stderr"] == 0
    assert found.marks["acc"].tolist() == [found.metrics["acc"]] * 6


def test_choices_of_one_length_are_read_at_once_and_none_is_padded(tmp_path: Path) -> None:
    [task] = tasks_of((str(file_of(tmp_path, QUESTIONS)),))
    model, tokenizer = tiny("llama", torch.float32), tiny_tokenizer()
    shapes: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    answered(model, tokenizer, [task], None, 1)
    handle.remove()
    asked = [
        tokenizer(f"Question: {q['question']}\nAnswer: {choice}")["input_ids"][:-1]
        for q in QUESTIONS
        for choice in q["choices"]
    ]
    # Choices that differ in the last token alone are told by one text.
    texts = {tuple(ids) for ids in asked}
    assert sorted(shapes) == sorted((n, len_) for len_, n in Counter(map(len, texts)).items())
    assert max(rows for rows, _ in shapes) > 1


def test_a_difference_is_that_of_pairs_of_answers(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model, other = tiny("llama", torch.float32), tiny("llama", torch.float32)
    with torch.no_grad():
        other.lm_head.weight.normal_()
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    riddles = [
        {"question": f"is {c}", "choices": [f"{c} x", f"y {c}", f"zz{c}"], "label": 1}
        for c in "abcdefg"
    ]
    path = file_of(tmp_path, riddles)
    wish = ("--against", tmp_path / "other", "--tasks", path)
    own, reference = json.loads(run(folder, *wish, "--json").stdout)["models"]
    assert reference["task_differences"] == {}
    assert own["task_differences"].keys() == {"float", "w4a4"}
    found = own["task_differences"]["float"]["riddles"]
    for metric, by_length in (("acc", False), ("acc_norm", True)):
        both = (answers_of(m, riddles, by_length=by_length) for m in (model, other))
        apart = [int(a) - int(b) for a, b in zip(*both, strict=True)]
        assert any(apart), "the models must answer otherwise, or the test says nothing"
        assert found[metric] == pytest.approx(mean(apart))
        assert found[f"{metric}_stderr"] == pytest.approx(stdev(apart) / len(apart) ** 0.5)
    shown = [line for line in run(folder, *wish).stdout.splitlines() if "above the ref" in line]
    assert len(shown) == 2
    assert f"{found['acc_norm']:+.3f} ± {found['acc_norm_stderr']:.3f}" in shown[0]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"choices": ["a", "b"], "label": 0}, "line 3: the field `question` is missing"),
        ({"question": "a", "label": 0}, "line 3: the field `choices` is missing"),
        ({"question": "a", "choices": ["a", "b"]}, "line 3: the field `label` is missing"),
        ({"question": " ", "choices": ["a", "b"], "label": 0}, "line 3: `question` is not a text"),
        ({"question": "a", "choices": ["a"], "label": 0}, "line 3: `choices` is not a list of two"),
        ({"question": "a", "choices": ["a", 2], "label": 0}, "line 3: `choices` is not a list"),
        ({"question": "a", "choices": ["a", "b"], "label": 2}, "line 3: `label` is not the place"),
        ({"question": "a", "choices": ["a", "b"], "label": True}, "line 3: `label` is not the"),
        ({"question": "a", "choices": ["a", "b"], "label": "a"}, "line 3: `label` is not the"),
        ("{", "line 3: not a JSON object"),
        ("[]", "line 3: not a JSON object"),
    ],
)
def test_a_bad_line_is_named(line: Any, sentence: str, folder: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, [QUESTIONS[0], "", line])
    refused(run(folder, "--tasks", path), f"{path}, {sentence}")


def test_an_answer_longer_than_what_a_model_reads_is_refused(folder: Path, tmp_path: Path) -> None:
    long = {"question": "is it", "choices": ["no", "y z " * POSITIONS], "label": 0}
    refused(run(folder, "--tasks", file_of(tmp_path, [long])), f"the model reads {POSITIONS}")


def test_a_tokenizer_that_marks_no_end_is_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    path = file_of(tmp_path, QUESTIONS)
    refused(run(folder, "--tasks", path), "neither a BOS nor an EOS")


def test_what_is_no_task_is_refused(folder: Path, tmp_path: Path) -> None:
    refused(run(folder, "--tasks", file_of(tmp_path, [""])), "holds no question")
    refused(run(folder, "--tasks", tmp_path / "no.jsonl"), "no.jsonl cannot be read")
    (tmp_path / "other").mkdir()
    twice = (file_of(tmp_path / at, QUESTIONS) for at in ("", "other"))
    refused(run(folder, "--tasks", ",".join(map(str, twice))), "two tasks are called riddles")
    assert run(folder, "--tasks", "piqa,,arc_easy").exit_code == 2


@pytest.mark.slow
def test_a_task_that_the_harness_does_not_know_is_refused(folder: Path) -> None:
    refused(run(folder, "--tasks", "no_such_task,piqa"), "has no task no_such_task")


def test_the_harness_is_asked_for_by_name_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr("absorb.measure.tasks.find_spec", lambda _: None)
    refused(run(folder, "--tasks", "piqa"), "pip install 'absorb-llm[eval]'")


def refused(result: Result, sentence: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert sentence in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_the_files_of_the_harness_kind_are_read(tmp_path: Path) -> None:
    assert questions_in(file_of(tmp_path, [QUESTIONS[0], QUESTIONS[1]])) == tuple(QUESTIONS[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perplexity_is_that_of_the_harness(dtype: torch.dtype, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    draw = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 26, (4 * compare.LENGTH,), generator=draw) + ord("a")
    text = "".join(map(chr, letters.tolist()))
    model, tokenizer = tiny("llama", dtype), tiny_tokenizer()
    rows = torch.tensor(tokenizer(text)["input_ids"]).view(4, compare.LENGTH)
    # The harness predicts every token of a row: the first behind BOS, which we leave out.
    subject = HFLM(pretrained=model, tokenizer=tokenizer, max_length=512, softmax_dtype="float32")
    total = 0.0
    for row in rows:
        [likelihood] = subject.loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, (tokenizer.decode(row),), 0)], disable_tqdm=True
        )
        total -= likelihood
    lead = Subject(
        decoder=Decoder(model, FAMILIES["llama"]), lead=torch.tensor([tokenizer.bos_token_id])
    )
    first = [nll_of_first(lead, row) for row in rows]
    expected = math.exp((total - sum(first)) / (rows.numel() - len(rows)))
    found = float(losses(lead, rows, "test").mean().exp())
    assert found == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def nll_of_first(subject: Subject, row: Tensor) -> float:
    logs = subject.decoder.model(subject.lead[None]).logits[0, -1].float().log_softmax(-1)
    return -float(logs[row[0]])
