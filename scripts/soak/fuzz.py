"""Give absorb damaged and hostile inputs, at random, and look for tracebacks and partial output.

    python -m scripts.soak.fuzz --cases 20000

Exit code 1 if there is any; each kind is shown once.
"""

import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["HF_HUB_OFFLINE"] = "1"

import click
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.helpers import fuzzing
from tests.helpers.fuzzing import Bench, Target, bench_in, empty_folder
from tests.helpers.fuzzing_text import TEXT_TARGETS

TARGETS = fuzzing.TARGETS | TEXT_TARGETS


@click.command()
@click.option("--cases", default=20_000, show_default=True, help="In all.")
@click.option("--target", "names", multiple=True, type=click.Choice([*TARGETS]))
@click.option("--seed", "number", default=0, show_default=True)
def main(cases: int, names: tuple[str, ...], number: int) -> None:
    torch.set_num_threads(1)
    chosen = names or tuple(TARGETS)
    failures = 0
    with TemporaryDirectory() as home:
        bench = bench_in(Path(home))
        for name in chosen:
            started = time.monotonic()
            tried, found = fuzz(bench, TARGETS[name], -(-cases // len(chosen)), number)
            failures += found.total()
            took = time.monotonic() - started
            click.echo(f"{name}: {tried} cases in {took:.0f} s, {found.total()} failures")
            for kind, count in found.most_common():
                click.echo(f"  {count} x {kind}")
    sys.exit(failures > 0)


def fuzz(bench: Bench, target: Target, cases: int, number: int) -> tuple[int, Counter[str]]:
    """How many cases were tried, and the failures by where and what they were."""
    found: Counter[str] = Counter()
    tried = 0

    @seed(number)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        nonlocal tried
        with empty_folder() as folder:
            tried += 1
            started = time.process_time()  # not what others made it wait
            try:
                target(bench, data.draw, folder)
            except (Exception, SystemExit) as error:
                if type(error).__module__.startswith("hypothesis"):
                    raise  # not a failure: how hypothesis ends a case
                found[_kind(error)] += 1
            if time.process_time() - started > 20:
                found["took more than 20 seconds"] += 1

    attempt()
    return tried, found


def _kind(error: BaseException) -> str:
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "/absorb/" in f.filename]
    last = (ours or traceback.extract_tb(error.__traceback__))[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    return f"{type(error).__name__} at {place}: {str(error)[:150]!r}"


if __name__ == "__main__":
    main()
