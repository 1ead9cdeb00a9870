"""What a fine-tune needs to go on later as if it had never stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Per parameter: what AdamW remembers of it.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """How far it was, in numbers. Which rows come next follows from the seed and the steps."""

    steps: int
    done: float  # steps, or seconds
    training: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """And with the values of all that is trained, at this step and at the best, and AdamW's."""

    training_state: TrainingState
    tensors: dict[str, Tensor]


def snapshot(
    parameters: Sequence[nn.Parameter], best: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The tensors of a state, by the place of their parameter among those that are trained."""
    tensors: dict[str, Tensor] = {}
    for place, (parameter, kept) in enumerate(zip(parameters, best, strict=True)):
        tensors |= {f"{place}.now": parameter.detach(), f"{place}.best": kept}
        moments = optimizer.state[parameter]  # empty for an expert that no token has reached
        tensors |= {f"{place}.{name}": moments[name] for name in _MOMENTS if name in moments}
    return tensors


def is_of(tensors: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> bool:
    """Whether a state is of these parameters."""
    now = {name: tensor.shape for name, tensor in tensors.items() if name.endswith(".now")}
    return now == {f"{place}.now": p.shape for place, p in enumerate(parameters)}


@torch.no_grad()
def restored(
    tensors: dict[str, Tensor],
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> list[Tensor]:
    """Undo `snapshot`; what comes out are the best values."""
    best = []
    for place, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"{place}.now"])
        best.append(tensors[f"{place}.best"].to(parameter.device))
        names = [name for name in _MOMENTS if f"{place}.{name}" in tensors]
        # AdamW counts its steps on the CPU, unless it does all in one kernel.
        counting = parameter.device if optimizer.defaults["fused"] else "cpu"
        optimizer.state[parameter] |= {
            name: tensors[f"{place}.{name}"].to(counting if name == "step" else parameter.device)
            for name in names
        }
    return best
