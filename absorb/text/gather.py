"""Text to calibrate on, to train on, to choose a step by and to report on: no token is shared."""

import filecmp
import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from absorb.errors import AbsorbError
from absorb.load.source import Source
from absorb.runtime import ranks
from absorb.schema.declared import typed
from absorb.schema.places import Dataset
from absorb.schema.settings import Calibration, Evaluation
from absorb.schema.training import LENGTH
from absorb.text.samples import LATEST_START, sampled
from absorb.text.windows import windows

CALIBRATION_ROWS = 12
# By device: two cores take as long for a table before and after as for all that it reports on, and
# for a look at four rows as for a step.
VALIDATION_ROWS = {"cpu": 4, "cuda": 16}
HELD_OUT_ROWS = {"cpu": 8, "cuda": 16}
SCALING_ROWS = 192
# Unless the user says otherwise: the windows of a file that are measured, and their tokens.
_WINDOWS, WINDOW = 32, 512
# Fixed ranges are taken from so many windows of a text of their own: more text has more extremes.
# Without one, a fifth of the windows of the text is kept for them.
_SEEN, _SHARE = 8, 5


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
        return known[:SCALING_ROWS]

    def of_first(self) -> "Texts":
        """The same text for all processes that convert together."""
        return replace(
            self,
            calibration=ranks.of_first(self.calibration),
            validation=ranks.of_first(self.validation),
            held_out=ranks.of_first(self.held_out),
            training=ranks.of_first(self.training),
        )

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
    device = source.decoder.device.type
    held_out = 0 if training_rows is None else HELD_OUT_ROWS[device]
    sizes = [CALIBRATION_ROWS, VALIDATION_ROWS[device], held_out, training_rows or 0]
    if calibration.text is not None:
        parts = _from_file(calibration.text, source, sizes)
        origin = typed(calibration.text)
    else:
        parts, origin = _sampled(source, sizes, calibration.seed)
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


def _from_file(path: Path | Dataset, source: Source, sizes: list[int]) -> list[Tensor]:
    """The file as windows (rows, LENGTH), in parts; the last may be smaller than wished for."""
    fixed, wanted = sum(sizes[:-1]), sizes[-1]
    rows = windows(source, path, fixed + wanted, LENGTH, least=fixed + min(wanted, 1))
    return list(rows.split([*sizes[:-1], len(rows) - fixed]))


def _sampled(source: Source, sizes: list[int], seed: int) -> tuple[list[Tensor], str]:
    """The model's own text in parts of `sizes` rows, and what to say of its origin."""
    made = sampled(source, sum(sizes), LENGTH, seed)
    origin = f"sampled from the model with seed {seed}"
    if made.loops:
        origin += f", loops left out: {made.loops} of {made.drawn} rows"
        logging.getLogger("absorb").warning(f"text {origin}; text of your own may serve better")
    return list(made.rows.split(sizes)), origin


def gather_windows(source: Source, request: Evaluation) -> Texts:
    """Rows to measure on, and rows to take ranges from, of files or sampled by the model.

    No document is in both.
    """
    ranges, seen = request.calibration, set[bytes]()
    if request.text is not None and ranges is not None and _are_same(ranges, request.text):
        ranges = None  # as without it: other windows of the same text
    if request.text is None:
        texts = gather(source, Calibration(), training_rows=0)
    else:
        texts = _windows(source, request.text, request, seen, shared=ranges is None)
    if ranges is None:
        return texts
    length = texts.held_out.shape[1]
    return replace(
        texts, calibration=windows(source, ranges, _SEEN, length, least=_SEEN, seen=seen)
    )


def _are_same(text: Path | Dataset, other: Path | Dataset) -> bool:
    """Whether two names mean one text, or a copy of it."""
    if isinstance(text, Dataset) or isinstance(other, Dataset):
        return text == other
    copies = text.is_file() and other.is_file()  # a pipe can be read but once
    return text.samefile(other) or (copies and filecmp.cmp(text, other, shallow=False))


def _windows(
    source: Source, text: Path | Dataset, request: Evaluation, seen: set[bytes], shared: bool
) -> Texts:
    """The first windows of a text: held out, save where they are `shared` with fixed ranges."""
    count, length = request.windows or _WINDOWS, request.length or WINDOW
    more = -(-count // (_SHARE - 1)) if shared else 0
    rows = windows(source, text, count + more, length, least=2 if shared else 1, seen=seen)
    apart = -(-len(rows) // _SHARE) if shared else 0
    held_out, calibration = rows.split([len(rows) - apart, apart])
    return Texts(
        calibration=calibration,
        validation=rows[:0],
        held_out=held_out,
        training=rows[:0],
        origin=typed(text),
    )
