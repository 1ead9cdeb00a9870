"""What a computation runs on, and in which type."""

import copy
from collections.abc import Mapping
from functools import reduce

import torch
from transformers import PreTrainedModel

from absorb.errors import AbsorbError
from absorb.models.modeling_absorb import NEUTRAL

# The parameters that no stock model has.
ADDED = set(NEUTRAL) - {"bias"}


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


def sketch_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in bfloat16 where the device multiplies that faster, else the model itself.

    It is good enough to sample text and to choose a prefix by.
    """
    if not _bfloat16_is_fast(model.device):
        return model
    sketch = copy.deepcopy(model)
    as_stored(sketch, torch.bfloat16)  # but no buffer: rotary frequencies stay exact
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


def as_stored(
    model: PreTrainedModel, dtype: torch.dtype, types: Mapping[str, torch.dtype] | None = None
) -> None:
    """Round the weights to the types they are saved in; sinks and scales stay float32.

    `types` are those of single parameters by name, and `dtype` is that of all others. A bias that
    its stock module does not have is stored like the weight beside it.
    """
    known = types or {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind not in ADDED:
            like = known.get(name, known.get(f"{module}.weight", dtype))
            parameter.data = parameter.data.to(like)
    model.config.dtype = dtype


def in_one_type(model: PreTrainedModel) -> None:
    """Hold weights of several types in one that holds them all, as no product takes two.

    Sinks and scales stay float32. Values stay as they are.
    """
    weights = [p for name, p in model.named_parameters() if name.rpartition(".")[2] not in ADDED]
    widest = reduce(torch.promote_types, {weight.dtype for weight in weights})
    for weight in weights:
        weight.data = weight.data.to(widest)
