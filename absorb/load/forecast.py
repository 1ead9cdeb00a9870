"""What a load would give, told from the headers of the files: no weight is read for it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from absorb.errors import AbsorbError
from absorb.load.files import STORED, Tensor, reading

# What configurations call the number of their layers.
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}
# Types of positions and masks. A weight in one of them is quantised, and lacks its float.
_COUNTED = {"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"}
# How the names of other buffers end, in models that transformers 3 and 4 saved.
_BUFFERS = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    ".masked_bias",
    "position_ids",
)
# In the names of tensors that peft adds, and of those that it moves away.
_ADAPTERS = ("lora_", ".base_layer.", "base_model.model.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What will be known of a model once it is loaded."""

    # That every parameter, tied ones by every name, and every buffer in a file is stored in.
    types: dict[str, torch.dtype]
    dtype: torch.dtype  # that most of all elements of parameters are stored in


def forecast(
    kind: Any, config: PreTrainedConfig, held: Mapping[str, Tensor], name: str
) -> Forecast:
    """What files that hold these tensors would make of a class and its configuration.

    Refuses weights of another model, and weights that are not floating point numbers. What the
    files hold beside parameters, such as masks and frequencies, may be of any type.
    """
    if not held:
        raise AbsorbError(f"{name} holds no weights; fetch it again")
    _refuse_adapters(held, name)
    with reading(name):
        _refuse_larger(_unmade(kind, config), sum(one.elements for one in held.values()), name)
        model, kinds, info = _loaded(kind, config, held)
    strange = {kind for found in kinds.values() for kind in found} - STORED.keys()
    if info["missing_keys"]:  # packed, weights have other names
        packed = {key for key in info["unexpected_keys"] if not _is_buffer(key, held[key])}
        strange |= {held[key].kind for key in packed} - STORED.keys()
    if strange:
        raise AbsorbError(
            f"{name} stores weights as {', '.join(sorted(strange))}, so it is quantised; "
            "convert the model it was made from"
        )
    refuse_mismatch(info, model, held, name)
    types = {parameter: _widest(found) for parameter, found in kinds.items()}
    return Forecast(types=types, dtype=most_of(model, types))


def _loaded(
    kind: Any, config: PreTrainedConfig, held: Mapping[str, Tensor]
) -> tuple[PreTrainedModel, dict[str, set[str]], Mapping[str, Any]]:
    """The model with numbers that stand for types as its weights, and what transformers missed.

    However transformers renames, joins and transposes what is stored, the numbers go along. Each
    tensor is one number, which takes no memory until it is joined with others.
    """
    kinds = sorted({one.kind for one in held.values()})
    numbers = {
        key: torch.tensor(float(kinds.index(one.kind)), dtype=torch.bfloat16).expand(one.shape)
        for key, one in held.items()
    }
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=numbers,
        dtype=torch.bfloat16,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    missed = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    kept = model.state_dict(keep_vars=True)
    buffers = [(key, one) for key, one in model.named_buffers() if key in kept]
    given = [*model.named_parameters(remove_duplicate=False), *buffers]
    found = {
        key: _numbers(one) for key, one in given if key not in missed and one.is_floating_point()
    }
    return model, {key: {kinds[number] for number in has} for key, has in found.items()}, info


def _numbers(parameter: torch.Tensor) -> set[int]:
    """The numbers in a tensor. What was expanded is looked at once."""
    once = [slice(0, 1) if stride == 0 else slice(None) for stride in parameter.stride()]
    return {int(number) for number in parameter.detach()[tuple(once)].unique().tolist()}


def _widest(kinds: set[str]) -> torch.dtype:
    return reduce(torch.promote_types, (STORED[kind] for kind in kinds))


def most_of(model: PreTrainedModel, types: Mapping[str, torch.dtype]) -> torch.dtype:
    """The type that most of all elements of parameters have, of the `types` by name."""
    elements: Counter[torch.dtype] = Counter()
    for key, parameter in model.named_parameters():
        elements[types[key]] += parameter.numel()
    return elements.most_common(1)[0][0]


def _unmade(kind: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """The model that a configuration describes, without memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = kind(config)
    return model


def refuse_deeper(settings: Mapping[str, Any], tensors: int, name: str) -> None:
    """Refuse more layers than there are tensors: the configuration alone would take for ever."""
    for key in _LAYERS & settings.keys():
        if isinstance(settings[key], int | float) and settings[key] > tensors:
            raise AbsorbError(
                f"the config.json of {name} says {key} {settings[key]:.6g} and there are {tensors} "
                "tensors; fetch both again"
            )
    for key, part in settings.items():
        if key.endswith("_config") and isinstance(part, dict):
            refuse_deeper(part, tensors, name)


def _refuse_adapters(held: Mapping[str, Tensor], name: str) -> None:
    for key in sorted(held):
        if any(mark in key for mark in _ADAPTERS):
            raise AbsorbError(
                f"{name} holds {key}, which is of an adapter that is not merged; merge it with "
                "peft's merge_and_unload, save the model, and convert that"
            )


def _refuse_larger(model: PreTrainedModel, elements: int, name: str) -> None:
    """Refuse a configuration of a much larger model: what is missing would fill the memory.

    Tied weights are stored once, so up to twice as many may be right.
    """
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > 2 * elements:
        raise AbsorbError(
            f"the config.json of {name} describes a model of {wanted:,} weights and there are "
            f"{elements:,}; fetch both again"
        )


def refuse_mismatch(
    info: Mapping[str, Any], model: PreTrainedModel, held: Mapping[str, Tensor], name: str
) -> None:
    """Refuse weights of another model: transformers would draw what is missing at random."""
    unused = [key for key in info["unexpected_keys"] if key not in held or _is_used(key, held[key])]
    strange = (
        [f"lacks {key}" for key in sorted(info["missing_keys"])]
        + [f"holds {key} in another shape" for key, *_ in sorted(info["mismatched_keys"])]
        + [f"holds {key} without a use for it" for key in sorted(unused)]
    )
    if strange:
        raise AbsorbError(
            f"{name} {strange[0]}: its weights are not those of the {type(model).__name__} that "
            "its configuration describes; fetch both again"
        )


def _is_used(key: str, tensor: Tensor) -> bool:
    """Whether somebody reads a tensor that this class does not: whole numbers are no weights."""
    return not _is_buffer(key, tensor) and tensor.kind not in _COUNTED


def _is_buffer(key: str, tensor: Tensor) -> bool:
    """Whether a tensor is one that a model computes anew, so that no training changed it.

    A causal mask is (1, 1, n, n), and what is learned has no such shape.
    """
    mask = len(tensor.shape) == 4 and tensor.shape == (1, 1, *2 * tensor.shape[-1:])
    return mask or key.endswith(_BUFFERS)
