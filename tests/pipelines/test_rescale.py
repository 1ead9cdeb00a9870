"""`absorb convert --to stock` and `--to native` write what needs no code, or say why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import absorb
from absorb.cli.main import main
from absorb.errors import AbsorbError
from absorb.fold.float16 import MOST, Rescaling, rescale
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.schema.settings import ModelRef
from absorb.ship.verify import verify
from tests.helpers.tiny import HEAD_DIM, INTERMEDIATE, KV_HEADS, LAYERS, tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("little_text", "warm_stranger")


LARGE = 2.0**-18


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 whose stream, values and neurons overflow float16."""
    folder = tmp_path_factory.mktemp("planted") / "model"
    model = tiny("gemma3_text", torch.float32)
    channels = {
        "self_attn.v_proj": torch.full((LAYERS, KV_HEADS * HEAD_DIM), LARGE),
        "mlp.up_proj": torch.full((LAYERS, INTERMEDIATE), LARGE),
    }
    by = Rescaling(stream=2.0**-14, channels=channels)
    rescale(Decoder(model, FAMILIES["gemma3_text"]), by)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rescaled(
    planted: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("rescaled") / "model"
    result = convert(planted, "--to", "stock", "--out", out, "--text", text_file, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((out / "absorb.json").read_text())
    return out, report


@torch.no_grad()
def half(folder: Path, tokens: Tensor) -> Tensor:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
    logits: Tensor = model(tokens).logits
    return logits.float()


@torch.no_grad()
def test_float16_holds_the_model_that_is_written(
    planted: Path, rescaled: tuple[Path, dict[str, Any]], tokens: Tensor
) -> None:
    expected = AutoModelForCausalLM.from_pretrained(planted, dtype=torch.float32)(tokens).logits
    assert not half(planted, tokens).isfinite().all()
    assert (half(rescaled[0], tokens) - expected).abs().max() < 0.01 * expected.abs().max()


def test_it_is_the_same_architecture_and_has_no_new_parameter(
    planted: Path, rescaled: tuple[Path, dict[str, Any]]
) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (planted, rescaled[0]))
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    configs = [AutoConfig.from_pretrained(f).to_dict() for f in (planted, rescaled[0])]
    changed = {n for n in configs[0] if configs[0][n] != configs[1][n]}
    assert changed == {"rms_norm_eps", "dtype", "_name_or_path"} & changed
    assert AutoTokenizer.from_pretrained(rescaled[0])("a b").input_ids


def test_headroom_is_told_before_and_after(rescaled: tuple[Path, dict[str, Any]]) -> None:
    folder, report = rescaled
    reaches = {reach["kind"]: reach for reach in report["reaches"]}
    for kind in ("residual stream", "neurons", "queries, keys, values", "gate and up projections"):
        assert reaches[kind]["after"] < MOST / 2 < MOST < reaches[kind]["before"], kind
    assert [kind for kind, reach in reaches.items() if not reach["bound"]] == [
        "sums of squares in norms"
    ]
    assert (report["stream"], set(report["channels"])) == (
        2 ** round(torch.tensor(report["stream"]).log2().item()),
        {"self_attn.v_proj", "mlp.up_proj"},
    )
    assert report["divergence"] < 1e-3
    card = (folder / "README.md").read_text()
    assert f"the residual stream over {report['stream']:g}, " in card
    assert "--to stock" in card


@pytest.mark.usefixtures("at_home")
def test_it_is_verified(rescaled: tuple[Path, dict[str, Any]]) -> None:
    checks = verify(ModelRef(name=str(rescaled[0])), lambda _: None).checks
    assert [(check.name, check.wrong) for check in checks] == [
        ("files", ()),
        ("code", ()),
        ("logits", ()),
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        # A gate passes an activation that bends it.
        ({"mlp.gate_proj.weight": 2.0**20}, "the gate and up projections of model reach"),
        (
            {"input_layernorm.weight": 2.0**-24, "self_attn.q_proj.weight": 2.0**24},
            "model.layers.1.self_attn.q_proj.weight of model does not fit float16",
        ),
    ],
)
def test_what_nothing_exact_makes_smaller_is_refused(
    changes: dict[str, float], sentence: str, original: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(original)
    with torch.no_grad():
        for name, factor in changes.items():
            model.get_parameter(f"model.layers.1.{name}").mul_(factor)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    result = convert(folder, "--to", "stock", "--out", tmp_path / "out", "--text", text_file)
    assert (result.exit_code, sentence in result.stderr) == (1, True), result.output
    assert not [*tmp_path.glob("out*")]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--to", "stock", "--steps", "3"], "--steps is of sinks and of training, and --to stock"),
        (["--to", "stock", "--sink", "key"], "--sink is of sinks and of training"),
        (["--to", "stock", "--resume"], "--to stock takes no long work; drop --resume"),
        (["--to", "native", "--sink", "key"], "--to native has no place for keys"),
    ],
)
def test_options_that_leave_no_sense_to_each_other_are_misuse(
    options: list[str], sentence: str, original: Path, tmp_path: Path
) -> None:
    result = convert(original, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert sentence in " ".join(result.stderr.split())


@pytest.mark.parametrize("to", ["stock", "native"])
def test_several_processes_are_told_what_one_must_write(
    to: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = convert(original, "--out", tmp_path / "out", "--to", to)
    assert result.exit_code == 2, result.output
    assert f"--to {to} is written by one process; start it without torchrun" in result.stderr


# A stock architecture that has sinks, in one step


@pytest.mark.slow
def test_a_native_model_is_converted_in_one_step(
    original: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--text", text_file, "--steps", 4, "--train", "all")
    result = convert(original, "--to", "native", "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    assert "granite_swa" in result.stdout
    report = json.loads((out / "absorb.json").read_text())
    # All weights were trained, and the scales of norms stayed together: nothing is lost.
    assert (report["architecture"], report["apart"], report["fitted_layers"]) == (
        "granite_swa",
        1.0,
        [],
    )
    assert report["divergence"] < 1e-5
    told = json.loads((out / "conversion.json").read_text())
    assert (told["recipe"]["train"], told["recipe"]["tied"]) == ("all", True)
    assert {file.name for file in out.iterdir()} >= {"model.safetensors", "README.md"}
    assert not [*out.glob("*.py"), *out.glob("converted*"), *tmp_path.glob("out.*")]
    assert not verify(ModelRef(name=str(out)), lambda _: None).wrong


def test_a_family_without_a_native_target_is_refused_before_the_long_work(
    planted: Path, tmp_path: Path
) -> None:
    result = convert(planted, "--to", "native", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "a place for the sinks of gemma3_text models" in result.stderr
    assert "measuring" not in result.stderr


# A window in every layer


@pytest.mark.slow
def test_a_converted_model_is_written_with_a_window(text_file: Path, tmp_path: Path) -> None:
    tiny("mistral", torch.float32).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    options = ("--window", 64, "--steps", 0, "--text", text_file)
    result = convert(tmp_path / "model", "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "config.json").read_text())["sliding_window"] == 64
    assert "--window 64" in (out / "README.md").read_text()


def test_a_window_without_a_setting_for_it_is_refused_before_the_long_work(
    original: Path, tmp_path: Path
) -> None:
    result = convert(original, "--window", 64, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "llama models have no setting for a window in every layer" in result.stderr
    assert "measuring" not in result.stderr


def test_layers_of_several_kinds_are_refused(tmp_path: Path) -> None:
    tiny("jamba", torch.float32).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    with pytest.raises(AbsorbError, match="layers of several kinds"):
        absorb.convert(tmp_path / "source", tmp_path / "out", to="stock")
    assert not (tmp_path / "out").exists()
