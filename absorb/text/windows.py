"""Text of a file as windows of one length."""

from pathlib import Path

import torch
from torch import Tensor

from absorb.errors import AbsorbError
from absorb.load.source import Source
from absorb.text.corpus import read_ids


def windows(source: Source, path: Path, count: int, length: int, *, least: int = 1) -> Tensor:
    """The first `count` windows (count, length) of a file, or all that a shorter one has.

    Windows follow one another without a gap, whatever is in them. An AbsorbError refuses a file
    that has fewer than `least`.
    """
    ids = read_ids(path, source, count * length)
    rows = min(len(ids) // length, count)
    if rows < least:
        raise AbsorbError(
            f"{path} holds {len(ids)} tokens and {least * length} are needed; name a longer text"
        )
    return torch.tensor(ids[: rows * length]).view(rows, length)
