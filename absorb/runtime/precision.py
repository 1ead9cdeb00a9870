"""What a computation runs on, and in which type."""

import copy
from collections.abc import Iterator

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from absorb.errors import AbsorbError
from absorb.models.decoder import Decoder
from absorb.models.modeling_absorb import NEUTRAL


def device_of(wish: str) -> torch.device:
    """The device that is meant by `auto`, cpu, cuda, cuda:1, ..."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wish.partition(":")[0] not in ("cpu", "cuda"):
        raise AbsorbError(f"--device {wish} is not supported; pass cpu, cuda, cuda:1, ... or auto")
    try:
        torch.empty(0, device=wish)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AbsorbError(f"--device {wish} cannot be used here ({reason}); try auto") from None
    return torch.device(wish)


def free_memory(device: torch.device) -> int:
    """The bytes that are free where a model would compute."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return int(psutil.virtual_memory().available)


def sketch_of(decoder: Decoder) -> PreTrainedModel:
    """A copy in bfloat16 where the device multiplies that faster, else the model itself.

    It is good enough to sample text and to choose a prefix by. There is no room for another model
    where weights stream.
    """
    if decoder.streaming or not _bfloat16_is_fast(decoder.device):
        return decoder.model
    copied: nn.Module = copy.deepcopy(decoder.model)
    sketch = copied.to(torch.bfloat16)
    assert isinstance(sketch, PreTrainedModel)
    return sketch


def hastened(device: torch.device) -> torch.autocast:
    """Within it products are taken in bfloat16 where the device does that faster.

    The residual stream stays float32. A measured figure may be off by a few parts in a thousand.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=_bfloat16_is_fast(device))


def _bfloat16_is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        fast: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return fast
    found = torch.cpu.get_capabilities().items()
    return device.type == "cpu" and any(has for name, has in found if "bf16" in name)


def as_stored(student: Decoder, dtype: torch.dtype) -> None:
    """Round the weights to the type they are saved in; sinks and scales stay float32.

    Where weights stream, those of a layer are rounded whenever they have come.
    """
    if student.streaming is None:
        for parameter in stock_parameters(student.model):
            parameter.data = parameter.data.to(dtype)
    else:

        def edit(layer: int) -> None:
            for parameter in stock_parameters(student.layers[layer]):
                parameter.data = parameter.data.to(dtype).float()

        student.streaming.edits.append(edit)
    student.config.dtype = dtype


def stock_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those that are saved in the type of the original's weights: all but sinks and scales."""
    ours = set(NEUTRAL) - {"bias"}
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] not in ours:
            yield parameter
