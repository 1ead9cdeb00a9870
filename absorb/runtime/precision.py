"""What a computation runs on, and in which type."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from absorb.errors import AbsorbError
from absorb.models.decoder import Decoder
from absorb.models.modeling_absorb import NEUTRAL

Found = TypeVar("Found")

# The parameters that no stock model has.
ADDED = set(NEUTRAL) - {"bias"}


def device_of(request: str) -> torch.device:
    """The device that is meant by `auto`, cpu, cuda, cuda:1, ..."""
    if request == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if request.partition(":")[0] not in ("cpu", "cuda"):
        raise AbsorbError(f"--device {request} is not supported; pass cpu, cuda, cuda:1 or auto")
    try:
        torch.empty(0, device=request)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AbsorbError(f"--device {request} cannot be used here ({reason}); try auto") from None
    device = torch.device(request)
    if device.type == "cuda" and device.index is not None:
        # Events and streams that are told of no device are of the current one.
        torch.cuda.set_device(device)
    return device


def free_memory(device: torch.device) -> int:
    """The bytes that are free where a model would compute, and that this process may take."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        allowed = int(torch.cuda.get_per_process_memory_fraction(index) * whole)
        return max(0, min(free, allowed - held) + held - used)
    return int(psutil.virtual_memory().available)


class Rows:
    """How many rows of text are read at once: half of them from when memory is short."""

    def __init__(self, at_once: int):
        self.at_once = at_once

    def read(self, find: Callable[[int], Found]) -> Found:
        """What `find` gives. It begins anew whenever memory is short, and is told how many rows.

        Where one row does not fit, an AbsorbError says so. A process does this by itself, so
        `find` must not meet others.
        """
        while True:
            try:
                return find(self.at_once)
            except torch.OutOfMemoryError:
                pass  # what the error holds is free only after this
            if self.at_once == 1:
                raise AbsorbError(
                    "there is no memory for one row of text at once; pass --device cpu, or end "
                    "what else runs there"
                )
            self.at_once //= 2
            torch.cuda.empty_cache()
            logging.getLogger("absorb").warning(
                "memory is short, so rows of text are read %d at once", self.at_once
            )


def with_fewer_rows(find: Callable[[int], Found], at_once: int) -> Found:
    """What `find` gives with so many rows of text at once, or with fewer as `Rows` reads them."""
    return Rows(at_once).read(find)


@contextmanager
def in_bf16(decoder: Decoder) -> Iterator[PreTrainedModel]:
    """The model in bfloat16 where the device multiplies that faster, else as it is.

    It is good enough to sample text and to choose a prefix by. There is no room for another model
    where weights stream, so they come in bfloat16 for a while; else it is a copy.
    """
    if not _bfloat16_is_fast(decoder.device):
        yield decoder.model
    elif decoder.streaming:
        with decoder.streaming.arriving_in(torch.bfloat16):
            yield decoder.model
    else:
        sketch = Decoder(copy.deepcopy(decoder.model), decoder.family, is_part=decoder.is_part)
        as_stored(sketch, torch.bfloat16)  # but no buffer: rotary frequencies stay exact
        yield sketch.model


@contextmanager
def autocast_bf16(device: torch.device) -> Iterator[None]:
    """Within it products are taken in bfloat16 where the device does that faster.

    The residual stream stays float32. A measured figure may be off by a few parts in a thousand.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=_bfloat16_is_fast(device)):
        try:
            yield
        finally:
            # Within another autocast torch would remember weights in bfloat16 until that one ends,
            # whatever they have become by then.
            torch.clear_autocast_cache()


@contextmanager
def as_in_a_new_process() -> Iterator[None]:
    """What torch keeps for the whole process, and a caller may have set, as it is at first.

    Trainers let float32 products be hastened, and then folds are no better than bfloat16; and where
    they want no algorithm that adds up in any order, a GPU refuses medians and sums of rows.
    """
    dtype, strict = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    backends: Any = torch.backends
    products = (backends.cuda.matmul, backends.mkldnn.matmul)
    kinds = [kind.fp32_precision for kind in products]
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for one kind of products
        named = "highest"
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.set_float32_matmul_precision(named)
        for kind, before in zip(products, kinds, strict=True):
            kind.fp32_precision = before


def product_type(device: torch.device) -> torch.dtype:
    """The type that products are taken in within `autocast_bf16`."""
    return torch.bfloat16 if _bfloat16_is_fast(device) else torch.float32


def _bfloat16_is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        fast: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return fast
    found = torch.cpu.get_capabilities().items()
    return device.type == "cpu" and any(has for name, has in found if "bf16" in name)


def as_stored(
    decoder: Decoder, dtype: torch.dtype, types: Mapping[str, torch.dtype] | None = None
) -> None:
    """Round the weights to the types they are saved in; sinks and scales stay float32.

    `types` are those of single parameters by name, and `dtype` is that of all others. Where weights
    stream they are rounded whenever they have come, and held as `in_one_type` holds others.
    """
    named = decoder.model.named_parameters()
    every = {parameter: stored_type(name, dtype, types or {}) for name, parameter in named}
    likes = {parameter: like for parameter, like in every.items() if like is not None}
    if decoder.streaming is None:
        for parameter, like in likes.items():
            parameter.data = parameter.data.to(like)
    else:
        widest = reduce(torch.promote_types, {*likes.values()})

        def form(parameter: nn.Parameter) -> Tensor:
            like = likes.get(parameter)
            return parameter.data if like is None else parameter.data.to(like).to(widest)

        decoder.streaming.form = form
    decoder.config.dtype = dtype


def stored_type(
    name: str, dtype: torch.dtype, types: Mapping[str, torch.dtype]
) -> torch.dtype | None:
    """The type that a parameter is saved in: None where it stays as it is, as sinks and scales do.

    A bias that its stock module does not have is stored like the weight beside it.
    """
    module, _, kind = name.rpartition(".")
    if kind in ADDED:
        return None
    return types.get(name, types.get(f"{module}.weight", dtype))


def in_one_type(model: PreTrainedModel) -> None:
    """Hold weights of several types in one that holds them all, as no product takes two.

    Sinks and scales stay float32. Values stay as they are.
    """
    weights = [p for name, p in model.named_parameters() if name.rpartition(".")[2] not in ADDED]
    widest = reduce(torch.promote_types, {weight.dtype for weight in weights})
    for weight in weights:
        weight.data = weight.data.to(widest)
