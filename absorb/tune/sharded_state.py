"""Where a fine-tune stands whose tensors are shared out among processes: by torch's own format.

Each state has a folder, which has its name once it is whole.
"""

import logging
import os
import shutil
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from absorb.runtime import ranks
from absorb.schema.codec import decode, parse_json, to_json
from absorb.tune.state import State, TrainingState

_NOTE = "training.json"
_SECONDS, _TIMES = 60, 10  # between two states: so many, or so many times what writing one took


class ShardedState:
    """A keeper of states in a folder, for a model whose parameters to train take gradients."""

    def __init__(self, folder: Path, model: nn.Module):
        self.folder, self.model = folder, model
        self.saved, self.pause = monotonic(), float(_SECONDS)
        self.has_kept = False
        for half in folder.glob("*.partial") if ranks.is_first() else ():
            shutil.rmtree(half)

    def state(self) -> State | None:
        """Where an earlier run stood, each process with its own part."""
        found = self._newest()
        if found is None:
            return None
        note = parse_json((found / _NOTE).read_text())
        names = FileSystemReader(found).read_metadata().state_dict_metadata
        tensors: dict[str, Tensor] = {}
        for place, parameter in enumerate(p for p in self.model.parameters() if p.requires_grad):
            for name in ("now", "best", "exp_avg", "exp_avg_sq"):
                if f"{place}.{name}" in names:
                    tensors[f"{place}.{name}"] = torch.zeros_like(parameter.detach())
            if f"{place}.step" in names:
                tensors[f"{place}.step"] = torch.zeros(())
        load(tensors, checkpoint_id=found)
        for name in [name for name in tensors if name.endswith(".now")]:
            best = name.replace(".now", ".best")
            if best not in tensors:
                tensors[best] = tensors[name].clone()
        return State(training_state=decode(TrainingState, note), tensors=tensors)

    def is_due(self) -> bool:
        due = monotonic() - self.saved > self.pause
        return bool(ranks.least(int(due)))

    def keep_state(self, state: State) -> None:
        """Keep where the fine-tune stands in place of where it stood, if that is due."""
        steps = state.training_state.steps
        best_is_now = state.training_state.kept == steps
        tensors = {n: t for n, t in state.tensors.items() if not best_is_now or ".best" not in n}
        if (self.has_kept and not self.is_due()) or not self._has_room(tensors):
            return
        start, partial = monotonic(), self.folder / f"{steps}.partial"
        _save(tensors, partial)
        if ranks.is_first():
            before = self._whole()
            with (partial / _NOTE).open("w") as note:
                note.write(to_json(state.training_state))
                note.flush()
                os.fsync(note.fileno())
            partial.replace(self.folder / str(steps))
            for older in before:  # a run that was killed may have left two
                shutil.rmtree(older)
        ranks.meet()
        self.has_kept, self.saved = True, monotonic()
        self.pause = max(_SECONDS, _TIMES * (self.saved - start))

    def _newest(self) -> Path | None:
        return max(self._whole(), key=lambda place: int(place.name), default=None)

    def _whole(self) -> list[Path]:
        return [place for place in self.folder.iterdir() if place.name.isdigit()]

    def _has_room(self, tensors: dict[str, Tensor]) -> bool:
        size = ranks.summed(torch.tensor(sum(ranks.part(one).nbytes for one in tensors.values())))
        free = shutil.disk_usage(self.folder).free
        if ranks.least(int(size < free)):
            return True
        logging.getLogger("absorb").warning(
            "%s is on a disk that is too full to keep where the fine-tune stands", self.folder
        )
        return False


def _save(tensors: dict[str, Tensor], place: Path) -> None:
    try:
        save(tensors, checkpoint_id=place)
    except CheckpointException as error:  # a disk that is full, on any of the processes
        found = [failure[0] for failure in error.failures.values()]
        raise next((one for one in found if isinstance(one, OSError)), error) from None
