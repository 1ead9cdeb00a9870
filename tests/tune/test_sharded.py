"""Two processes with a part of every weight each learn what one with all of them does."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from absorb.runtime import precision, ranks
from absorb.schema.training import Recipe
from absorb.tune import distill as module
from absorb.tune.distill import distill
from absorb.tune.state import State
from tests.helpers import warm
from tests.pipelines.test_ranks import told
from tests.tune.test_distill import PREFIX, texts
from tests.tune.test_end_to_end import pair

ALL = Recipe(steps=4, train="all", rows=4)


class Early(module._Check):
    """Looks at all steps, and finds none after the second any good."""

    def __call__(self, step: int) -> None:
        exact = self.loss
        self.loss = lambda rows: exact(rows) + 10 * (step > 2)
        super().__call__(step)
        self.loss = exact


def part(family: str, place: Path) -> None:
    """What each process does: it trains, ends after a state is kept, and goes on from there."""
    from absorb.tune import sharded

    class Ending(sharded.ShardedState):
        def keep_state(self, state: State) -> None:
            super().keep_state(state)
            if state.training_state.steps == 2:
                raise KeyboardInterrupt

    precision._bfloat16_is_fast = lambda device: False
    module._Check = Early
    keeper = sharded.ShardedState
    with ranks.joined("cpu"):
        for run, kind, folder in (
            ("whole", keeper, None),
            ("end", Ending, place),
            ("on", keeper, place),
        ):
            sharded.ShardedState = kind
            teacher, student = pair(family, streamed=True)
            try:
                losses = sharded.distill_sharded(
                    teacher, student, PREFIX, texts(), ALL, 0, folder, place
                )
            except KeyboardInterrupt:
                continue
            with student.streaming.held(lambda parameter: parameter.data.clone()):
                weights = {name: p.detach() for name, p in student.model.named_parameters()}
            torch.save((losses, weights), place / f"{run}-{ranks.number()}")


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_does(
    family: str, in_float32: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order. The embedding of a gpt2 is its head as well."""
    with ThreadPoolExecutor() as pool:
        envs = [os.environ | place for place in told(2)]
        done = pool.map(lambda env: warm.call(part, family, tmp_path, env=env), envs)
    for process in done:
        assert process.returncode == 0, process.stderr
    teacher, student = pair(family, streamed=False)
    monkeypatch.setattr(module, "_Check", Early)
    expected = distill(teacher, student, PREFIX, texts(), ALL, seed=0)
    for run in ("whole", "on"):
        found = [torch.load(tmp_path / f"{run}-{n}", weights_only=False) for n in range(2)]
        (losses, weights), (_, others) = found
        assert losses.kept == expected.kept == 2
        for kind in ("held_out", "training"):
            ours, theirs = (torch.tensor(getattr(one, kind)) for one in (losses, expected))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        for name, tensor in student.model.named_parameters():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
            assert torch.equal(weights[name], others[name])
