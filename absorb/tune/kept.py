"""A layer that is trained, in a file: where it rests, and what a later run goes on from."""

import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from absorb.runtime import ranks

_ERRORS = "errors"  # the entry of the metadata


class KeptLayer:
    """The file of one layer: whole or not there. It holds no weights where training did not help.

    Processes that train together write the same.
    """

    def __init__(self, file: Path):
        self.file = file
        self.is_there = file.is_file()

    def write(self, weights: dict[str, Tensor], errors: tuple[float, float]) -> None:
        """Keep weights, and the error of the layer's stream before and after it was trained."""
        partial = self.file.with_suffix(f".{ranks.number()}.partial")
        save_file(weights, partial, metadata={_ERRORS: json.dumps(errors)})
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(self.file)

    @property
    def errors(self) -> tuple[float, float]:
        with safe_open(self.file, "pt") as content:
            before, after = json.loads(content.metadata()[_ERRORS])
        return before, after
