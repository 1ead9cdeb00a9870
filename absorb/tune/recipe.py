"""What a fine-tune will do: what the user asked for, the rest chosen by device and purpose."""

import torch

from absorb.schema.settings import Distillation
from absorb.schema.training import WEIGHT_RATES, Recipe


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
        rate=WEIGHT_RATES[wish.purpose],
    )
