"""`absorb export` writes a folder that a stranger loads, or nothing, and says why in a sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import absorb
from absorb.cli.main import main
from absorb.pipelines import export as story
from absorb.schema.settings import ModelRef
from absorb.ship.plan_file import PLAN
from absorb.ship.staging import digests
from absorb.ship.verify import verify
from tests.helpers.fake_hub import TOKEN, USER, serving
from tests.helpers.tiny import LAYERS

pytestmark = pytest.mark.usefixtures("little_text", "warm_stranger")


def export(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def relist(folder: Path) -> Path:
    """List the files as they are now, as if they had been written so."""
    file = folder / "absorb.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"files": digests(folder)}))
    return folder


@pytest.fixture(scope="module")
def mixed(original: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion in the form `auto` with keys in all layers, as logits fit none of them."""
    out = tmp_path_factory.mktemp("mixed") / "model"
    absorb.convert(original, out, text=text_file, steps=0)
    found = json.loads((out / "absorb.json").read_text())["inspection"]["keyed_layers"]
    assert found == [*range(LAYERS)]
    return out


@pytest.fixture(scope="module")
def native(converted: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "model"
    result = export(converted, "--out", out, "--text", text_file, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((out / "absorb.json").read_text())
    assert report["divergence"] < 1e-7
    assert report["fitted_layers"] == []
    return out


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A converted model that may be changed."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


@torch.no_grad()
def test_an_export_is_a_stock_model_that_says_what_the_converted_one_does(
    native: Path, converted: Path, tokens: Tensor
) -> None:
    assert not [*native.rglob("*.py")]
    settings = json.loads((native / "config.json").read_text())
    assert settings["model_type"] == "granite_swa"
    assert "auto_map" not in settings
    kind = AutoModelForCausalLM
    ours, theirs = (kind.from_pretrained(f).eval()(tokens).logits for f in (native, converted))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    first, second = (AutoTokenizer.from_pretrained(f)("some text") for f in (native, converted))
    assert first["input_ids"] == second["input_ids"]


def test_the_card_says_how_every_engine_loads_it_and_that_nothing_was_lost(native: Path) -> None:
    card = (native / "README.md").read_text()
    assert "license: mit" in card
    for words in ("transformers", "vllm serve", "llama.cpp", "up to 0.5.23 it drops all biases"):
        assert words in card
    assert "\n- Nothing.\n" in card


@pytest.mark.usefixtures("at_home")
def test_an_export_is_verified_and_pushed(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(main, ["verify", str(native), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["checks"]
    assert [check["name"] for check in found] == ["files", "code", "logits"]
    with serving(monkeypatch, tmp_path) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        result = CliRunner().invoke(main, ["push", str(native), "model"])
        assert result.exit_code == 0, result.output
        assert {*hub.files(f"{USER}/model")} == {*digests(native), "absorb.json", ".gitattributes"}


def changed_weight(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.sinks"] += 3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return "the logits are "


def code(folder: Path) -> str:
    (folder / "modeling_absorb.py").write_text("raise SystemExit('run')\n")
    return "modeling_absorb.py is code that absorb does not write"


def code_elsewhere(folder: Path) -> str:
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "modeling_absorb.Config"}
    (folder / "config.json").write_text(json.dumps(settings))
    return "config.json names code outside of transformers (modeling_absorb.Config)"


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize("change", [changed_weight, code, code_elsewhere])
def test_a_change_of_an_export_is_found(
    change: Callable[[Path], str], native: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(native, tmp_path / "model"))
    sentence = change(folder)
    wrong = verify(ModelRef(name=str(relist(folder))), lambda _: None).wrong
    assert [reason for reason in wrong if sentence in reason], wrong


@pytest.mark.slow
def test_keys_that_became_logits_are_told_and_what_that_costs(
    mixed: Path, text_file: Path, tmp_path: Path
) -> None:
    out, text = tmp_path / "out", ["--text", text_file]
    result = export(mixed, "--out", out, *text, "--tolerance", 0)
    assert result.exit_code == 1
    assert "nats per token from the converted model and 0 is allowed" in result.stderr
    assert "the keys of the prefix in layers 0, 1, 2 became logits" in result.stderr
    assert "convert with --sink logit, or allow more by --tolerance" in result.stderr
    assert not out.exists()
    assert export(mixed, "--out", out, *text, "--tolerance", 1).exit_code == 0
    report = json.loads((out / "absorb.json").read_text())
    assert report["fitted_layers"] == [0, 1, 2]
    assert 1e-5 < report["divergence"] < 1
    assert "keys of the prefix in layers 0, 1, 2 became logits" in (out / "README.md").read_text()


@pytest.mark.slow
def test_scales_that_moved_are_told_and_what_that_costs(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.input_layernorm.input_scale"][::2] *= 1.02
    save_file(tensors, file, {"format": "pt"})
    result = export(relist(folder), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "sampled from the converted model" in result.stdout
    assert "had moved by up to 2.00%, are in the weights of the norms" in " ".join(
        result.stdout.split()
    )


# Refusals


def as_keys(folder: Path) -> None:
    """As `--sink key` writes it: without logits for its keys."""
    tensors = load_file(folder / PLAN)
    with_fit = [name for name in tensors if ".fit." in name]
    assert with_fit
    with safe_open(folder / PLAN, "pt") as content:
        told = content.metadata()
    kept = {name: tensor for name, tensor in tensors.items() if name not in with_fit}
    save_file(kept, folder / PLAN, told)
    relist(folder)


def test_keys_without_logits_are_refused(mixed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixed, tmp_path / "model"))
    as_keys(folder)
    refuse(folder, tmp_path, "no logits for them, and granite_swa has no place for keys")


def refuse(folder: Path, place: Path, sentence: str, *options: object) -> None:
    """Check that an export ends with one sentence and leaves nothing behind."""
    result = export(folder, "--out", place / "out", *options)
    assert result.exit_code == 1, result.output
    assert sentence in result.stderr.splitlines()[-1]
    assert not [*place.glob("out*")]


def cut(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "model.safetensors of"


def planless(folder: Path) -> str:
    (folder / PLAN).unlink()
    return f"lacks {PLAN}"


def weightless(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "has no weights in the safetensors format"


def reportless(folder: Path) -> str:
    (folder / "absorb.json").unlink()
    return "has no absorb.json, so absorb did not write it"


def told_otherwise(**settings: Any) -> Callable[[Path], str]:
    def change(folder: Path) -> str:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        relist(folder)
        return ""

    return change


DAMAGES = [cut, planless, weightless, reportless]


@pytest.mark.parametrize("change", DAMAGES)
def test_a_damaged_folder_is_refused(
    change: Callable[[Path], str], folder: Path, tmp_path: Path
) -> None:
    refuse(folder, tmp_path, change(folder))


def test_a_plan_that_belongs_to_another_model_is_refused(mixed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixed, tmp_path / "model"))
    with safe_open(folder / PLAN, "pt") as content:
        told = content.metadata()
    tensors = load_file(folder / PLAN)
    tensors["sinks.1.fit.value"] = torch.zeros(3, 2)
    save_file(tensors, folder / PLAN, told)
    refuse(relist(folder), tmp_path, "could not be read")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model_type": "absorb_gemma2"}, "a place for the sinks of gemma2 models"),
        ({"model_type": "llama"}, "holds no converted model"),
        ({"num_hidden_layers": 2}, "does not fit granite_swa, so it is damaged"),
        ({"num_hidden_layers": "two"}, "could not be read"),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            "RoPE of the kind proportional",
        ),
    ],
)
def test_a_configuration_that_cannot_be_exported_is_refused(
    settings: dict[str, Any], sentence: str, folder: Path, tmp_path: Path
) -> None:
    told_otherwise(**settings)(folder)
    refuse(folder, tmp_path, sentence)


def test_what_is_no_conversion_is_refused(original: Path, native: Path, tmp_path: Path) -> None:
    refuse(original, tmp_path, "has no absorb.json")
    refuse(tmp_path / "nowhere", tmp_path, "is no folder; name one that `absorb convert` wrote")
    refuse(native, tmp_path, "is an export already")


def test_what_lies_there_is_kept_unless_it_may_be_replaced(
    converted: Path, native: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    for more in ([], ["--force"]):
        result = export(converted, "--out", tmp_path / "out", *more)
        assert result.exit_code == 1
        assert "is not empty" in result.stderr
    assert (tmp_path / "out" / "note").read_text() == "mine"


def test_an_export_never_takes_the_place_of_its_conversion(folder: Path) -> None:
    before = digests(folder)
    shutil.copy(folder / "absorb.json", folder.parent)  # as if that were a checkpoint too
    for out in (folder, folder.parent):
        result = export(folder, "--out", out, "--force")
        assert result.exit_code == 1
        assert "would take its place; choose another --out" in result.stderr
    assert digests(folder) == before


@pytest.mark.slow
def test_an_export_that_should_be_exact_and_is_not_is_no_matter_of_tolerance(
    converted: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halved(layer: dict[str, Tensor], *_: object) -> dict[str, Tensor]:
        return {name: t / 2 if name.endswith("sinks") else t for name, t in layer.items()}

    monkeypatch.setattr(story.native, "_LAYER", (*story.native._LAYER, halved))
    refuse(
        converted,
        tmp_path,
        "which should be none; please report",
        *("--text", text_file, "--tolerance", 9),
    )
