"""llm-compressor on a folder, in an environment of its own."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from scripts.engines.environments import COMPRESSOR, asked

VERSION = COMPRESSOR.requirements[0].partition("==")[2]


def compressed(
    folder: Path,
    out: Path,
    recipe: dict[str, Any],
    rows: list[list[int]],
    say: Sequence[list[int]] = (),
) -> Any:
    """Write `folder` to `out` by a recipe, calibrated on rows of tokens if there are any.

    inside/compress.py has what a recipe is, and what is said of the work and of the rows in `say`.
    """
    with TemporaryDirectory() as place:
        job, found = Path(place, "job.json"), Path(place, "found.json")
        told = {"model": str(folder), "out": str(out), "recipe": recipe}
        job.write_text(json.dumps({**told, "rows": rows, "say": say}))
        asked(COMPRESSOR, "compress.py", job, found)
        return json.loads(found.read_text())


def perplexity(said: list[list[float]]) -> float:
    """By the log-probabilities of tokens, in nats."""
    return float((-torch.tensor(said, dtype=torch.float64)).mean().exp())


def size(folder: Path) -> int:
    """Bytes of the weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
