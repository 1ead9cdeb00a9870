"""A real tokenizer for the tiny models: byte-level BPE over lower case letters."""

from string import ascii_lowercase

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny import VOCABULARY

SPECIAL = ["<unk>", "<s>", "</s>"]  # the ids that the tiny models give to padding, BOS and EOS
SPACE = "Ġ"  # how byte-level BPE spells a space
TOKENS = [*SPECIAL, SPACE, *ascii_lowercase, *(SPACE + letter for letter in ascii_lowercase)]
MERGES = [(SPACE, letter) for letter in ascii_lowercase]
TEMPLATE = "{% for message in messages %}{{ bos_token + message['content'] }}{% endfor %}"

assert len(TOKENS) <= VOCABULARY


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter, with the space before it if there is one; adds no BOS."""
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    backend = Tokenizer(BPE(vocabulary, MERGES, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )


def letters(count: int, seed: int = 0) -> str:
    """A text of so many tokens, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return "".join(ascii_lowercase[i] for i in torch.randint(26, (count,), generator=generator))
