"""What a proof is about: a class, a configuration with small sizes, and an entry."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from absorb.models.decoder import Decoder
from absorb.models.family import Family
from absorb.prove import edits
from absorb.prove.shrink import some_tokens, tiny_model
from absorb.schema.proof import Check

# Norms and softmax compute in float32 even in a float64 model.
UNCHANGED = 1e-5
CHANGED = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An entry, and what makes the tiny random models that it is tried on."""

    kind: Any
    config: Any
    family: Family

    def model(self, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        return tiny_model(self.kind, self.config, dtype)

    def decoder(self, dtype: torch.dtype = torch.float64) -> Decoder:
        return Decoder(self.model(dtype), self.family)

    @property
    def tokens(self) -> Tensor:
        return some_tokens()

    def with_entry(self, **changes: Any) -> "Subject":
        return replace(self, family=replace(self.family, **changes))

    def drift(self, edit: edits.Edit) -> float:
        """How far an edit moves the logits, relative to the largest.

        A head that is tied to the embedding would be edited with it, so it gets its own weight.
        """
        model = self.model()
        head: Any = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        return edits.drift(model, self.family, self.tokens, edit)


def still(claim: str, moved: float, bound: float = UNCHANGED) -> Check:
    """That something stays as it is."""
    return Check(claim=claim, moved=moved, bound=bound)


def shows(claim: str, moved: float) -> Check:
    """That a mistake is seen."""
    return Check(claim=claim, moved=moved, bound=CHANGED, shows=True)


def without_each(family: Family, field: str) -> Iterator[tuple[str, Family]]:
    """The entry without one of its readers or writers, by what is left out."""
    names = getattr(family, field)
    for name in names:
        fewer: dict[str, Any] = {field: tuple(other for other in names if other != name)}
        yield name, replace(family, **fewer)


def without_each_fed(family: Family) -> Iterator[tuple[str, Family]]:
    """The entry without one of the readers of a norm, by what is left out."""
    for place, (norm, readers) in enumerate(family.feeds):
        for name in readers:
            feeds = list(family.feeds)
            feeds[place] = (norm, tuple(other for other in readers if other != name))
            yield name, replace(family, feeds=tuple(feeds))
