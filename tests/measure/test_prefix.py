"""What the sinks will stand for: the tokens that are sinks in most of the text."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from absorb.measure.outliers import Measurement, measure
from absorb.measure.prefix import strongest_sink
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.schema.settings import Thresholds
from tests.helpers.tiny import LAYERS, tiny

BOS, RARE, USUAL, ODD = 1, 7, 9, 11
LIMITS = Thresholds()


@pytest.fixture
def seen() -> Measurement:
    """Eight rows behind BOS. RARE is a sink in two, USUAL a weaker one in four, ODD in one."""
    tokens = torch.full((8, 15), 20)
    tokens[:2, 3], tokens[2:6, 5], tokens[6, 8] = RARE, USUAL, ODD
    measurement = measure(
        Decoder(tiny("llama", torch.float32), FAMILIES["llama"]), tokens, _only(BOS)
    )
    weight = torch.full((LAYERS, 8, 16), 0.05)
    weight[:, :, 0] = 0.9
    weight[:2, :2, 4], weight[:2, 2:6, 6], weight[:, 6, 9] = 0.5, 0.35, 0.99
    return replace(measurement, token_weight=weight)


def _only(token: int) -> Tensor:
    return torch.tensor([token])


def test_the_sink_of_more_places_comes_before_that_of_one(seen: Measurement) -> None:
    assert strongest_sink(seen, (BOS,), LIMITS) == USUAL


def test_it_does_not_hang_on_which_row_comes_first(seen: Measurement) -> None:
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [1, 0, 3, 2, 5, 4, 7, 6]):
        turned = replace(seen, tokens=seen.tokens[order], token_weight=seen.token_weight[:, order])
        assert strongest_sink(turned, (BOS,), LIMITS) == USUAL


def test_what_stands_in_the_prefix_is_not_asked_for_again(seen: Measurement) -> None:
    assert strongest_sink(seen, (BOS, USUAL), LIMITS) == RARE


def test_a_sink_of_one_row_in_many_is_left_in_the_text(seen: Measurement) -> None:
    alone = replace(seen, tokens=seen.tokens[6:7], token_weight=seen.token_weight[:, 6:7])
    assert strongest_sink(alone, (BOS,), LIMITS) == ODD
    assert strongest_sink(seen, (BOS, USUAL, RARE), LIMITS) is None


def test_weights_below_the_threshold_are_no_sink_however_many(seen: Measurement) -> None:
    weight = seen.token_weight.clone()
    weight[:, :, 10:13] = 0.25  # a token of all rows, and no sink in any
    assert strongest_sink(replace(seen, token_weight=weight), (BOS,), LIMITS) == USUAL
    assert strongest_sink(seen, (BOS,), replace(LIMITS, sink_weight=0.995)) is None
