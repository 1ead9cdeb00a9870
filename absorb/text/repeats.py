"""Documents without those that were read before: white space may differ."""

import hashlib
import re
import string
from collections.abc import Iterable, Iterator

# What is shorter may well be said twice: a heading, an answer. The longest line that WikiText-2
# repeats has 40 characters.
_LONG = 80
_PART = 1 << 20  # characters of a document that are looked at at once
_SPACE = string.whitespace.encode()
_BETWEEN = re.compile(r"(\n(?:[ \t]*\n)+)")  # paragraphs


def unrepeated(documents: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    """The documents that are not in `seen`, where each is noted as it is read."""
    for document in documents:
        if _is_new(document, seen):
            yield document


def without_repeats(text: str, seen: set[bytes]) -> str:
    """Plain text without the long paragraphs and lines that are in `seen`, or stood before in it.

    They are what a document is where nothing else divides them.
    """
    parts = _BETWEEN.split(text)
    found = []
    for paragraph, after in zip(parts[::2], [*parts[1::2], ""], strict=True):
        kept = _without_lines(paragraph, seen)
        found += [kept, after] if kept else []
    return "".join(found)


def _without_lines(paragraph: str, seen: set[bytes]) -> str:
    lines = paragraph.split("\n")
    several = len([*filter(str.strip, lines)]) > 1  # or it would be a repeat of itself
    if several and len(paragraph) >= _LONG and not _is_new(paragraph, seen):
        return ""
    return "\n".join(line for line in lines if len(line) < _LONG or _is_new(line, seen))


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(text), _PART):
        digest.update(text[start : start + _PART].encode().translate(None, _SPACE))
    mark = digest.digest()
    if mark in seen:
        return False
    seen.add(mark)
    return True
