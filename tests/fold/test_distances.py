"""Sinks are fitted to keys that are far away, as far as a model sees, and to near ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from absorb.fold.sinks.choose import fit_sinks
from absorb.fold.sinks.distances import spread_positions
from absorb.fold.sinks.prefix_cache import Prefix, prefix_of
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from tests.helpers.tiny import tiny

LENGTH = 16
TEXT = torch.arange(3, 3 + 8 * LENGTH).view(8, LENGTH) % 50


def known(family: str, **settings: Any) -> tuple[Decoder, Prefix]:
    decoder = Decoder(tiny(family, torch.float64, **settings), FAMILIES[family])
    return decoder, prefix_of(decoder, torch.tensor([7]))


def spread(family: str, **settings: Any) -> Tensor:
    return spread_positions(*known(family, **settings), TEXT)


def test_a_quarter_of_the_rows_skips_up_to_the_longest_text() -> None:
    positions = spread("llama", max_position_embeddings=1024)
    near = torch.arange(1, 1 + LENGTH)
    assert torch.equal(positions[:6], near.expand(6, -1))
    assert positions[:, 0].eq(1).all()
    skips = positions.diff(dim=1)
    assert (skips > 1).sum(1).tolist() == [0] * 6 + [1, 1]
    assert LENGTH < positions[6, -1] < positions[7, -1] == 1023


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"max_position_embeddings": LENGTH}),
        ("mistral", {"max_position_embeddings": 1024, "sliding_window": LENGTH}),
        ("opt", {}),
    ],
)
def test_no_row_skips_where_a_text_cannot_be_longer(family: str, settings: dict[str, Any]) -> None:
    positions = spread(family, **settings)
    assert positions.diff(dim=1).eq(1).all()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sinks_of_every_family_are_fitted_to_rows_that_skip(family: str) -> None:
    decoder, prefix = known(family)
    fits = [fit for fit in fit_sinks(decoder, prefix, TEXT[:4, :8]) if fit]
    assert fits
    assert all(0 <= fit.error <= 1 for fit in fits)
    skips = spread_positions(decoder, prefix, TEXT[:4, :8]).diff(dim=1).amax() > 1
    assert skips == bool(decoder.rotating)
