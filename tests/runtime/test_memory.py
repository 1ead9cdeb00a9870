"""What commands do about memory, and what they tell of it."""

import os
import platform
import resource
import sys

import pytest

from absorb.runtime.memory import _ALLOC_CONF, join_freed_gpu_memory, start_peak
from tests.helpers import warm

MEGABYTE = 2**20


@pytest.mark.skipif(start_peak() is None, reason="the system does not tell")
@pytest.mark.parametrize("size", [32, 256])
def test_growth_is_the_most_that_a_run_holds_at_once(size: int) -> None:
    code = f"""
import torch
from absorb.measure.timing import growth
def run():
    for _ in range(3):
        torch.ones({size * MEGABYTE}, dtype=torch.uint8)
run()
print(growth(run, "cpu"))
"""
    # In a process of its own: what others have freed in this one is used again, or is not.
    done = warm.run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert grown == pytest.approx(size * MEGABYTE, abs=8 * MEGABYTE)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_what_a_command_frees_it_uses_again() -> None:
    assert _new_pages("keep_freed_memory()") < 0.3 * _new_pages("pass")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_what_was_kept_can_be_given_back() -> None:
    assert _held("release_freed_memory()") < _held("pass") - 50 * MEGABYTE


@pytest.mark.skipif(sys.platform != "linux", reason="torch has no such pages elsewhere")
@pytest.mark.parametrize("said", ["", *sorted(_ALLOC_CONF)])
def test_what_a_user_has_said_of_gpu_memory_stands(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in _ALLOC_CONF:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")  # so that it is as it was afterwards
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    if said:
        monkeypatch.setenv(said, "max_split_size_mb:64")
    join_freed_gpu_memory()
    found = {name: os.environ[name] for name in _ALLOC_CONF if name in os.environ}
    usual = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert found == ({said: "max_split_size_mb:64"} if said else usual)


def _held(after: str) -> int:
    """The bytes that a process holds after small blocks between kept ones were freed."""
    code = f"""
from pathlib import Path
import torch
from absorb.runtime.memory import keep_freed_memory, release_freed_memory
keep_freed_memory()
tensors = [torch.ones(250_000) for _ in range(200)]
del tensors[::2]
{after}
print(int(Path("/proc/self/statm").read_text().split()[1]))
"""
    done = warm.run([sys.executable, "-c", code])
    return int(done.stdout) * resource.getpagesize()


def _new_pages(before: str) -> int:
    """How many pages tensors take from the kernel when as many were just freed."""
    code = f"""
import resource, torch
from absorb.runtime.memory import keep_freed_memory
{before}
def use():
    tensors = [torch.ones(size * 1_000_000) for size in (1, 2, 3, 4) * 4]
use()
seen = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - seen)
"""
    done = warm.run([sys.executable, "-c", code])
    return int(done.stdout)
