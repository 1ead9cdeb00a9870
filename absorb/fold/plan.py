"""Everything that a conversion changes, decided before anything is changed."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from absorb.fold.sinks.forms import KeySink, LayerSink
from absorb.schema.findings import Removal

STREAM = "stream"  # the name of its order


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `graft` writes into a copy of a model, and no more.

    sinks holds one for each layer, None where it takes none. residual holds λ, one power of two for
    each channel of the stream: (hidden,). smoothing holds, for the name of all that is divided, the
    divisors: (layers, channels), with experts (layers, experts, channels). orders holds those that
    channels are to stand in, by the names that fold/order.py has; a place that is missing stays as
    it is. gates holds what gates read, by the name of the norm that gets them: (layers, rank,
    hidden). They multiply by one until they are trained.
    """

    prefix: tuple[int, ...]
    sinks: tuple[LayerSink | None, ...]
    removals: tuple[Removal, ...]
    residual: Tensor
    smoothing: dict[str, Tensor]
    orders: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)

    @property
    def fit_error(self) -> Tensor:
        """The share of the prefix's effect that each layer's sinks leave out: (layers,)."""
        return torch.stack([sink.error if sink else torch.zeros(()) for sink in self.sinks])

    @property
    def as_logits(self) -> "Plan":
        """The same with the fitted logits in place of keys, for engines that know no others."""
        sinks = (s.fit if isinstance(s, KeySink) and s.fit else s for s in self.sinks)
        return replace(self, sinks=tuple(sinks))

    @property
    def keyed_layers(self) -> tuple[int, ...]:
        """The layers whose sinks are the keys and values of the prefix itself."""
        return tuple(i for i, sink in enumerate(self.sinks) if isinstance(sink, KeySink))
