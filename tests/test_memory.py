"""What commands do about memory, and what they tell of it."""

import platform
import subprocess
import sys

import pytest
import torch

from absorb.memory import start_peak
from absorb.timing import growth

MEGABYTE = 2**20


@pytest.mark.skipif(start_peak() is None, reason="the system does not tell")
@pytest.mark.parametrize("size", [32, 256])
def test_growth_is_the_most_that_a_run_holds_at_once(size: int) -> None:
    def run() -> None:
        for _ in range(3):
            torch.ones(size * MEGABYTE, dtype=torch.uint8)

    run()
    grown = growth(run, "cpu")
    assert grown is not None
    assert grown == pytest.approx(size * MEGABYTE, abs=8 * MEGABYTE)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_what_a_command_frees_it_uses_again() -> None:
    assert _new_pages("keep_freed_memory()") < 0.3 * _new_pages("pass")


def _new_pages(before: str) -> int:
    """How many pages tensors take from the kernel when as many were just freed."""
    code = f"""
import resource, torch
from absorb.memory import keep_freed_memory
{before}
def use():
    tensors = [torch.ones(size * 1_000_000) for size in (1, 2, 3, 4) * 4]
use()
seen = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - seen)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)
