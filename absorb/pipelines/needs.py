"""What a conversion takes of this machine: told before it begins, refused where it is missing.

Sums of what is held at once; a process takes some hundred megabytes more. The time is that of a
sample times what is read in all.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from absorb.errors import AbsorbError
from absorb.load.source import HELD, HELD_TO_TRAIN, Source
from absorb.measure.pace import pace_of
from absorb.models.decoder import Decoder
from absorb.runtime import ranks
from absorb.runtime.precision import free_memory
from absorb.schema.settings import Distillation, Train
from absorb.schema.training import LENGTH, Recipe
from absorb.show.tables import size_of
from absorb.text.gather import CALIBRATION_ROWS, HELD_OUT_ROWS, SCALING_ROWS, VALIDATION_ROWS
from absorb.tune.end_to_end import bytes_with_logits, held_bytes, waiting_bytes
from absorb.tune.recipe import by_layers

# Bytes a weight of the layer in hand: float32, and where all is trained its gradient, what AdamW
# remembers and a bfloat16 copy. Else the gradient stops at a few parameters.
_LAYER: dict[Train, int] = {"sinks": 6, "scales": 6, "all": 18}
_UNTRAINED = 6
# Where weights are shared out: float32, the gradient, what AdamW remembers and the best step. And
# of what is whole for a while: as it has come, its copy in bfloat16 and its gradient.
_SHARDED, _WHOLE = 20, 10
# Tensors of the size of what all heads give, and of all attention weights in one row, in a fit.
_OUTPUTS, _SCORES = 16, 4
_LOGITS = 4  # copies of the logits of the tokens that are read at once
_TOKENS = 512
# Rows of text that all layers read for a plan, beside text for scales, and where a plan is read;
# and on how many walks. As counted: 8 to draw up a plan, 4 to compare it with and without logits,
# 3 for its scales, 7 to evaluate; and writing and reading again what was written. A fine-tune layer
# by layer takes 8 more.
_ROWS, _WALKS, _ROWS_OF_READ, _WALKS_OF_READ = 65, 24, 20, 10
_TIMES_HELD_OUT = 8  # two models, in float and in INT8, with a teacher and with ranges
_TIMES_TRAINED = 4  # the teacher once; the student once, and its gradients twice
_CHECKED = 10  # validation text, before and at every quarter, by two models
_SPARE = 0.5e9  # what a GPU keeps for itself, and odds and ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes of memory where the model computes, and of the disk, and what there is of them."""

    memory: int
    free: int
    disk: int
    disk_free: int
    streams: bool

    def __str__(self) -> str:
        return (
            f"needs about {size_of(self.memory)} of memory ({size_of(self.free)} are free) and "
            f"{size_of(self.disk)} of disk ({size_of(self.disk_free)} are free)"
        )


def held_for(fine_tune: Recipe | None) -> int:
    """Bytes a weight of a conversion that holds all models at once."""
    if fine_tune is None or not fine_tune.trains or fine_tune.train != "all":
        return HELD
    return HELD_TO_TRAIN


def needs_of(source: Source, fine_tune: Recipe, out: Path) -> Needs:
    """What a conversion of a model that is loaded takes; its weights are counted as they rest."""
    weights = list(source.model.parameters())
    stored = sum(w.numel() * source.dtype.itemsize for w in weights)
    trains = fine_tune.trains and source.streaming is not None
    device = source.decoder.device
    count = sum(weight.numel() for weight in weights)
    return Needs(
        memory=_streamed(source, fine_tune) if source.streaming else held_for(fine_tune) * count,
        free=free_memory(device) + (0 if source.streaming else 4 * count),
        disk=stored * (2 if trains else 1),  # layers that are trained wait there
        disk_free=shutil.disk_usage(_first_there(out)).free,
        streams=source.streaming is not None,
    )


def seconds_of(source: Source, fine_tune: Recipe, plan_is_read: bool) -> float:
    """What the layers take to read all that they read, once there is text."""
    pace = pace_of(source.decoder)
    device = source.decoder.device.type
    validation = VALIDATION_ROWS[device]
    rows = _TIMES_HELD_OUT * HELD_OUT_ROWS[device]
    known = CALIBRATION_ROWS + validation + fine_tune.training_rows
    rows += _ROWS_OF_READ if plan_is_read else _ROWS + min(SCALING_ROWS, known)
    steps = (fine_tune.steps or 0) + (fine_tune.end_steps or 0)
    trained = _TIMES_TRAINED * steps * fine_tune.rows
    by_all = _CHECKED * validation if fine_tune.trains else 0
    by_all += fine_tune.training_rows if fine_tune.end_steps else 0  # by the teacher once more
    walks = _WALKS_OF_READ if plan_is_read else _WALKS
    limit = 60 * (fine_tune.minutes or 0)
    shared = (pace.row * rows + pace.hasty * trained) / ranks.count()
    return shared + pace.hasty * by_all + pace.walk * walks + limit


