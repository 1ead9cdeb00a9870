"""Text to calibrate on, to train on, to choose a step by and to report on: no token is shared."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.plain import parsed
from absorb.samples import LATEST_START, sampled
from absorb.settings import Calibration
from absorb.source import Source

LENGTH = 256
CALIBRATION_ROWS = 12
VALIDATION_ROWS = 4
# By device: a table before and after takes two cores as long as all that it reports on.
HELD_OUT_ROWS = {"cpu": 8, "cuda": 16}
_SCALING_ROWS = 192

# A token of plain text has fewer than so many characters, on average; and what is tokenised beyond
# what is needed, since a word may be cut there.
_CHARACTERS, _SPARE = 8, 64


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
    refuse_short_model(source, LENGTH + LATEST_START + 1)
    held_out = 0 if training_rows is None else HELD_OUT_ROWS[source.model.device.type]
    sizes = [CALIBRATION_ROWS, VALIDATION_ROWS, held_out, training_rows or 0]
    if calibration.text is not None:
        parts = _from_file(calibration.text, source, sizes)
        origin = calibration.text.name
    else:
        parts, origin = _sampled(source, sizes, calibration.seed)
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


def _sampled(source: Source, sizes: list[int], seed: int) -> tuple[list[Tensor], str]:
    """The model's own text in parts of `sizes` rows, and what to say of its origin."""
    made = sampled(source, sum(sizes), LENGTH, seed)
    origin = f"sampled from the model with seed {seed}"
    if made.loops:
        origin += f", loops left out: {made.loops} of {made.drawn} rows"
        logging.getLogger("absorb").warning(f"text {origin}; text of your own may serve better")
    return list(made.rows.split(sizes)), origin
