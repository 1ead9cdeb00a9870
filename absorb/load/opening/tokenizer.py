"""What a tokenizer puts before a text, and a tokenizer that puts nothing there."""

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from absorb.errors import is_failure
from absorb.load.opening import templates
from absorb.load.opening.post_processor import without_lead

# Texts that tokenizers begin in different ways, lest what stands first be taken for a lead.
_TEXTS = ("a", "The", "1", "\n", "a b\nThe 1.")


def lead_of(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What the tokenizer puts before every text, be it called BOS or not. (n,), often empty"""
    leads = [_before(tokenizer, text) for text in _TEXTS]
    return torch.tensor(max(leads, key=len), dtype=torch.long)


def _before(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that stand before those which it has without special ones."""
    whole, bare = _ids(tokenizer, text), _ids(tokenizer, text, add_special_tokens=False)
    places = range(len(whole) - len(bare) + 1) if bare else ()
    first = next((at for at in places if whole[at : at + len(bare)] == bare), 0)
    return whole[:first]


def _ids(tokenizer: PreTrainedTokenizerBase, *texts: str, **options: bool) -> list[int]:
    ids: list[int] = tokenizer(*texts, verbose=False, **options)["input_ids"]
    return ids


def without_bos(
    tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int] = ()
) -> PreTrainedTokenizerBase:
    """A tokenizer that puts nothing before a text: the sinks stand for what it put there.

    Nor do its chat templates, of what it put before or of the BOS that the `prefix` begins with.
    What cannot be had so stays, and `leads_left` tells it.
    """
    opening = _opening(tokenizer, prefix)
    plain = _without_lead(tokenizer)
    if opening and tokenizer.chat_template:
        plain = copy.copy(plain)
        plain.chat_template = templates.without_opening(tokenizer, opening)
    return plain


def _opening(tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int]) -> str:
    """What no chat may begin with, spelled as templates spell it."""
    ids = lead_of(tokenizer).tolist()
    bos = tokenizer.bos_token_id
    if not ids and bos is not None and [*prefix[:1]] == [bos]:
        ids = [bos]
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def leads_left(
    tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """What `without_bos` leaves before a text, by who puts it there."""
    plain = without_bos(tokenizer, prefix)
    ids = lead_of(plain).tolist()
    left = {"The tokenizer": tuple(ids)} if ids else {}
    openings = {_opening(tokenizer, prefix), tokenizer.bos_token or ""} - {""}
    for name, opening in templates.openings(plain, sorted(openings, key=len)).items():
        left[name] = tuple(_ids(plain, opening, add_special_tokens=False))
    return left


@lru_cache(maxsize=1)  # a large vocabulary takes seconds to write and read, and is asked for thrice
def _without_lead(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer without its lead, if it can be had, in memory and from its files."""
    if not len(lead_of(tokenizer)):
        return tokenizer
    ways: tuple[Callable[[PreTrainedTokenizerBase], None], ...] = (_edit, _tell)
    for way in ways:
        plain = copy.deepcopy(tokenizer)
        try:
            way(plain)
            if _differs_by_lead(tokenizer, plain) and _differs_by_lead(tokenizer, _again(plain)):
                return plain
        except BaseException as error:  # a tokenizer may be anybody's code
            if not is_failure(error):
                raise
    return tokenizer


def _edit(tokenizer: PreTrainedTokenizerBase) -> None:
    """Take the lead out of the post-processor, and leave all else that it does, such as EOS."""
    backend = tokenizer.backend_tokenizer
    lead = lead_of(tokenizer).tolist()
    backend.post_processor = without_lead(backend.post_processor, lead)


def _tell(tokenizer: PreTrainedTokenizerBase) -> None:
    """What tokenizers that are written in Python understand."""
    tokenizer.add_bos_token = False


def _differs_by_lead(tokenizer: PreTrainedTokenizerBase, plain: PreTrainedTokenizerBase) -> bool:
    """Whether one gives of every text, and pair, what the other gives, without its lead."""
    lead = lead_of(tokenizer).tolist()
    for texts in (*((text,) for text in _TEXTS), ("a", "b")):
        before, after = (_both(one, texts) for one in (tokenizer, plain))
        if before is None:  # tokenizers panics where a template for two texts has room for one
            continue
        whole, bare = before
        led = len(lead) if whole[: len(lead)] == lead else 0
        if after != (whole[led:], bare):
            return False
    return True


def _both(
    tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...]
) -> tuple[list[int], list[int]] | None:
    """The tokens of a text or pair, with special ones and without; None where it cannot be read."""
    try:
        return _ids(tokenizer, *texts), _ids(tokenizer, *texts, add_special_tokens=False)
    except BaseException as error:
        if not is_failure(error):
            raise
        return None


def _again(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as it is loaded from its files: some classes add what these leave out."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        try:
            again: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, OSError):  # code of the model's own, which is loaded already
            again = type(tokenizer).from_pretrained(folder)
    found: PreTrainedTokenizerBase = again
    return found


def within(tokenizer: PreTrainedTokenizerBase, length: int) -> PreTrainedTokenizerBase:
    """A tokenizer that knows of the positions which the prefix took from a table of them."""
    short = copy.deepcopy(tokenizer)
    short.model_max_length = min(short.model_max_length, length)
    return short
