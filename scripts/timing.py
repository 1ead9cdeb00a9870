"""Side by side timings: what is compared runs in turns, so that a busy machine slows all alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Run = Callable[[], object]


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
    """Median seconds of every run, after two turns that do not count."""
    turns = [{name: seconds(run, device) for name, run in runs.items()} for _ in range(repeats + 2)]
    return {name: median(turn[name] for turn in turns[2:]) for name in runs}
