"""How far an edit moves the logits of the tiny model of a family."""

from typing import Any

from torch import Tensor

from absorb.models.family import Family
from absorb.prove import edits
from tests.helpers.tiny import tiny


def drift(family: Family, tokens: Tensor, edit: edits.Edit, **settings: Any) -> float:
    """Relative to the largest logit."""
    return edits.drift(tiny(family.model_type, **settings), family, tokens, edit)
