"""Text from a file or from the model itself, and what is said when there is none to be had."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from absorb.errors import AbsorbError
from absorb.load.source import Source
from absorb.models.families import FAMILIES
from absorb.schema.settings import Calibration
from absorb.schema.training import LENGTH
from absorb.text.corpus import documents
from absorb.text.gather import CALIBRATION_ROWS, HELD_OUT_ROWS, VALIDATION_ROWS, Texts, gather
from tests.helpers.sources import source_of
from tests.helpers.tiny import tiny

FIXED = CALIBRATION_ROWS + VALIDATION_ROWS["cpu"] + HELD_OUT_ROWS["cpu"]


@pytest.fixture(scope="module")
def source() -> Source:
    return source_of(tiny("llama", torch.float32, max_position_embeddings=512))


@pytest.fixture(scope="module")
def sampled(source: Source) -> Callable[..., Texts]:
    """Text for so many rows of training, and a seed: it takes seconds."""
    return cache(lambda rows, seed=0: gather(source, Calibration(seed=seed), rows))


def parts(texts: Texts) -> list[torch.Tensor]:
    return [texts.calibration, texts.validation, texts.held_out, texts.training]


def written(folder: Path, tokens: int, name: str = "text.txt") -> Path:
    draw = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 26, (tokens,), generator=draw) + ord("a")
    path = folder / name
    path.write_text("".join(map(chr, letters.tolist())))
    return path


def test_the_parts_of_a_file_do_not_overlap(source: Source, tmp_path: Path) -> None:
    path = written(tmp_path, (FIXED + 5) * LENGTH)
    texts = gather(source, Calibration(text=path), 100)
    sizes = [len(part) for part in parts(texts)]
    assert sizes == [CALIBRATION_ROWS, VALIDATION_ROWS["cpu"], HELD_OUT_ROWS["cpu"], 5]
    again = torch.cat(parts(texts)).flatten()
    ids = torch.tensor(source.tokenizer(path.read_text())["input_ids"])
    assert torch.equal(again, ids[: len(again)])
    assert texts.origin == "text.txt"


def test_a_file_that_is_too_short_is_refused_with_both_numbers(
    source: Source, tmp_path: Path
) -> None:
    path = written(tmp_path, 300)
    with pytest.raises(AbsorbError, match=rf"holds 301 tokens and {(FIXED + 1) * LENGTH} are"):
        gather(source, Calibration(text=path), 100)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\x00\xff\xfe\x80binary")
    with pytest.raises(AbsorbError, match=r"text\.txt cannot be read as UTF-8"):
        next(documents(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", ""), ("b.txt", "\n \n"), ("c.jsonl", ""), ("d.jsonl", '{"text": " "}\n')],
)
def test_a_file_without_text_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(AbsorbError, match=rf"{name} holds no text"):
        list(documents(tmp_path / name))


def test_documents_of_jsonl_are_told_apart_and_repeats_dropped(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": text}) for text in ("one", "two", "one")]
    path.write_text("\n".join([*lines, "", ""]))
    assert list(documents(path)) == ["one", "two"]


@pytest.mark.parametrize("line", ['{"txt": "a"}', '{"text": 3}', "[1]", "nonsense", '"text"'])
def test_a_bad_line_of_jsonl_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line)
    with pytest.raises(AbsorbError, match=r"text.jsonl, line 2: .*`text`"):
        list(documents(path))


def test_sampled_text_is_the_models_own(source: Source, sampled: Callable[..., Texts]) -> None:
    texts = sampled(3)
    sizes = [len(part) for part in parts(texts)]
    assert sizes == [CALIBRATION_ROWS, VALIDATION_ROWS["cpu"], HELD_OUT_ROWS["cpu"], 3]
    rows = torch.cat(parts(texts))
    assert rows.shape[1] == LENGTH
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)
    assert not (rows == source.tokenizer.eos_token_id).any()


def test_what_is_fitted_to_does_not_depend_on_what_else_is_sampled(
    sampled: Callable[..., Texts],
) -> None:
    alone, more = sampled(None), sampled(3)
    assert torch.equal(alone.calibration, more.calibration)
    assert torch.equal(alone.validation, more.validation)
    assert len(alone.held_out) == len(alone.training) == 0


@pytest.mark.slow
def test_the_seed_decides_what_is_sampled(source: Source, sampled: Callable[..., Texts]) -> None:
    first, other = sampled(None), sampled(None, seed=1)
    again = gather(source, Calibration(seed=0), None)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert not torch.equal(first.calibration, other.calibration)


def test_a_model_of_few_learned_positions_is_refused(source: Source) -> None:
    short = replace(source, model=tiny("gpt2"), family=FAMILIES["gpt2"])
    with pytest.raises(AbsorbError, match="reads 64 tokens at most and absorb measures on 289"):
        gather(short, Calibration(), 3)
