"""A model of an architecture without an entry can be measured, where it is plain what is where."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from absorb.cli.main import main
from absorb.load.architecture.unlisted import inferred_family
from absorb.models.families import FAMILIES
from absorb.models.family import UnsupportedFamilyError
from tests.helpers.tiny import COMMON, randomise, tiny
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer

DENSE = [n for n, f in FAMILIES.items() if "experts" not in f.down and not f.some]
TOKENS = {name: COMMON[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
OLD: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 528, **TOKENS}
SHAPES: dict[str, dict[str, Any]] = {
    "helium": {**COMMON, "head_dim": 8, "max_position_embeddings": 528},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, **TOKENS},
    "gptj": {**OLD, "rotary_dim": 4},
    "gpt_bigcode": OLD,  # with a table of positions that a few more tokens run off
}


def strange(model_type: str, **settings: Any) -> PreTrainedModel:
    """A random model of an architecture that has no entry."""
    assert model_type not in FAMILIES
    config = AutoConfig.for_model(model_type, **{**SHAPES.get(model_type, COMMON), **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    return model


def evaluated(model: PreTrainedModel, folder: Path, *more: str) -> Result:
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(letters(1200))
    command = ["eval", f"{folder / 'model'}", "--text", f"{folder / 'text.txt'}", "--json", *more]
    return CliRunner().invoke(main, command)


@pytest.mark.parametrize("model_type", DENSE)
def test_what_an_entry_says_is_read_off_the_model(model_type: str) -> None:
    family, found = FAMILIES[model_type], inferred_family(tiny(model_type), "model")
    assert found.layers == family.layers
    assert found.attention == family.attention
    assert found.positions == family.positions


@pytest.mark.parametrize("model_type", SHAPES)
def test_such_a_model_is_measured(model_type: str, tmp_path: Path) -> None:
    model = strange(model_type)
    result = evaluated(model, tmp_path, "--formats", "w8a8-static,cache-int8")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["models"][0]
    ids = tiny_tokenizer()((tmp_path / "text.txt").read_text(), add_special_tokens=False)
    rows = torch.tensor(ids["input_ids"][:512])[None]
    loss = float(model(rows, labels=rows, use_cache=False).loss)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert found["perplexity"] not in found["formats"].values()


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bert", "a token of it sees those that come after it"),
        ("mamba", "the matrix mixer.A_log of its layers belongs to no Linear"),
        ("aria_text", "the matrix mlp.router.weight of its layers belongs to no Linear"),
    ],
)
def test_what_is_not_plain_is_refused(model_type: str, reason: str, tmp_path: Path) -> None:
    result = evaluated(strange(model_type, max_position_embeddings=528), tmp_path)
    assert result.exit_code == 1
    assert reason in result.stderr
    assert "Traceback" not in result.stderr


def test_it_is_not_converted_where_no_entry_can_be_proved(tmp_path: Path) -> None:
    model = strange("gptj")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    result = CliRunner().invoke(main, ["convert", f"{tmp_path}", "--out", f"{tmp_path / 'out'}"])
    assert result.exit_code == 1
    assert "absorb has no entry for the architecture 'gptj'" in result.stderr
    assert "cannot prove one, as it" in result.stderr


def test_a_list_of_layers_must_be_the_only_one() -> None:
    model = tiny("llama")
    model.model.others = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in model.model.layers])
    with pytest.raises(UnsupportedFamilyError, match="do not stand in one list"):
        inferred_family(model, "model")
