"""A layer that is trained, in a file: where it rests, and what a later run goes on from."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from absorb.runtime import ranks

_ERRORS, _EXPERTS = "errors", "experts"  # the entries of the metadata


class KeptLayer:
    """The file of one layer: whole or not there. It holds no weights where training did not help.

    The first process of a host writes it and all there read it: if each did, the disk would hold
    one for each, as what is read stays there. Where an earlier run had memory for another decision
    about the `experts`, to train them or not, its layer counts as not there.
    """

    def __init__(self, file: Path, experts: bool = True):
        self.file, self.experts = file, experts
        self.is_there = file.is_file() and self._noted(_EXPERTS) == experts

    def write(self, weights: dict[str, Tensor], errors: tuple[float, float]) -> None:
        """Keep weights, and the error of the layer's stream before and after it was trained.

        All processes call this with the same, and go on when the file is there.
        """
        if ranks.is_first_here():
            self._write(weights, errors)
        ranks.meet()

    def _write(self, weights: dict[str, Tensor], errors: tuple[float, float]) -> None:
        partial = self.file.with_suffix(f".{ranks.number()}.partial")
        notes = {_ERRORS: errors, _EXPERTS: self.experts}
        save_file(weights, partial, metadata={n: json.dumps(note) for n, note in notes.items()})
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(self.file)

    @property
    def errors(self) -> tuple[float, float]:
        before, after = self._noted(_ERRORS)
        return before, after

    def _noted(self, name: str) -> Any:
        with safe_open(self.file, "pt") as content:
            return json.loads(content.metadata().get(name, "null"))
