"""Outlier channels that are nearly constant are told from those that tell tokens apart."""

import pytest
import torch

from absorb.measure.findings import find
from absorb.measure.outliers import Measurement, measure
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.schema.findings import OutlierChannel
from absorb.schema.settings import Thresholds
from absorb.show.rows import steadiness
from tests.helpers import anatomy
from tests.helpers.anatomy import CONSTANT, HIDDEN, TELLING, VOCABULARY


def measured(size: float) -> Measurement:
    model = anatomy.body("llama")
    anatomy.outlie(model, size)
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(3, VOCABULARY, (4, 64), generator=draw)
    return measure(Decoder(model, FAMILIES["llama"]), text, torch.tensor([1]))


def test_a_constant_channel_is_told_from_one_that_tells_tokens_apart() -> None:
    found = find(measured(40.0), Thresholds()).outlier_channels
    channels = {outlier.channel: outlier for outlier in found}
    assert steadiness(channels[CONSTANT]).startswith("constant, |mean| / std")
    assert steadiness(channels[TELLING]).startswith("informative, |mean| / std")


@pytest.mark.usefixtures("in_float32")
@torch.no_grad()
def test_the_figure_is_the_mean_by_the_standard_deviation() -> None:
    model = anatomy.body("llama")
    anatomy.outlie(model, 40.0)
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(3, VOCABULARY, (4, 64), generator=draw)
    rows = torch.cat([torch.ones(4, 1, dtype=torch.long), text], 1)
    stream = model(rows, output_hidden_states=True).hidden_states[1].double()
    spread = stream.std((0, 1), correction=0)
    expected = stream.mean((0, 1)).abs() / spread
    told = (spread > 1e-3) & (expected < 100)  # float32 has no digits for the others
    assert told.sum() > HIDDEN / 2
    found = measured(40.0).channel_steadiness[0]
    torch.testing.assert_close(found[told], expected[told].float(), rtol=1e-2, atol=1e-3)


def test_what_an_earlier_version_found_says_nothing_of_it() -> None:
    assert steadiness(OutlierChannel(channel=1, layers=(0,), ratio=20.0, share=0.5)) == ""
