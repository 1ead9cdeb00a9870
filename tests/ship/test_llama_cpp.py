"""llama.cpp says of an exported .gguf file what transformers says of the same model.

scripts/test_llama_cpp installs it: without the package llama_cpp_py_sync all of this is skipped.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from absorb.cli.main import main
from absorb.errors import AbsorbError
from absorb.schema.places import Destination
from absorb.schema.settings import ModelRef, Weights
from absorb.ship.export import gguf
from absorb.ship.export.targets import ROUTES, config_for
from absorb.ship.export.vocabulary import _CUTS, vocabulary
from absorb.ship.hub import upload
from absorb.ship.verify import verify
from tests.helpers.fake_hub import TOKEN, USER, serving
from tests.helpers.tiny import COMMON, VOCABULARY
from tests.helpers.tiny_tokenizer import tiny_tokenizer
from tests.ship.test_export import CASES, ROPES, Case, export
from tests.ship.test_export import converted as made_of

# Of log-probabilities: sums in float32, in another order.
SAME = 1e-3
RUNS = {
    name: case
    for name, case in CASES.items()
    if ROUTES[case.family].target.model_type == gguf.ARCHITECTURE
    and not {"dynamic RoPE", "longrope RoPE", "longrope"} & {*name.split(", ")}
    and "hidden_act" not in case.settings
}


def run(*words: object) -> str:
    command = [sys.executable, "-m", "scripts.engines.llama_cpp", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def said(file: Path, tokens: Tensor) -> Tensor:
    """The log-probabilities that llama.cpp gives: (rows, length, vocabulary)."""
    rows, out = file.with_suffix(".json"), file.with_suffix(".npy")
    rows.write_text(json.dumps(tokens.tolist()))
    run("logits", file, rows, out)
    return torch.from_numpy(np.load(out)).log_softmax(-1)


@torch.no_grad()
def written(case: Case, place: Path, weights: Weights = "f32") -> tuple[Path, Any]:
    """A .gguf file, and the same model in transformers."""
    student = made_of(case).float()
    folder = export(student, place)
    tiny_tokenizer().save_pretrained(folder)
    gguf.write(place / "model.gguf", folder, weights, "tiny", "mit")
    return place / "model.gguf", AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_llama_cpp_says_what_transformers_says(name: str, tokens: Tensor, tmp_path: Path) -> None:
    file, model = written(RUNS[name], tmp_path)
    expected = model(tokens).logits.log_softmax(-1)
    assert (said(file, tokens) - expected).abs().max() < SAME


@pytest.mark.llama_cpp
@pytest.mark.parametrize("weights", ["f16", "bf16"])
@torch.no_grad()
def test_short_types_hold_matrices_rounded_and_all_else_as_it_was(
    weights: Weights, tokens: Tensor, tmp_path: Path
) -> None:
    file, model = written(CASES["granite"], tmp_path, weights)
    short = {"f16": torch.float16, "bf16": torch.bfloat16}[weights]
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.copy_(parameter.to(short).float())
    # llama.cpp rounds what a matrix of these types reads as well.
    far = {"f16": 1e-2, "bf16": 1e-1}[weights]
    found = (said(file, tokens) - model(tokens).logits.log_softmax(-1)).abs().max()
    assert found < far


@pytest.mark.llama_cpp
@torch.no_grad()
def test_llama_cpp_quantises_an_export(tokens: Tensor, tmp_path: Path) -> None:
    # Q4_K wants rows of 256.
    case = Case("llama", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2})
    file, model = written(case, tmp_path)
    expected = model(tokens).logits.log_softmax(-1)
    far = {}
    for kind in ("q8_0", "q4_k_m"):
        run("quantize", file, tmp_path / f"{kind}.gguf", kind)
        apart = expected - said(tmp_path / f"{kind}.gguf", tokens)
        far[kind] = (expected.exp() * apart).sum(-1).mean().item()
    assert 0 < far["q8_0"] < 1e-3 < far["q4_k_m"] < 0.1
    sizes = [(tmp_path / f"{kind}.gguf").stat().st_size for kind in ("q4_k_m", "q8_0")]
    assert sizes[0] < sizes[1] < file.stat().st_size / 3


# Tokenizers

TEXTS = [
    "Hello world, it's 2024 and they'll pay $1,234.56!",
    "  two  spaces\n\n\n and\ttabs \r\n ends  ",
    "ÄÖÜ naïve Straße 東京 привет 🙂🙂 e\u0301",
    "def f(x):\n    return x**2  # DON'T\n",
    "",
    "<s>[bos]</s>",
]


def byte_level(cut: tuple[str, ...]) -> Tokenizer:
    """A byte-level tokenizer that cuts text so, trained on what lies here."""
    steps: list[Any] = []
    for part in cut:
        if part == "by digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif part != "by words":
            steps.append(pre_tokenizers.Split(Regex(part), "isolated"))
    words = cut[-1] == "by words"
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words))
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(Path(__file__).parents[2] / "README.md"), __file__], trainer)
    return tokenizer


def pieces(metaspace: bool) -> Tokenizer:
    """One that spells spaces as SentencePiece does, and bytes that it does not know."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=specials, show_progress=False, limit_alphabet=80
    )
    tokenizer.train([str(Path(__file__).parents[2] / "README.md"), __file__], trainer)
    told = json.loads(tokenizer.to_str())
    told["added_tokens"] = told["added_tokens"][:3]
    if metaspace:
        told["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
    else:
        told["pre_tokenizer"] = None
        replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        told["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, replaced],
        }
    return Tokenizer.from_str(json.dumps(told))


MADE = {name: lambda cut=cut: byte_level(cut) for cut, name in _CUTS.items()}
MADE |= {"Metaspace": lambda: pieces(True), "Prepend": lambda: pieces(False)}


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", MADE)
def test_llama_cpp_cuts_texts_into_the_same_tokens(name: str, tmp_path: Path) -> None:
    made = PreTrainedTokenizerFast(
        tokenizer_object=MADE[name](), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    student = made_of(Case("llama", {"vocab_size": len(made) + 3})).float()
    folder = export(student, tmp_path)
    made.save_pretrained(folder)
    gguf.write(tmp_path / "model.gguf", folder, "f32", "tiny", None)
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    found = json.loads(run("tokenize", tmp_path / "model.gguf", tmp_path / "texts.json"))
    expected = [made(text)["input_ids"] for text in TEXTS]
    if name == "Metaspace":
        # It puts no space before a text that begins with one, and none after a special token, and
        # llama.cpp does.
        found, expected = found[:1] + found[2:-1], expected[:1] + expected[2:-1]
    assert found == expected


def test_a_bos_is_never_added(tmp_path: Path) -> None:
    folder = export(made_of(Case("llama")).float(), tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    gguf.write(tmp_path / "model.gguf", folder, "f16", "tiny", "mit")
    told = GGUFReader(tmp_path / "model.gguf")
    assert told.get_field("tokenizer.ggml.add_bos_token").contents() is False
    assert told.get_field("tokenizer.ggml.bos_token_id").contents() == tokenizer.bos_token_id
    assert told.get_field("tokenizer.chat_template").contents() == tokenizer.chat_template
    assert len(told.get_field("tokenizer.ggml.tokens").contents()) == VOCABULARY


# Refusals


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (Case("llama", ROPES["dynamic"]), "RoPE of the kind dynamic, and llama.cpp rotates by"),
        (Case("llama", ROPES["longrope"]), "RoPE of the kind longrope, and llama.cpp rotates by"),
        (Case("llama", {"hidden_act": "gelu"}), "the activation gelu, and llama.cpp has silu"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_by_name(case: Case, sentence: str) -> None:
    config = AutoConfig.for_model(case.family, **{**COMMON, **case.settings})
    with pytest.raises(AbsorbError, match=sentence):
        gguf.refuse(config_for(ROUTES[case.family], config))


@pytest.mark.skipif("flint" not in CONFIG_MAPPING, reason="transformers 5.21 has it")
def test_an_architecture_that_llama_cpp_lacks_is_refused() -> None:
    config = AutoConfig.for_model("qwen3", **COMMON)
    with pytest.raises(AbsorbError, match="does not know flint"):
        gguf.refuse(config_for(ROUTES["qwen3"], config))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "of the kind Unigram"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "cuts text by Whitespace in its own way"),
        ({"normalizer": {"type": "Lowercase"}}, "one that changes text by Lowercase"),
        (
            {"added_tokens": [{"id": VOCABULARY, "content": "<new>", "special": True}]},
            f"has a token {VOCABULARY} and the model has {VOCABULARY}; fetch both again",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    told = json.loads(tiny_tokenizer().backend_tokenizer.to_str()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(AbsorbError, match=sentence):
        vocabulary(tmp_path, VOCABULARY, "tiny")


def test_a_matrix_that_overflows_float16_is_refused(tmp_path: Path) -> None:
    student = made_of(Case("llama")).float()
    student.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    folder = export(student, tmp_path)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(AbsorbError, match=r"1\.mlp\.up_proj\.weight overflows float16"):
        gguf.write(tmp_path / "model.gguf", folder, "f16", "tiny", "mit")


# The story


def test_a_type_without_a_file_is_refused(converted: Path, tmp_path: Path) -> None:
    words = ["export", str(converted), "--out", str(tmp_path / "out"), "--type", "f16"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "--type is of a .gguf file; pass --to gguf, or drop it" in result.output


@pytest.mark.slow
def test_an_exported_file_comes_with_its_card_and_is_verified_and_pushed(
    converted: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["export", str(converted), "--out", str(out), "--to", "gguf", "--text", str(text_file)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    names = {file.name for file in out.iterdir()}
    assert names == {"README.md", "absorb.json", "tiny-llama-absorbed-F16.gguf"}
    card = (out / "README.md").read_text()
    assert "llama-server -m tiny-llama-absorbed-F16.gguf" in card
    assert "trust_remote_code" not in card
    assert verify(ModelRef(name=str(out)), lambda _: None).wrong == []
    with serving(monkeypatch, tmp_path) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        pushed = CliRunner().invoke(main, ["push", str(out), "model"])
        assert pushed.exit_code == 0, pushed.output
        assert {*hub.files(f"{USER}/model")} == {*names, ".gitattributes"}
        assert verify(ModelRef(name=f"{USER}/model"), lambda _: None).wrong == []
        with pytest.raises(AbsorbError, match="an export to llama"):
            upload(converted, Destination(repository=f"{USER}/model"), lambda _: None)
    (out / "tiny-llama-absorbed-F16.gguf").write_bytes(b"GGUF")
    assert verify(ModelRef(name=str(out)), lambda _: None).wrong
