"""`scripts.benchmarks.rivals`: every rival is what its paper says, and all are in one table."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from absorb.cli.main import main
from absorb.errors import AbsorbError
from absorb.measure.score import losses
from absorb.models.decoder import Decoder
from absorb.runtime.hooks import watching
from absorb.runtime.reading import Subject, new_cache
from scripts.bench import windows
from scripts.benchmarks.rivals import rivals
from scripts.benchmarks.rivals.__main__ import main as benchmark
from scripts.benchmarks.rivals.rivals import Bench
from scripts.benchmarks.rivals.table import COLUMNS, rival_rows
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.slow
STEPS = 2


def written(path: Path, tokens: int, seed: int) -> Path:
    draw = torch.Generator().manual_seed(seed)
    letters = torch.randint(0, 26, (tokens,), generator=draw) + ord("a")
    path.write_text("".join(map(chr, letters.tolist())))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its conversion, the text to measure on, and the text to calibrate on."""
    folder = tmp_path_factory.mktemp("rivals")
    tiny("llama", torch.float32).save_pretrained(folder / "original")
    tiny_tokenizer().save_pretrained(folder / "original")
    written(folder / "text.txt", 2 * 512, seed=0)
    written(folder / "calibration.txt", 80 * 256, seed=1)
    command = ["convert", folder / "original", "--out", folder / "converted", "--train", "all"]
    command += ["--sink", "logit"]  # with keys, which are exact, no step would be kept
    command += ["--steps", STEPS, "--text", folder / "calibration.txt", "--prefix", "ab"]
    result = CliRunner().invoke(main, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    original, calibration = str(folder / "original"), folder / "calibration.txt"
    return rivals.bench_of(original, folder / "converted", calibration, "cpu")


@pytest.fixture(scope="module")
def rows(bench: Bench, folder: Path) -> Tensor:
    return windows(bench.source, folder / "text.txt", 2)


def run(folder: Path, *options: object) -> Result:
    command = [folder / "original", folder / "converted", "--text", folder / "text.txt"]
    command += ["--calibration", folder / "calibration.txt", "--windows", 2, *options]
    return CliRunner().invoke(benchmark, [str(part) for part in command])


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    result = run(folder, "--json", folder / "rivals.json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads((folder / "rivals.json").read_text())
    return found


def loss(subject: Subject, rows: Tensor) -> float:
    return float(losses(subject, rows, "test").mean())


def test_every_rival_has_every_figure_with_its_interval(report: dict[str, Any]) -> None:
    assert report["rivals"].keys() == rivals.RIVALS.keys()
    for rival in report["rivals"].values():
        assert rival["figures"].keys() == COLUMNS.keys()
        for figure in rival["figures"].values():
            for value, name in (("perplexity", "interval"), ("of_absorb", "interval_of_absorb")):
                low, high = figure[name]
                assert low * (1 - 1e-6) <= figure[value] <= high * (1 + 1e-6)
    of_itself = report["rivals"]["absorb"]["figures"].values()
    assert all(figure["of_absorb"] == 1 for figure in of_itself)
    assert report["trained_on_the_same"]


def test_absorb_is_the_folder_that_was_named(
    report: dict[str, Any], folder: Path, rows: Tensor
) -> None:
    from transformers import AutoModelForCausalLM

    for name, path in (("untouched", "original"), ("absorb", "converted")):
        model = AutoModelForCausalLM.from_pretrained(folder / path, trust_remote_code=True)
        expected = math.exp(model(rows, labels=rows).loss)
        found = report["rivals"][name]["figures"]["float"]["perplexity"]
        assert found == pytest.approx(expected, rel=1e-5)


def test_what_is_exact_changes_nothing_in_float(report: dict[str, Any]) -> None:
    def perplexity(name: str) -> float:
        value: float = report["rivals"][name]["figures"]["float"]["perplexity"]
        return value

    for name in ("SmoothQuant", "random Hadamard rotation"):
        assert perplexity(name) == pytest.approx(perplexity("untouched"), rel=1e-5)
    for name in ("prefix in the cache", "absorb"):
        assert perplexity(f"{name}, then rotated") == pytest.approx(perplexity(name), rel=1e-5)
    assert perplexity("absorb, untrained") != pytest.approx(perplexity("absorb"), rel=1e-5)


@torch.no_grad()
def test_the_prefix_is_what_a_cache_of_transformers_holds(bench: Bench, rows: Tensor) -> None:
    _, remember = new_cache(bench.model)
    rival = rivals.with_prefix(bench)
    assert rival.chosen["prefix"][-1] == bench.source.tokenizer.bos_token_id
    bench.model(torch.tensor([rival.chosen["prefix"]]), **remember)
    logits = bench.model(rows[:1], **remember).logits[:, :-1].mT
    expected = torch.nn.functional.cross_entropy(logits, rows[:1, 1:])
    found = loss(rival.subject, rows[:1])
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert found != pytest.approx(loss(rivals.original(bench), rows[:1]), rel=1e-4)


def test_plain_training_learns_the_next_token(bench: Bench) -> None:
    before = loss(rivals.original(bench), bench.texts.validation)
    rival = rivals.fine_tuned(bench)
    assert rival.chosen["steps"] == STEPS
    after = loss(rival.subject, bench.texts.validation)
    assert after < before
    assert after == pytest.approx(rival.chosen["loss"], rel=1e-3)


@pytest.mark.usefixtures("in_float32")
@torch.no_grad()
def test_smoothing_moves_ranges_behind_norms_as_its_paper_does(
    bench: Bench, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "ALPHAS", [0.5])
    model = rivals.smoothed(bench).subject.decoder.model
    kept, changed = bench.model.model.layers[0], model.model.layers[0]
    assert torch.equal(kept.mlp.down_proj.weight, changed.mlp.down_proj.weight)
    seen: list[Tensor] = []
    with watching([kept.mlp.up_proj], lambda _, values: seen.append(values), inputs=True):
        bench.model(bench.texts.scaling)
    reach = torch.stack([kept.mlp.up_proj.weight, kept.mlp.gate_proj.weight]).abs().amax((0, 1))
    scales = (torch.cat(seen).abs().amax((0, 1)) / reach).sqrt()
    expected = kept.post_attention_layernorm.weight / scales
    assert torch.allclose(changed.post_attention_layernorm.weight, expected, rtol=1e-4)


@torch.no_grad()
def test_a_rotated_model_reads_rotated_inputs(bench: Bench, rows: Tensor) -> None:
    rotated = rivals.turned(bench).subject.decoder.model
    for model, weighted in ((bench.model, True), (rotated, False)):
        norm = model.model.layers[0].input_layernorm
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)) != weighted
    inputs: dict[bool, Tensor] = {}
    for model in (bench.model, rotated):
        linear = Decoder(model, bench.decoder.family).linears["model.layers.0.self_attn.o_proj"]
        see = lambda _, values, m=model: inputs.update({m is rotated: values})  # noqa: E731
        with watching([linear], see, inputs=True):
            model(rows[:1])
    assert not torch.allclose(inputs[True], inputs[False], atol=1e-3)
    assert torch.allclose(inputs[True].norm(dim=-1), inputs[False].norm(dim=-1), rtol=1e-4)


