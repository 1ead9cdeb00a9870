"""A model that is larger than the memory for it is converted all the same, to the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import absorb
from absorb.load import source as loading
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer


def converted(source: Path, out: Path, text: Path, **options: str) -> dict[str, torch.Tensor]:
    absorb.convert(source, out, text=text, steps=0, **options)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "sink"),
    [
        ("llama", "auto"),
        ("gpt2", "logit"),
        ("mixtral", "key"),
        *(
            pytest.param(family, sink, marks=pytest.mark.slow)
            for family in ("llama", "gemma2", "gpt_neox", "mixtral", "olmo2")
            for sink in ("logit", "key")
        ),
    ],
)
def test_weights_that_stream_become_what_others_do(
    family: str, sink: str, in_float32: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = tmp_path / "source", tmp_path / "text.txt"
    tiny(family, torch.float32, max_position_embeddings=512).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    text.write_text(letters(26_000))
    resident = converted(source, tmp_path / "resident", text, sink=sink)
    monkeypatch.setattr(loading, "_HELD", 10**9)
    streamed = converted(source, tmp_path / "streamed", text, sink=sink)
    assert streamed.keys() == resident.keys()
    for name, tensor in resident.items():
        torch.testing.assert_close(streamed[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    first, second = (
        json.loads((tmp_path / name / "absorb.json").read_text())
        for name in ("resident", "streamed")
    )
    assert second["converted"]["perplexity"] == pytest.approx(first["converted"]["perplexity"])
    assert second["probe"]["logits"][0] == pytest.approx(first["probe"]["logits"][0], abs=1e-4)
