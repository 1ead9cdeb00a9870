"""Text is cut one way: windows follow one another, and documents have the end of text between."""

import json
from pathlib import Path

import pytest
import torch

from absorb.errors import AbsorbError
from absorb.load.source import Source
from absorb.text.windows import windows
from tests.helpers.sources import source_of
from tests.helpers.tiny import tiny


@pytest.fixture(scope="module")
def source() -> Source:
    return source_of(tiny("llama", torch.float32))


def test_windows_are_the_tokens_of_a_plain_text_in_their_order(
    source: Source, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 3)
    ids = source.tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    assert windows(source, path, 2, 7).flatten().tolist() == ids[:14]
    assert windows(source, path, 100, 7).shape == (4, 7)


def test_documents_have_the_end_of_text_between_them(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abc", "de", "fghi")))
    ends = source.tokenizer.eos_token_id
    each = [
        source.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("abc", "de", "fghi")
    ]
    expected = [*each[0], ends, *each[1], ends, *each[2], ends]
    assert windows(source, path, 1, len(expected)).flatten().tolist() == expected


def test_a_text_with_fewer_windows_than_are_needed_is_refused(
    source: Source, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 20)
    held = len(source.tokenizer("a" * 20, add_special_tokens=False)["input_ids"]) + 1
    with pytest.raises(AbsorbError, match=rf"text.txt holds {held} tokens and 32 are needed; name"):
        windows(source, path, 9, 8, least=4)
