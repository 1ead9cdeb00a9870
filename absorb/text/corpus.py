"""Text of files and of users → token ids."""

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.load.source import Source
from absorb.schema.places import Dataset
from absorb.schema.training import LENGTH
from absorb.text.files import PARQUET, opened, signature
from absorb.text.records import records
from absorb.text.repeats import unrepeated, without_repeats
from absorb.text.tables import in_parquet, on_the_hub, refuse_missing_package

# A token of plain text has fewer than so many characters, on average; and what is tokenised beyond
# what is needed, since a word may be cut there.
_CHARACTERS, _SPARE = 8, 64


def read_ids(
    text: Path | Dataset, source: Source, count: int, seen: set[bytes] | None = None
) -> list[int]:
    """The tokens of the first documents of a text: `count` or more, or all that there are.

    Documents are divided by the end-of-text token. Those that were `seen` are left out, and those
    that are read are noted there.
    """
    ids: list[int] = []
    tokenizer = source.tokenizer
    divider = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in tqdm(documents(text, seen), desc="reading text", unit="document"):
        ids += _beginning(tokenizer, document, count - len(ids)) + divider
        if len(ids) >= count:
            break
    refuse_unknown_tokens(source, ids, str(text))
    return ids


def _beginning(tokenizer: PreTrainedTokenizerBase, document: str, count: int) -> list[int]:
    """The tokens of a document, or of a beginning of it that holds more than `count`.

    The last few of a beginning may not be those of the document, so there are some to spare.
    """
    length = _CHARACTERS * count
    while True:
        part = tokenizer(document[:length], add_special_tokens=False, verbose=False)
        ids: list[int] = part["input_ids"]
        if len(ids) >= count + _SPARE or length >= len(document):
            return ids
        length = 2 * length + _SPARE


def refuse_unreadable(text: Path | Dataset | None) -> None:
    """Refuse a text in whose beginning something is wrong, before anything large is loaded."""
    if isinstance(text, Dataset):
        refuse_missing_package(text)
    elif text is not None and text.is_file():  # not a pipe, which can be read but once
        next(documents(text))


def documents(text: Path | Dataset, seen: set[bytes] | None = None) -> Iterator[str]:
    """The different documents of a text, not all empty: its records, or all of a plain file.

    None is told twice, or told at all that was `seen` before, lest anything be measured on that
    was trained on. Of plain text it is the long lines and paragraphs that are not repeated.
    """
    seen = set() if seen is None else seen
    known, empty = len(seen), True
    for document in _documents(text, seen):
        empty = empty and not document.strip()
        yield document
    if empty and known:
        raise AbsorbError(f"{text} holds no text but what was read before; name another text")
    if empty:
        raise AbsorbError(f"{text} holds no text; name a file that does")


def _documents(text: Path | Dataset, seen: set[bytes]) -> Iterator[str]:
    if isinstance(text, Dataset):
        return unrepeated(on_the_hub(text), seen)
    if signature(text).startswith(PARQUET):
        return unrepeated(in_parquet(text), seen)
    return _of_file(text, seen)


def _of_file(path: Path, seen: set[bytes]) -> Iterator[str]:
    with opened(path) as content:
        found = records(content, path)
        if isinstance(found, str):
            yield without_repeats(found, seen)
        else:
            yield from unrepeated(found, seen)


def encoded(source: Source, text: str) -> tuple[int, ...]:
    """The tokens of the prefix that the user wishes for."""
    ids = source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise AbsorbError(f"--prefix {text!r} holds no token; give text, or leave --prefix out")
    refuse_unknown_tokens(source, ids, "--prefix")
    room = source.model.config.max_position_embeddings - LENGTH
    if source.family.positions is not None and len(ids) > room:
        raise AbsorbError(
            f"--prefix is {len(ids)} tokens long and {source.name} has positions for {room} before "
            f"the {LENGTH} tokens that absorb measures on; give a shorter --prefix"
        )
    return tuple(ids)


def refuse_unknown_tokens(source: Source, ids: list[int], origin: str) -> None:
    """Refuse tokens that the tokenizer has and the model does not."""
    known = source.model.config.vocab_size
    if max(ids, default=0) >= known:
        raise AbsorbError(
            f"the tokenizer of {source.name} makes token {max(ids)} of {origin} and the model has "
            f"{known}; fetch both again, or choose another text"
        )
