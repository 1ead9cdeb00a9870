"""A checkpoint, read by a process that has neither absorb nor a token: ship/isolated.py, run."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from absorb.errors import AbsorbError
from absorb.schema.settings import Dtype
from absorb.ship import isolated

# What the isolated process is told of the environment: no token, no path to Python code.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "LANG", "OMP_NUM_THREADS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the model of a folder said to a stranger: ship/isolated.py says what is what."""

    logits: list[list[float]]
    divergence: float | None


def said_in_isolation(
    folder: Path,
    tokens: tuple[int, ...],
    reference: Path | None = None,
    dtype: Dtype = "float32",
) -> Said:
    """The logits that an isolated process prints, and how far they are from those in a file."""
    known = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    words = [str(folder.resolve()), json.dumps(tokens), dtype]
    words += [str(reference)] if reference else []
    with TemporaryDirectory() as home:
        private = {"HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-I", str(isolated.__file__), *words],
            env=known | private,
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        raise AbsorbError(f"the model does not load without absorb ({last}); convert again")
    return Said(**json.loads(done.stdout.splitlines()[-1]))
