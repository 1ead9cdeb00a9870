"""What MLX says of models. Runs in an environment with mlx-lm and no absorb.

    python -P mlx_says.py JOB.json OUT.json

JOB and OUT are described in scripts/engines/beside.py. Rounds of timing go from one model to the
next, so that other work on the machine meets all of them.
"""

import itertools
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

NEW = 16  # tokens that a decode adds


def log_probabilities(model: Any, row: list[int]) -> list[float]:
    """Of every token but the first, read at once into an empty cache."""
    tokens = mx.array([row])
    logits = model(tokens, cache=make_prompt_cache(model))[0, :-1].astype(mx.float32)
    said = logits - mx.logsumexp(logits, -1, keepdims=True)
    return mx.take_along_axis(said, tokens[0, 1:, None], -1)[:, 0].tolist()


def token_by_token(model: Any, row: list[int]) -> list[float]:
    """The same, with a cache that grows by one token at a time."""
    cache, found = make_prompt_cache(model), []
    for token, after in itertools.pairwise(row):
        logits = model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
        found.append((logits[after] - mx.logsumexp(logits)).item())
    return found


def speed(model: Any, row: list[int]) -> dict[str, float]:
    cache, start = make_prompt_cache(model), time.perf_counter()
    token = model(mx.array([row]), cache=cache)[:, -1:].argmax(-1)
    mx.eval(token)
    middle = time.perf_counter()
    for _ in range(NEW):
        token = model(token, cache=cache).argmax(-1)
        mx.eval(token)
    end = time.perf_counter()
    return {"prefill": len(row) / (middle - start), "decode": NEW / (end - middle)}


def main(job_file: str, out: str) -> None:
    mx.set_default_device(mx.cpu)
    job = json.loads(Path(job_file).read_text())
    models = {
        name: load_model(Path(folder), trust_remote_code=True)[0]
        for name, folder in job["models"].items()
    }
    found: dict[str, Any] = {}
    for name, model in models.items():
        model.set_dtype(mx.float32)
        rows = job["rows"][name]
        # A part of the text by single tokens: caches of windows turn round there.
        said = [log_probabilities(model, row) for row in rows[:-1]]
        found[name] = {"said": [*said, token_by_token(model, rows[-1])]}
    timed: dict[str, dict[str, list[float]]] = {name: {} for name in job["timed"]}
    for _ in range(job["rounds"]):
        for name in job["timed"]:
            for work, value in speed(models[name], job["rows"][name][0]).items():
                timed[name].setdefault(work, []).append(value)
    for name, speeds in timed.items():
        found[name]["tokens_per_second"] = speeds
    versions = {package: version(package) for package in ("mlx", "mlx-lm")}
    Path(out).write_text(json.dumps({"versions": versions, "models": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
