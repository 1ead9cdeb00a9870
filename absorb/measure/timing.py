"""Side by side timings: what is compared runs in turns, so that a busy machine slows all alike."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.runtime.memory import peak, start_peak
from absorb.runtime.reading import new_cache
from absorb.schema.scores import Speed

Run = Callable[[], object]
LEAST = 1.0  # seconds for all turns of a comparison: short runs need many
BURST = 10  # short runs in a turn on a GPU, which in a model has the next layer queued already
SHORT = 0.01  # seconds for a burst, where a run does not take longer by itself
_REPEATS = 5
DECODED = 8  # tokens, one after the other behind a text


@torch.no_grad()
def speeds(models: list[PreTrainedModel], tokens: Tensor) -> list[Speed]:
    """How fast models read the text `tokens` (1, length), in turns, and with how much memory."""
    device = tokens.device.type
    names = [f"{index}" for index in range(len(models))]
    caches = [_read(model, tokens) for model in models]
    fills = {name: partial(_read, m, tokens) for name, m in zip(names, models, strict=True)}
    steps = {
        name: partial(_continue, model, tokens[:, -1:], *cache)
        for name, model, cache in zip(names, models, caches, strict=True)
    }
    sizes = [_bytes_of(cache) for cache, _ in caches]
    with tqdm(total=2, desc="timing", unit="part") as bar:
        prefill = interleaved(fills, device, _REPEATS)
        bar.update()
        decode = interleaved(steps, device, _REPEATS)
        bar.update()
    weights = [sum(parameter.nbytes for parameter in model.parameters()) for model in models]
    grown = [growth(fills[name], device) for name in names]
    return [
        Speed(
            prefill=tokens.shape[1] / prefill[name],
            decode=DECODED / decode[name],
            weights=held,
            cache=size,
            peak=None if more is None else held + more,
        )
        for name, held, size, more in zip(names, weights, sizes, grown, strict=True)
    ]


def _read(model: PreTrainedModel, tokens: Tensor) -> tuple[Any, dict[str, Any]]:
    """The cache that a text leaves, and the arguments to go on with."""
    cache, remember = new_cache(model)
    model(tokens, logits_to_keep=1, **remember)
    return cache, remember


def _continue(model: PreTrainedModel, token: Tensor, cache: Any, remember: dict[str, Any]) -> None:
    for _ in range(DECODED):
        model(token, **remember)
    # Forgotten again, lest many turns run off a table of positions. What left a sliding window
    # cannot be had back, but models that have one have no such table.
    # Nor can a state that was handed on.
    if not any(cache.is_sliding) and all(hasattr(layer, "keys") for layer in cache.layers):
        cache.crop(-DECODED)


def _bytes_of(cache: Any) -> int:
    """Of keys and values, and of states in their place."""
    held = [value for layer in cache.layers for value in vars(layer).values()]
    parts = [part for value in held for part in (value if isinstance(value, list) else [value])]
    return sum(part.nbytes for part in parts if torch.is_tensor(part))


def growth(run: Run, device: str) -> int | None:
    """How much more memory a run holds at its most than there was before it, in bytes.

    On a CPU that is None where the system does not tell.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    start = start_peak()
    run()
    return None if start is None else peak() - start


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
