"""What several test files share.

The process that hands out the tests reads this too, so that torch is imported in fixtures alone.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor

# Tiny models gain nothing from threads, and on a busy machine waiting for them costs minutes. torch
# looks here when it is imported, in the processes that tests start as well.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """All that is imported by now stays: a collection need not look through torch every time."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("llama_cpp") and not os.environ.get("ABSORB_LLAMA_CPP"):
        pytest.skip("run by scripts/test_llama_cpp")


@pytest.fixture
def tokens() -> "Tensor":
    """Two random texts without special tokens: (2, 16)."""
    import torch

    from tests.helpers.tiny import VOCABULARY

    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (2, 16), generator=generator)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer and a licence, as a folder."""
    import torch

    from tests.helpers.tiny import tiny
    from tests.helpers.tiny_tokenizer import tiny_tokenizer

    folder = tmp_path_factory.mktemp("original") / "tiny-llama"
    tiny("llama", torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough text to convert a tiny model with: reading it is faster than sampling."""
    from tests.helpers.tiny_tokenizer import letters

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(letters(9_000))
    return path


@pytest.fixture(scope="module")
def little_text() -> Iterator[None]:
    """Two rows of text instead of some dozens, for tests of all but the figures found on them.

    A test of figures, or of how much text is read, must not use this.
    """
    with pytest.MonkeyPatch.context() as patch:
        shorten_texts(patch)
        yield


def shorten_texts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("absorb.text.gather.CALIBRATION_ROWS", 2)
    patch.setattr("absorb.pipelines.needs.CALIBRATION_ROWS", 2)
    patch.setattr("absorb.text.gather.VALIDATION_ROWS", {"cpu": 2, "cuda": 2})
    patch.setattr("absorb.text.gather.HELD_OUT_ROWS", {"cpu": 2, "cuda": 2})
    patch.setattr("absorb.schema.training._LEAST_TRAINING_ROWS", 2)


@pytest.fixture(scope="session")
def converted(original: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that model, converted. Copy it before changing anything in it."""
    import absorb

    out = tmp_path_factory.mktemp("converted") / "model"
    with pytest.MonkeyPatch.context() as patch:
        shorten_texts(patch)
        absorb.convert(original, out, text=text_file, steps=0, sink="logit")
    return out


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify in this process: a stranger's takes seconds to begin, and other tests have one."""
    import torch
    from transformers import AutoModelForCausalLM

    from absorb.ship.isolated import logits_after
    from absorb.ship.stranger import Said

    def said(folder: Path, tokens: tuple[int, ...]) -> Said:
        kind = AutoModelForCausalLM
        model = kind.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        return Said(logits=logits_after(model.eval(), tokens), divergence=None)

    monkeypatch.setattr("absorb.ship.verify.said_in_isolation", said)


@pytest.fixture(scope="module")
def warm_stranger() -> Iterator[None]:
    """Verify in a process of its own that has imported torch and transformers, and no absorb."""
    from tests.helpers import warm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("absorb.ship.stranger.subprocess", warm)
        yield


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is hastened, whatever the processor: what is compared here is compared closely."""
    monkeypatch.setattr("absorb.runtime.precision._bfloat16_is_fast", lambda device: False)
