"""Text of a file → the records in it: JSON lines, JSON values, or a table with a header."""

import csv
import json
import re
import sys
from collections.abc import Iterator
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from absorb.errors import AbsorbError
from absorb.schema.codec import parse_json
from absorb.text.files import refuse_binary

FIELD = "text"
_JSON = {".json", ".jsonl", ".ndjson", ".jsonlines", ".jl"}
_TABLES = {".csv": ",", ".tsv": "\t"}
_PACKED = {".gz", ".bz2", ".xz"}
_DELIMITERS = ",\t;|"
# A header where no ending says that there is one: prose has spaces and sentences.
_COLUMN = re.compile(r"[\w.:/-]{1,40}")
_SPACE = re.compile(r"\s*")
_decoder = json.JSONDecoder()


def records(text: TextIO, path: Path) -> Iterator[str] | str:
    """The documents that are records of a file, or all of its text where it has no records.

    An ending counts only where the content leaves a doubt, and where it promises what is not there.
    """
    head = _head(text)
    ending = _ending(path)
    lines = chain(StringIO(head), text)  # other line breaks may stand in a string
    if _object_at(head):
        numbered = enumerate(lines, 1)
        return (_line(path, number, line) for number, line in numbered if line.strip())
    seems_json = head.lstrip()[:1] in ("{", "[")
    delimiter = None if seems_json else _delimiter(head, ending, path)
    if delimiter:
        return _rows(lines, delimiter, path)
    whole = head + text.read()
    if ending in _JSON or seems_json:
        values = _values(whole, path, strict=ending in _JSON)
        if values is not None:
            return iter(values)
    refuse_binary(whole, path)
    return whole


def _head(text: TextIO) -> str:
    """Everything up to the end of the first line that is not blank."""
    found = []
    for line in text:
        found.append(line)
        if line.strip():
            break
    return "".join(found)


def _ending(path: Path) -> str:
    """That of what is packed, in small letters."""
    return next((e for e in map(str.lower, reversed(path.suffixes)) if e not in _PACKED), "")


def _object_at(head: str) -> bool:
    """Whether a line begins with a JSON object that is not empty."""
    try:
        value, _ = _decoder.raw_decode(head.strip())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value)


def _line(path: Path, number: int, line: str) -> str:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise AbsorbError(
            f"{path}, line {number}: not JSON ({error}); write an object with a string field "
            f"`{FIELD}` on each line, and nothing else"
        ) from None
    return field(value, f"{path}, line {number}")


def field(value: Any, place: str) -> str:
    """The text of a record, or an AbsorbError that says what it lacks and what to do."""
    text = value.get(FIELD) if isinstance(value, dict) else None
    if isinstance(text, str):
        return _writable(text, place)
    if not isinstance(value, dict):
        lacks = f"not a JSON object with a string field `{FIELD}` but a {_kind(value)}"
    elif FIELD in value:
        lacks = f"its field `{FIELD}` is {_kind(text)} and not a string"
    else:
        names = ", ".join(f"{name!r:.40}" for name in [*value][:5])
        lacks = f"an object with {f'the fields {names}' if names else 'no field'} and no `{FIELD}`"
    raise AbsorbError(
        f"{place}: {lacks}; put what the model is to read into `{FIELD}`, a chat as one string by "
        "its template, or drop the record"
    )


def _writable(text: str, place: str) -> str:
    """A lone surrogate is a fine string to JSON and to Python, but nothing can write it down."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AbsorbError(f"{place}: not text ({error.reason}); drop the record") from None
    return text


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "number")


def _values(whole: str, path: Path, strict: bool) -> list[str] | None:
    """The documents of an array, or of JSON objects one after another over any lines.

    None where it is not JSON after all, unless a file is `strict`: then it is refused.
    """
    try:
        found = _decoded(whole)
    except ValueError as error:
        if strict:
            raise AbsorbError(
                f"{path} is not JSON ({error}); write an object with a string field `{FIELD}` on "
                "each line, or an array of them"
            ) from None
        return None
    if not strict and not (found and found[0][1] and isinstance(found[0][1], dict | str)):
        return None
    objects = ((place, {FIELD: v} if isinstance(v, str) else v) for place, v in found)
    return [field(value, f"{path}, {place}") for place, value in objects]


def _decoded(whole: str) -> list[tuple[str, Any]]:
    """The records, each with its place; a ValueError says what is not JSON."""
    found: list[tuple[str, Any]] = []
    line, counted, at = 1, 0, _after_space(whole, 0)
    while at < len(whole):
        line, counted = line + whole.count("\n", counted, at), at
        try:
            value, end = _decoder.raw_decode(whole, at)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if isinstance(value, list):
            found += [(f"record {number}", one) for number, one in enumerate(value, 1)]
        elif isinstance(value, dict):
            found.append((f"line {line}", value))
        else:
            raise ValueError(f"line {line} holds neither an object nor an array")
        at = _after_space(whole, end)
    return found


def _after_space(whole: str, at: int) -> int:
    space = _SPACE.match(whole, at)
    assert space is not None  # it matches nothing, too
    return space.end()


def _delimiter(head: str, ending: str, path: Path) -> str | None:
    """What divides the columns of a table with a header, or None where there is no table."""
    line = head.strip("\r\n ")
    marks = sorted(_DELIMITERS, key=lambda mark: mark != _TABLES.get(ending))
    rows = {mark: _split(line, mark) for mark in marks}
    for mark, names in rows.items():
        surely = ending in _TABLES or (len(names) > 1 and all(map(_COLUMN.fullmatch, names)))
        if FIELD in names and surely:
            return mark
    if ending not in _TABLES or not line.strip():
        return None
    names = max(rows.values(), key=len)
    raise AbsorbError(
        f"{path}: its first line names no column `{FIELD}` but {', '.join(names)!r:.80}; call the "
        f"column with the text `{FIELD}`"
    )


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]
    except csv.Error:
        return []


def _rows(lines: Iterator[str], delimiter: str, path: Path) -> Iterator[str]:
    """The column `text` of a table."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    usual = csv.field_size_limit(sys.maxsize)  # documents are longer than what it allows
    try:
        rows = (row for row in reader if any(map(str.strip, row)))
        header = [name.strip() for name in next(rows)]
        for row in rows:
            if len(row) != len(header):
                raise AbsorbError(
                    f"{path}, line {reader.line_num}: {len(row)} fields and the header has "
                    f"{len(header)}; put text with {delimiter!r} in it in quotes"
                )
            text = row[header.index(FIELD)]
            refuse_binary(text, path)
            yield text
    except csv.Error as error:
        raise AbsorbError(
            f"{path}, line {reader.line_num}: not a row of a table ({error}); write it again"
        ) from None
    finally:
        csv.field_size_limit(usual)
