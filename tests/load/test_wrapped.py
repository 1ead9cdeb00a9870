"""Of a model that reads images too, the language model is converted alone, with --text-only."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from absorb.cli.main import main
from absorb.load.source import load
from absorb.models.families import INSIDE
from absorb.schema.settings import ModelRef
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer
from tests.helpers.wrappers import WRAPPERS, saved

TEXTS = {name: known.text for name, known in WRAPPERS.items() if known.text not in INSIDE}
# Of one the head has a scale, when it stands alone.
EVERY = pytest.mark.parametrize("model_type", [name for name in TEXTS if name != "aya_vision"])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@EVERY
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_alone_it_says_of_text_what_the_whole_says(
    model_type: str, tied: bool, tokens: Tensor, tmp_path: Path
) -> None:
    folder = saved(model_type, tmp_path, tied)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    source = load(ModelRef(name=str(folder), text_only=True))
    assert source.family.model_type == source.model.config.model_type == TEXTS[model_type]
    assert torch.equal(source.model(tokens).logits, whole(tokens).logits)
    embedding, head = (
        source.model.get_input_embeddings(),
        source.model.get_output_embeddings(),
    )
    assert (embedding.weight is head.weight) == tied


@pytest.mark.usefixtures("little_text", "at_home")
def test_it_is_converted_and_verified(text_file: Path, tmp_path: Path) -> None:
    folder, out = saved("gemma3", tmp_path / "whole", tied=True), tmp_path / "out"
    options = ("--text-only", "--steps", "0", "--text", text_file)
    result = run("convert", folder, "--out", out, *options)
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "absorb_gemma3_text"
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any("vision" in name for name, _ in model.named_parameters())
    assert "--text-only" in (out / "README.md").read_text()
    verified = run("verify", out)
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("model_type", ["gemma3", "llava"])
@torch.no_grad()
def test_measured_it_needs_no_option(model_type: str, tmp_path: Path) -> None:
    folder = saved(model_type, tmp_path, max_position_embeddings=528)
    (tmp_path / "text.txt").write_text(letters(1200))
    result = run(
        "eval", folder, "--text", tmp_path / "text.txt", "--json", "--formats", "w8a8-token"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["models"][0]["perplexity"]
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tiny_tokenizer()((tmp_path / "text.txt").read_text(), add_special_tokens=False)
    rows = torch.tensor(ids["input_ids"][:512])[None]
    logits = whole(rows).logits[0, :-1]
    assert found == pytest.approx(float(cross_entropy(logits, rows[0, 1:]).exp()), rel=1e-3)


@pytest.mark.parametrize("change", [{"text_config": None}, {"model_type": "llama"}])
def test_a_model_without_another_inside_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    edited(saved("llava", tmp_path), **change)
    result = run("inspect", tmp_path, "--text-only")
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert "drop --text-only" in result.stderr or "no class for these" in result.stderr


def test_a_quantised_whole_has_a_quantised_part(tmp_path: Path) -> None:
    edited(saved("llava", tmp_path), quantization_config={"quant_method": "fp8"})
    result = run("inspect", tmp_path, "--text-only")
    assert result.exit_code == 1
    assert "is quantised" in result.stderr


def test_a_language_model_without_an_entry_is_refused_by_its_own_name(tmp_path: Path) -> None:
    inside = {"text_config": {"model_type": "emu3_text_model"}}
    edited(saved("llava", tmp_path), model_type="emu3", **inside)
    result = run("inspect", tmp_path, "--text-only")
    assert result.exit_code == 1
    assert "does not know the architecture 'emu3_text_model'" in result.stderr


def test_settings_that_only_the_whole_knows_are_heeded(tmp_path: Path) -> None:
    folder = saved("paligemma", tmp_path)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edited(folder, text_config={**text, "use_bidirectional_attention": None})
    result = run("inspect", folder, "--text-only")
    assert result.exit_code == 1
    assert "gemma only with use_bidirectional_attention False" in result.stderr


def test_a_file_has_nothing_inside(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    result = run("inspect", tmp_path / "model.gguf", "--text-only")
    assert result.exit_code == 1
    assert "drop --text-only" in result.stderr


def edited(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
