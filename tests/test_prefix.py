"""What the sinks will stand for: the tokens that are sinks in most of the text."""

from dataclasses import replace

import pytest
import torch
from tiny import LAYERS, tiny
from torch import Tensor

from absorb.families import FAMILIES
from absorb.measure import Measurement, measure
from absorb.prefix import strongest_sink
from absorb.settings import Thresholds

BOS, RARE, USUAL = 1, 7, 9
LIMITS = Thresholds()


@pytest.fixture
def seen() -> Measurement:
    """Four rows behind BOS. RARE is a sink in one of them, USUAL a weaker one in two."""
    tokens = torch.full((4, 15), 20)
    tokens[0, 3], tokens[1:3, 5] = RARE, USUAL
    measurement = measure(tiny("llama", torch.float32), FAMILIES["llama"], tokens, _only(BOS))
    weight = torch.full((LAYERS, 4, 16), 0.05)
    weight[:, :, 0] = 0.9
    weight[:2, 0, 4], weight[:2, 1:3, 6] = 0.5, 0.35
    return replace(measurement, token_weight=weight)


def _only(token: int) -> Tensor:
    return torch.tensor([token])


def test_the_sink_of_more_places_comes_before_that_of_one(seen: Measurement) -> None:
    assert strongest_sink(seen, (BOS,), LIMITS) == USUAL


def test_it_does_not_hang_on_which_row_comes_first(seen: Measurement) -> None:
    for order in ([3, 2, 1, 0], [1, 0, 3, 2]):
        turned = replace(seen, tokens=seen.tokens[order], token_weight=seen.token_weight[:, order])
        assert strongest_sink(turned, (BOS,), LIMITS) == USUAL


def test_what_stands_in_the_prefix_is_not_asked_for_again(seen: Measurement) -> None:
    assert strongest_sink(seen, (BOS, USUAL), LIMITS) == RARE
    assert strongest_sink(seen, (BOS, USUAL, RARE), LIMITS) is None


def test_weights_below_the_threshold_are_no_sink_however_many(seen: Measurement) -> None:
    weight = seen.token_weight.clone()
    weight[:, :, 7:12] = 0.25  # a token of all rows, and no sink in any
    assert strongest_sink(replace(seen, token_weight=weight), (BOS,), LIMITS) == USUAL
    assert strongest_sink(seen, (BOS,), replace(LIMITS, sink_weight=0.6)) is None
