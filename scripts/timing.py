"""Side by side timings: what is compared runs in turns, so that a busy machine slows all alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Run = Callable[[], object]

LEAST = 2.0  # seconds for all turns of a comparison: short runs need many


def seconds(run: Run, device: str) -> float:
    """Wall clock of one run, until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(runs: Mapping[str, Run], device: str, repeats: int) -> dict[str, float]:
    """Median seconds of every run over at least `repeats` turns that fill at least LEAST.

    The first two turns do not count.
    """
    turns: list[dict[str, float]] = []
    while len(turns) < repeats + 2 or sum(sum(turn.values()) for turn in turns) < LEAST:
        turns.append({name: seconds(run, device) for name, run in runs.items()})
    return {name: median(turn[name] for turn in turns[2:]) for name in runs}
