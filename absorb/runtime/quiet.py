"""Libraries that speak to the user, silenced for a while."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging as console

# Up to this size a progress bar would be gone before it is read.
QUIET_BYTES = 2_000_000_000


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and warnings."""
    verbosity = console.get_verbosity()
    bars = console.is_progress_bar_enabled()
    console.set_verbosity_error()
    console.disable_progress_bar()
    try:
        yield
    finally:
        console.set_verbosity(verbosity)
        if bars:
            console.enable_progress_bar()


@contextmanager
def quiet_load(files: list[Path]) -> Iterator[None]:
    """Silence the bars of small files, and warnings, which `load.checks` makes errors."""
    verbosity, bars = (
        console.get_verbosity(),
        console.is_progress_bar_enabled(),
    )
    small = sum(file.stat().st_size for file in files) < QUIET_BYTES
    console.set_verbosity(logging.ERROR)
    if bars and small:
        console.disable_progress_bar()
    try:
        yield
    finally:
        console.set_verbosity(verbosity)
        if bars and small:
            console.enable_progress_bar()
