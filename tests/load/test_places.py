"""Where models lie, and under which names: indices, caches of the Hub, clones, tokenizers alone."""

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import absorb
from absorb.errors import AbsorbError
from absorb.fold.graft import twin
from absorb.load.source import Source, load
from absorb.models.decoder import Decoder
from absorb.models.families import family_of
from absorb.schema.settings import ModelRef
from tests.helpers.fake_hub import COMMIT, FakeHub, serving
from tests.helpers.tiny import HIDDEN, tiny
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_tokenizer import tiny_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
INDEX = "model.safetensors.index.json"
Edit = Callable[[Path], None]


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    tiny("llama", torch.float32).save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(monkeypatch, tmp_path / "hub") as hub:
        yield hub


def loaded(name: Path | str) -> Source:
    return load(ModelRef(name=str(name)))


def is_tiny(source: Source) -> bool:
    expected = tiny("llama", torch.float32).state_dict()
    return all(t.equal(expected[k]) for k, t in source.model.state_dict().items())


def edit_json(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


# --- weights under other names -------------------------------------------------------------------


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    index = json.loads((folder / INDEX).read_text())
    for old in sorted({*index["weight_map"].values()}):
        (folder / old).rename(folder / rename(old))
    index["weight_map"] = {k: rename(v) for k, v in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def in_one_file(folder: Path) -> None:
    """An index that names a single file, which is not called as one would expect."""
    shards = sorted({*json.loads((folder / INDEX).read_text())["weight_map"].values()})
    tensors = {k: t for shard in shards for k, t in load_file(folder / shard).items()}
    for shard in shards:
        (folder / shard).unlink()
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "consolidated.safetensors")})
    )


def named_by_config(folder: Path) -> None:
    in_one_file(folder)
    (folder / INDEX).unlink()
    edit_json(folder / "config.json", transformers_weights="consolidated.safetensors")


def index_named_by_config(folder: Path) -> None:
    (folder / INDEX).rename(folder / "other.safetensors.index.json")
    edit_json(folder / "config.json", transformers_weights="other.safetensors.index.json")


NAMES: dict[str, Edit] = {
    "in-the-middle": lambda f: renamed(f, lambda s: s.replace("model-", "model.safetensors-")),
    "pytorch": lambda f: renamed(f, lambda s: s.replace("model-", "pytorch_model-")),
    "underscore": lambda f: renamed(f, lambda s: s.replace("model-", "model_")),
    "consolidated": lambda f: renamed(f, lambda s: s.replace("model-", "consolidated-")),
    "brackets": lambda f: renamed(f, lambda s: s.replace("model-", "model [*] ")),
    "one-file": in_one_file,
    "by-config": named_by_config,
    "index-by-config": index_named_by_config,
}


@pytest.mark.parametrize("case", NAMES)
def test_weights_are_found_where_an_index_says(case: str, sharded: Path, hub: FakeHub) -> None:
    NAMES[case](sharded)
    save_file({"other": torch.ones(1)}, sharded / "adapter.safetensors")
    hub.folders["someone/tiny"] = sharded
    assert is_tiny(loaded(sharded))
    assert is_tiny(loaded("someone/tiny"))
    weights = {file.name for file in sharded.glob("*.safetensors")} - {"adapter.safetensors"}
    assert {name for name in hub.downloaded if name.endswith(".safetensors")} == weights


