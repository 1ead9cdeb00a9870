"""The brief fine-tune: the student learns the teacher's next-token distribution."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.device import hastened
from absorb.divergence import Loss, gap, mean_loss, rows_at_once
from absorb.errors import AbsorbError
from absorb.modeling_absorb import NEUTRAL
from absorb.recipe import Recipe
from absorb.settings import Train
from absorb.state import Standstill, State, captured, put_back
from absorb.text import Texts


class Keeper(Protocol):
    """Remembers where a fine-tune stands, for one that goes on from there."""

    def state(self) -> State | None: ...
    def is_due(self) -> bool: ...
    def keep_state(self, state: State) -> None: ...


# Learning rates by the last part of a parameter's name; what is not named is a weight.
_RATES = {
    "sink": 1e-2,
    "sink_key": 1e-3,
    "sink_value": 1e-3,
    "bias": 1e-3,
    "input_scale": 1e-3,
}
_SINKS = ("sink", "sink_key", "sink_value", "bias")
_TRAINED: dict[Train, tuple[str, ...]] = {
    "sinks": _SINKS,
    "scales": (*_SINKS, "input_scale"),
    "all": (*_SINKS, "input_scale"),  # and all that is stock
}
_WARM_UP = 0.1
_CHECKS = 4  # how often the validation divergence is looked at: at every quarter


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Divergence from the teacher in nats per token: (step, value), and the step that was kept.

    Where nothing was trained, nothing was looked at.
    """

    training: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    kept: int


def distill(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    prefix: Tensor,
    texts: Texts,
    fine_tune: Recipe,
    seed: int,
    keeper: Keeper | None = None,
) -> Losses:
    """Train the student in place to predict what the teacher does, as `train` says.

    The teacher reads the tokens `prefix` (n,) first, the student never does.
    """

    def loss(tokens: Tensor) -> Tensor:
        return gap(teacher, student, prefix, tokens)

    return train(student, loss, texts, fine_tune, seed, keeper)


def train(
    student: PreTrainedModel,
    loss: Loss,
    texts: Texts,
    fine_tune: Recipe,
    seed: int,
    keeper: Keeper | None = None,
) -> Losses:
    """Train the student in place, and keep its best step by the loss on validation text.

    A keeper may have the state of an earlier run, which is then gone on from.
    Limited by minutes, no two runs are the same to the bit: how many steps there are, and the
    learning rate of each, depend on how fast the machine is.
    """
    student.eval()  # dropout would only blur what is to be matched
    if not (fine_tune.steps or fine_tune.minutes):
        student.requires_grad_(False)
        return Losses(training=(), held_out=(), kept=0)
    parameters = _choose(student, fine_tune.train)
    check = _Check(loss, rows_at_once(student), texts.validation, parameters)
    optimizer = _optimizer(student, parameters, fine_tune.rate)
    batches = _batches(texts.training, fine_tune.rows, seed)
    pace = _Pace(fine_tune)
    state = keeper.state() if keeper else None
    if state is None:
        losses: list[tuple[int, float]] = []
        check(0)
    else:
        losses = list(state.standstill.training)
        check.go_on(state.standstill, put_back(state.tensors, parameters, optimizer))
        pace.go_on(state.standstill)
        batches = islice(batches, pace.steps, None)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: _rate(pace.done, pace.whole))
    with pace.bar:
        while pace.done < pace.whole:
            value = _step(loss, student, next(batches), optimizer, parameters)
            check_is_due = pace.count()
            losses.append((pace.steps, value))
            schedule.step()
            if check_is_due:
                check(pace.steps)
            if keeper and (check_is_due or keeper.is_due()):
                tensors = captured(parameters, check.best, optimizer)
                keeper.keep_state(State(standstill=check.at(pace, losses), tensors=tensors))
    check.restore()
    student.requires_grad_(False)
    return Losses(training=tuple(losses), held_out=tuple(check.seen), kept=check.kept)


