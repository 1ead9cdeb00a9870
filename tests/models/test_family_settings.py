"""Which models of an architecture its entry holds for, by the settings of their configuration."""

import subprocess
import sys
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoConfig

from absorb.errors import AbsorbError
from absorb.fold.graft import twin
from absorb.load.checks import family_of_config
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES, family_of, suited
from absorb.models.family import Family, UnsupportedFamilyError
from absorb.prove.edits import (
    Edit,
    fold_values,
    rescale_stream,
    smooth_neurons,
    smooth_norms,
    smooth_values,
)
from absorb.prove.subject import CHANGED, UNCHANGED
from tests.helpers.drifting import drift
from tests.helpers.tiny import HIDDEN, LAYERS, tiny

# Settings that change which modules there are or how they are joined, and that an entry admits.
ADMITTED: list[tuple[str, dict[str, Any]]] = [
    ("cohere", {"use_qk_norm": True}),
    ("phi", {"qk_layernorm": True}),
    ("stablelm", {"qk_layernorm": True}),
    ("qwen2_moe", {"qkv_bias": False, "norm_topk_prob": True}),
    ("ernie4_5", {"use_bias": True}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * LAYERS}),
    ("starcoder2", {"use_bias": False}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"attention_bias": False}),
    ("opt", {"enable_bias": False}),
]


# Settings that would make an entry wrong.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("gemma", {"use_bidirectional_attention": True}),
    ("gemma2", {"use_bidirectional_attention": True}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("olmo", {"clip_qkv": 8.0}),
    ("olmoe", {"clip_qkv": 8.0}),
    ("stablelm", {"use_parallel_residual": True}),
    ("gpt2", {"add_cross_attention": True}),
    ("opt", {"activation_function": "gelu"}),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("opt", {"_remove_final_layer_norm": True}),
    ("opt", {"word_embed_proj_dim": 16}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("qwen2_moe", {"decoder_sparse_step": 2}),
]

# Some of them with an edit that shows it.
BREAKS: list[tuple[str, dict[str, Any], Edit]] = [
    ("olmo", {"clip_qkv": 0.5}, smooth_values),
    ("olmoe", {"clip_qkv": 0.5}, smooth_values),
    ("opt", {"activation_function": "gelu"}, smooth_neurons),
    ("opt", {"do_layer_norm_before": False, "_remove_final_layer_norm": True}, smooth_norms),
]

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


@pytest.mark.parametrize(("model_type", "settings"), ADMITTED)
def test_an_entry_holds_for_the_settings_that_it_admits(
    model_type: str, settings: dict[str, Any], tokens: Tensor
) -> None:
    family = FAMILIES[model_type]
    for edit in (rescale_stream, smooth_norms, smooth_values, fold_values):
        assert drift(family, tokens, edit, **settings) < UNCHANGED, edit.__name__


@pytest.mark.parametrize(("model_type", "settings"), REFUSED)
def test_settings_that_make_an_entry_wrong_are_refused(
    model_type: str, settings: dict[str, Any]
) -> None:
    setting = "|".join(settings)
    with pytest.raises(UnsupportedFamilyError, match=f"{model_type} only with {setting} "):
        suited(FAMILIES[model_type], {"hidden_size": HIDDEN, **settings})


@pytest.mark.parametrize(("model_type", "settings", "edit"), BREAKS)
def test_refusing_them_is_needed(
    model_type: str, settings: dict[str, Any], edit: Edit, tokens: Tensor
) -> None:
    assert drift(FAMILIES[model_type], tokens, edit) < UNCHANGED
    assert drift(FAMILIES[model_type], tokens, edit, **settings) > CHANGED


def test_a_configuration_is_refused_before_anything_is_downloaded() -> None:
    config = {"model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 32}
    with pytest.raises(UnsupportedFamilyError, match="opt only with word_embed_proj_dim 64"):
        family_of_config(config, "a/model")


@pytest.mark.parametrize(
    ("model_type", "setting"),
    [("cohere", "use_qk_norm"), ("phi", "qk_layernorm"), ("stablelm", "qk_layernorm")],
)
def test_keys_behind_a_norm_get_no_bias(model_type: str, setting: str) -> None:
    family = suited(FAMILIES[model_type], {setting: True})
    assert family.key is None
    student = twin(Decoder(tiny(model_type, **{setting: True}), family)).model
    assert not any("k_proj" in name for name in student.config.absorb["bias"])
    assert suited(FAMILIES[model_type], {setting: False}).key is not None


@every_family
def test_a_default_config_finds_its_family(family: Family) -> None:
    settings = AutoConfig.for_model(family.model_type).to_dict()
    assert suited(family_of(settings["model_type"]), settings) is family


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"'mamba'.*gemma2.*smollm3.*add an entry"):
        family_of("mamba")
    assert issubclass(UnsupportedFamilyError, AbsorbError)


def test_looking_up_a_family_does_not_import_torch() -> None:
    code = "import sys, absorb.models.families; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
