"""The fine-tune: it trains what it was told to, gets closer, and never hands back a worse step."""

from dataclasses import replace
from itertools import count
from time import monotonic

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.errors import AbsorbError
from absorb.fold.graft import twin
from absorb.measure.divergence import divergence
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.schema.settings import Distillation
from absorb.schema.training import Recipe
from absorb.text.gather import Texts
from absorb.tune import distill as module
from absorb.tune.distill import distill
from absorb.tune.optimizer import choose, rate_at
from absorb.tune.recipe import recipe
from tests.helpers.tiny import VOCABULARY, tiny

PREFIX = torch.tensor([1])


def texts(rows: int = 16) -> Texts:
    draw = torch.Generator().manual_seed(3)
    part = torch.randint(3, VOCABULARY, (4, rows, 12), generator=draw)
    return Texts(
        calibration=part[0], validation=part[1], held_out=part[2], training=part[3], origin="made"
    )


@pytest.fixture
def teacher() -> PreTrainedModel:
    return tiny("llama", torch.float32)


@pytest.fixture
def student(teacher: PreTrainedModel) -> PreTrainedModel:
    return twin(Decoder(teacher, FAMILIES["llama"])).model


def changed(model: PreTrainedModel, before: dict[str, Tensor]) -> set[str]:
    """The last parts of the names of the parameters that are not what they were."""
    now = model.named_parameters()
    return {name.rpartition(".")[2] for name, value in now if not torch.equal(value, before[name])}


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("sinks", {"sink", "bias"}),
        ("scales", {"sink", "bias", "input_scale"}),
        ("all", {"sink", "bias", "input_scale", "weight"}),
    ],
)
def test_only_what_was_asked_for_is_trained(
    teacher: PreTrainedModel, student: PreTrainedModel, train: str, expected: set[str]
) -> None:
    before = {name: value.clone() for name, value in student.named_parameters()}
    for name, parameter in student.named_parameters():
        if name.endswith("sink"):
            parameter.data.fill_(0.5)  # a sink far below the logits has next to no gradient
    fine_tune = Recipe(steps=8, train=train, rows=4)
    losses = distill(*pair(teacher, student), PREFIX, texts(), fine_tune, seed=0)
    assert losses.kept > 0
    assert changed(student, before) == expected
    assert not any(parameter.requires_grad for parameter in student.parameters())


def pair(teacher: PreTrainedModel, student: PreTrainedModel) -> tuple[Decoder, Decoder]:
    family = FAMILIES[teacher.config.model_type]
    return Decoder(teacher, family), Decoder(student, family)


