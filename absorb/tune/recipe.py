"""What a fine-tune will do: what the user asked for, the rest chosen by device and purpose."""

from dataclasses import replace

import torch

from absorb.errors import AbsorbError
from absorb.schema.settings import Distillation
from absorb.schema.training import WEIGHT_RATES, Recipe

_ROUNDS, _LAYER_RATE = 2, 2e-4  # where layers are trained one by one


def recipe(wish: Distillation, device: torch.device, tied: bool = False) -> Recipe:
    """What the user asked for, the rest chosen for a few minutes on this device.

    On a GPU everything is trained. On a CPU there is time for the sinks and their biases only.
    With `tied` the scales of all norms stay those of the stream.
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
        tied=tied,
    )


def by_layers(recipe: Recipe, wish: Distillation, experts: bool, held: bool) -> Recipe:
    """The same for a model of which the memory holds one layer at a time, with its experts or not.

    At its rate a layer learns in two rounds over the text what it does in six at that of a whole
    model. End to end few parameters are trained afterwards, where a frozen copy can be `held`.
    """
    steps = (
        recipe.steps if wish.steps is not None else _ROUNDS * recipe.training_rows // recipe.rows
    )
    return replace(
        recipe,
        steps=steps,
        rate=_LAYER_RATE,
        by_layers=True,
        experts=experts,
        end_steps=recipe.steps if held or not recipe.trains else None,
    )


def refuse_minutes(wish: Distillation) -> None:
    """Refuse a limit in minutes for a model of which the memory holds one layer at a time."""
    if wish.minutes is not None:
        raise AbsorbError(
            "the model is larger than the memory, so its layers are trained one by one, each in so "
            "many steps; pass --steps instead of --minutes"
        )
