"""Text to calibrate on, to train on, to choose a step by and to report on: no token is shared."""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.memory import release_freed_memory
from absorb.modeling_absorb import NEUTRAL, sink_attention
from absorb.settings import Calibration
from absorb.source import Source
from absorb.watch import attending, remembering
from absorb.windows import windows

LENGTH = 256
CALIBRATION_ROWS = 12
VALIDATION_ROWS = 4
# By device: a table before and after takes two cores as long as all that it reports on.
HELD_OUT_ROWS = {"cpu": 8, "cuda": 16}
_SCALING_ROWS = 192
_SAMPLED_AT_ONCE = {"cpu": 64, "cuda": 512}
# Without it a small model soon rambles, and top-p costs a sort of the vocabulary at every step.
_TOP_K = 100
# Rows of sampled text start up to this many tokens into a text, as windows of a file do: sinks
# fitted to beginnings alone do badly in the middle of a sentence.
_LATEST_START = 32
_SAMPLED = LENGTH + _LATEST_START

# Where sampled text starts when the tokenizer has no BOS: words that many texts start with.
_FIRST_WORDS = ("The", "In", "I", "A", "This", "It", "We", "When", "For", "If", "As", "There")


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Token ids, each part (rows, length), without what the tokenizer puts before a text."""

    calibration: Tensor
    validation: Tensor
    held_out: Tensor
    training: Tensor
    origin: str

    @property
    def scaling(self) -> Tensor:
        """What smoothing scales are taken from: largest values need more text than averages do."""
        known = torch.cat([self.calibration, self.validation, self.training])
        return known[:_SCALING_ROWS]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all token ids."""
        parts = (self.calibration, self.validation, self.held_out, self.training)
        return hashlib.sha256(torch.cat(parts).cpu().numpy().tobytes()).hexdigest()


def gather(source: Source, calibration: Calibration, training_rows: int | None) -> Texts:
    """Text from the file that the user names, else text that the model itself samples.

    With None for `training_rows` there is no text to train on and none to report on.
    """
    refuse_short_model(source, LENGTH + _LATEST_START + 1)
    held_out = 0 if training_rows is None else HELD_OUT_ROWS[source.model.device.type]
    sizes = [CALIBRATION_ROWS, VALIDATION_ROWS, held_out, training_rows or 0]
    if calibration.text is not None:
        parts = _from_file(calibration.text, source, sizes)
        origin = calibration.text.name
    else:
        parts = _sampled(source, sizes, calibration.seed)
        origin = f"sampled from the model with seed {calibration.seed}"
    return Texts(
        calibration=parts[0],
        validation=parts[1],
        held_out=parts[2],
        training=parts[3],
        origin=origin,
    )


def refuse_short_model(
    source: Source, needed: int, remedy: str = "choose a model with more positions"
) -> None:
    """Refuse a model whose learned positions end before a row of text, and what leads it, does."""
    if source.family.positions is None:
        return
    room = source.model.config.max_position_embeddings
    if room < needed:
        raise AbsorbError(
            f"{source.name} reads {room} tokens at most and absorb measures on {needed}; {remedy}"
        )


def _from_file(path: Path, source: Source, sizes: list[int]) -> list[Tensor]:
    """The file as windows (rows, LENGTH), in parts; the last may be smaller than wished for."""
    fixed, wanted = sum(sizes[:-1]), sizes[-1]
    rows = windows(source, path, fixed + wanted, LENGTH, least=fixed + min(wanted, 1))
    return list(rows.split([*sizes[:-1], len(rows) - fixed]))


@torch.no_grad()
def _sampled(source: Source, sizes: list[int], seed: int) -> list[Tensor]:
    """The model's own text, what it thinks language looks like, in parts of `sizes` rows."""
    # By row: the first, which everything is fitted to, are the same whatever else is wanted.
    draws = torch.rand(sum(sizes), _SAMPLED, generator=torch.Generator().manual_seed(seed))
    at_once = _SAMPLED_AT_ONCE[source.model.device.type]
    with tqdm(total=draws.numel(), desc="sampling text", unit="token", unit_scale=True) as bar:
        parts = [_sample(source, part, bar) for part in draws.split(at_once)]
    return list(torch.cat(parts).split(sizes))


def _sample(source: Source, draws: Tensor, bar: tqdm) -> Tensor:
    """Sampled windows (rows, LENGTH), each from another place of a text.

    draws is (rows, _SAMPLED): where, from 0 to 1, each token lies among the likely ones.
    """
    start, not_text = _starts(source.tokenizer, len(draws))
    model, device = source.model, source.model.device
    draws = draws.to(device)
    _, remember = remembering(model, room=_SAMPLED)
    text = [start.to(device)]
    with nullcontext() if source.converted or source.family.outline else attending(model, _attend):
        for draw in draws.split(1, 1):
            logits = model(text[-1], **remember).logits[:, -1].float()
            logits[:, _ends(model)] = -torch.inf
            # Among few: a draw from the whole vocabulary takes longer than the model does.
            likely, tokens = logits.topk(min(_TOP_K, logits.shape[-1]))
            below = likely.softmax(-1).cumsum(-1)
            choice = torch.searchsorted(below, draw * below[:, -1:], right=True)
            text.append(tokens.gather(1, choice.clamp_max(tokens.shape[1] - 1)))
            release_freed_memory()  # a millisecond or two, and over a gigabyte in the end
            bar.update(len(draws))
    first = not_text + torch.arange(len(draws)) % (_LATEST_START + 1)
    return torch.cat(text, 1).cpu().gather(1, first[:, None] + torch.arange(LENGTH))


def _attend(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stock attention in half the time: ours, with sinks that take nothing.

    For a single query the stock one reads keys and values once for every query head.
    """
    sink = torch.full((query.shape[1],), NEUTRAL["sink"], device=query.device)
    neutral = SimpleNamespace(sink=sink, is_causal=True, training=False)
    return sink_attention(neutral, query, *args, **kwargs)


def _ends(model: PreTrainedModel) -> list[int]:
    """The tokens that end a text."""
    assert model.generation_config is not None
    wish = model.generation_config.eos_token_id
    ends = wish if isinstance(wish, list) else [wish]
    return [end for end in ends if end in range(model.config.vocab_size)]


def _starts(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[Tensor, int]:
    """The tokens (rows, 1) to sample from, and how many of them are not text."""
    if tokenizer.bos_token_id is not None:
        return torch.full((rows, 1), tokenizer.bos_token_id), 1
    first = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in _FIRST_WORDS]
    return torch.tensor([first[row % len(first)] for row in range(rows)])[:, None], 0
