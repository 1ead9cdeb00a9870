"""What a fine-tune trains, and how fast each parameter learns."""

import math
from collections.abc import Collection

import torch
from torch import nn

from absorb.models.modeling_absorb import NEUTRAL
from absorb.runtime import ranks
from absorb.schema.settings import Train
from absorb.schema.training import Recipe

# Learning rates by the last part of a parameter's name; what is not named is a weight.
_RATES = {
    "sink": 1e-2,
    "sink_key": 1e-3,
    "sink_value": 1e-3,
    "bias": 1e-3,
    "input_scale": 1e-3,
    "gate_in": 1e-4,
    "gate_out": 3e-3,
}
# Gates that nobody trains do nothing.
_SINKS = ("sink", "sink_key", "sink_value", "bias", "gate_in", "gate_out")
_TRAINED: dict[Train, tuple[str, ...]] = {
    "sinks": _SINKS,
    "scales": (*_SINKS, "input_scale"),
    "all": (*_SINKS, "input_scale"),  # and all that is stock
}
_WARM_UP = 0.1


def choose(
    module: nn.Module, recipe: Recipe, left_out: Collection[nn.Parameter] = ()
) -> list[nn.Parameter]:
    """Let the parameters take gradients that a recipe trains, but for those `left_out`."""
    chosen, trained = [], {*_TRAINED[recipe.train]}
    if recipe.tied:
        trained.discard("input_scale")
    for name, parameter in module.named_parameters():
        last = name.rpartition(".")[2]
        stock = recipe.train == "all" and last not in NEUTRAL
        stock |= recipe.norms and last == "weight" and parameter.ndim == 1
        skipped = any(parameter is one for one in left_out)
        parameter.requires_grad_(not skipped and (stock or last in trained))
        if parameter.requires_grad:
            chosen.append(parameter)
    return chosen


def optimizer_of(
    module: nn.Module, parameters: list[nn.Parameter], weight_rate: float
) -> torch.optim.AdamW:
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rate = _RATES.get(name.rpartition(".")[2], weight_rate)
            # No operation takes tensors that are shared out with others.
            groups.setdefault((rate, ranks.is_shared_out(parameter)), []).append(parameter)
    settings = [{"params": group, "lr": rate} for (rate, _), group in groups.items()]
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(settings, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)


def rate_at(done: float, whole: float) -> float:
    """Linear warm-up, then a cosine down to zero, after `done` of `whole` steps or seconds."""
    warm = max(1, round(_WARM_UP * whole))
    if done >= whole:
        return 0.0
    if done < warm:
        return min(1.0, (done + 1) / warm)
    return 0.5 * (1 + math.cos(math.pi * (done - warm) / (whole - warm)))
