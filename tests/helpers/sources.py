"""Tiny models as a load gives them."""

import torch
from transformers import PreTrainedModel

from absorb.load.source import Source
from absorb.models.families import family_of
from tests.helpers.tiny_tokenizer import tiny_tokenizer


def source_of(model: PreTrainedModel, name: str = "tiny") -> Source:
    """A stock model in float32, with the tokenizer of the tiny models."""
    return Source(
        name=name,
        model=model,
        tokenizer=tiny_tokenizer(),
        family=family_of(model.config.model_type),
        dtype=torch.float32,
        license=None,
        commit=None,
    )
