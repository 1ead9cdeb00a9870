"""What commands do about the threads that torch computes on."""

import os
import platform
import subprocess
import sys

import pytest

# What a thread takes that has nothing to do for most of the time.
IDLE = """
from absorb.runtime.memory import share_cores
{call}
import torch
from time import process_time, sleep

torch.set_num_threads(2)
values = torch.zeros(2**18)
values.add_(1)
start = process_time()
for _ in range(200):
    values.add_(1)
    sleep(0.002)
print(process_time() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core is waited for by nobody")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere threads are not libgomp's")
def test_threads_of_a_command_that_wait_leave_their_cores() -> None:
    assert _seconds("share_cores()") < 0.5 * _seconds("pass")


def _seconds(call: str) -> float:
    known = {name: value for name, value in os.environ.items() if not _is_about_waiting(name)}
    command = [sys.executable, "-c", IDLE.format(call=call)]
    done = subprocess.run(command, env=known, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _is_about_waiting(name: str) -> bool:
    return name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