@pytest.mark.parametrize("name", ["../tiny.safetensors", "/etc/passwd", "weights.bin", 3])
def test_weights_that_a_configuration_finds_elsewhere_are_refused(
    name: object, folder: Path
) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "tiny.safetensors")
    edit_json(folder / "config.json", transformers_weights=name)
    with pytest.raises(AbsorbError, match="as its weights, which is no file beside it"):
        loaded(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_clone_without_its_large_files_is_refused_by_its_cure(file: str, folder: Path) -> None:
    (folder / file).write_text(POINTER)
    with pytest.raises(
        AbsorbError, match=rf"the {file} of .* pointer of Git LFS .* `git lfs pull`"
    ):
        loaded(folder)


# --- copies in a cache of the Hub ----------------------------------------------------------------


def cached(folder: Path, name: str, cache: Path) -> Path:
    """A snapshot as huggingface_hub lays it out: links to contents that have no names."""
    place = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs, refs = place / "snapshots" / COMMIT, place / "blobs", place / "refs"
    for made in (snapshot, blobs, refs):
        made.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def itself(snapshot: Path) -> Path:
    return snapshot


def whole(snapshot: Path) -> Path:
    return snapshot.parent.parent


def linked(snapshot: Path) -> Path:
    link = snapshot.parents[3] / "a link"
    link.symlink_to(snapshot)
    return link


@pytest.mark.parametrize("place", [itself, whole, linked])
@pytest.mark.parametrize("name", ["someone/tiny-1.5", "gpt2"])
def test_a_copy_in_the_cache_keeps_its_name(
    name: str, place: Callable[[Path], Path], folder: Path, tmp_path: Path
) -> None:
    source = loaded(place(cached(folder, name, tmp_path / "cache")))
    assert (source.name, source.commit, source.license) == (name, COMMIT, "mit")
    assert is_tiny(source)


def test_a_gguf_file_in_the_cache_keeps_the_name_of_its_repository(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny("llama"))
    (tmp_path / "files").mkdir()
    (tmp_path / "tiny.gguf").rename(tmp_path / "files" / "tiny.gguf")
    snapshot = cached(tmp_path / "files", "someone/tiny-gguf", tmp_path / "cache")
    source = loaded(snapshot / "tiny.gguf")
    assert (source.name, source.commit) == ("someone/tiny-gguf", COMMIT)


def test_a_card_names_the_base_model_and_no_place(
    folder: Path, text_file: Path, tmp_path: Path
) -> None:
    name, out = "gpt2", tmp_path / "out"  # a repository without an owner
    snapshot = cached(folder, name, tmp_path / "cache")
    report = absorb.convert(snapshot, out, text=text_file, steps=0)
    assert report.inspection.job.model.name == report.inspection.model == name
    card = ModelCard.load(out / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == (name, "finetune")
    assert f"absorb convert {name} --out DIR" in card.text
    assert "target_modules" in card.text  # what peft asks of an architecture it does not know
    written = [file for file in out.rglob("*") if file.suffix in (".json", ".md")]
    assert not any(str(tmp_path) in file.read_text() for file in written)


# --- tokenizers ----------------------------------------------------------------------------------

# The beginning of a protocol buffer with one piece, "a"; and a table of tiktoken with one token.
SENTENCEPIECE = b"\n\x08\n\x01a\x15\x00\x00\x00\x00"
TIKTOKEN = base64.b64encode(b"a") + b" 0\n"


def with_tokenizer(folder: Path, file: str, content: bytes) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / file).write_bytes(content)


@pytest.mark.parametrize(
    ("file", "content", "module", "package"),
    [
        ("tokenizer.model", SENTENCEPIECE, "sentencepiece", "sentencepiece"),
        ("tokenizer.model", TIKTOKEN, "tiktoken", "tiktoken"),
        ("spiece.model", SENTENCEPIECE, "sentencepiece", "sentencepiece"),
        ("tekken.json", b"{}", "mistral_common", "mistral-common"),
    ],
)
def test_a_tokenizer_alone_names_the_package_that_reads_it(
    file: str, content: bytes, module: str, package: str, folder: Path
) -> None:
    if find_spec(module) is not None:
        pytest.skip(f"{package} is installed")
    with_tokenizer(folder, file, content)
    with pytest.raises(AbsorbError, match=rf"{file} of .* without {package}.*pip install") as said:
        loaded(folder)
    others = {"sentencepiece", "tiktoken", "mistral-common"} - {package}
    assert not any(other in str(said.value) for other in others)


def test_a_tokenizer_of_no_kind_is_refused_as_damaged(folder: Path) -> None:
    with_tokenizer(folder, "tokenizer.model", b"<html>not found</html>")
    with pytest.raises(AbsorbError, match=r"tokenizer\.model \(it is of no known kind\)"):
        loaded(folder)


def test_how_a_tokenizer_was_loaded_is_not_written_down(folder: Path, tmp_path: Path) -> None:
    loaded(folder).tokenizer.save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path"} & kept.keys()


# --- models with more than text, and texts with nothing ------------------------------------------


@pytest.mark.parametrize(
    ("wrapper", "part"), [("llama4", "llama4_text"), ("gemma3n", "gemma3n_text")]
)
def test_a_model_around_one_that_is_refused_is_refused_by_the_name_of_that(
    wrapper: str, part: str, folder: Path
) -> None:
    edit_json(folder / "config.json", model_type=wrapper, text_config={"model_type": part})
    with pytest.raises(AbsorbError, match=rf"does not convert the architecture '{part}'"):
        loaded(folder)


@pytest.mark.parametrize("shape", [(1, 0), (2, 0), (0, 3)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma3_text"])
def test_an_empty_prompt_is_refused_in_a_sentence(
    model_type: str, attention: str, shape: tuple[int, int]
) -> None:
    model = twin(Decoder(tiny(model_type, torch.float32), family_of(model_type))).model
    model.set_attn_implementation(attention)
    for given in ({"input_ids": torch.zeros(shape, dtype=torch.long)}, embedded(shape)):
        with pytest.raises(ValueError, match=r"the prompt is empty.*give at least one token"):
            model(**given)


def embedded(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {"inputs_embeds": torch.zeros(*shape, HIDDEN)}


def test_generation_from_an_empty_text_is_refused_in_the_same_sentence(converted: Path) -> None:
    source = load(ModelRef(name=str(converted)), measured=True)
    prompt = source.tokenizer("", return_tensors="pt")
    with pytest.raises(ValueError, match="the prompt is empty"):
        source.model.generate(**prompt, max_new_tokens=2)
