"""What a conversion needs is told in its first seconds, and refused where it is not there."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import absorb
from absorb.errors import AbsorbError
from absorb.load import source as loading
from absorb.measure.pace import pace_of
from absorb.pipelines import needs
from absorb.schema.settings import ModelRef
from absorb.schema.training import Recipe
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    tiny("llama", torch.float32, max_position_embeddings=512).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(letters(26_000))
    return folder


def refused(source: Path, out: Path) -> str:
    with pytest.raises(AbsorbError) as caught:
        absorb.convert(source, out, text=source / "text.txt", steps=0)
    assert not out.exists()
    return str(caught.value)


def test_a_disk_without_room_is_refused_before_anything_is_measured(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: full)
    assert "make room, or name another place with --out" in refused(source, tmp_path / "out")


def test_a_layer_that_fits_nowhere_is_refused_with_what_would_fit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (loading, needs):
        monkeypatch.setattr(module, "free_memory", lambda device: 0)
    assert "pass --train sinks or --steps 0" in refused(source, tmp_path / "out")


def test_needs_are_told(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="absorb"):
        absorb.convert(source, tmp_path / "out", text=source / "text.txt", steps=0)
    [told] = [line for line in caplog.messages if line.startswith("the conversion needs")]
    assert "of disk" in told
    assert any(line.startswith("it takes about ") for line in caplog.messages)


@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_the_time_that_is_told_grows_with_what_is_read(
    way: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "streamed":
        monkeypatch.setattr(loading, "free_memory", lambda device: 0)
    device = torch.device("cpu")
    loaded = loading.load(ModelRef(name=str(source)), device=device)
    pace = pace_of(loaded.decoder)
    monkeypatch.setattr(needs, "pace_of", lambda decoder: pace)
    times = [
        needs.seconds_of(loaded, Recipe(steps=steps, train="all", rows=8), plan_is_read)
        for plan_is_read, steps in ((True, 0), (False, 0), (False, 10), (False, 100))
    ]
    assert times[0] > 0
    assert times == sorted({*times})
