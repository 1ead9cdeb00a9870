"""A file → its text, whatever it is packed with and encoded in: the content decides."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from absorb.errors import AbsorbError

PARQUET = b"PAR1"
_HEAD = 8  # bytes, enough for every signature below
_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_STRANGE = {
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it (zstd -d)",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"%PDF": "a PDF; save its text (pdftotext)",
    b"ARROW1": "an Arrow file; save the table as parquet",
    PARQUET: "packed parquet; unpack it",
}


def signature(path: Path) -> bytes:
    """The first bytes of a file as it lies there; none of a pipe, which can be read but once."""
    if not path.is_file():
        return b""
    with readable(path), path.open("rb") as file:
        return file.read(_HEAD)


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """The unpacked and decoded text of a file. An AbsorbError refuses what is none."""
    with readable(path), path.open("rb") as file:
        content: IO[bytes] = file
        while unpack := next((u for magic, u in _PACKED.items() if _starts(content, magic)), None):
            content = io.BufferedReader(unpack(content))
        for magic, what in _STRANGE.items():
            if _starts(content, magic):
                raise AbsorbError(f"{path} is {what} and name what comes out")
        encoding = next((e for mark, e in _MARKS.items() if _starts(content, mark)), "utf-8")
        with io.TextIOWrapper(content, encoding=encoding) as text:
            yield text


def _starts(content: IO[bytes], magic: bytes) -> bool:
    assert isinstance(content, io.BufferedReader)
    return content.peek(_HEAD).startswith(magic)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Make one sentence of whatever is wrong with the bytes of a file."""
    try:
        yield
    except UnicodeError as error:
        raise AbsorbError(
            f"{path} cannot be read as UTF-8 text: {error}; save it as UTF-8 "
            "(iconv -f ENCODING -t UTF-8)"
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise AbsorbError(f"{path} cannot be read ({error}); check it, or fetch it again") from None


def refuse_binary(text: str, path: Path) -> None:
    """Refuse text with NUL in it: an archive, or UTF-16 that does not say so."""
    if "\0" in text:
        raise AbsorbError(
            f"{path} holds NUL characters, so it is not UTF-8 text; if it is UTF-16 without a mark "
            "at its beginning, save it as UTF-8 (iconv -f UTF-16LE -t UTF-8)"
        )
