"""How somebody ran a model is not carried on, and the end is tried at the start."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import absorb
from absorb.errors import AbsorbError
from absorb.load.session import is_of_session
from absorb.load.source import Source, load
from absorb.schema.settings import ModelRef

CONFIG = {
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_autoset": True,
    "_flash_attn_2_enabled": True,
    "attn_implementation": "flash_attention_3",
    "dtype": "auto",
    "experts_implementation": "deepgemm",
    "fusion_config": {"patch_embeddings": True},
    "gradient_checkpointing": True,
    "hf_device_map": {"": 0},
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "torch_dtype": "auto",
    "torchscript": True,
    "unsloth_version": "2025.1",
    "use_cache": False,
    "use_reentrant": False,
}
GENERATION = {
    "cache_implementation": "static",
    "compile_config": {"mode": "max-autotune"},
    "output_attentions": True,
    "output_scores": True,
    "return_dict_in_generate": True,
    "use_cache": False,
}
TOKENIZER = {
    "cache_dir": "/somebody/cache",
    "device_map": "auto",
    "is_local": True,
    "local_files_only": True,
    "token": "hf_a_secret",
    "trust_remote_code": True,
    "use_auth_token": True,
}
FILES = {
    "config.json": CONFIG,
    "generation_config.json": GENERATION,
    "tokenizer_config.json": TOKENIZER,
}
CASES = [(file, key) for file, settings in FILES.items() for key in settings]


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def content(folder: Path, file: str) -> dict[str, Any]:
    return dict(json.loads((folder / file).read_text()))


def edit(folder: Path, file: str, **settings: Any) -> None:
    (folder / file).write_text(json.dumps(content(folder, file) | settings))


def loaded(folder: Path) -> Source:
    return load(ModelRef(name=str(folder)))


@pytest.mark.parametrize(("file", "key"), CASES)
def test_a_setting_of_a_session_changes_nothing(
    file: str, key: str, folder: Path, original: Path, tokens: Tensor
) -> None:
    edit(folder, file, **{key: FILES[file][key]})
    source, plain = loaded(folder), loaded(original)
    assert source.model(tokens).logits.equal(plain.model(tokens).logits)
    ours, theirs = source.model.config.to_diff_dict(), plain.model.config.to_diff_dict()
    assert ours == theirs
    assert source.tokenizer.init_kwargs == plain.tokenizer.init_kwargs


def test_no_setting_of_a_session_is_in_the_result(
    folder: Path, text_file: Path, tmp_path: Path
) -> None:
    for file, settings in FILES.items():
        edit(folder, file, **settings)
    edit(folder, "generation_config.json", do_sample=True, temperature=0.25)
    absorb.convert(folder, tmp_path / "out", text=text_file, steps=0)
    for file, settings in FILES.items():
        # What stands there all the same is a default of the stock configuration.
        kept = {k: v for k, v in content(tmp_path / "out", file).items() if settings.get(k) == v}
        assert kept == {}, file
    assert "hf_a_secret" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    generation = content(tmp_path / "out", "generation_config.json")
    assert (generation["do_sample"], generation["temperature"]) == (True, 0.25)  # of the model


@pytest.mark.parametrize(
    "key", ["attention_bias", "logit_scale", "attention_multiplier", "output_multiplier", "rope"]
)
def test_a_setting_of_the_model_is_none_of_a_session(key: str) -> None:
    assert not is_of_session(key)


def test_a_model_that_asks_for_tuples_can_be_evaluated(folder: Path, text_file: Path) -> None:
    edit(folder, "config.json", return_dict=False, output_attentions=True)
    found = absorb.evaluate(folder, text=text_file, windows=1, length=32, formats=())
    assert found.models[0].perplexity > 1


@pytest.mark.parametrize("value", [float("nan"), [float("inf")]])
def test_what_could_not_be_written_at_the_end_is_refused_at_the_start(
    value: Any, folder: Path
) -> None:
    edit(folder, "tokenizer_config.json", of_somebody=value)
    with pytest.raises(AbsorbError, match=r"tokenizer_config\.json of .* would hold (NaN|Inf)"):
        loaded(folder)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"chat_template": [{"name": "a/b", "template": "x"}]}, "a/b"),
        ({"chat_template": [{"name": "a", "template": 3}]}, "must be str"),
        ({"of_somebody": "\ud800"}, "surrogates"),
    ],
)
def test_a_writer_of_the_end_speaks_at_the_start(
    settings: dict[str, Any], reason: str, folder: Path
) -> None:
    """transformers reads all of these, and cannot write them."""
    (folder / "chat_template.jinja").unlink()
    edit(folder, "tokenizer_config.json", **settings)
    with pytest.raises(AbsorbError, match=f"tokenizer of .* cannot be written again .*{reason}"):
        loaded(folder)


def test_a_reason_on_the_second_line_is_told(folder: Path) -> None:
    edit(folder, "config.json", layer_types=["full_attention"])
    with pytest.raises(AbsorbError, match=r"validate_layer_type.*must be equal to the number of"):
        loaded(folder)
