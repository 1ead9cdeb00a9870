"""Side by side timings: what is compared runs in turns, so that a busy machine slows all alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Run = Callable[[], object]

LEAST = 1.0  # seconds for all turns of a comparison: short runs need many
BURST = 10  # runs in a turn on a GPU, which in a model has the next layer queued already


def seconds(run: Run, device: str) -> float:
    """Wall clock of one run, or the mean of a burst, until the device is done."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(BURST):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / BURST


def interleaved(runs: Mapping[str, Run], device: str, repeats: int) -> dict[str, float]:
    """Median seconds of every run over at least `repeats` turns that fill at least LEAST.

    The first two turns do not count.
    """
    turns: list[dict[str, float]] = []
    while len(turns) < repeats + 2 or sum(sum(turn.values()) for turn in turns) < LEAST:
        turns.append({name: seconds(run, device) for name, run in runs.items()})
    return {name: median(turn[name] for turn in turns[2:]) for name in runs}
