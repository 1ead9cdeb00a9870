"""One decoder layer of a trace: which modules read its stream, and which write to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from absorb.models.decoder import is_linear
from absorb.models.family import UnsupportedFamilyError
from absorb.prove.derived.trace import Call, Trace, same

_MOST = 3  # writers whose outputs are added to the stream at once
_NEAR = 1e-5  # some models add in float32


class UnderivedError(UnsupportedFamilyError):
    """What stands in the way of an entry for a model: the end of a sentence."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What happened in one layer: its stream, and the calls of its sites in order."""

    stem: str
    streams: tuple[Tensor, ...]  # (tokens, hidden): as it comes, after each block, as it goes
    sites: tuple[Call, ...]
    writers: tuple[Call, ...]

    @property
    def readers(self) -> tuple[Call, ...]:
        """Every site that reads the stream."""
        return tuple(
            site for site in self.sites if any(same(site.given, s) for s in self.streams[:-1])
        )

    def fed_by(self, call: Call) -> tuple[Call, ...]:
        """Every site that reads what a call gave."""
        return tuple(site for site in self.sites if same(site.given, call.gave))

    def reading(self, calls: Sequence[Call]) -> tuple[str, ...]:
        """The names of sites as readers: experts read with their first matrix. Routers are last."""
        routers = [call for call in calls if not is_linear(call.module) and has_weight(call.module)]
        routers = [call for call in routers if not is_norm(call.module)]
        others = [call for call in calls if call not in routers]
        return tuple(self.name(call, experts=0) for call in (*others, *routers))

    def name(self, call: Call, experts: int) -> str:
        """The name of a site in the layer; of experts, that of one of their matrices."""
        name = call.name.removeprefix(self.stem)
        parts = _matrices(call.module)
        return f"{name}.{parts[experts]}" if parts else name


def layers_of(model: Any) -> str:
    """The name of the list of decoder layers."""
    count = getattr(model.config, "num_hidden_layers", None)
    lists = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    names = [n for n, m in lists if len(m) == count and any(map(is_linear, m[0].modules()))]
    if not names:
        raise UnderivedError("its layers do not stand in one list")
    return str(min(names, key=len))


def layer_of(trace: Trace, stem: str) -> Layer:
    """The layer whose modules have names that begin with `stem`."""
    whole = trace.call(stem.removesuffix("."))
    sites = tuple(c for c in trace.calls if c.name.startswith(stem) and _is_site(c))
    if whole is None or whole.given.shape != whole.gave.shape:
        raise UnderivedError("its layers do not hand on one stream")
    streams: list[Tensor] = [whole.given]
    writers: dict[str, Call] = {}
    for place, site in enumerate(sites):
        known = [*streams, *(call.gave for call in sites[:place])]  # what one module gave is no sum
        if not any(same(site.given, other) for other in known):
            found = _written(streams[-1], site.given, sites[:place])
            streams += [site.given] if found else []
            writers |= {call.name: call for call in found}
    last = _written(streams[-1], whole.gave, sites)
    if not last:
        raise UnderivedError("its layers do not add what matrices give to what they were given")
    writers |= {call.name: call for call in last}
    return Layer(stem, (*streams, whole.gave), sites, tuple(writers.values()))


def _written(before: Tensor, after: Tensor, earlier: Sequence[Call]) -> tuple[Call, ...]:
    """The fewest calls whose outputs make up a difference.

    The stream itself may be multiplied too, and must have its part: a norm's output has none.
    """
    return summed(after, earlier, (before,)) if before.shape == after.shape else ()


def summed(
    target: Tensor, earlier: Sequence[Call], beside: tuple[Tensor, ...] = ()
) -> tuple[Call, ...]:
    """The fewest calls whose outputs, each times a number for every token, add up to the target."""
    calls = [call for call in earlier if call.gave.shape == target.shape]
    for count in range(1, _MOST + 1):
        for some in combinations(calls, count):
            if spans(target, [*beside, *(call.gave for call in some)]):
                return some
    return ()


def spans(target: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether parts (tokens, hidden), each times a number for a token, add up to the target.

    All parts must be needed for that.
    """
    matrix = torch.stack([part.double() for part in parts], -1)
    shares = torch.linalg.lstsq(matrix, target.double()[..., None]).solution
    error = (matrix @ shares)[..., 0] - target
    size = (shares.abs()[..., 0] * matrix.norm(dim=1)).amin(1) / target.norm(dim=1)
    return bool(error.norm() < _NEAR * target.norm() and size.amin() > _NEAR)


def is_norm(module: Any) -> bool:
    """Whether it is a norm, with a weight or without one."""
    plain = not any(True for _ in module.children()) and not _matrices(module)
    weight = getattr(module, "weight", None)
    return plain and "Norm" in type(module).__name__ and (weight is None or weight.ndim == 1)


def has_weight(module: Any) -> bool:
    return getattr(module, "weight", None) is not None


def _matrices(module: Any) -> tuple[str, ...]:
    """The parameters of experts: one matrix for each, in the order in which they are multiplied."""
    return tuple(name for name, p in module.named_parameters(recurse=False) if p.ndim == 3)


def _is_site(call: Call) -> bool:
    module: Any = call.module
    routes = has_weight(module) and module.weight.ndim == 2
    return is_linear(module) or routes or is_norm(module) or bool(_matrices(module))
