"""Several processes that convert one model together, as torchrun starts them.

Each computes on a GPU of its own, or all on one CPU. Rows of text are shared out, and what is found
is brought together, so that all come to the same. Alone a process does nothing here.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Thread
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from absorb.errors import AbsorbError
from absorb.runtime.precision import device_of

T = TypeVar("T")


# Whether the processes have joined here: a caller may have joined them for work of its own.
_joined = False


class RefusedByOneError(AbsorbError):
    """What one process had to refuse, as all of them raise it."""


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Let the processes of torchrun find each other; `device` is what the user asked for.

    Where a caller has let them find each other already, this one works alone.
    """
    global _joined
    if started() == 1:
        yield
        return
    on_gpus = device_of(device).type == "cuda"
    if on_gpus:
        if device_of(device).index is not None:
            raise AbsorbError(f"--device {device} is one GPU of several processes; pass cuda")
        place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= there:
            raise AbsorbError(f"there are {there} GPUs here; pass --nproc-per-node {there}")
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    _joined = True
    with _hearing_the_end() if on_gpus else nullcontext():
        try:
            yield  # where it fails the others are waiting, and torchrun ends them
        except RefusedByOneError:
            meet()  # or torchrun would end one that is still clearing up
            raise
    dist.destroy_process_group()
    _joined = False


@contextmanager
def _hearing_the_end() -> Iterator[None]:
    """Let SIGTERM, which torchrun sends where a process is lost, end the wait for that one.

    Python hears of a signal between two of its operations, and such a wait is one of them.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    before = signal.set_wakeup_fd(told)
    Thread(target=_give_up_at, args=(heard,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(told)


def _give_up_at(heard: int) -> None:
    while number := os.read(heard, 1):
        if number[0] == signal.SIGTERM:
            dist.distributed_c10d._abort_process_group()
    os.close(heard)


def started() -> int:
    """How many processes torchrun has started for this, whether they have joined or not."""
    is_of_caller = dist.is_initialized() and not _joined
    return 1 if is_of_caller else int(os.environ.get("WORLD_SIZE", 1))


def count() -> int:
    return dist.get_world_size() if _joined else 1


def number() -> int:
    """Which of them this is."""
    return dist.get_rank() if _joined else 0


def is_first() -> bool:
    """Whether this is the one that speaks, and writes what all would write alike."""
    return number() == 0


def is_first_here() -> bool:
    """Whether this is the one that writes what those of its host read."""
    return count() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"


def share(rows: Tensor) -> Tensor:
    """The rows that this process reads: all, where there are too few to share them out."""
    return rows if readers(len(rows)) > 1 else rows[number() :: count()]


def readers(rows: int) -> int:
    """How many processes read each of so many rows."""
    return count() if rows < count() else 1


def by_row(rows: Tensor, find: Callable[[Tensor], Tensor]) -> Tensor:
    """What `find` makes of every row, (rows, ...), each process having found its share."""
    return of_all(find(share(rows)), len(rows))


def of_all(own: Tensor, rows: int) -> Tensor:
    """What was found of every row, (rows, ...), from what this process found of its share."""
    if readers(rows) > 1:
        return of_first(own)
    if count() == 1:
        return own
    whole = own.new_zeros(rows, *own.shape[1:])
    whole[number() :: count()] = own
    return summed(whole)


def summed(tensor: Tensor) -> Tensor:
    return _together(tensor, dist.ReduceOp.SUM)


def largest(tensor: Tensor) -> Tensor:
    return _together(tensor, dist.ReduceOp.MAX)


def mean(value: float) -> float:
    """The mean of what all processes have found, the same for all to the last bit."""
    return float(summed(torch.tensor(value, dtype=torch.float64))) / count()


def least(value: int) -> int:
    return -int(largest(torch.tensor(-value)))


def for_each(free: int, device: torch.device) -> int:
    """The bytes that each process may take of those it finds free: the same for all.

    On a CPU they have one memory.
    """
    return least(free // (count() if device.type == "cpu" else 1))


def of_first(tensor: Tensor) -> Tensor:
    """What the first process has, in a tensor of the same shape and type."""
    if count() == 1:
        return tensor
    there = _at_hand(tensor)
    dist.broadcast(there, 0)
    return there.to(tensor.device)


def path_of_first(path: Path) -> Path:
    """The place that the first process means."""
    if count() == 1:
        return path
    given = [str(path)]
    dist.broadcast_object_list(given, 0)
    return Path(given[0])


def share_a_host() -> bool:
    """Whether all processes run on one host, and so see the same files."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == count()


def together(find: Callable[[], T]) -> list[T]:
    """What `find` gives in every process, in their order. An AbsorbError of one is raised by all.

    Until all have found theirs none goes on.
    """
    own: T | AbsorbError
    try:
        own = find()
    except AbsorbError as error:
        own = error
    every: list[T | AbsorbError] = [own] * count()
    dist.all_gather_object(every, own)
    refused = next((one for one in every if isinstance(one, AbsorbError)), None)
    if refused is not None:
        raise RefusedByOneError(str(refused)) from refused
    return [one for one in every if not isinstance(one, AbsorbError)]


def meet() -> None:
    """Go on when all processes have come here."""
    mean(0.0)


def is_shared_out(tensor: Tensor) -> bool:
    """Whether each process holds a part of a tensor, as FSDP has it."""
    return hasattr(tensor, "full_tensor")


def part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_shared_out(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, for which all processes have to ask."""
    return tensor.full_tensor() if is_shared_out(tensor) else tensor  # type: ignore[attr-defined]


def forget_whole(model: torch.nn.Module) -> None:
    """Let what is whole of a model that FSDP shares out be gathered anew: its parts have changed.

    FSDP leaves what stands outside of the layers whole after a pass, in the type of products.
    """
    reshard = getattr(model, "reshard", None)
    if reshard is not None:
        reshard()


def _together(tensor: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    if count() == 1:
        return tensor
    there = _at_hand(tensor)
    dist.all_reduce(there, how)
    return there.to(tensor.device)


def _at_hand(tensor: Tensor) -> Tensor:
    """A copy where the processes reach it."""
    where = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return tensor.detach().to(where, copy=True).contiguous()


def add_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Let every process have the sum of all gradients."""
    if count() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:  # of an expert that none of these rows has reached
            parameter.grad = torch.zeros_like(parameter)
        if is_shared_out(parameter):
            parameter.grad *= count()  # FSDP takes the mean
        else:
            dist.all_reduce(parameter.grad)


def clip_gradients(parameters: list[torch.nn.Parameter]) -> float:
    """Bring the norm of all gradients down to one, if it is larger: what it was."""
    apart = [p.grad for p in parameters if p.grad is not None and is_shared_out(p)]
    if not apart:
        return torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    parts = [part(gradient) for gradient in apart]
    others = [p.grad for p in parameters if p.grad is not None and not is_shared_out(p)]
    norm = (summed(_square(parts)) + _square(others)).sqrt()
    torch._foreach_mul_([*parts, *others], (1 / (norm + 1e-6)).clamp(max=1))
    return norm.item()


def _square(tensors: list[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(one) for one in tensors]).square().sum()
