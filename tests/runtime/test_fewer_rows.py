"""Where memory is short fewer rows are read at once, and figures stay what they are."""

import logging
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from absorb.errors import AbsorbError
from absorb.fold.graft import twin
from absorb.measure import divergence as apart
from absorb.measure import score
from absorb.measure.divergence import divergence
from absorb.measure.outliers import measure
from absorb.measure.score import losses, tallies
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.resting.streaming import Streaming
from absorb.quantize.ranges import clipped_ranges
from absorb.runtime.inputs import input_peaks
from absorb.runtime.reading import Subject
from absorb.schema.settings import Thresholds
from tests.helpers.tiny import tiny

NOTHING = torch.tensor([], dtype=torch.long)
CPU = torch.device("cpu")


def text() -> torch.Tensor:
    return torch.randint(0, 60, (6, 12), generator=torch.Generator().manual_seed(0))


def decoder_of(streams: bool) -> Decoder:
    model = tiny("llama", torch.float32)
    plain = Decoder(model, FAMILIES["llama"])
    return Decoder(model, plain.family, Streaming(model, plain.layers, CPU)) if streams else plain


def with_room_for(rows: int, decoder: Decoder) -> None:
    """Let the last layer run out of memory with more rows than that, once its hooks have seen."""

    def refuse(_: Any, args: tuple[torch.Tensor, ...], __: Any) -> None:
        if len(args[0]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    decoder.layers[-1].register_forward_hook(refuse)


def measured(decoder: Decoder) -> Any:
    found = measure(decoder, text(), NOTHING)
    return found.channel_mean, found.median, found.first_weight, found.token_peak


def seen(decoder: Decoder) -> Any:
    subject = Subject(decoder=decoder)
    [tally] = tallies([subject], subject, text())
    return astuple(tally.figures(Thresholds()))


def apart_from_itself(decoder: Decoder) -> Any:
    return divergence(decoder, twin(decoder), torch.tensor([1]), text())


FIGURES: dict[str, Callable[[Decoder], Any]] = {
    "measurement": measured,
    "tallies": seen,
    "losses": lambda decoder: losses(Subject(decoder=decoder), text(), ""),
    "inputs": lambda decoder: input_peaks(decoder, text()),
    "ranges": lambda decoder: clipped_ranges(decoder, text()),
    "divergence": apart_from_itself,
}


@pytest.fixture(autouse=True)
def four_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many are read at once of the text, wherever the number depends on the device."""
    monkeypatch.setattr(score, "_TOKENS", 4 * 12)
    monkeypatch.setattr(score, "ROWS_AT_ONCE", {"cpu": 4})
    monkeypatch.setattr(apart, "rows_at_once", lambda *_: 4)


@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("name", sorted(FIGURES))
def test_figures_stay_what_they_are(
    name: str, streams: bool, in_float32: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Products of fewer rows may add up in another order: 1e-5 of float32."""
    expected = FIGURES[name](decoder_of(streams))
    short = decoder_of(streams)
    with_room_for(1, short)
    with caplog.at_level(logging.WARNING, "absorb"):
        found = FIGURES[name](short)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    halved = [record.getMessage() for record in caplog.records]
    said = "memory is short, so rows of text are read {} at once"
    assert halved == [said.format(2), said.format(1)]


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_what_cannot_read_one_row_is_refused(name: str) -> None:
    short = decoder_of(streams=True)
    with_room_for(0, short)
    with pytest.raises(AbsorbError, match="there is no memory for one row of text at once"):
        FIGURES[name](short)


def test_weights_come_anew_where_memory_ran_out_on_their_way(in_float32: None) -> None:
    def found(lacking: list[int]) -> Any:
        """What is measured of folded layers, where there is no memory for these the first time."""
        decoder = decoder_of(streams=True)
        assert decoder.streaming is not None

        def fold(layer: int) -> None:
            if layer in lacking:
                lacking.remove(layer)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            decoder.layers[layer].mlp.down_proj.weight.mul_(2)

        decoder.streaming.fold = fold
        return measured(decoder)

    lacking = [1]
    assert_close(found(lacking), found([]), rtol=1e-5, atol=1e-6)
    assert not lacking
