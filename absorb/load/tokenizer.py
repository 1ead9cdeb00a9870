"""What a tokenizer puts before a text, and a tokenizer that puts nothing there."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from absorb.errors import AbsorbError

# At the head of a chat template: the name that it writes BOS by means nothing there.
_NO_BOS = "{%- set bos_token = '' -%}"


def lead_of(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What the tokenizer puts before every text: BOS, or nothing. (n,)"""
    ids = tokenizer("a")["input_ids"]
    return torch.tensor(ids[:1] if ids[:1] == [tokenizer.bos_token_id] else [], dtype=torch.long)


def without_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that puts no BOS before the text: the sinks stand for what BOS did."""
    if not len(lead_of(tokenizer)):
        return tokenizer
    plain = copy.deepcopy(tokenizer)
    plain.add_bos_token = False
    if isinstance(plain.chat_template, str) and "bos_token" in plain.chat_template:
        plain.chat_template = _NO_BOS + plain.chat_template
    if len(lead_of(plain)):
        raise AbsorbError(
            f"the tokenizer {type(tokenizer).__name__} cannot be told to leave out the BOS that "
            "the sinks stand for; save it with a fast tokenizer (tokenizer.json) and convert again"
        )
    return plain


def within(tokenizer: PreTrainedTokenizerBase, length: int) -> PreTrainedTokenizerBase:
    """A tokenizer that knows of the positions which the prefix took from a table of them."""
    short = copy.deepcopy(tokenizer)
    short.model_max_length = min(short.model_max_length, length)
    return short
