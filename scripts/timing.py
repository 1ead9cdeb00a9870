"""Side by side timings: what is compared runs in turns, so that a busy machine slows all alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Run = Callable[[], object]

LEAST = 1.0  # seconds for all turns of a comparison: short runs need many
BURST = 10  # short runs in a turn on a GPU, which in a model has the next layer queued already
SHORT = 0.01  # seconds for a burst, where a run does not take longer by itself


def seconds(run: Run, device: str, count: int = 1) -> float:
    """Wall clock of one run, the mean of `count` in a row, until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def interleaved(runs: Mapping[str, Run], device: str, repeats: int) -> dict[str, float]:
    """Median seconds of every run over at least `repeats` turns that fill at least LEAST.

    The first two turns do not count.
    """
    counts = dict.fromkeys(runs, 1)
    turns: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(turns) < repeats + 2 or time.perf_counter() - start < LEAST:
        turns.append({name: seconds(run, device, counts[name]) for name, run in runs.items()})
        if device == "cuda":
            counts = {n: max(1, min(BURST, int(SHORT / t))) for n, t in turns[-1].items()}
    return {name: median(turn[name] for turn in turns[2:]) for name in runs}