class _Pace:
    """How far a fine-tune is: `done` of `whole`, in steps or, limited by minutes, in seconds."""

    def __init__(self, fine_tune: Recipe) -> None:
        self.timed = fine_tune.minutes is not None
        self.whole: float = fine_tune.steps or 60 * (fine_tune.minutes or 0)
        self.done: float = 0
        self.steps = 0
        self.started = monotonic()
        self.bar = tqdm(
            total=self.whole,
            desc="fine-tuning",
            unit="s" if self.timed else "step",
            unit_scale=self.timed,
        )

    def go_on(self, state: Standstill) -> None:
        """Take up where an earlier run stopped."""
        self.steps, self.done = state.steps, state.done
        self.started = monotonic() - state.done
        self.bar.update(state.done)

    def count(self) -> bool:
        """Count a step that is over; whether it was the last one of a quarter."""
        before, self.steps = self.done, self.steps + 1
        self.done = monotonic() - self.started if self.timed else self.steps
        self.bar.update(min(self.done, self.whole) - before)
        return _CHECKS * self.done // self.whole > _CHECKS * before // self.whole


def _choose(student: PreTrainedModel, train: Train) -> list[nn.Parameter]:
    chosen = []
    for name, parameter in student.named_parameters():
        last = name.rpartition(".")[2]
        stock = train == "all" and last not in NEUTRAL
        parameter.requires_grad_(stock or last in _TRAINED[train])
        if parameter.requires_grad:
            chosen.append(parameter)
    return chosen


def _optimizer(
    student: PreTrainedModel, parameters: list[nn.Parameter], weight_rate: float
) -> torch.optim.AdamW:
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            rate = _RATES.get(name.rpartition(".")[2], weight_rate)
            groups.setdefault(rate, []).append(parameter)
    settings = [{"params": group, "lr": rate} for rate, group in groups.items()]
    return torch.optim.AdamW(settings, betas=(0.9, 0.95), weight_decay=0.0)


def _rate(done: float, whole: float) -> float:
    """Linear warm-up, then a cosine down to zero, after `done` of `whole` steps or seconds."""
    warm = max(1, round(_WARM_UP * whole))
    if done >= whole:
        return 0.0
    if done < warm:
        return min(1.0, (done + 1) / warm)
    return 0.5 * (1 + math.cos(math.pi * (done - warm) / (whole - warm)))


def _batches(training: Tensor, rows: int, seed: int) -> Iterator[Tensor]:
    """Batches (rows, length) without end, every row once before any comes again."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < rows:
            order = torch.cat([order, torch.randperm(len(training), generator=draw)])
        yield training[order[:rows]]
        order = order[rows:]


def _step(
    loss: Loss,
    student: PreTrainedModel,
    batch: Tensor,
    optimizer: torch.optim.AdamW,
    parameters: list[nn.Parameter],
) -> float:
    total = 0.0
    for part in batch.split(rows_at_once(student)):
        with hastened(student.device):
            share = loss(part) * len(part) / len(batch)
        share.backward()
        total += share.item()
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    if not math.isfinite(total + norm.item()):
        raise AbsorbError(
            "the fine-tune diverged (its loss is not a number any more); "
            "convert with --steps 0, or with --train sinks"
        )
    optimizer.step()
    optimizer.zero_grad()
    return total


class _Check:
    """Measures the loss on validation text, and keeps a copy of the best parameters."""

    def __init__(
        self, loss: Loss, rows: int, validation: Tensor, parameters: list[nn.Parameter]
    ) -> None:
        self.loss, self.rows = loss, rows
        self.validation, self.parameters = validation, parameters
        self.seen: list[tuple[int, float]] = []
        self.kept = 0
        self.best: list[Tensor] = []

    def __call__(self, step: int) -> None:
        value = mean_loss(self.loss, self.validation, self.rows)
        if value < min((before for _, before in self.seen), default=math.inf):
            self.kept = step
            self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.seen.append((step, value))

    def at(self, pace: _Pace, losses: list[tuple[int, float]]) -> Standstill:
        return Standstill(
            steps=pace.steps,
            done=pace.done,
            training=tuple(losses),
            held_out=tuple(self.seen),
            kept=self.kept,
        )

    def go_on(self, state: Standstill, best: list[Tensor]) -> None:
        """Take up what an earlier run had measured."""
        self.seen, self.kept, self.best = list(state.held_out), state.kept, best

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, best in zip(self.parameters, self.best, strict=True):
            parameter.copy_(best)
