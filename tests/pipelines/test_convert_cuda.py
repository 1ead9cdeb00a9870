"""A conversion on the GPU, whatever it is for: pytest tests/pipelines/test_convert_cuda.py"""

from pathlib import Path
from typing import get_args

import pytest
import torch

import absorb
from absorb.load import source as loading
from absorb.schema.settings import ModelRef, Purpose
from absorb.ship.verify import verify
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("little_text"),
]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("purpose", get_args(Purpose))
def test_it_converts_and_is_verified(
    family: str, streams: bool, purpose: Purpose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text, out = (tmp_path / name for name in ("source", "text.txt", "out"))
    wide = {"hidden_size": 64, "intermediate_size": 128}  # whole blocks of four-bit formats
    tiny(family, torch.bfloat16, max_position_embeddings=512, **wide).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    text.write_text(letters(26_000))
    if streams:
        monkeypatch.setattr(loading, "free_memory", lambda device: 0)
    report = absorb.convert(source, out, text=text, steps=4, purpose=purpose)
    assert report.recipe.by_layers == streams
    assert not verify(ModelRef(name=str(out)), lambda _: None).wrong
