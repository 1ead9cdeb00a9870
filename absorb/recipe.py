"""What a fine-tune will do: what the user asked for, the rest chosen by device and purpose."""

from dataclasses import dataclass

import torch

from absorb.settings import Distillation, Purpose, Train
from absorb.text import LENGTH

# Of weights, which have a longer way to go where four bits are left of them.
_WEIGHT_RATES: dict[Purpose, float] = {"none": 5e-5, "int8": 5e-5, "w4a4": 1e-4, "nvfp4": 1e-4}
_TRAINING_ROWS: dict[Train, int] = {"sinks": 32, "scales": 32, "all": 1024}
_LEAST_TRAINING_ROWS = 32  # for the smoothing scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the fine-tune will do, in a number of steps or until so many minutes are over."""

    steps: int | None
    minutes: float | None = None
    train: Train
    rows: int  # of text in a step
    purpose: Purpose = "none"
    rate: float = _WEIGHT_RATES["none"]  # at which weights learn

    @property
    def training_rows(self) -> int:
        """How much text to sample: after a few rounds over the same text, more helps little.

        The smoothing scales need some even where nothing is trained.
        """
        enough = _TRAINING_ROWS[self.train]
        if self.steps is None:
            return enough
        return min(max(self.steps * self.rows, _LEAST_TRAINING_ROWS), enough)

    def __str__(self) -> str:
        length = "" if self.steps is None else f"{self.steps} "
        limit = "" if self.minutes is None else f"{self.minutes:g} minutes of "
        rounding = "" if self.purpose == "none" else f", for {self.purpose.upper()}"
        size = f"{self.rows} x {LENGTH} tokens"
        return f"{limit}{length}steps of {size}, training {self.train}{rounding}"


def recipe(wish: Distillation, device: torch.device) -> Recipe:
    """What the user asked for, the rest chosen for a few minutes on this device.

    On a GPU everything is trained. On a CPU there is time for the sinks and their biases only.
    """
    gpu = device.type == "cuda"
    steps = wish.steps
    if steps is None and wish.minutes is None:
        steps = 100 if gpu else 12
    return Recipe(
        steps=steps,
        minutes=wish.minutes,
        train=wish.train or ("all" if gpu else "sinks"),
        rows=32 if gpu else 8,
        purpose=wish.purpose,
        rate=_WEIGHT_RATES[wish.purpose],
    )
