"""The memory and the threads of this process, as the system sees them. Imported before torch is."""

import ctypes
import os
import sys
from pathlib import Path

# glibc's names for what mallopt sets, from malloc.h, and the most that it takes: blocks that are
# larger go back to the kernel all the same.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER, _LARGEST = 2**31 - 1, 2**25
# Some 50 microseconds: as long as between two operations, and as it takes to wake a thread.
_SPINS = "2000"
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

# Where a user tells torch how to take memory of a GPU. The last is AMD's.
_ALLOC_CONF = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for what is asked for next; nothing happens elsewhere.

    Otherwise most tensors are made of new pages that the kernel clears first, which takes a tenth
    of the time of a small model.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def join_freed_gpu_memory() -> None:
    """Let torch take memory of a GPU in pages, unless the user has said how: call it before torch.

    Otherwise a small tensor that lies where a large one was keeps all of that place: of 5 GB there
    was no room for the head of an 8B model, which takes 3.
    """
    if sys.platform == "linux" and not _ALLOC_CONF & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def release_freed_memory() -> None:
    """Let glibc give back what is freed, where tensors that grow fit no hole that they left."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def start_peak() -> int | None:
    """The bytes that this process holds, of which `peak` tells the most from now on.

    None where the system does not tell.
    """
    release_freed_memory()  # what was freed is not in use
    try:
        _RESET.write_text("5")
        return peak()
    except OSError:
        return None


def peak() -> int:
    """The most bytes that this process has held since a `start_peak` that told any."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


def share_cores() -> None:
    """Let a thread that waits for the others sleep soon, unless the user has said what it is to do.

    libgomp lets it spin for milliseconds, and so keep the core from those that it waits for: with
    one more process on two cores everything took five times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
