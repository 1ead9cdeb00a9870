"""Text as models are compared on it: windows of one length, cut without regard to what is in it."""

from pathlib import Path

import torch

from absorb.errors import AbsorbError
from absorb.source import Source
from absorb.text import documents

LENGTH = 512


def windows(source: Source, path: Path, count: int) -> torch.Tensor:
    """The first `count` windows (count, LENGTH) of a text, or all that a shorter one has."""
    text = "\n".join(documents(path))
    ids = source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = min(count, len(ids) // LENGTH)
    if rows == 0:
        raise AbsorbError(f"{path} holds {len(ids)} tokens and {LENGTH} are needed; name another")
    return torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)
