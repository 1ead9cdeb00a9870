"""What several test files share."""

import pytest
import torch
from tiny import VOCABULARY
from torch import Tensor

# Tiny models gain nothing from threads, and on a busy machine waiting for them costs minutes.
torch.set_num_threads(1)


@pytest.fixture
def tokens() -> Tensor:
    """Two random texts without special tokens: (2, 16)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (2, 16), generator=generator)
