"""Files that appear complete or not at all, and what to say where nothing can be written."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from absorb.errors import AbsorbError
from absorb.schema.places import expanded


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """What is to become the file at `path` when the block ends, unless that raises.

    Enter it before the long work: a place that cannot be written to is refused at once. A file that
    lies there is replaced.
    """
    path = expanded(path).resolve()
    partial = path.with_name(f"{path.name}.partial")
    with full_disk_explained(path), with_parents(path):
        if path.is_dir():
            raise AbsorbError(f"{path} is a folder and a file is to be written; name a file")
        with unwritable_explained(path):
            file = partial.open("wb")
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def with_parents(path: Path) -> Iterator[None]:
    """Make the folders above `path`; afterwards remove those new ones that are still empty."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        with unwritable_explained(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # not empty, or never made
                parent.rmdir()


@contextmanager
def unwritable_explained(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AbsorbError(
            f"{place} cannot be written to ({error.strerror}); choose another place"
        ) from error


@contextmanager
def full_disk_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if _says_disk_full(error):
            raise AbsorbError(
                f"the disk that holds {out.parent} is full, so {out.name} was not written; "
                "free some space or choose another place"
            ) from error
        raise


def _says_disk_full(error: Exception) -> bool:
    """Whether the disk or the user's share of it is full. safetensors tells the number as text."""
    # The last is for a file that is too large for its file system, or for this process.
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    return any(f"(os error {number})" in str(error) for number in numbers)
