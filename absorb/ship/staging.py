"""A folder that appears complete or not at all: filled as DIR.partial, flushed, then renamed.

DIR.lock keeps a second conversion out of the same folder meanwhile. A run that was killed may leave
DIR.lock, DIR.partial or DIR.replaced behind; the next one takes them over.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from tqdm import tqdm

from absorb.errors import AbsorbError
from absorb.schema.places import expanded
from absorb.ship.files import full_disk_explained, unwritable_explained, with_parents

# Every checkpoint that absorb writes holds this file; a folder without it is never replaced.
REPORT = "absorb.json"


@contextmanager
def staged(out: Path, force: bool) -> Iterator[Path]:
    """An empty folder to fill. It becomes `out` when the block ends, or is gone if that raises.

    The lock is held for the whole block, so enter it before the long work to keep others out.
    """
    out = _real(out)
    partial = _beside(out, "partial")
    with _locked(out), full_disk_explained(out):
        _prepare(out, force)
        try:
            partial.mkdir()
            yield partial
            _let_read(partial)
            _flush(partial)
            _swap(partial, out, force)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def digests(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint but its report, by its path in the folder.

    What begins with a dot is the business of git and of the Hub's cache. Those that are `known` are
    taken as they are.
    """
    paths = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*"))}
    mine = [name for name in paths if not name.startswith(".") and name != REPORT]
    files = [name for name in mine if paths[name].is_file()]
    left = tqdm(files, "hashing", delay=2, unit="file")
    return {name: known.get(name) or digest(paths[name]) for name in left}


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _real(out: Path) -> Path:
    """Where a link leads, so that renaming replaces the folder and not the link."""
    return expanded(out).resolve()


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(f"{out.name}.{ending}")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / REPORT).is_file()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other conversions out of `out`. That the lock can be made proves the parent writable."""
    lock = _beside(out, "lock")
    with with_parents(lock):
        handle = _acquire(lock, out)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            os.close(handle)


def _acquire(lock: Path, out: Path) -> int:
    """An open handle on the lock file, held by nobody else."""
    while True:
        with unwritable_explained(lock.parent):
            handle = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise AbsorbError(
                f"another conversion is writing {out}; wait for it or choose another --out"
            ) from None
        except OSError:
            pass  # some cluster file systems know no locks: conversions there must not meet
        # The holder before us may have removed the file between our open and our lock.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        os.close(handle)


def _prepare(out: Path, force: bool) -> None:
    """Clear what a killed run left, then refuse an `out` that must not be replaced."""
    _clear(out)
    if os.path.ismount(out) or Path.cwd().is_relative_to(out):
        raise AbsorbError(
            f"{out} cannot be replaced as a whole, being a mount point or the current folder; "
            "choose a folder inside it as --out"
        )
    outer = next(filter(_is_checkpoint, out.parents), None)
    if outer is not None:
        raise AbsorbError(
            f"{out} lies in the checkpoint {outer}, which would be whole no more; choose another "
            "--out"
        )
    _refuse_occupied(out, force)


def _clear(out: Path) -> None:
    """Remove a partial checkpoint, and finish a replacement that was killed half way."""
    partial, replaced = _beside(out, "partial"), _beside(out, "replaced")
    if replaced.exists():
        if not out.exists():
            replaced.rename(out)
        elif _is_checkpoint(out) and _is_checkpoint(replaced):
            shutil.rmtree(replaced)
        else:
            raise AbsorbError(f"{replaced} is in the way; move it or choose another --out")
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial)
    elif os.path.lexists(partial):
        raise AbsorbError(f"{partial} is in the way; move it or choose another --out")


def _refuse_occupied(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise AbsorbError(f"{out} is a file; choose another --out")
    if not any(out.iterdir()):
        return
    if not force:
        raise AbsorbError(f"{out} is not empty; choose another --out or pass --force")
    if not _is_checkpoint(out):
        raise AbsorbError(
            f"{out} is not empty and has no {REPORT}, so absorb did not write it and will not "
            "replace it; choose another --out"
        )


def _let_read(folder: Path) -> None:
    """Let those read every file whom the umask lets: safetensors 0.8 writes for its user alone."""
    allowed = folder.stat().st_mode & 0o666  # of a new folder, which has what the umask leaves
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(OSError):  # some file systems keep no modes
                path.chmod(path.stat().st_mode | allowed)


def _flush(folder: Path) -> None:
    """Ask the disk to keep every file and folder, lest the rename survive a crash without them."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(partial: Path, out: Path, force: bool) -> None:
    """Rename `partial` to `out`. What stood there takes the name `partial`, to be removed."""
    replaced = _beside(out, "replaced")
    _refuse_occupied(out, force)  # again: the long work left time for others to write there
    try:
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    _sync(out.parent)
    if replaced.exists():
        replaced.rename(partial)
