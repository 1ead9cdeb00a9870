"""What several test files share."""

from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, tiny
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor

import absorb

# Tiny models gain nothing from threads, and on a busy machine waiting for them costs minutes.
torch.set_num_threads(1)


@pytest.fixture
def tokens() -> Tensor:
    """Two random texts without special tokens: (2, 16)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (2, 16), generator=generator)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer and a licence, as a folder."""
    folder = tmp_path_factory.mktemp("original") / "tiny-llama"
    tiny("llama", torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


@pytest.fixture(scope="session")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that model, converted. Copy it before changing anything in it."""
    out = tmp_path_factory.mktemp("converted") / "model"
    absorb.convert(original, out, steps=0)
    return out
