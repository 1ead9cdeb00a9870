"""Processes meet where all have read their share, and never within what one of them may repeat."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import distributed as dist

from absorb.measure.prefix import find_prefix
from absorb.runtime import precision, ranks
from absorb.schema.settings import Thresholds
from tests.helpers import warm
from tests.helpers.sources import source_of
from tests.pipelines.test_ranks import told
from tests.runtime.test_fewer_rows import FIGURES, decoder_of, text

pytestmark = pytest.mark.slow


def figures_of_both() -> None:
    """Find every figure together with another process, and see when they meet."""
    repeats, met = 0, 0
    read, reduce = precision.Rows.read, dist.all_reduce

    def reading(self: precision.Rows, find: Callable[[int], Any]) -> Any:
        nonlocal repeats
        repeats += 1
        found = read(self, find)
        repeats -= 1
        return found

    def meeting(*what: Any) -> None:
        nonlocal met
        assert not repeats
        met += 1
        reduce(*what)

    precision.Rows.read, dist.all_reduce = reading, meeting
    with ranks.joined("cpu"):
        decoder = decoder_of(streams=False)
        for name, find in FIGURES.items():
            before = met
            find(decoder)
            assert met > before or name == "ranges"  # which all find of all rows
        before = met
        find_prefix(source_of(decoder.model), None, text(), Thresholds())
        assert met > before


def test_no_process_meets_others_in_what_it_may_repeat() -> None:
    with ThreadPoolExecutor() as pool:
        envs = [os.environ | place for place in told(2)]
        done = [*pool.map(lambda env: warm.call(figures_of_both, env=env), envs)]
    for one in done:
        assert one.returncode == 0, one.stderr
