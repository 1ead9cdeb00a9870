"""`--text`: what a file holds is told by its content, and no document is read twice."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from absorb.errors import AbsorbError
from absorb.load.source import Source
from absorb.schema.codec import decode
from absorb.schema.declared import typed
from absorb.schema.places import Dataset, is_dataset, text_named
from absorb.schema.settings import Calibration, Evaluation
from absorb.text.corpus import documents, refuse_unreadable
from absorb.text.gather import Texts, gather_windows
from absorb.text.repeats import without_repeats
from tests.helpers.sources import source_of
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import letters

DOCUMENTS = ["one, two\nthree", 'with "quotes"', "ends with a space ", "line\u2028separator é"]
LINES = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in DOCUMENTS)
OBJECTS = [{"id": 1, "text": text} for text in DOCUMENTS]
RAW = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in OBJECTS)


def table(delimiter: str, documents: list[str] = DOCUMENTS) -> str:
    file = io.StringIO()
    rows = csv.writer(file, delimiter=delimiter)
    rows.writerows([("id", "text"), *((1, text) for text in documents)])
    return file.getvalue()


def read(folder: Path, name: str, content: bytes | str) -> list[str]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(documents(path))


JSON = [
    LINES,
    RAW,
    "\n\n" + LINES,
    LINES.replace("\n", "\r\n"),
    json.dumps(OBJECTS),
    json.dumps(OBJECTS, indent=2),
    json.dumps(DOCUMENTS),
    "\n".join(json.dumps(one, indent=1) for one in OBJECTS),  # as jq prints them
]
TABLES = [table(","), table("\t"), table(";"), "\n \n" + table("|")]


@pytest.mark.parametrize("content", JSON)
def test_json_is_known_by_what_it_is(tmp_path: Path, content: str) -> None:
    for name in ("a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.txt", "a.csv", "a"):
        assert read(tmp_path, name, content) == DOCUMENTS


@pytest.mark.parametrize("content", TABLES)
def test_a_table_is_known_by_its_header(tmp_path: Path, content: str) -> None:
    for name in ("a.csv", "a.TSV", "a.txt", "a.data", "a"):
        assert read(tmp_path, name, content) == DOCUMENTS


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("content", [LINES, RAW, json.dumps(OBJECTS), table(",")])
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, mark: str, content: str) -> None:
    assert read(tmp_path, "a.jsonl" if "{" in content else "a.csv", content.encode(mark)) == (
        DOCUMENTS
    )
    assert read(tmp_path, "a.txt", "plain é".encode(mark)) == ["plain é"]
    big = codecs.BOM_UTF16_BE + "plain é".encode("utf-16-be")
    assert read(tmp_path, "a.txt", big) == ["plain é"]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_files_are_unpacked_whatever_they_are_called(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    assert read(tmp_path, "a.jsonl.gz", pack(LINES.encode())) == DOCUMENTS
    assert read(tmp_path, "a.txt", pack(pack(LINES.encode("utf-16")))) == DOCUMENTS
    assert read(tmp_path, "b.csv.gz", pack(table(",").encode())) == DOCUMENTS
    assert read(tmp_path, "b.txt.gz", pack(b"plain")) == ["plain"]
    with pytest.raises(AbsorbError, match=r"cut\.gz cannot be read \(.*fetch it again"):
        read(tmp_path, "cut.gz", pack(LINES.encode() * 50)[:-20])


@pytest.mark.parametrize(
    "text",
    [
        "{ int x; }\nint y;",
        "{% if x %}a{% endif %}",
        "[1] Introduction\nThe",
        "[Music]",
        "[1, 2]",
        "{}",
        '"Quoted."\nHe said.',
        "text, images and sound\nall of it",
        "text\nabout text",
        "tl;dr: text",
        "3",
        "null",
    ],
)
def test_plain_text_that_looks_a_little_like_records_is_plain(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, "a.txt", text) == [text]


def test_a_table_of_one_column_is_known_by_its_ending(tmp_path: Path) -> None:
    assert read(tmp_path, "a.csv", "text\na\nb\n\n") == ["a", "b"]
    assert read(tmp_path, "a.tsv", "\n  \ntext\na,b\n") == ["a,b"]


def test_a_document_in_a_table_may_be_long(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    assert read(tmp_path, "a.csv", table(",", ["x" * (limit + 9), "b"])) == ["x" * (limit + 9), "b"]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", LINES + '{"content": "a"}', r"line 5: .*'content' and no `text`; put"),
        ("a.txt", LINES + '{"text": null}', r"line 5: its field `text` is null and not a string"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', r"line 1: .*'messages'.* by its template"),
        ("a.jsonl", LINES.replace("}\n", "},\n"), r"line 1: not JSON \(Extra data.*; write an obj"),
        ("a.jsonl", LINES + "[1]", r"line 5: not a JSON object with .* but a list"),
        ("a.json", "[{}]", r"record 1: an object with no field and no `text`"),
        ("a.json", json.dumps([*OBJECTS, 3]), r"record 5: not a JSON object .* but a number"),
        ("a.json", json.dumps(OBJECTS)[:-1], r"a.json is not JSON \(.*; write an object"),
        ("a.json", "[" * 100_000, r"a.json is not JSON \(it is nested too deeply\)"),
        ("a.json", '["\\ud800"]', r"record 1: not text \(surrogates not allowed\); drop"),
        ("a.csv", "id,content\n1,a", r"names no column `text` but 'id, content'; call"),
        ("a.csv", "text,id\na,1\nb,c,2", r"line 3: 3 fields and the header has 2; put"),
        ("a.csv", 'text,id\n"a,1', r"line 2: not a row of a table \(unexpected end of data\)"),
        ("a.txt", "é".encode("latin-1"), r"cannot be read as UTF-8 text: .*; save it as UTF-8"),
        ("a.txt", "plain".encode("utf-16-le"), r"NUL characters.*iconv -f UTF-16LE"),
        ("a.jsonl", LINES.encode("utf-16-le"), r"a.jsonl is not JSON \("),
        ("a.txt", b"PK\x03\x04zip", r"a.txt is a zip archive; unpack it and name"),
        ("a.txt", b"%PDF-1.7", r"a.txt is a PDF; save its text"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x00", r"is packed with zstd; unpack it"),
        ("a.parquet", b"PAR1 and no more", r"cannot be read as parquet \(.*\); fetch it again"),
        ("a.csv", "", "a.csv holds no text; name a file that does"),
        ("a.json", "[]", "a.json holds no text; name a file that does"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place_and_a_remedy(
    tmp_path: Path, name: str, content: Any, sentence: str
) -> None:
    with pytest.raises(AbsorbError, match=sentence) as refused:
        read(tmp_path, name, content)
    assert "\n" not in str(refused.value)


def test_only_the_beginning_is_read_before_a_model_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES + "nonsense")
    refuse_unreadable(path)
    path.write_text("nonsense\n" + LINES)
    with pytest.raises(AbsorbError, match="not JSON"):
        refuse_unreadable(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in the file system")
def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(gzip.compress(LINES.encode()),))
    writer.start()
    assert text_named(path, "text") == path
    refuse_unreadable(path)
    assert list(documents(path)) == DOCUMENTS
    writer.join()


def test_parquet_is_read_under_any_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    arrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    for name in ("a.parquet", "a.txt"):
        rows = {"id": range(4), "text": DOCUMENTS}
        parquet.write_table(arrow.table(rows), tmp_path / name, row_group_size=3)
        assert list(documents(tmp_path / name)) == DOCUMENTS
    parquet.write_table(arrow.table({"text": ["a", None]}), tmp_path / "b")
    with pytest.raises(AbsorbError, match="b, row 2: its field `text` is null"):
        list(documents(tmp_path / "b"))
    parquet.write_table(arrow.table({"content": ["a"]}), tmp_path / "c")
    with pytest.raises(AbsorbError, match="c has no column `text` but 'content'; call"):
        list(documents(tmp_path / "c"))


def test_a_dataset_is_read_as_far_as_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)  # the package takes a folder of that name for the repository
    folder = tmp_path / "owner" / "data"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(LINES)
    (folder / "test.jsonl").write_text(json.dumps({"text": "tested"}))
    assert list(documents(Dataset("owner/data"))) == DOCUMENTS
    assert list(documents(Dataset("owner/data:test"))) == ["tested"]
    for name in ("owner/data:dev", "owner/none"):
        with pytest.raises(AbsorbError, match=rf"no file {name}, .*; check its name and split"):
            list(documents(Dataset(name)))


def test_the_package_that_is_missing_is_named_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = tmp_path / "a.txt"
    path.write_bytes(b"PAR1")
    for text in (path, Dataset("owner/data")):
        with pytest.raises(AbsorbError, match=r"package datasets; pip install 'absorb-llm\[data\]"):
            refuse_unreadable(text)


def test_a_name_means_a_dataset_unless_it_looks_like_a_path(tmp_path: Path) -> None:
    for name in ("owner/data", "owner/data:test", "o/d.v2:train[:100]"):
        assert is_dataset(name)
        assert text_named(name, "text") == Dataset(name)
    for name in (
        "owner/data.jsonl",
        "owner/data.CSV",
        "data",
        "/owner/data",
        "tests/none",
        "a/b/c",
    ):
        with pytest.raises(AbsorbError, match="is no file to read text from; check text"):
            text_named(name, "text")
    assert (Dataset("a/b").repository, Dataset("a/b").part) == ("a/b", "train")
    assert (Dataset("a/b:c").repository, Dataset("a/b:c").part) == ("a/b", "c")


def test_a_record_names_a_dataset_in_full_and_a_file_without_its_place() -> None:
    for text, name in ((Dataset("a/b:c"), "a/b:c"), (Path("home/me/b.txt"), "b.txt")):
        assert typed(text) == name
        assert typed(decode(Calibration, {"text": name}).text) == name
    assert isinstance(decode(Calibration, {"text": "a/b:c"}).text, Dataset)
    assert isinstance(decode(Calibration, {"text": "b.txt"}).text, Path)


LONG = ["long line " * 10 + f"{number}" for number in range(4)]


def test_long_lines_and_paragraphs_of_plain_text_are_not_repeated(tmp_path: Path) -> None:
    text = f"= a =\n{LONG[0]}\n= a =\n{LONG[1]}\n\n{LONG[0]} \n= a =\n{LONG[2]}\n"
    assert read(tmp_path, "a.txt", text) == [
        f"= a =\n{LONG[0]}\n= a =\n{LONG[1]}\n\n= a =\n{LONG[2]}\n"
    ]
    wrapped = "short lines\nthat make a paragraph\n" * 3
    assert without_repeats(f"{wrapped}\n\nmiddle\n\n{wrapped}", set()) == f"{wrapped}\n\nmiddle\n\n"
    one_line = (
        "a line that is long enough to be told apart from others, and ends the file with a break\n"
    )
    assert without_repeats(f"before\n\n{one_line}", set()) == f"before\n\n{one_line}"
    for text in ("", "\n", "a\na\na\n", "\n".join(LONG), f"{LONG[0]}\n\n\n \n{LONG[1]}\r"):
        assert without_repeats(text, set()) == text


def test_documents_that_differ_in_white_space_are_the_same(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("a b", "a  b\n", " a\tb", "c")]
    assert read(tmp_path, "a.jsonl", "\n".join(lines)) == ["a b", "c"]
    assert read(tmp_path, "a.json", json.dumps(["a b", "a b ", "c"])) == ["a b", "c"]


@pytest.fixture(scope="module")
def source() -> Source:
    return source_of(tiny("llama", torch.float32, max_position_embeddings=512))


def pieces(first: int, last: int) -> list[str]:
    return [letters(100, seed=seed) for seed in range(first, last)]


def as_lines(documents: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents)


@pytest.mark.parametrize(
    ("text", "calibration"),
    [
        (as_lines(pieces(0, 9)), as_lines(pieces(0, 30))),
        ("\n".join(pieces(0, 9)), "\n".join(pieces(0, 30))),
        ("\n\n".join(pieces(0, 9)), as_lines(pieces(0, 30))),
        (as_lines(pieces(0, 9)), "\n\n".join(pieces(0, 30))),
    ],
)
def test_no_document_is_in_both_files_of_an_evaluation(
    source: Source, tmp_path: Path, text: str, calibration: str
) -> None:
    (tmp_path / "a").write_text(text)
    (tmp_path / "b").write_text(calibration)
    sizes = {"windows": 3, "length": 64}
    wish = Evaluation(model="m", text=tmp_path / "a", calibration=tmp_path / "b", **sizes)
    texts = gather_windows(source, wish)
    assert texts.held_out.shape == (3, 64)
    assert texts.calibration.shape == (8, 64)
    shown = [
        source.tokenizer.decode(part.flatten()) for part in (texts.held_out, texts.calibration)
    ]
    for piece in pieces(0, 30):
        assert not all(piece[:40] in whole for whole in shown)


def test_a_copy_of_the_measured_file_is_as_good_as_the_file(source: Source, tmp_path: Path) -> None:
    (tmp_path / "a").write_text(letters(1000))
    (tmp_path / "b").write_text(letters(1000))
    (tmp_path / "c").write_bytes(gzip.compress(letters(1000).encode()))

    def texts(calibration: Path | None) -> Texts:
        sizes = {"windows": 3, "length": 64}
        wish = Evaluation(model="m", text=tmp_path / "a", calibration=calibration, **sizes)
        return gather_windows(source, wish)

    assert texts(tmp_path / "b").fingerprint == texts(None).fingerprint
    with pytest.raises(AbsorbError, match="c holds no text but what was read before; name another"):
        texts(tmp_path / "c")
