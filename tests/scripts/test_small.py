"""`scripts.trials.train_small` writes a stock checkpoint, trained on nothing that it keeps."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import absorb
from absorb.load.opening.tokenizer import lead_of
from absorb.load.source import load
from absorb.models.families import FAMILIES
from absorb.schema.settings import ModelRef
from scripts.trials import train_small

pytestmark = pytest.mark.slow
LONG = 120  # different words of a text
train_small.LENGTH = 128  # of a row, for more steps in the same time
TINY = replace(
    train_small.Recipe(),
    minutes=0.1,
    vocabulary=300,
    rate=1e-2,
    rows=2,
    shape=(("num_hidden_layers", 2), ("hidden_size", 24), ("num_attention_heads", 6)),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Python files, of which one repeats another, and a file that is none."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(4 * train_small.KEPT):
        words = (f"{word}{number % (4 * train_small.KEPT - 1)}" for word in range(LONG))
        (folder / f"{number}.py").write_text(" ".join(words))
    (folder / "other.txt").write_text("nothing")
    return folder


@pytest.fixture(scope="module", params=list(train_small.SHAPES))
def made(
    text: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[str, Path, str]:
    """An architecture, the folder of a model of it, and what was said of it."""
    out = tmp_path_factory.mktemp(request.param) / "model"
    return request.param, out, train_small.make(request.param, [text], out, TINY, "cpu")


def test_what_is_written_is_a_checkpoint_of_the_stock_class(made: tuple[str, Path, str]) -> None:
    model_type, out, _ = made
    source = load(ModelRef(name=str(out)))
    assert source.family == FAMILIES[model_type]
    assert lead_of(source.tokenizer).tolist() == [source.model.config.bos_token_id]
    words = "word 12 é"
    ids = source.tokenizer(words, add_special_tokens=False)["input_ids"]
    assert source.tokenizer.decode(ids) == words


def test_it_learns(made: tuple[str, Path, str]) -> None:
    model_type, out, said = made
    source = load(ModelRef(name=str(out)))
    piece = json.loads((out / "held_out.jsonl").read_text().partition("\n")[0])["text"]
    rows = torch.tensor(source.tokenizer(piece)["input_ids"])[None]
    loss = float(source.model(rows, labels=rows).loss.detach())
    untrained = train_small.fresh(model_type, TINY, source.tokenizer)
    assert loss < float(untrained(rows, labels=rows).loss.detach()) - 0.2
    steps = re.search(r"(\d+) steps", said)
    assert steps is not None
    assert int(steps[1]) > 3


def test_it_says_what_it_found(made: tuple[str, Path, str]) -> None:
    model_type, _, said = made
    first, _, head, *layers, _, sinks, spikes = said.splitlines()
    assert first.startswith(f"{model_type}: ")
    assert "weight on BOS" in head
    assert len(layers) == 2
    assert sinks == "no head has a sink: train longer, or on more text"
    assert spikes == "there are no massive activations"


def test_nothing_is_trained_on_that_is_measured_on(text: Path) -> None:
    found = train_small.corpus([text])
    parts = [set(found.training), set(found.held_out), set(found.calibration)]
    assert [len(part) for part in parts] == [
        2 * train_small.KEPT - 1,
        train_small.KEPT,
        train_small.KEPT,
    ]
    assert len(set.union(*parts)) == 4 * train_small.KEPT - 1  # one file repeats another


def test_a_long_document_is_cut_into_pieces(tmp_path: Path) -> None:
    words = " ".join(map(str, range(200_000)))
    (tmp_path / "long.txt").write_text(words)
    found = train_small.corpus([tmp_path / "long.txt"])
    pieces = [*found.training, *found.held_out, *found.calibration]
    assert sorted(map(len, pieces))[1] == train_small.PIECE
    assert sum(map(len, pieces)) == len(words)


def test_the_rate_rises_then_falls() -> None:
    paces = [train_small.pace(past / 100, 0.05) for past in range(101)]
    top = paces.index(max(paces))
    assert paces[0] == 0
    assert paces[-1] == 0
    assert 3 < top < 7
    assert paces[: top + 1] == sorted(paces[: top + 1])
    assert paces[top:] == sorted(paces[top:], reverse=True)


def test_a_sink_is_counted(made: tuple[str, Path, str]) -> None:
    """A model that attends to every token alike gives BOS half before the second."""
    _, out, _ = made
    source = load(ModelRef(name=str(out)))
    for name, parameter in source.model.named_parameters():
        if name.endswith(("q_proj.weight", "query_key_value.weight")):
            parameter.data.zero_()  # attention is uniform: two tokens share it
    rows = torch.randint(3, 200, (2, 2))
    said = train_small.found(source.model, source.family, rows, lead_of(source.tokenizer))
    assert "sinks: 12 of 12 heads give BOS more than 0.3" in said


def test_it_can_be_absorbed(made: tuple[str, Path, str], tmp_path: Path) -> None:
    _, out, _ = made
    report = absorb.convert(out, tmp_path / "converted", steps=0, text=out / "calibration.jsonl")
    ratio = report.converted.perplexity / report.original.perplexity
    assert ratio == pytest.approx(1, abs=0.02)


def test_it_becomes_the_same_to_the_bit_where_its_weights_stream(
    made: tuple[str, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = made
    job = {"steps": 0, "sink": "logit", "text": out / "calibration.jsonl", "device": "cpu"}
    absorb.convert(out, tmp_path / "resident", **job)
    monkeypatch.setattr("absorb.load.source.free_memory", lambda device: 0)
    absorb.convert(out, tmp_path / "streamed", **job)
    resident, streamed = (
        load_file(tmp_path / way / "model.safetensors") for way in ("resident", "streamed")
    )
    assert streamed.keys() == resident.keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in resident.items())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--text", "short.txt"], "1 pieces of 5000 characters, and 192 are needed"),
        (["--text", "short.txt", "--out", "."], "is not empty; choose another --out"),
    ],
)
def test_what_cannot_be_done_is_refused(
    options: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    result = CliRunner().invoke(train_small.main, ["qwen3", "--out", "out", *options])
    assert result.exit_code == 1
    assert sentence in result.output
    assert not (tmp_path / "out").exists()
