"""Of a model that reads images too, the language model is converted alone, with --text-only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from absorb.cli.main import main
from absorb.fold.graft import graft
from absorb.fold.plan import Plan
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.load.source import load
from absorb.schema.settings import ModelRef
from tests.helpers.tiny import COMMON, HIDDEN, SPECIAL, randomise
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer

IMAGE = 63  # the token in whose place the patches of a picture stand
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# The model that reads images, the language model inside it, and what reads the images.
WRAPPERS = {
    "gemma3": ("gemma3_text", "siglip_vision_model", {"mm_tokens_per_image": 4}),
    "mistral3": ("mistral", "pixtral", {}),
    "llava": ("llama", "clip_vision_model", {}),
    "llava_onevision": ("qwen2", "siglip_vision_model", {}),
    "paligemma": ("gemma", "siglip_vision_model", {"projection_dim": 32}),
}
EVERY = pytest.mark.parametrize("model_type", [name for name in WRAPPERS if name != "paligemma"])


def saved(model_type: str, folder: Path, tied: bool = False, **more: Any) -> Path:
    """A tiny random model that reads images, with a tokenizer."""
    text, vision, own = WRAPPERS[model_type]
    settings = {**COMMON, **SPECIAL.get(text, {}), "tie_word_embeddings": tied, **more}
    config = AutoConfig.for_model(
        model_type,
        text_config=AutoConfig.for_model(text, **settings).to_dict(),
        vision_config={"model_type": vision, **VISION},
        image_token_index=IMAGE,
        tie_word_embeddings=tied,
        **own,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


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
    assert source.family.model_type == source.model.config.model_type == WRAPPERS[model_type][0]
    assert torch.equal(source.model(tokens).logits, whole(tokens).logits)
    embedding, head = (
        source.model.get_input_embeddings(),
        source.model.get_output_embeddings(),
    )
    assert (embedding.weight is head.weight) == tied


# What goes with the tokens of a picture: which of them see each other.
SEEING: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "gemma3": lambda rows: {"token_type_ids": (rows == IMAGE).long()},
    "llava": lambda rows: {},
}


@pytest.mark.parametrize("model_type", SEEING)
@torch.no_grad()
def test_pictures_meet_keys_in_place_of_the_prefix_as_text_does(
    model_type: str, tokens: Tensor, tmp_path: Path
) -> None:
    """The converted part, put back into the whole: it says what the original says behind BOS."""
    prefix, patches = torch.tensor([[1, 9]]), torch.full((1, 4), IMAGE)
    words = tokens[:1].clamp_max(IMAGE - 1)
    rows = torch.cat([words[:, :6], patches, words[:, 6:]], 1)
    seen = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    folder, tells = saved(model_type, tmp_path), SEEING[model_type]
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    before = torch.cat([prefix, rows], 1)
    behind = whole(before, **seen, **tells(before)).logits[:, prefix.shape[1] :]
    alone = whole(rows, **seen, **tells(rows)).logits

    source = load(ModelRef(name=str(folder), text_only=True))
    keys = prefix_of(source.decoder, prefix[0], -prefix.shape[1]).layers
    plan = Plan(prefix=(1, 9), sinks=keys, removals=(), residual=torch.ones(HIDDEN), smoothing={})
    part = graft(source.decoder, plan).model
    whole.model.language_model, whole.lm_head = part.base_model, part.lm_head
    whole.config.text_config = part.config
    given = whole(rows, **seen, **tells(rows)).logits
    assert (given - behind).abs().max() < 1e-5 * behind.abs().max()
    assert (alone - behind).abs().max() > 0.01 * behind.abs().max()


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


def test_unasked_it_is_refused_with_the_option_that_helps(tmp_path: Path) -> None:
    result = run("convert", saved("gemma3", tmp_path / "whole"), "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "a gemma3 model, in which a language model (gemma3_text) is one part" in result.stderr
    assert "pass --text-only to convert that part" in result.stderr


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
    inside = {"text_config": {"model_type": "qwen2_vl_text"}}
    edited(saved("llava", tmp_path), model_type="qwen2_vl", **inside)
    result = run("inspect", tmp_path, "--text-only")
    assert result.exit_code == 1
    assert "does not know the architecture 'qwen2_vl_text'" in result.stderr


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