def _streamed(source: Source, fine_tune: Recipe) -> int:
    """The most that a layer at work takes, or the head, or a fit: one after the other."""
    config, decoder = source.model.config, source.decoder
    layer = max(sum(p.numel() for p in one.parameters()) for one in decoder.layers)
    heads = decoder.heads[0]
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    given, weights = CALIBRATION_ROWS * heads * LENGTH * width, heads * LENGTH**2
    fit = 4 * (_OUTPUTS * given + _SCORES * weights) + _UNTRAINED * layer
    scored = 4 * config.hidden_size + 4 * _LOGITS * _TOKENS
    ends = config.vocab_size * max(scored, _UNTRAINED * config.hidden_size)
    work = _work(decoder, fine_tune)
    if fine_tune.train == "all" and not experts_fit(source, fine_tune):
        work = _work(decoder, fine_tune, experts=False)
    return int(_SPARE + max(work, fit, ends))


def experts_fit(source: Source, fine_tune: Recipe) -> bool:
    """Whether a layer is trained whole; else its experts stay as they are."""
    room = _room(source) - _SPARE
    return not source.decoder.experts or _work(source.decoder, fine_tune) <= room


def streamed(source: Source, fine_tune: Recipe, wish: Distillation) -> Recipe:
    """The recipe of a model whose weights stream: as far as the memory allows."""
    if _shards(source, fine_tune):
        return replace(fine_tune, sharded=ranks.count())
    held = end_needs(source, fine_tune) <= _room(source)
    return by_layers(fine_tune, wish, experts_fit(source, fine_tune), held)


def end_needs(source: Source, fine_tune: Recipe) -> int:
    """The bytes of memory that few parameters take to be trained end to end."""
    decoder = source.decoder
    return int(_SPARE + held_bytes(decoder, LENGTH, _rows_of_teacher(decoder, fine_tune)))


def _rows_of_teacher(decoder: Decoder, fine_tune: Recipe) -> int:
    """The rows of text of which what it gives waits for the student."""
    return fine_tune.training_rows + VALIDATION_ROWS[decoder.device.type]


def _shards(source: Source, fine_tune: Recipe) -> bool:
    """Whether all weights are trained at once, each process with its part of them."""
    processes = ranks.count()
    if processes == 1 or fine_tune.train != "all" or not fine_tune.trains:
        return False
    if fine_tune.purpose != "none" or fine_tune.rows % processes:
        return False
    return shard_needs(source, fine_tune) <= _room(source)


def _room(source: Source) -> int:
    """The bytes that each process may take where the model computes."""
    device = source.decoder.device
    return ranks.for_each(free_memory(device), device)


def shard_needs(source: Source, fine_tune: Recipe) -> int:
    """The bytes of memory that it takes of each of them."""
    decoder = source.decoder
    count = sum(weight.numel() for weight in source.model.parameters())
    layer = max(sum(p.numel() for p in one.parameters()) for one in decoder.layers)
    ends = count - sum(p.numel() for one in decoder.layers for p in one.parameters())
    rows = _rows_of_teacher(decoder, fine_tune)
    mine = _SHARDED * count / ranks.count() + _WHOLE * (layer + ends)
    return int(_SPARE + mine + waiting_bytes(decoder, LENGTH, rows) + bytes_with_logits(decoder))


def _work(decoder: Decoder, fine_tune: Recipe, experts: bool = True) -> float:
    """The most that the weights of a layer take while it is trained, with its experts or not."""
    each = _LAYER[fine_tune.train] if fine_tune.trains else _UNTRAINED
    most = 0
    for index, layer in enumerate(decoder.layers):
        left_out = [] if experts else decoder.expert_weights(index)
        still = sum(weight.numel() for weight in left_out)
        whole = sum(weight.numel() for weight in layer.parameters())
        most = max(most, each * (whole - still) + _UNTRAINED * still)
    return most


def refuse_unfit(needs: Needs, out: Path) -> None:
    """Refuse what cannot work, with what would make it work."""
    if needs.disk > needs.disk_free:
        raise AbsorbError(
            f"{out} is on a disk with {size_of(needs.disk_free)} left and the conversion writes "
            f"{size_of(needs.disk)}; make room, or name another place with --out"
        )
    if needs.streams and needs.memory > needs.free:
        raise AbsorbError(
            f"one layer of the model at work needs {size_of(needs.memory)} of memory and "
            f"{size_of(needs.free)} are free; pass --train sinks or --steps 0, which need less, or "
            "--device cpu where the host has more"
        )


def _first_there(path: Path) -> Path:
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return there
