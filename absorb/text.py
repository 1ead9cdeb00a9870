"""Text to calibrate on, to train on, to choose a step by and to report on: no token is shared."""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.memory import release_freed_memory
from absorb.modeling_absorb import NEUTRAL, How, fast
from absorb.plain import parsed
from absorb.settings import Calibration
from absorb.source import Source
from absorb.watch import attending, remembering

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

# A token of plain text has fewer than so many characters, on average; and what is tokenised beyond
# what is needed, since a word may be cut there.
_CHARACTERS, _SPARE = 8, 64

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


def refuse_unknown_tokens(source: Source, ids: list[int], origin: str) -> None:
    """Refuse tokens that the tokenizer has and the model does not."""
    known = source.model.config.vocab_size
    if max(ids, default=0) >= known:
        raise AbsorbError(
            f"the tokenizer of {source.name} makes token {max(ids)} of {origin} and the model has "
            f"{known}; fetch both again, or choose another text"
        )


def refuse_short_model(source: Source, needed: int) -> None:
    """Refuse a model whose learned positions end before a row of text, and what leads it, does."""
    if source.family.positions is None:
        return
    room = source.model.config.max_position_embeddings
    if room < needed:
        raise AbsorbError(
            f"{source.name} reads {room} tokens at most and absorb measures on {needed}; "
            "choose a model with more positions"
        )


def _from_file(path: Path, source: Source, sizes: list[int]) -> list[Tensor]:
    """The file as windows (rows, LENGTH), in parts; the last may be smaller than wished for."""
    ids = read_ids(path, source, sum(sizes) * LENGTH)
    rows, fixed = len(ids) // LENGTH, sum(sizes[:-1])
    least = fixed + min(sizes[-1], 1)
    if rows < least:
        raise AbsorbError(
            f"{path} holds {len(ids)} tokens and {least * LENGTH} are needed; give a longer text, "
            "or no --text and the model samples its own"
        )
    training = min(sizes[-1], rows - fixed)
    used = torch.tensor(ids[: (fixed + training) * LENGTH]).view(-1, LENGTH)
    return list(used.split([*sizes[:-1], training]))


def read_ids(path: Path, source: Source, count: int) -> list[int]:
    """The tokens of the first documents of a file: `count` or more, or all that there are.

    Documents are divided by the end-of-text token.
    """
    ids: list[int] = []
    tokenizer = source.tokenizer
    divider = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in tqdm(documents(path), desc="reading text", unit="document"):
        ids += _beginning(tokenizer, document, count - len(ids)) + divider
        if len(ids) >= count:
            break
    refuse_unknown_tokens(source, ids, str(path))
    return ids


def _beginning(tokenizer: PreTrainedTokenizerBase, document: str, count: int) -> list[int]:
    """The tokens of a document, or of a beginning of it that holds more than `count`.

    The last few of a beginning may not be those of the document, so there are some to spare.
    """
    length = _CHARACTERS * count
    while True:
        part = tokenizer(document[:length], add_special_tokens=False, verbose=False)
        ids: list[int] = part["input_ids"]
        if len(ids) >= count + _SPARE or length >= len(document):
            return ids
        length = 2 * length + _SPARE


def documents(path: Path) -> list[str]:
    """The different documents of a file, not all empty: one a line in .jsonl, else all of it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AbsorbError(f"{path} cannot be read as UTF-8 text: {error}") from None
    found = [text] if path.suffix != ".jsonl" else _in_lines(path, text)
    if not any(document.strip() for document in found):
        raise AbsorbError(f"{path} holds no text; name a file that does")
    return found


def _in_lines(path: Path, text: str) -> list[str]:
    lines = enumerate(text.split("\n"), 1)  # other line breaks may stand in a string
    # Without repeats, so that no document is measured on that was trained on.
    return list(dict.fromkeys(_field(path, number, line) for number, line in lines if line.strip()))


def _field(path: Path, number: int, line: str) -> str:
    try:
        text = parsed(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise AbsorbError(f"{path}, line {number}: not a JSON object with a string field `text`")
    return text


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


def _attend(
    _: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **__: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stock attention in half the time: ours, with sinks that take nothing.

    For a single query the stock one reads keys and values once for every query head.
    """
    sink = torch.full((query.shape[1],), NEUTRAL["sink"], device=query.device)
    return fast(query, key, value, mask, (sink,), How(scaling, softcap=softcap))


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
