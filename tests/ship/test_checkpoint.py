"""A checkpoint folder appears complete or not at all, and nobody else's folder is ever lost."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from absorb.errors import AbsorbError
from absorb.ship import staging as checkpoint
from absorb.ship.staging import staged

HOLD = """
import sys
from pathlib import Path
from absorb.ship.staging import staged
with staged(Path(sys.argv[1]), force=False) as partial:
    (partial / "half").write_text("half")
    print("inside", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "model"


def write(out: Path, content: str, force: bool = False) -> None:
    with staged(out, force) as partial:
        (partial / "absorb.json").write_text(content)


class StoppedError(Exception):
    """Stands for whatever ends a conversion early."""


def check_writable(out: Path, force: bool) -> None:
    """Enter the block, and leave it as a conversion does that fails."""
    with suppress(StoppedError), staged(out, force):
        raise StoppedError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def another_conversion(out: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of writing `out`."""
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        yield process
        process.kill()


def test_what_the_block_writes_becomes_the_folder(out: Path) -> None:
    with staged(out, force=False) as partial:
        (partial / "assets").mkdir()
        (partial / "assets" / "file").write_text("text")
        assert not out.exists()
    assert (out / "assets" / "file").read_text() == "text"
    assert names(out.parent) == ["model"]


def test_whoever_the_umask_lets_reads_every_file(out: Path) -> None:
    with staged(out, force=False) as partial:
        (partial / "plain").touch()
        save_file({"scale": torch.ones(1)}, partial / "weights.safetensors")
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert modes == {(out / "plain").stat().st_mode}


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, SystemExit, AbsorbError])
def test_an_exception_leaves_nothing(out: Path, raised: type[BaseException]) -> None:
    def fail() -> None:
        with staged(out / "deep", force=False) as partial:
            (partial / "file").write_text("text")
            raise raised

    with pytest.raises(raised):
        fail()
    assert names(out.parent) == []


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_to_be_replaced(
    out: Path, raised: type[BaseException]
) -> None:
    write(out, "old")
    with pytest.raises(raised), staged(out, force=True):
        raise raised
    assert (out / "absorb.json").read_text() == "old"
    assert names(out.parent) == ["model"]


def test_missing_parents_are_made(out: Path) -> None:
    write(out / "a" / "b", "new")
    assert names(out / "a") == ["b"]


def test_an_empty_folder_is_filled(out: Path) -> None:
    out.mkdir()
    write(out, "new")
    assert names(out) == ["absorb.json"]


def test_a_link_stays_a_link(out: Path, tmp_path: Path) -> None:
    out.mkdir()
    link = tmp_path / "link"
    link.symlink_to(out)
    write(link, "new")
    assert link.is_symlink()
    assert names(out) == ["absorb.json"]


def test_a_checkpoint_is_replaced_only_by_force(out: Path) -> None:
    write(out, "old")
    (out / "old-shard").write_text("old")
    with pytest.raises(AbsorbError, match="is not empty; choose another --out or pass --force"):
        check_writable(out, force=False)
    write(out, "new", force=True)
    assert (out / "absorb.json").read_text() == "new"
    assert names(out) == ["absorb.json"]
    assert names(out.parent) == ["model"]


def test_a_checkpoint_takes_in_no_other(out: Path) -> None:
    write(out, "old")
    with pytest.raises(AbsorbError, match="lies in the checkpoint"):
        write(out / "deep" / "new", "new")
    assert names(out) == ["absorb.json"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_absorb_did_not_write_is_never_replaced(out: Path, force: bool) -> None:
    out.mkdir()
    (out / "thesis").write_text("years of work")
    with pytest.raises(AbsorbError, match="is not empty"), staged(out, force):
        raise AssertionError("the block must not be entered")
    assert names(out) == ["thesis"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_others_filled_meanwhile_is_not_replaced(out: Path, force: bool) -> None:
    def meet_others() -> None:
        with staged(out, force):
            out.mkdir()
            (out / "thesis").write_text("years of work")

    with pytest.raises(AbsorbError, match="is not empty"):
        meet_others()
    assert names(out) == ["thesis"]
    assert names(out.parent) == ["model"]


def test_a_file_in_the_way_is_refused(out: Path) -> None:
    out.write_text("text")
    with pytest.raises(AbsorbError, match="model is a file"):
        check_writable(out, force=True)


def test_a_parent_that_is_a_file_is_refused(out: Path) -> None:
    out.write_text("text")
    with pytest.raises(AbsorbError, match="cannot be written to"):
        check_writable(out / "inside", force=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_refused(out: Path) -> None:
    out.parent.chmod(0o500)
    with pytest.raises(AbsorbError, match="Permission denied"):
        check_writable(out, force=False)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_parent_on_which_nothing_can_be_made_is_refused() -> None:
    with pytest.raises(AbsorbError, match="/proc cannot be written to"):
        check_writable(Path("/proc/model"), force=False)


def test_the_current_folder_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.mkdir()
    monkeypatch.chdir(out)
    with pytest.raises(AbsorbError, match="choose a folder inside it"):
        check_writable(Path(), force=True)


def test_failing_leaves_no_trace(out: Path) -> None:
    check_writable(out / "a" / "b", force=False)
    assert names(out.parent) == []


def test_a_second_conversion_into_the_same_folder_is_refused(out: Path) -> None:
    with another_conversion(out):
        with pytest.raises(AbsorbError, match="another conversion is writing"):
            check_writable(out, force=True)
        with pytest.raises(AbsorbError, match="another conversion is writing"):
            write(out, "new", force=True)
        assert (out.parent / "model.partial" / "half").exists()


def test_what_a_killed_run_left_is_cleared_away(out: Path) -> None:
    with another_conversion(out) as process:
        process.kill()
        process.wait()
    assert names(out.parent) == ["model.lock", "model.partial"]
    check_writable(out, force=False)
    assert names(out.parent) == []


def test_a_run_killed_between_the_two_renames_loses_nothing(out: Path) -> None:
    write(out, "old")
    out.rename(out.with_name("model.replaced"))
    out.with_name("model.partial").mkdir()
    with pytest.raises(AbsorbError, match="pass --force"):
        check_writable(out, force=False)
    assert (out / "absorb.json").read_text() == "old"
    assert names(out.parent) == ["model"]


def test_a_run_killed_after_the_renames_is_finished(out: Path) -> None:
    write(out, "new")
    write(out.with_name("model.replaced"), "old")
    check_writable(out, force=True)
    assert (out / "absorb.json").read_text() == "new"
    assert names(out.parent) == ["model"]


@pytest.mark.parametrize("name", ["model.partial", "model.replaced"])
def test_a_stranger_under_one_of_our_names_is_left_alone(out: Path, name: str) -> None:
    out.mkdir()
    out.with_name(name).write_text("text")
    with pytest.raises(AbsorbError, match=f"{name} is in the way"):
        check_writable(out, force=True)
    assert out.with_name(name).read_text() == "text"


def test_a_failing_rename_restores_what_was_there(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(out, "old")
    rename = Path.rename

    def fail_for_partial(path: Path, target: Path) -> Path:
        if path.name == "model.partial":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_partial)
    with pytest.raises(OSError, match="no"):
        write(out, "new", force=True)
    assert (out / "absorb.json").read_text() == "old"
    assert names(out.parent) == ["model"]


def test_every_file_and_folder_is_flushed_before_the_rename(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(checkpoint, "_sync", synced.append)
    with staged(out, force=False) as partial:
        (partial / "assets").mkdir()
        (partial / "assets" / "file").write_text("text")
    assert set(synced) == {
        partial / "assets" / "file",
        partial / "assets",
        partial,
        out.parent,
    }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(out: Path) -> None:
    with pytest.raises(AbsorbError, match="is full, so model was not written"), staged(out, False):
        Path("/dev/full").write_text("text")
    assert names(out.parent) == []


def test_a_full_disk_under_safetensors_is_one_sentence(out: Path) -> None:
    # What safetensors 0.8 raised on a full disk: no OSError, and the number only in the text.
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(AbsorbError, match="is full"), staged(out, False):
        raise SafetensorError(message)
