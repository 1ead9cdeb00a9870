"""Text of a file as windows of one length."""

from pathlib import Path

import torch
from torch import Tensor

from absorb.errors import AbsorbError
from absorb.load.source import Source
from absorb.schema.places import Dataset
from absorb.text.corpus import read_ids


def windows(
    source: Source,
    text: Path | Dataset,
    count: int,
    length: int,
    *,
    least: int = 1,
    seen: set[bytes] | None = None,
) -> Tensor:
    """The first `count` windows (count, length) of a text, or all that a shorter one has.

    Windows follow one another without a gap, whatever is in them. Documents that were `seen` are
    left out. An AbsorbError refuses a text that has fewer than `least`.
    """
    known = bool(seen)
    ids = read_ids(text, source, count * length, seen)
    rows = min(len(ids) // length, count)
    if rows < least:
        apart = " beside what was read before" if known else ""
        raise AbsorbError(
            f"{text} holds {len(ids)} tokens and {least * length} are needed; name a longer text"
            + apart
        )
    return torch.tensor(ids[: rows * length]).view(rows, length)
