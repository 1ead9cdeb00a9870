"""Layers that several processes train together rest in one file each."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from absorb.quantize.formats import FORMATS
from absorb.runtime import ranks
from absorb.tune.nudge import nudge
from tests.helpers import warm
from tests.pipelines.test_ranks import told
from tests.tune.test_end_to_end import pair
from tests.tune.test_short_memory import one_by_one

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is read from /proc"),
]


def trained(place: Path) -> None:
    """Say which files a process has mapped once all layers are trained, and nudged."""
    with ranks.joined("cpu"):
        teacher, student = pair("llama", streamed=True)
        one_by_one(teacher, student, place / "trained")
        print(json.dumps(mapped(place)))
        rows = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(0))
        nudge(student, rows, FORMATS["nvfp4"], place)
        print(json.dumps(mapped(place)))
        ranks.meet()


def mapped(folder: Path) -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line[line.index("/") :] for line in lines if str(folder) in line})


def test_the_disk_holds_each_layer_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        envs = [os.environ | place for place in told(2)]
        done = [*pool.map(lambda env: warm.call(trained, tmp_path, env=env), envs)]
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    for line in [*done[0].stdout.splitlines(), *done[1].stdout.splitlines()]:
        files = json.loads(line)
        assert files
        assert not [file for file in files if "(deleted)" in file]