def test_training_brings_the_student_closer(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    start = divergence(*pair(teacher, student), PREFIX, texts().validation)
    fine_tune = Recipe(steps=30, train="all", rows=8)
    losses = distill(*pair(teacher, student), PREFIX, texts(), fine_tune, seed=0)
    assert losses.held_out[0] == (0, pytest.approx(start))
    reached = divergence(*pair(teacher, student), PREFIX, texts().validation)
    assert reached < 0.9 * start
    assert dict(losses.held_out)[losses.kept] == pytest.approx(reached, rel=1e-4)
    assert [step for step, _ in losses.training] == list(range(1, 31))


def test_the_best_step_is_kept_even_if_it_is_the_untrained_one(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    before = {name: value.clone() for name, value in student.named_parameters()}
    fine_tune = Recipe(steps=2, train="all", rows=4, rate=1.0)  # ruins every weight at once
    losses = distill(*pair(teacher, student), PREFIX, texts(), fine_tune, seed=0)
    assert losses.kept == 0
    assert losses.held_out[-1][1] > losses.held_out[0][1]
    assert not changed(student, before)


def test_a_student_further_than_untrained_goes_on_from_its_best_step_more_slowly(
    teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At eight hundred times the usual rate the first check finds it further than it began."""

    def reached(slower: float) -> float:
        monkeypatch.setattr(module, "_SLOWER", slower)
        student = twin(Decoder(teacher, FAMILIES["llama"])).model
        fine_tune = Recipe(steps=80, train="all", rows=8, rate=0.04)
        losses = distill(*pair(teacher, student), PREFIX, texts(), fine_tune, seed=0)
        start, first, *later = (value for _, value in losses.held_out)
        assert first > start
        return min(later)

    assert reached(0.3) < 0.8 * reached(1.0)


def test_no_steps_change_nothing(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in student.named_parameters()}
    nothing = replace(texts(), training=torch.empty(0, 12, dtype=torch.long))
    fine_tune = Recipe(steps=0, train="all", rows=4)
    losses = distill(*pair(teacher, student), PREFIX, nothing, fine_tune, seed=0)
    assert (losses.training, losses.kept) == ((), 0)
    assert not changed(student, before)


def test_a_fine_tune_that_diverges_is_told(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    fine_tune = Recipe(steps=20, train="all", rows=4, rate=1e30)
    with pytest.raises(AbsorbError, match=r"diverged.*--steps 0"):
        distill(*pair(teacher, student), PREFIX, texts(), fine_tune, seed=0)


def test_a_student_that_gives_no_numbers_is_told(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    student.model.norm.input_scale.data.fill_(float("nan"))
    with pytest.raises(AbsorbError, match="not a number"):
        divergence(*pair(teacher, student), PREFIX, texts().validation)


def test_the_same_seed_gives_the_same_student(teacher: PreTrainedModel) -> None:
    fine_tune = Recipe(steps=4, train="all", rows=4)
    students = [twin(Decoder(teacher, FAMILIES["llama"])).model for _ in range(3)]
    for seed, student in zip((0, 0, 1), students, strict=True):
        distill(*pair(teacher, student), PREFIX, texts(), fine_tune, seed)
    first, second, other = (student.state_dict() for student in students)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_every_row_is_read_once_before_any_comes_again() -> None:
    rows = torch.arange(6)[:, None]
    batches = module._batches(rows, 4, seed=0)
    seen = torch.cat([next(batches) for _ in range(3)]).flatten().tolist()
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    rates = [rate_at(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_user_overrides_what_the_machine_would_choose() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (recipe(Distillation(), cpu).train, recipe(Distillation(), gpu).train) == (
        "sinks",
        "all",
    )
    asked = recipe(Distillation(steps=3, train="scales"), gpu)
    assert (asked.steps, asked.train) == (3, "scales")


def test_the_experts_of_a_mixture_are_trained_too() -> None:
    teacher = tiny("mixtral", torch.float32)
    student = twin(Decoder(teacher, FAMILIES["mixtral"])).model
    choose(student, recipe(Distillation(train="all"), torch.device("cpu")))
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    assert frozen == []


def test_dropout_does_not_blur_the_student() -> None:
    teacher = tiny("gpt2", torch.float32)
    student = twin(Decoder(teacher, FAMILIES["gpt2"])).model
    start = divergence(*pair(teacher, student), PREFIX, texts().validation)
    fine_tune = Recipe(steps=1, train="all", rows=4)
    losses = distill(*pair(teacher, student), PREFIX, texts(), fine_tune, seed=0)
    assert losses.held_out[0][1] == pytest.approx(start, rel=1e-5)
    assert not student.training


@pytest.mark.parametrize(
    ("seconds", "checked"), [(0.7, [0, 11, 22, 33, 43]), (9, [0, 1, 2, 3, 4]), (20, [0, 1, 2])]
)
def test_a_fine_tune_by_the_clock_ends_in_time_and_cools_down(
    seconds: float,
    checked: list[int],
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, rates, rate = count(100, seconds), [], rate_at
    monkeypatch.setattr(module, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module, "rate_at", lambda *at: rates.append(rate(*at)) or rates[-1])
    fine_tune = Recipe(steps=None, minutes=0.5, train="all", rows=4)
    losses = distill(*pair(teacher, student), PREFIX, texts(), fine_tune, seed=0)
    assert [step for step, _ in losses.training] == list(range(1, checked[-1] + 1))
    assert [step for step, _ in losses.held_out] == checked
    assert rates[0] == pytest.approx(1 / 3)  # one second of the three that it warms up for
    cooling = rates[rates.index(max(rates)) :]
    assert cooling == sorted(cooling, reverse=True)
    assert cooling[-1] == 0
    assert losses.held_out[-1][1] < losses.held_out[0][1]


def test_the_clock_is_that_on_the_wall(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    fine_tune = Recipe(steps=None, minutes=0.01, train="sinks", rows=4)
    started = monotonic()
    losses = distill(*pair(teacher, student), PREFIX, texts(), fine_tune, seed=0)
    assert monotonic() - started >= 0.6
    assert losses.training


def test_checks_come_at_every_quarter(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    for steps, expected in ((1, [0, 1]), (3, [0, 1, 2, 3]), (10, [0, 3, 5, 8, 10])):
        fine_tune = Recipe(steps=steps, train="sinks", rows=4)
        losses = distill(*pair(teacher, student), PREFIX, texts(), fine_tune, seed=0)
        assert [step for step, _ in losses.held_out] == expected


@pytest.mark.parametrize("seconds", [0.5, 1.2, 30, 600])
def test_the_learning_rate_by_the_clock_never_exceeds_its_peak(seconds: float) -> None:
    rates = [rate_at(seconds * permille / 1000, seconds) for permille in range(1001)]
    assert min(rates) >= 0
    assert max(rates) <= 1
    assert rates[-1] == 0


def test_minutes_take_the_place_of_steps() -> None:
    asked = recipe(Distillation(minutes=1.5), torch.device("cpu"))
    assert (asked.steps, asked.minutes, asked.training_rows) == (None, 1.5, 32)
    assert str(asked) == "1.5 minutes of steps of 8 x 256 tokens, training sinks"
    assert recipe(Distillation(minutes=1), torch.device("cuda")).training_rows == 1024
