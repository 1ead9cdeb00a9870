"""A model most of whose layers hand on a state is converted in part, and the report says so."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from absorb.cli.main import main
from tests.helpers.tiny import LAYERS, tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("little_text")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def saved(model_type: str, folder: Path) -> Path:
    tiny(model_type, torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "granitemoehybrid"])
def test_layers_that_hand_on_a_state_are_named_and_all_others_are_converted(
    model_type: str, text_file: Path, tmp_path: Path
) -> None:
    folder, out = saved(model_type, tmp_path / "model"), tmp_path / "out"
    result = run("convert", folder, "--out", out, "--steps", "2", "--text", text_file)
    assert result.exit_code == 0, result.output
    assert "none in layers 0, 2, which hand on a state" in result.output
    inspection = json.loads((out / "absorb.json").read_text())["inspection"]
    assert [layer["attends"] for layer in inspection["layers"]] == [False, True, False]
    card = " ".join((out / "README.md").read_text().split())
    assert f"2 of {LAYERS} layers hand on a state instead of attending" in card
    verified = run("verify", out)
    assert verified.exit_code == 0, verified.output
    again = run(
        "convert", folder, "--out", tmp_path / "again", "--steps", "0", "--plan", out, "--text",
        text_file,
    )  # fmt: skip
    assert again.exit_code == 0, again.output


def test_behind_a_gate_no_logit_is_fitted(text_file: Path, tmp_path: Path) -> None:
    folder = saved("qwen3_5_text", tmp_path / "model")
    result = run("inspect", folder, "--sink", "logit", "--text", text_file)
    assert result.exit_code == 1
    assert "passes a gate, so that no value folds into a bias" in result.stderr
    assert "--sink key" in result.stderr
