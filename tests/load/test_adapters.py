"""Nothing is attached to a model unasked: adapters are refused, and what else lies there unread.

peft need not be installed: where it is, transformers would attach these adapters by itself.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from absorb.errors import AbsorbError
from absorb.fold import graft
from absorb.load.session import shown
from absorb.load.source import load
from absorb.schema.settings import ModelRef
from tests.helpers.fake_hub import serving
from tests.helpers.tiny import tiny
from tests.helpers.tiny_gguf import write_gguf

Edit = Callable[[Path], None]
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def add_adapter(folder: Path, base: str | None = "someone/base") -> None:
    """The two files that peft's save_pretrained writes, for a LoRA on one projection."""
    settings = {"base_model_name_or_path": base, "peft_type": "LORA", "r": 4, "lora_alpha": 8}
    targets = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | targets))
    stem = f"base_model.{QUERY.replace('model.', 'model.model.', 1)}"
    parts = {f"{stem}.lora_A.weight": torch.ones(4, 32), f"{stem}.lora_B.weight": torch.ones(32, 4)}
    save_file(parts, folder / "adapter_model.safetensors")


def alone(folder: Path, base: str | None = "someone/base") -> None:
    """Make an adapter's folder of a model's."""
    add_adapter(folder, base)
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / file).unlink()


def unmerged(folder: Path) -> None:
    """Weights that were saved while an adapter was attached to them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{QUERY}.base_layer.weight"] = tensors.pop(f"{QUERY}.weight")
    tensors[f"{QUERY}.lora_A.default.weight"] = torch.ones(4, 32)
    save_file(tensors, file, metadata={"format": "pt"})


REFUSED: list[tuple[Edit, str]] = [
    (add_adapter, r"holds an adapter beside its model \(adapter_config\.json\).*merge it, or move"),
    (alone, "is an adapter of someone/base; merge it first"),
    (lambda folder: alone(folder, None), "is an adapter of another model; merge it first"),
    (unmerged, r"holds model\.\S+base_layer\.weight, which is of an adapter that is not merged"),
]


@pytest.mark.parametrize(("edit", "sentence"), REFUSED)
def test_an_adapter_in_a_folder_is_refused(edit: Edit, sentence: str, folder: Path) -> None:
    edit(folder)
    with pytest.raises(AbsorbError, match=sentence):
        load(ModelRef(name=str(folder)))


@pytest.mark.parametrize(("edit", "sentence"), REFUSED)
def test_an_adapter_on_the_hub_is_refused_by_the_same_sentence(
    edit: Edit, sentence: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(folder)
    with serving(monkeypatch, tmp_path) as hub:
        hub.folders["someone/tiny"] = folder
        with pytest.raises(AbsorbError, match=sentence):
            load(ModelRef(name="someone/tiny"))


def test_an_adapter_in_gguf_is_refused(tmp_path: Path) -> None:
    def typed(writer: Any) -> None:
        writer.add_string("general.type", "adapter")

    write_gguf(tmp_path / "lora.gguf", tiny("llama"), extra=typed)
    with pytest.raises(AbsorbError, match="is of the type 'adapter' and no model; merge it first"):
        load(ModelRef(name=str(tmp_path / "lora.gguf")))


def test_what_lies_beside_a_model_is_not_shown_to_transformers(folder: Path) -> None:
    """Of these, transformers 5.24 reads the parts of a sharded training in place of the weights."""
    shutil.copy(folder / "model.safetensors", folder / "__0_0.distcp.safetensors")
    (folder / ".metadata").write_bytes(b"a checkpoint of torch.distributed")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit")
    with shown(folder, [folder / "model.safetensors"], "tiny") as view:
        names = {path.name for path in view.rglob("*")}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    expected = load_file(folder / "model.safetensors")
    loaded = load(ModelRef(name=str(folder))).model.state_dict()
    assert all(loaded[key].equal(tensor) for key, tensor in expected.items())


def test_what_a_copy_lacks_is_no_surprise_to_us(folder: Path) -> None:
    """A state whose names have changed, as under an attached adapter, ends the graft."""
    source = load(ModelRef(name=str(folder)))
    attention = source.model.model.layers[0].self_attn
    attention.q_proj = torch.nn.Sequential(attention.q_proj)
    with pytest.raises(AssertionError, match="q_proj"):
        graft.twin(source.decoder)
