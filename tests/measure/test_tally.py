"""Figures are what they are said to be, and no batch that rows are read in changes them."""

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from absorb.measure.findings import find
from absorb.measure.outliers import Measurement, measure
from absorb.measure.score import tallies
from absorb.measure.tally import (
    Tally,
    first_token_attention,
    is_massive,
    kurtosis,
    outlier_tokens,
    row_medians,
    token_attention,
    token_ratios,
)
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.runtime.reading import Subject
from absorb.schema.settings import Thresholds
from tests.helpers.tiny import VOCABULARY, tiny

LEAD = torch.tensor([1])
ROWS = 7  # so that the last batch is smaller than the others


@pytest.fixture
def text() -> Tensor:
    """Rows that differ: the first repeats one token, and another token is an outlier in some."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCABULARY, (ROWS, 16), generator=generator)
    rows[0] = rows[0, 0]
    rows[1, 3] = rows[5, 5] = 2
    return rows


def in_batches(find: Callable[[], Any], name: str, values: tuple[int, ...]) -> list[Any]:
    """What is found with each of the values in the place of a constant."""
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for value in values:
            patch.setattr(name, value)
            found.append(find())
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_measurement_does_not_depend_on_how_many_rows_are_read_at_once(
    family: str, text: Tensor
) -> None:
    model = tiny(family)
    with torch.no_grad():
        model.get_input_embeddings().weight[2] *= 3000  # an outlier token, and a massive one

    def measured() -> Measurement:
        return measure(Decoder(model, FAMILIES[family]), text, LEAD)

    alone, *others = in_batches(measured, "absorb.measure.outliers.ROWS", (1, 3, ROWS))
    found = find(alone, Thresholds())
    assert found.outlier_tokens > 0
    for other in others:
        for field in fields(Measurement):
            # Of float32: attention weights are that in a model of float64, too.
            torch.testing.assert_close(
                getattr(other, field.name), getattr(alone, field.name), rtol=1e-5, atol=1e-6
            )
        assert find(other, Thresholds()).outlier_tokens == found.outlier_tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_no_figure_depends_on_how_many_rows_are_read_at_once(family: str, text: Tensor) -> None:
    model, teacher = tiny(family, torch.float32), tiny(family, torch.float32)
    decoder = Decoder(model, FAMILIES[family])
    with torch.no_grad():
        model.get_input_embeddings().weight[2] *= 3000
    subjects = [Subject(decoder=decoder), Subject(decoder=decoder, lead=LEAD)]

    def scored() -> list[dict[str, Any]]:
        reference = Subject(decoder=Decoder(teacher, FAMILIES[family]), lead=LEAD)
        return [shown(t) for t in tallies(subjects, reference, text, inputs=True)]

    length = text.shape[1]
    alone, *others = in_batches(
        scored, "absorb.measure.score._TOKENS", (length, 3 * length, ROWS * length)
    )
    assert alone[0]["massive_tokens"] > 0
    for other in others:
        for one, expected in zip(other, alone, strict=True):
            assert one == pytest.approx(expected, rel=2e-5, abs=1e-6)


def shown(tally: Tally) -> dict[str, Any]:
    """Every figure of a tally by its name."""
    names = ("agreement", "token_ratio", "kurtosis")
    single = {name: getattr(tally, name) for name in names}
    heads = {f"head {i}": w for i, w in enumerate(tally.head_weights.flatten().tolist())}
    losses = {f"row {i}": loss for i, loss in enumerate(tally.row_losses.tolist())}
    figures = asdict(tally.figures(Thresholds()))
    return figures | single | heads | losses | tally.input_kurtosis


def test_what_is_found_and_what_is_scored_are_the_same_figures(text: Tensor) -> None:
    model, family = tiny("llama"), FAMILIES["llama"]  # in float64 no product is hastened
    with torch.no_grad():
        model.get_input_embeddings().weight[2] *= 3000
    subject = Subject(decoder=Decoder(model, family), lead=LEAD)
    measurement = measure(Decoder(model, family), text, LEAD)
    [tally] = tallies([subject], subject, text)
    torch.testing.assert_close(tally.peaks.all(), measurement.token_peak)
    torch.testing.assert_close(tally.medians.mean(), measurement.median)
    torch.testing.assert_close(tally.head_weights, measurement.first_weight)


def test_a_median_is_of_the_entries_of_its_row() -> None:
    size = torch.tensor([[[1.0, 2.0], [3.0, 9.0]], [[0.0, 0.0], [5.0, 5.0]]])
    assert row_medians(size).tolist() == [2.0, 0.0]  # of two in the middle the lower


def test_a_massive_activation_is_large_and_a_large_multiple() -> None:
    peaks = torch.tensor([[[50.0, 150.0]], [[150.0, 1500.0]]])
    medians = torch.tensor([0.01, 1.0])
    found = is_massive(peaks, medians, Thresholds())
    assert found.tolist() == [[[False, True]], [[False, True]]]


def test_an_outlier_token_is_one_in_its_own_row() -> None:
    small, large = torch.full((5,), 1.0), torch.full((5,), 100.0)
    small[1], large[3] = 70, 70
    peaks = torch.stack([small, large])
    assert outlier_tokens(peaks, Thresholds()).nonzero().tolist() == [[0, 1]]
    assert float(token_ratios(peaks).max()) == 70


def test_attention_on_a_token_is_a_mean_over_heads_and_later_queries() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 5, 5, generator=draw)
    weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    first, each = first_token_attention(weights), token_attention(weights)
    for row in range(2):
        for head in range(3):
            expected = sum(weights[row, head, query, 0] for query in range(1, 5)) / 4
            assert first[row, head] == pytest.approx(float(expected))
        for key in range(4):
            later = weights[row, :, key + 1 :, key]
            assert each[row, key] == pytest.approx(float(later.mean()))
    assert each[:, 4].tolist() == [0, 0]  # no query is later than the last
    torch.testing.assert_close(first.mean(1), each[:, 0])


def test_kurtosis_is_that_of_known_distributions() -> None:
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(1000, 100, generator=draw)
    assert float(kurtosis(7 + 3 * normal)) == pytest.approx(3, rel=0.03)
    assert float(kurtosis(torch.tensor([-1.0, 1.0]))) == 1
    lone = torch.zeros(1000)
    lone[3] = 1e4
    assert float(kurtosis(lone)) == pytest.approx(1000, rel=0.01)
