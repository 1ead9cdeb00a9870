"""A model whose architecture has no entry, from its folder to a stranger's load."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoConfig, AutoModelForCausalLM

from absorb.cli.main import main
from absorb.models.families import FAMILIES
from absorb.prove.shrink import shrunk, tiny_model
from tests.helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("little_text")


UNLISTED, UNPROVABLE = "helium", "nanochat"


def asked(*words: str) -> Result:
    return CliRunner().invoke(main, [*words])


def saved(folder: Path, model_type: str, weights: bool = True) -> Path:
    tokenizer = tiny_tokenizer()
    config = shrunk(AutoConfig.for_model(model_type))
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 1024
    for role in ("bos", "eos", "pad"):
        setattr(config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    config.save_pretrained(folder)
    if weights:
        kind = AutoModelForCausalLM._model_mapping[type(config)]
        tiny_model(kind, config, torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_model_without_an_entry_is_converted_and_verified(
    text_file: Path, tmp_path: Path, at_home: None
) -> None:
    assert UNLISTED not in FAMILIES
    model, out = saved(tmp_path / "model", UNLISTED), tmp_path / "out"
    text = ["--text", str(text_file)]
    done = asked("convert", str(model), "--out", str(out), "--steps", "0", *text)
    assert done.exit_code == 0, done.output
    assert f'Family(\n    model_type="{UNLISTED}",\n    epsilon=None,\n)' in done.stderr
    assert "derived and proved by" in done.stdout
    found = json.loads((out / "absorb.json").read_text())["inspection"]
    assert found["proof"]["checks"]
    assert found["divergence"] < 1e-6
    assert "derived and proved on tiny random models" in (out / "README.md").read_text()
    assert asked("verify", str(out)).exit_code == 0
    # A plan needs the entry again, and so does what is measured of the converted model.
    again = ["--plan", str(out / "plan" / "plan.safetensors"), "--steps", "0", *text]
    assert asked("convert", str(model), "--out", str(tmp_path / "again"), *again).exit_code == 0
    measured = asked("eval", str(out), "--against", str(model), *text)
    assert measured.exit_code == 0, measured.output


def test_an_entry_and_its_proof_are_shown_by_the_configuration_alone(tmp_path: Path) -> None:
    model = saved(tmp_path, UNLISTED, weights=False)
    assert [file.name for file in model.iterdir()] == ["config.json"]
    done = asked("inspect", str(model), "--family", "--json")
    assert done.exit_code == 0, done.output
    proof = json.loads(done.stdout)
    assert proof["entry"] == f'Family(\n    model_type="{UNLISTED}",\n    epsilon=None,\n)'
    assert not proof["left_out"]


def test_how_somebody_ran_a_model_says_nothing_of_its_architecture(tmp_path: Path) -> None:
    file = saved(tmp_path, UNLISTED, weights=False) / "config.json"
    ran = {"use_return_dict": False, "output_attentions": True, "return_dict": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | ran))
    done = asked("inspect", str(tmp_path), "--family")
    assert done.exit_code == 0, done.output


def test_an_entry_that_is_listed_is_shown_and_proved_as_well(tmp_path: Path) -> None:
    done = asked("inspect", str(saved(tmp_path, "gpt2", weights=False)), "--family")
    assert done.exit_code == 0, done.output
    assert 'positions="transformer.wpe"' in done.stdout
    assert "the form key is exact" in done.stdout


@pytest.mark.parametrize("words", [["inspect"], ["convert", "--out", "out"]])
def test_a_model_of_which_nothing_is_proved_is_refused_before_its_weights_are_read(
    words: list[str], tmp_path: Path
) -> None:
    model = saved(tmp_path / "model", UNPROVABLE)
    (model / "model.safetensors").write_bytes(b"no weights")
    done = asked(words[0], str(model), *words[1:])
    assert done.exit_code == 1
    said = " ".join(done.stderr.split())
    assert f"has no entry for the architecture '{UNPROVABLE}' of {model} and cannot prove" in said
    assert "fails the test that rescaling the stream" in said


def test_what_is_refused_by_name_says_its_property_and_not_a_test(tmp_path: Path) -> None:
    done = asked("inspect", str(saved(tmp_path, "bloom", weights=False)), "--family")
    assert done.exit_code == 1
    assert "takes no function from outside" in done.stderr
