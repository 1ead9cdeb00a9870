"""A conversion that was stopped goes on where it was, and the result is the same to the bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from absorb.cli.main import main
from absorb.ship import resume as module
from absorb.ship.resume import Progress
from absorb.tune.state import State


class StoppedError(Exception):
    """Stands for whatever ends a conversion early."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + n * n * 7 % 23 + n % 3) for n in range(13_000)))
    return path


pytestmark = pytest.mark.usefixtures("little_text")


def convert(original: Path, out: Path, text: Path, *options: str) -> Result:
    command = ["convert", original, "--out", out, "--text", text, "--steps", "8", *options]
    return CliRunner().invoke(main, [str(word) for word in command])


def stop_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """End a conversion once it has kept its state so many times; 0: once it has kept the plan."""
    keep_draft, keep_state, count = Progress.keep_draft, Progress.keep_state, iter(range(saves + 1))

    def counted(keep: Callable[..., None]) -> Callable[..., None]:
        def keep_and_stop(*arguments: object) -> None:
            keep(*arguments)
            if next(count) == saves:
                raise StoppedError

        return keep_and_stop

    monkeypatch.setattr(Progress, "keep_draft", counted(keep_draft))
    monkeypatch.setattr(Progress, "keep_state", counted(keep_state))


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        (["--train", "sinks"], (1,)),
        pytest.param(["--train", "all", "--for", "int8"], (0, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_the_result_is_that_of_an_uninterrupted_run(
    options: list[str], stops: tuple[int, ...], original: Path, text: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole" / "model", tmp_path / "model"
    assert convert(original, whole, text, *options).exit_code == 0
    for saves in stops:
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, saves)
            stopped = convert(original, out, text, *options, "--resume")
        assert isinstance(stopped.exception, StoppedError)
        assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.progress"]
    resumed = convert(original, out, text, *options, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "resumed" in resumed.stderr
    assert "fitting sinks" not in resumed.stderr
    for name in ("model.safetensors", "absorb.json", "plan/plan.safetensors", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model"]


@pytest.fixture
def stopped(original: Path, text: Path, tmp_path: Path) -> Path:
    """What a conversion left that was stopped in its fine-tune: the place of its output."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        convert(original, tmp_path / "model", text, "--resume")
    return tmp_path / "model"


def test_what_differs_is_named(original: Path, stopped: Path, text: Path) -> None:
    other = convert(original, stopped, text, "--resume", "--seed", "1")
    assert other.exit_code == 1
    assert "another set of arguments" in other.stderr
    text.write_text(text.read_text() + "a")
    other = convert(original, stopped, text, "--resume")
    assert other.exit_code == 1
    assert "another text" in other.stderr
    assert not stopped.exists()


def test_another_version_is_named(
    original: Path, stopped: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "versions", lambda: {"absorb": "9"})
    other = convert(original, stopped, text, "--resume")
    assert other.exit_code == 1
    assert "another version" in other.stderr


@pytest.mark.parametrize("name", ["state.safetensors", "texts.safetensors", "plan.safetensors"])
def test_damage_is_named(original: Path, stopped: Path, text: Path, name: str) -> None:
    file = stopped.with_name("model.progress") / name
    file.write_bytes(file.read_bytes()[:-9])
    other = convert(original, stopped, text, "--resume")
    assert other.exit_code == 1
    assert name in other.stderr


def test_without_resume_nothing_is_kept_and_what_was_kept_is_not_used(
    original: Path, stopped: Path, text: Path
) -> None:
    anew = convert(original, stopped, text)
    assert anew.exit_code == 0, anew.output
    assert "fitting sinks" in anew.stderr
    assert not stopped.with_name("model.progress").exists()


def test_a_state_is_kept_every_minute(
    original: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS", -1)
    kept: list[int] = []
    keep = Progress.keep_state

    def noted(progress: Progress, state: State) -> None:
        kept.append(state.training_state.steps)
        keep(progress, state)

    monkeypatch.setattr(Progress, "keep_state", noted)
    assert convert(original, tmp_path / "model", text, "--resume").exit_code == 0
    assert kept == [*range(1, 9)]
