"""What a conversion with --resume has found so far: OUT.progress, for the same conversion again.

It holds safetensors with JSON inside, each of them whole or not there. The text and the plan are
kept once there is a plan, the fine-tune at every check and once a minute.
"""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from absorb.errors import AbsorbError
from absorb.fold.plan import Plan
from absorb.load.source import Source
from absorb.runtime import ranks
from absorb.schema.codec import decode, parse_json, to_json
from absorb.schema.places import expanded
from absorb.schema.report import Inspection, versions
from absorb.schema.settings import Job
from absorb.ship.files import unwritable_explained
from absorb.ship.plan_file import read_plan, write_plan
from absorb.text.gather import Texts
from absorb.tune.state import State, TrainingState

_TEXTS, _PLAN, _STATE = "texts.safetensors", "plan.safetensors", "state.safetensors"
_LAYERS = "layers"  # a folder of those that are trained one by one
_SHARDS = "shards"  # a folder of states of weights that are shared out
_PARTS = ("calibration", "validation", "held_out", "training")
_SECONDS = 60
_NOTE = "absorb"  # the entry of the metadata


class Progress:
    """The folder beside an output, for one conversion: a model, its arguments, text and versions.

    Making one refuses a folder that another conversion has filled.
    """

    def __init__(self, job: Job, source: Source) -> None:
        self.folder = folder_beside(job.out)
        self.source, self.mark = source, _mark(job, source)
        self.saved = monotonic()
        if (self.folder / _TEXTS).is_file():
            self._refuse_others()

    def _refuse_others(self) -> None:
        theirs = _noted(self.folder / _TEXTS)[1].get("mark")
        theirs = theirs if isinstance(theirs, dict) else {}
        other = [name for name, value in self.mark.items() if theirs.get(name) != value]
        if other:
            raise AbsorbError(
                f"{self.folder} is of a conversion with another {other[0]}, so it cannot be "
                "resumed; give what was given then, or remove that folder"
            )

    def draft(self) -> tuple[Texts, Plan, Inspection] | None:
        """The text, and the plan with all that was found, if that far was come."""
        if not (self.folder / _TEXTS).is_file():
            return None
        tensors, note = _noted(self.folder / _TEXTS)
        plan, inspection = read_plan(self.folder / _PLAN, self.source)
        try:
            texts = Texts(origin=note["origin"], **{name: tensors[name] for name in _PARTS})
        except KeyError as error:
            raise _damaged(self.folder / _TEXTS, error) from error
        return texts, plan, inspection

    def keep_draft(self, texts: Texts, plan: Plan, inspection: Inspection) -> None:
        """Keep the text and the plan, unless they are. The text says that both are there."""
        if (self.folder / _TEXTS).is_file() or not ranks.is_first():
            return
        with unwritable_explained(self.folder):
            self.folder.mkdir(exist_ok=True)
        try:
            write_plan(self.folder / _PLAN, plan, inspection)
            note = json.dumps({"mark": self.mark, "origin": texts.origin})
            _write(self.folder / _TEXTS, {name: getattr(texts, name) for name in _PARTS}, note)
        except BaseException:  # nobody can go on from half of it
            _clear(self.folder)
            raise

    def state(self) -> State | None:
        """Where the fine-tune stood, if it had begun."""
        if not (self.folder / _STATE).is_file():
            return None
        tensors, note = _noted(self.folder / _STATE)
        try:
            return State(training_state=decode(TrainingState, note), tensors=tensors)
        except ValueError as error:
            raise _damaged(self.folder / _STATE, error) from error

    @property
    def layers(self) -> Path:
        """Where layers that are trained one by one are kept."""
        return self._made(_LAYERS)

    @property
    def shards(self) -> Path:
        """Where the states of a fine-tune are kept whose weights are shared out."""
        return self._made(_SHARDS)

    def _made(self, name: str) -> Path:
        place = self.folder / name
        with unwritable_explained(self.folder):
            place.mkdir(parents=True, exist_ok=True)  # a helper may come first
        return place

    def is_due(self) -> bool:
        """Whether a minute has passed since anything was kept."""
        return monotonic() - self.saved > _SECONDS

    def keep_state(self, state: State) -> None:
        """Keep where the fine-tune stands, in place of where it stood."""
        if ranks.is_first():
            _write(self.folder / _STATE, state.tensors, to_json(state.training_state))
        self.saved = monotonic()


def folder_beside(out: Path) -> Path:
    """Where the progress of a conversion into `out` is kept."""
    whole = expanded(out).resolve()
    return whole.with_name(f"{whole.name}.progress")


def forget(out: Path) -> None:
    """Remove what was kept, once the checkpoint is there."""
    _clear(folder_beside(out))


def _clear(folder: Path) -> None:
    """Remove what absorb keeps in a folder, and it too unless there are other things in it."""
    if folder.is_dir():
        for name in (_TEXTS, _STATE, _PLAN):
            (folder / name).unlink(missing_ok=True)
            _partial(folder / name).unlink(missing_ok=True)
        for name in (_LAYERS, _SHARDS):
            shutil.rmtree(folder / name, ignore_errors=True)
        with suppress(OSError):
            folder.rmdir()


def _mark(job: Job, source: Source) -> dict[str, str]:
    """What must be the same for a conversion to go on, each by its name for people."""
    arguments = asdict(job)
    for name in ("model", "out", "force"):  # the model is known by its weights
        del arguments[name]
    text = job.calibration.text
    return {
        "model": f"{source.name} {source.fingerprint}",
        "version of absorb or of a library": json.dumps(versions(), sort_keys=True),
        "text": _digest(text) if isinstance(text, Path) and text.is_file() else "",
        "set of arguments": json.dumps(arguments, sort_keys=True, default=str),
    }


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _write(path: Path, tensors: dict[str, Tensor], note: str) -> None:
    partial = _partial(path)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, partial, metadata={_NOTE: note})
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _noted(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what is written beside them."""
    try:
        with safe_open(path, "pt") as content:
            note = parse_json((content.metadata() or {}).get(_NOTE, "{}"))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(note, dict):
        raise _damaged(path, TypeError("no notes"))
    return tensors, note


def _damaged(path: Path, error: Exception) -> AbsorbError:
    reason = str(error).partition("\n")[0]
    return AbsorbError(f"{path} is damaged ({reason}); remove {path.parent} to start anew")
