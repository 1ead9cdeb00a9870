"""`--window` and `--mlx` of an export: what is older is hidden, and code lies beside it."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from absorb.cli.main import main
from absorb.schema.settings import ModelRef
from absorb.ship.export import mlx, native
from absorb.ship.export.targets import ROUTES, config_for
from absorb.ship.verify import verify
from tests.models.test_windows import SAME, WINDOW, within
from tests.ship.test_export import KNOWN, conversion, loaded
from tests.ship.test_export import converted as student_of
from tests.ship.test_export_story import relist

pytestmark = pytest.mark.usefixtures("little_text", "warm_stranger")
FAMILIES = sorted({case.family for case in KNOWN.values()})


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_export_has_a_window_in_every_layer(family: str, tokens: Tensor, tmp_path: Path) -> None:
    student = student_of(next(case for case in KNOWN.values() if case.family == family))
    student.set_attn_implementation("eager")
    student.save_pretrained(tmp_path / "converted")
    with ExitStack() as stack:
        tensors = native.Tensors([tmp_path / "converted" / "model.safetensors"], stack)
        told = conversion(student, tensors)
        config = config_for(told.route, told.config, WINDOW)
        (tmp_path / "out").mkdir()
        native.write(tmp_path / "out", config, native.exported(tensors, told))
    mask = within(tokens.shape[1]).expand(len(tokens), -1, -1, -1)
    expected, whole = student(tokens, attention_mask=mask).logits, student(tokens).logits
    logits, most = loaded(tmp_path / "out")(tokens).logits, whole.abs().max()
    assert (logits - expected).abs().max() < SAME * most
    assert (logits - whole)[:, WINDOW:].abs().max() > 10 * SAME * most


def test_a_window_that_layers_never_saw_is_refused() -> None:
    config = student_of(KNOWN["mistral, window"]).config
    with pytest.raises(ValueError, match="have a window of 6 tokens and never saw more"):
        config_for(ROUTES["mistral"], config, 64)


@pytest.fixture(scope="module")
def for_mlx(converted: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with a window and code for MLX."""
    out = tmp_path_factory.mktemp("mlx") / "model"
    options = ("--mlx", "--window", 64, "--text", text_file)
    result = run("export", converted, "--out", out, *options)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.usefixtures("at_home")
def test_code_for_mlx_is_named_and_verified(for_mlx: Path, tmp_path: Path) -> None:
    settings = json.loads((for_mlx / "config.json").read_text())
    assert settings["model_file"] == mlx.MODEL_FILE
    assert (settings["sliding_window"], {*settings["layer_types"]}) == (64, {"sliding_attention"})
    assert (for_mlx / mlx.MODEL_FILE).read_bytes() == mlx.OURS.read_bytes()
    assert "from mlx_lm import generate, load" in (for_mlx / "README.md").read_text()
    assert not verify(ModelRef(name=str(for_mlx)), lambda _: None).wrong
    folder = Path(shutil.copytree(for_mlx, tmp_path / "model"))
    with (folder / mlx.MODEL_FILE).open("a") as code:
        code.write("raise SystemExit('run')\n")
    (wrong,) = verify(ModelRef(name=str(relist(folder))), lambda _: None).wrong
    assert "granite_swa_mlx.py is not that of this version of absorb" in wrong


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rope_parameters": {"rope_type": "yarn"}}, "RoPE of the kind yarn"),
        ({"hidden_act": "gelu"}, "has the activation gelu"),
        ({"model_type": "flint"}, "absorb has code for MLX of granite_swa"),
    ],
)
def test_what_the_code_for_mlx_cannot_run_is_refused(
    changes: dict[str, object], sentence: str
) -> None:
    config = config_for(ROUTES["llama"], student_of(KNOWN["llama"]).config)
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=sentence):
        mlx.refuse(config)


def test_code_for_mlx_is_of_a_folder(converted: Path, tmp_path: Path) -> None:
    result = run("export", converted, "--out", tmp_path / "out", "--to", "gguf", "--mlx")
    assert result.exit_code == 2
    assert "--mlx is of a folder; pass --to native, or drop it" in result.stderr
