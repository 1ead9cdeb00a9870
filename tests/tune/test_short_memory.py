"""A fine-tune reads fewer rows at once from when memory is short, and learns the same."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from absorb.errors import AbsorbError
from absorb.measure import divergence
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.schema.training import Recipe
from absorb.tune import blockwise, distill, end_to_end
from tests.helpers.plans import neutral_plan
from tests.tune.test_distill import PREFIX, texts
from tests.tune.test_end_to_end import pair

ALL = Recipe(steps=4, train="all", rows=8)
FEW = replace(ALL, by_layers=True, end_steps=4).at_the_end
Weights = dict[str, Tensor]


def at_hand(teacher: Decoder, student: Decoder, place: Path) -> Weights:
    losses = distill.distill(teacher, student, PREFIX, texts(), ALL, seed=0)
    assert losses.kept > 0
    return {name: p.detach() for name, p in student.model.named_parameters()}


def held(teacher: Decoder, student: Decoder, place: Path) -> Weights:
    losses = end_to_end.distill_held(teacher, student, PREFIX, texts(), FEW, None, 0, None)
    assert losses.kept > 0
    assert student.streaming is not None
    names = {parameter: name for name, parameter in student.model.named_parameters()}
    return {names[parameter]: tensor for parameter, tensor in student.streaming.learned.items()}


def one_by_one(teacher: Decoder, student: Decoder, place: Path) -> Weights:
    """The layers as they are kept: those that are better than untrained."""
    plan = neutral_plan(FAMILIES["llama"], prefix=(1,))
    place.mkdir(exist_ok=True)
    blockwise.distill_layers(teacher, student, plan, texts(), ALL, None, place)
    kept = {file.stem: load_file(file) for file in place.iterdir()}
    assert any(kept.values())
    return {f"{layer}.{name}": tensor for layer in kept for name, tensor in kept[layer].items()}


WAYS: dict[str, Callable[[Decoder, Decoder, Path], Weights]] = {
    "at_hand": at_hand,
    "held": held,
    "one_by_one": one_by_one,
}


def trained(
    way: str, rows: int, place: Path, patch: pytest.MonkeyPatch, limit: int = 8, after: int = 0
) -> Weights:
    """Weights that have learned by so many rows at once, where no more than `limit` fit in memory
    once the first layer of the student was called `after` times."""
    patch.setattr(distill, "rows_at_once", lambda *_: rows)
    patch.setattr(divergence, "rows_at_once", lambda *_: 2)
    patch.setattr(end_to_end, "rows_in", lambda *_: rows)
    patch.setattr(blockwise, "_rows_at_once", lambda *_: rows)
    teacher, student = pair("llama", streamed=way != "at_hand")
    calls = 0

    def refuse(_: Any, args: tuple[Tensor, ...], __: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after and len(args[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    student.layers[0].register_forward_hook(refuse)
    return WAYS[way](teacher, student, place)


# Memory runs out as validation text is read, in the second part of a step, in what the first one's
# gradients compute anew, and on the way through a layer that has learned.
@pytest.mark.parametrize(
    ("way", "after"),
    [
        *(("at_hand", 0), ("at_hand", 5)),
        *(("held", 0), ("held", 5), ("held", 6)),
        *(("one_by_one", 8), ("one_by_one", 13), ("one_by_one", 29)),
    ],
)
def test_a_step_without_memory_is_repeated_by_fewer_rows(
    way: str,
    after: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_float32: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To the rounding of float32: the same parts are read in the end. A part whose gradients are
    added twice moves weights by more than a thousandth."""
    expected = trained(way, 2, tmp_path / "few", monkeypatch)
    with caplog.at_level(logging.WARNING, "absorb"):
        found = trained(way, 4, tmp_path / "short", monkeypatch, limit=2, after=after)
    assert [record.getMessage() for record in caplog.records] == [
        "memory is short, so rows of text are read 2 at once"
    ]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_a_fine_tune_that_cannot_read_one_row_is_refused(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AbsorbError, match="there is no memory for one row of text at once"):
        trained(way, 4, tmp_path / "none", monkeypatch, limit=0, after=9)
