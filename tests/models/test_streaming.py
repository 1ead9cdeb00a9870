"""A model that is larger than the memory for it is converted all the same, to the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import absorb
from absorb.load import source as loading
from absorb.models.resting.streaming import Streaming
from absorb.pipelines import needs
from absorb.runtime import precision
from absorb.schema.settings import ModelRef, Purpose
from absorb.schema.training import Recipe
from absorb.ship.isolated import logits_after
from absorb.tune import blockwise
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("little_text")


def saved(family: str, place: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A tiny model, and a text to convert it on."""
    source, text = place / "source", place / "text.txt"
    tiny(family, dtype, max_position_embeddings=512).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    text.write_text(letters(26_000))
    return source, text


def converted(source: Path, out: Path, text: Path, **options: str) -> dict[str, torch.Tensor]:
    absorb.convert(source, out, text=text, steps=0, **options)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "sink", "dtype", "hastened"),
    [
        ("llama", "auto", torch.float32, False),
        ("gpt2", "logit", torch.float32, True),
        ("mixtral", "key", torch.bfloat16, True),
        *(
            pytest.param(family, sink, torch.bfloat16, True, marks=pytest.mark.slow)
            for sink, families in (
                ("logit", ("gpt_neox", "qwen3")),
                ("key", ("gemma2", "olmo2")),
            )
            for family in families
        ),
    ],
)
def test_weights_that_stream_become_what_others_do_to_the_bit(
    family: str,
    sink: str,
    dtype: torch.dtype,
    hastened: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And all that is reported is the same, whether products are taken in bfloat16 or not."""
    monkeypatch.setattr(precision, "_bfloat16_is_fast", lambda device: hastened)
    source, text = saved(family, tmp_path, dtype)
    resident = converted(source, tmp_path / "resident", text, sink=sink)
    monkeypatch.setattr(loading, "free_memory", lambda device: 0)
    streamed = converted(source, tmp_path / "streamed", text, sink=sink)
    assert streamed.keys() == resident.keys()
    assert [name for name in resident if not torch.equal(streamed[name], resident[name])] == []
    first, second = (
        json.loads((tmp_path / name / "absorb.json").read_text())
        for name in ("resident", "streamed")
    )
    for report in (first, second):
        del report["inspection"]["job"]["out"]
    for part in ("inspection", "original", "converted", "probe"):
        assert second[part] == first[part]


@pytest.mark.parametrize(
    ("family", "purpose"),
    [
        ("llama", "none"),
        pytest.param("mixtral", "int8", marks=pytest.mark.slow),
        pytest.param("llama", "mxfp4", marks=pytest.mark.slow),
    ],
)
def test_layers_that_stream_learn_one_after_the_other(
    family: str, purpose: Purpose, in_float32: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = saved(family, tmp_path)
    monkeypatch.setattr(loading, "free_memory", lambda device: 0)
    out = tmp_path / "out"
    report = absorb.convert(
        source, out, text=text, sink="logit", steps=8, train="all", purpose=purpose
    )
    (_, before), (_, after), (again, start), *_, (_, last) = report.losses.held_out
    assert report.recipe.by_layers
    assert "layer by layer, then 8 end to end on sinks, biases, scales and" in str(report.recipe)
    assert report.losses.kept > 8
    assert again == 8
    assert last < start
    assert after < before
    assert all(left <= first for first, left in report.losses.layers)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"plan"}
    model = AutoModelForCausalLM.from_pretrained(out)
    again = logits_after(model, report.probe.tokens)
    assert again[0] == pytest.approx(report.probe.logits[0], abs=1e-4)


@pytest.mark.slow
def test_experts_stay_as_they_are_where_a_layer_with_them_is_too_large(
    in_float32: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = saved("mixtral", tmp_path)
    monkeypatch.setattr(loading, "free_memory", lambda device: 0)
    untrained = converted(source, tmp_path / "untrained", text, sink="logit")
    loaded = loading.load(ModelRef(name=str(source)), device=torch.device("cpu"))
    assert needs.experts_fit(loaded, Recipe(steps=8, train="all", rows=8))
    monkeypatch.setattr(needs, "free_memory", lambda device: 0.5e9)
    assert not needs.experts_fit(loaded, Recipe(steps=8, train="all", rows=8))
    monkeypatch.setattr(needs, "free_memory", lambda device: 1e9)
    monkeypatch.setattr(needs, "experts_fit", lambda source, fine_tune: False)
    monkeypatch.setattr(needs, "end_needs", lambda source, fine_tune: 2e9)
    out = tmp_path / "trained"
    plan = tmp_path / "untrained"
    report = absorb.convert(source, out, text=text, steps=32, train="all", plan=plan)
    assert "training all but experts" in str(report.recipe)
    assert "and not end to end, for which there is too little memory" in str(report.recipe)
    assert report.losses.kept == 32
    changed = {
        name
        for name, tensor in load_file(out / "model.safetensors").items()
        if not torch.equal(tensor, untrained[name])
    }
    assert any("self_attn.q_proj" in name for name in changed)
    assert not any("experts" in name for name in changed)


def test_layers_that_come_no_closer_stay_untrained(
    in_float32: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rotation the graft is exact, and nothing is left to learn."""
    source, text = saved("gpt2", tmp_path)
    monkeypatch.setattr(loading, "free_memory", lambda device: 0)
    # Smoothing scales are taken from the rows to train on: there are as many without steps.
    monkeypatch.setattr("absorb.schema.training._LEAST_TRAINING_ROWS", 32)
    untrained = converted(source, tmp_path / "untrained", text, sink="logit")
    options = {"sink": "logit", "steps": 4, "train": "all"}
    report = absorb.convert(source, tmp_path / "trained", text=text, **options)
    assert report.losses.kept == 0
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    assert all(torch.equal(trained[name], tensor) for name, tensor in untrained.items())


@pytest.mark.parametrize(
    ("family", "experts"), [("llama", True), pytest.param("mixtral", False, marks=pytest.mark.slow)]
)
def test_layers_that_an_earlier_run_has_trained_alike_are_gone_on_from(
    family: str,
    experts: bool,
    in_float32: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends while the second layer is trained; the checkpoint is that of a run that does not.

    One that had no memory for experts left layers that are trained anew.
    """
    source, text = saved(family, tmp_path)
    monkeypatch.setattr(loading, "free_memory", lambda device: 0)
    monkeypatch.setattr(needs, "end_needs", lambda source, fine_tune: 1e15)
    job = {"text": text, "sink": "logit", "steps": 4, "train": "all"}
    whole = absorb.convert(source, tmp_path / "whole", **job)
    trained = blockwise._Layers._trained
    calls: list[int] = []

    def ends(layers: blockwise._Layers, layer: int) -> tuple[float, float]:
        calls.append(layer)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return trained(layers, layer)

    monkeypatch.setattr(blockwise._Layers, "_trained", ends)
    out = tmp_path / "out"
    with monkeypatch.context() as short:
        short.setattr(needs, "experts_fit", lambda source, fine_tune: experts)
        with pytest.raises(KeyboardInterrupt):
            absorb.convert(source, out, resume=True, **job)
    assert not out.exists()
    again = absorb.convert(source, out, resume=True, **job)
    assert calls == [0, 1, *range(1 if experts else 0, len(whole.losses.layers))]
    assert again.losses == whole.losses
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out"))
    assert first == second
    assert not (tmp_path / "out.progress").exists()


def test_one_table_of_the_vocabulary_is_at_hand_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 it is the largest thing that a small card holds, and there are two models."""
    source, text = saved("llama", tmp_path)
    config = json.loads((source / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    fetch, seen, most = Streaming._fetch, set[Streaming](), 0

    def fetched(self: Streaming, unit: torch.nn.Module) -> None:
        nonlocal most
        fetch(self, unit)
        seen.add(self)
        tables = [p for one in seen for p in one._resting if len(p) == config["vocab_size"]]
        most = max(most, len(tables))

    monkeypatch.setattr(Streaming, "_fetch", fetched)
    monkeypatch.setattr(loading, "free_memory", lambda device: 0)
    converted(source, tmp_path / "out", text)
    assert most == 1
