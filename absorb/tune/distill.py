"""The brief fine-tune: the student learns the teacher's next-token distribution."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from time import monotonic
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.errors import AbsorbError
from absorb.measure.divergence import Loss, gap, mean_loss, rows_at_once
from absorb.models.decoder import Decoder
from absorb.runtime import ranks
from absorb.runtime.precision import Rows, autocast_bf16
from absorb.runtime.reading import Subject
from absorb.schema.training import Losses, Recipe
from absorb.text.gather import Texts
from absorb.tune.optimizer import choose, optimizer_of, rate_at
from absorb.tune.state import State, TrainingState, is_of, restored, snapshot

Found = TypeVar("Found")


class Keeper(Protocol):
    """Remembers where a fine-tune stands, for one that goes on from there."""

    def state(self) -> State | None: ...
    def is_due(self) -> bool: ...
    def keep_state(self, state: State) -> None: ...


_CHECKS = 4  # how often the validation divergence is looked at: at every quarter
_SLOWER = 0.3  # times the rate, from a check on that found the student no closer than untrained


def distill(
    teacher: Decoder,
    student: Decoder,
    prefix: Tensor,
    texts: Texts,
    fine_tune: Recipe,
    seed: int,
    keeper: Keeper | None = None,
) -> Losses:
    """Train the student in place to predict what the teacher does, as `train` says.

    The teacher reads the tokens `prefix` (n,) first, the student never does.
    """
    loss = partial(gap, Subject(decoder=teacher, lead=prefix), Subject(decoder=student))
    return train(student.model, loss, texts, fine_tune, seed, keeper)


def train(
    student: PreTrainedModel,
    loss: Loss,
    texts: Texts,
    fine_tune: Recipe,
    seed: int,
    keeper: Keeper | None = None,
    at_once: int | None = None,
) -> Losses:
    """Train the student in place, and keep its best step by the loss on validation text.

    Where a check finds it no better than untrained, it goes on from its best step more slowly: how
    fast a model may learn depends on how close it is already.
    A keeper may have the state of an earlier run, which is then gone on from. So many rows are read
    `at_once`, or as many as the memory allows, and fewer from when it is short.
    Limited by minutes, no two runs are the same to the bit: how many steps there are, and the
    learning rate of each, depend on how fast the machine is.
    """
    student.eval()  # dropout would only blur what is to be matched
    if not fine_tune.trains:
        return _untrained(student)
    parameters = choose(student, fine_tune)
    most = max(fine_tune.rows, len(texts.validation))
    reading = _Reading(student, parameters, most, at_once)
    check = _Check(loss, reading, texts.validation, parameters)
    optimizer = optimizer_of(student, parameters, fine_tune.rate)
    pace = _Pace(fine_tune)
    losses: list[tuple[int, float]] = []
    state = _found(keeper, parameters) if keeper else None
    if state is None:
        check(0)
    else:
        losses += state.training_state.training
        pace.go_on(state.training_state)
        check.go_on(state.training_state, restored(state.tensors, parameters, optimizer))
        state.tensors.clear()  # they are where they belong
    batches = islice(_batches(texts.training, fine_tune.rows, seed), pace.steps, None)
    schedule = LambdaLR(optimizer, lambda _: check.rate * rate_at(pace.done, pace.whole))
    with pace.bar:
        while pace.done < pace.whole:
            value = _step(loss, reading, next(batches), optimizer, parameters)
            check_is_due = pace.count()
            losses.append((pace.steps, value))
            if check_is_due:
                check(pace.steps)
                if check.is_lost:
                    check.restore()
            schedule.step()
            if keeper and (check_is_due or keeper.is_due()):
                tensors = snapshot(parameters, check.best, optimizer)
                keeper.keep_state(State(training_state=check.at(pace, losses), tensors=tensors))
    check.restore()
    student.requires_grad_(False)
    return Losses(training=tuple(losses), held_out=tuple(check.seen), kept=check.kept)


class _Reading:
    """How many rows a student reads at once: so many, or what fits, and fewer in need."""

    def __init__(
        self,
        student: PreTrainedModel,
        parameters: list[nn.Parameter],
        most: int,
        given: int | None,
    ):
        self.student, self.given = student, given
        # Where weights are shared out all processes ask for each layer together, so none may read
        # in more parts than others: it ends instead, and they with it. Elsewhere they meet when
        # all parts are read.
        self.alike = any(ranks.is_shared_out(parameter) for parameter in parameters)
        self.rows = Rows(most)

    def __call__(self, find: Callable[[int], Found]) -> Found:
        """What `find` gives, which is told how many."""
        self.rows.at_once = min(self.rows.at_once, self._fitting())
        return find(self.rows.at_once) if self.alike else self.rows.read(find)

    def _fitting(self) -> int:
        return self.given or rows_at_once(self.student, self.student.device)


def _found(keeper: Keeper, parameters: list[nn.Parameter]) -> State | None:
    """Where an earlier run stood that trained the same: with other memory free it trains others."""
    state = keeper.state()
    return state if state is not None and is_of(state.tensors, parameters) else None


def _untrained(student: PreTrainedModel) -> Losses:
    student.requires_grad_(False)
    return Losses(training=(), held_out=(), kept=0)


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

    def go_on(self, state: TrainingState) -> None:
        """Take up where an earlier run stopped."""
        self.steps, self.done = state.steps, state.done
        self.started = monotonic() - state.done
        self.bar.update(state.done)

    def count(self) -> bool:
        """Count a step that is over; whether it was the last one of a quarter."""
        before, self.steps = self.done, self.steps + 1
        passed = torch.tensor(monotonic() - self.started, dtype=torch.float64)
        # No two clocks agree, and processes have to.
        self.done = float(ranks.largest(passed)) if self.timed else self.steps
        self.bar.update(min(self.done, self.whole) - before)
        return _CHECKS * self.done // self.whole > _CHECKS * before // self.whole


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
    reading: _Reading,
    batch: Tensor,
    optimizer: torch.optim.AdamW,
    parameters: list[nn.Parameter],
) -> float:
    """One step on a batch (rows, length), of which this process reads its share."""
    own, rows = ranks.share(batch), len(batch) * ranks.readers(len(batch))

    def added(at_once: int) -> float:
        """The sum of losses, whose gradients add up. All count alike, however they are read."""
        optimizer.zero_grad()  # of parts that were read before memory ran out
        total = 0.0
        for part in own.split(at_once):
            with autocast_bf16(parameters[0].device):
                share = loss(part) * len(part) / rows
            share.backward()
            total += share.item()
        return total

    total = reading(added)
    ranks.add_gradients(parameters)
    total = ranks.mean(total) * ranks.count()
    norm = ranks.clip_gradients(parameters)
    if not math.isfinite(total + norm):
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
        self, loss: Loss, reading: _Reading, validation: Tensor, parameters: list[nn.Parameter]
    ) -> None:
        self.loss, self.reading = loss, reading
        self.validation, self.parameters = validation, parameters
        self.seen: list[tuple[int, float]] = []
        self.kept = 0
        self.best: list[Tensor] = []

    def __call__(self, step: int) -> None:
        value = ranks.mean(self.reading(partial(mean_loss, self.loss, self.validation)))
        if value < min((before for _, before in self.seen), default=math.inf):
            self.kept = step
            self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.seen.append((step, value))

    @property
    def is_lost(self) -> bool:
        """Whether the student is no closer than untrained."""
        return self.seen[-1][1] >= self.seen[0][1]

    @property
    def rate(self) -> float:
        """The share of the rate that is left after all checks that found it so."""
        start, *later = (value for _, value in self.seen)
        return float(_SLOWER ** sum(value >= start for value in later))

    def at(self, pace: _Pace, losses: list[tuple[int, float]]) -> TrainingState:
        return TrainingState(
            steps=pace.steps,
            done=pace.done,
            training=tuple(losses),
            held_out=tuple(self.seen),
            kept=self.kept,
        )

    def go_on(self, state: TrainingState, best: list[Tensor]) -> None:
        """Take up what an earlier run had measured."""
        self.seen, self.kept, self.best = list(state.held_out), state.kept, best

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, best in zip(self.parameters, self.best, strict=True):
            parameter.copy_(best)
        ranks.forget_whole(self.reading.student)
