"""How a model is given a text: behind other tokens, and with a cache."""

from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from absorb.models.decoder import Decoder


def led(tokens: Tensor, lead: Tensor) -> Tensor:
    """Text `tokens` (batch, length), each row after the tokens `lead` (n,): (batch, n + length)."""
    return torch.cat([lead.to(tokens.device).expand(len(tokens), -1), tokens], 1)


class _PreallocatedLayer(DynamicLayer):
    """Keys and values in room for so many tokens: joined, all are copied for each new token."""

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        new = (key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.is_initialized = True
            self.whole = [t.new_empty(*t.shape[:-2], self.room, t.shape[-1]) for t in new]
        for whole, states in zip(self.whole, new, strict=True):
            whole[..., start:end, :] = states
        self.keys, self.values = (whole[..., :end, :] for whole in self.whole)
        return self.keys, self.values


def new_cache(
    model: PreTrainedModel, room: int | None = None
) -> tuple[DynamicCache, dict[str, Any]]:
    """An empty cache of keys and values, and the arguments that let a model fill and use it.

    With `room` it is made for so many tokens at once, and takes no more.
    """
    cache = DynamicCache(config=model.config)
    if room is not None:
        # Of a sliding window only the end is kept.
        cache.layers = [
            _PreallocatedLayer(room) if type(x) is DynamicLayer else x for x in cache.layers
        ]
    # Renamed in transformers 5.24.
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    return cache, {name: cache, "use_cache": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, and the tokens (n,) that it is to be given before every row of text, if any."""

    decoder: Decoder
    lead: Tensor = field(default_factory=lambda: torch.tensor([], dtype=torch.long))

    def reads_as(self, other: "Subject") -> bool:
        """Whether both are one model that is given the same lead."""
        return self.decoder.model is other.decoder.model and torch.equal(self.lead, other.lead)

    def led(self, tokens: Tensor) -> Tensor:
        """What the model reads of text (rows, length)."""
        return led(tokens.to(self.decoder.device), self.lead)

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (rows, length, vocabulary) of text (rows, length), without those of the lead."""
        found: Tensor = self.decoder.model(self.led(tokens), use_cache=False).logits
        return found[:, len(self.lead) :]