@torch.no_grad()
def test_a_clipped_stream_stays_within_its_limits(
    bench: Bench, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "SHARES", [0.5])
    rival = rivals.clipped(bench)
    assert rival.chosen == {"share": 0.5}
    peaks: list[float] = []
    layers = rival.subject.decoder.layers
    with watching(layers, lambda _, stream: peaks.append(float(stream.abs().max()))):
        rival.subject.decoder.model(rows[:1])
        clipped, peaks[:] = list(peaks), []
    with watching(bench.decoder.layers, lambda _, s: peaks.append(float(s.abs().max()))):
        bench.model(rows[:1])
    assert all(after < 0.5 * before for after, before in zip(clipped, peaks, strict=True))


def test_the_best_of_each_column_is_bold(report: dict[str, Any]) -> None:
    head, *body = rival_rows(report)
    assert len(head) == len(COLUMNS) + 2
    for column in (1, *range(3, len(head))):
        values = [float(row[column].strip("*").replace(",", "")) for row in body]
        bold = [value for row, value in zip(body, values, strict=True) if "*" in row[column]]
        assert bold[0] == min(values)


def test_a_folder_that_is_no_conversion_is_refused(folder: Path) -> None:
    original, calibration = folder / "original", folder / "calibration.txt"
    with pytest.raises(AbsorbError, match=r"name a folder that `absorb convert` wrote"):
        rivals.bench_of(str(original), original, calibration, "cpu")


def test_windows_of_a_short_text_are_those_that_it_has(bench: Bench, tmp_path: Path) -> None:
    text = written(tmp_path / "text.txt", 2 * 512 + 100, seed=0)
    assert windows(bench.source, text, 8).shape == (2, 512)
    with pytest.raises(AbsorbError, match=r"short\.txt holds 511 tokens and 512 are needed"):
        windows(bench.source, written(tmp_path / "short.txt", 510, seed=0), 8)
