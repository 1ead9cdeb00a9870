"""A converted checkpoint with gates is read, verified and planned from as any other is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import absorb
from absorb import AbsorbError
from absorb.cli.main import main
from absorb.load import source as loading
from absorb.schema.settings import ModelRef, Thresholds
from absorb.ship.isolated import logits_after
from absorb.ship.verify import verify
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("little_text")

GATES = ("gate_in", "gate_out")
LOW = Thresholds(channel_ratio=1.3)  # some channels of a tiny model are above it
OPTIONS: Any = {"sink": "logit", "steps": 8, "train": "all", "gates": "norm", "thresholds": LOW}


@pytest.fixture(scope="module")
def gated(
    original: Path, text_file: Path, little_text: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("gated") / "out"
    report = absorb.convert(original, out, text=text_file, **OPTIONS)
    assert report.inspection.findings.outlier_channels
    assert report.losses.kept > 0
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    return {name: one for name, one in found.items() if name.endswith(GATES)}


def planned(folder: Path) -> dict[str, torch.Tensor]:
    """What gates were to read before they were trained."""
    found = load_file(folder / "plan" / "plan.safetensors")
    return {name: one for name, one in found.items() if name.startswith("gate.")}


def test_gates_are_trained_and_a_stranger_loads_them(gated: Path, at_home: None) -> None:
    found = weights(gated)
    assert len(found) == 2 * 2 * 3
    assert {one.dtype for one in found.values()} == {torch.float32}
    assert all(one.any() for one in found.values())
    assert not verify(ModelRef(name=str(gated)), print).wrong
    told = json.loads((gated / "absorb.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(gated, trust_remote_code=True, dtype="float32")
    again = logits_after(model.eval(), told["probe"]["tokens"])
    assert again[0] == pytest.approx(told["probe"]["logits"][0], abs=1e-4)
    assert "--gates norm" in (gated / "README.md").read_text()
    assert told["inspection"]["job"]["gates"] == "norm"


def test_its_plan_makes_the_same_again(
    original: Path, gated: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    report = absorb.convert(original, out, text=text_file, plan=gated, steps=8, train="all")
    assert report.inspection.job.gates == "norm"
    assert (out / "model.safetensors").read_bytes() == (gated / "model.safetensors").read_bytes()
    for more, sentence in (({"steps": 0}, "do nothing"), ({"to": "native"}, "has no place")):
        options: Any = {"text": text_file, "plan": gated, **more}
        with pytest.raises(AbsorbError, match=f"has gates, .*{sentence}"):
            absorb.convert(original, tmp_path / "none", **options)


def test_a_model_with_gates_is_measured(gated: Path, text_file: Path) -> None:
    found = absorb.evaluate(gated, text=text_file, formats=["nvfp4"], windows=2, length=64)
    assert found.models[0].converted


@pytest.mark.slow
def test_keys_and_a_format_go_along_with_gates(
    original: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {**OPTIONS, "sink": "key", "purpose": "nvfp4", "text": text_file}
    report = absorb.convert(original, tmp_path / "out", **options)
    assert report.inspection.keyed_layers
    assert all(one.any() for one in weights(tmp_path / "out").values())
    assert not verify(ModelRef(name=str(tmp_path / "out")), print).wrong
    found = absorb.evaluate(
        tmp_path / "out", text=text_file, formats=["nvfp4"], windows=2, length=64
    )
    assert found.models[0].formats["nvfp4"] is not None


@pytest.mark.slow
def test_weights_that_stream_have_the_same_gates(
    original: Path,
    text_file: Path,
    in_float32: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absorb.convert(original, tmp_path / "resident", text=text_file, **OPTIONS)
    monkeypatch.setattr(loading, "free_memory", lambda device: 0)
    report = absorb.convert(original, tmp_path / "streamed", text=text_file, **OPTIONS)
    resident, streamed = (planned(tmp_path / name) for name in ("resident", "streamed"))
    assert streamed.keys() == resident.keys()
    for name, one in resident.items():
        torch.testing.assert_close(streamed[name], one, rtol=1e-3, atol=1e-4, msg=name)
    assert report.losses.kept >= 8  # the steps of each layer, and those of all layers behind them
    assert all(one.any() for one in weights(tmp_path / "streamed").values())


def test_no_export_drops_gates_without_a_word(gated: Path, tmp_path: Path) -> None:
    with pytest.raises(AbsorbError, match=r"norms of .* have gates, and no stock architecture"):
        absorb.export(gated, tmp_path / "native")
    for to, sentence in (("native", "has no place for gates"), ("stock", "drop one of them")):
        words = ["convert", "nothing", "--out", str(tmp_path / "o"), "--gates", "norm", "--to", to]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 2
        assert sentence in " ".join(result.stderr.split())


def test_a_family_without_such_norms_is_refused_before_the_work(tmp_path: Path) -> None:
    tiny("olmo2", torch.float32).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(AbsorbError, match="nothing to gate; drop --gates"):
        absorb.convert(tmp_path / "model", tmp_path / "out", gates="norm")
