"""Text as models are compared on it: windows of one length, cut without regard to what is in it."""

from pathlib import Path

import torch

from absorb.source import Source
from absorb.text import documents

LENGTH = 512


def windows(source: Source, path: Path, count: int) -> torch.Tensor:
    """The first `count` windows (count, LENGTH) of a text."""
    text = "\n".join(documents(path))
    ids = source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: count * LENGTH]).view(-1, LENGTH)
