"""What absorb refuses to convert, each with the sentence that says why and what to do."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from absorb.errors import AbsorbError
from absorb.load import vocabulary, wrapped
from absorb.load.files import headers, read_json, reading, refuse_pointers, weight_files
from absorb.load.forecast import forecast
from absorb.load.opening.tokenizer import lead_of
from absorb.models.families import FAMILIES, family_of, suited
from absorb.models.family import Family, UnsupportedFamilyError
from absorb.models.refused import REFUSED

_CONVERTED = "absorb_"
_ADAPTER, _BASE = "adapter_config.json", "base_model_name_or_path"


def family_in(
    folder: Path,
    name: str,
    measured: bool = False,
    text_only: bool = False,
    unlisted: bool = False,
) -> Family | None:
    """The family of the model in a folder, which has a sound configuration and a tokenizer.

    Where there is a language model inside, that of this one. Where it is only to be measured, that
    of the stock model beneath a converted one. None for an architecture without an entry, where the
    model is only to be measured or is welcome although it is `unlisted`.
    """
    refuse_pointers(folder, name)
    refuse_adapter(folder, name)
    config = read_json(folder / "config.json", name)
    if text_only or wrapped.has_part(config):
        config = wrapped.inside(config, name)
    if measured:
        config.pop("absorb", None)
    stock = stock_type(config) if measured else None
    if stock is not None:
        config["model_type"] = stock
    family = None
    try:
        family = family_of_config(config, name)
    except UnsupportedFamilyError:
        known = config["model_type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if not (measured and known) and not (unlisted and is_of_text(config)):
            raise
    if not any((folder / file).is_file() for file in vocabulary.FILES):
        raise AbsorbError(
            f"{name} has no tokenizer; save one beside the model, as {vocabulary.FILES[0]}"
        )
    return family


def refuse_adapter(folder: Path, name: str) -> None:
    """Refuse an adapter, or one that lies beside a model: where peft is, a load would attach it."""
    if not (folder / _ADAPTER).is_file():
        return
    if (folder / "config.json").is_file():
        raise AbsorbError(
            f"{name} holds an adapter beside its model ({_ADAPTER}), and it is not clear which of "
            "the two is meant; merge it, or move it away"
        )
    base = " ".join(str(read_json(folder / _ADAPTER, name).get(_BASE) or "another model").split())
    raise AbsorbError(
        f"{name} is an adapter of {base}; merge it first, with peft's "
        "merge_and_unload, and convert what that gives"
    )


def stock_type(config: Mapping[str, Any]) -> str | None:
    """The architecture that absorb converted to the one with this configuration, if it did."""
    model_type = str(config.get("model_type"))
    return model_type.removeprefix(_CONVERTED) if model_type.startswith(_CONVERTED) else None


def family_of_config(config: Mapping[str, Any], name: str) -> Family:
    """The family of the model that a configuration describes, if absorb can convert it."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise AbsorbError(f"the config.json of {name} names no model_type; fetch it again")
    if stock_type(config) is not None or "absorb" in config:
        raise AbsorbError(f"{name} is absorbed already; convert the model it was made from")
    if _is_quantized(config):
        raise AbsorbError(f"{name} is quantised; convert the model it was made from, then quantise")
    if not _is_causal(config):
        raise AbsorbError(
            f"{name} is a {model_type} model that does not predict the next token from a decoder "
            "alone; absorb converts decoder-only language models"
        )
    return suited(family_of(model_type), config)


def is_of_text(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a class for a model that reads nothing but text."""
    known = config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return known and not isinstance(config.get("text_config"), dict)


def unproved(config: Mapping[str, Any], name: str, reason: str) -> UnsupportedFamilyError:
    """What to say of a model that no entry fits, and for which none could be proved either."""
    try:
        family_of_config(config, name)
    except UnsupportedFamilyError as error:
        if config["model_type"] in REFUSED or config["model_type"] in FAMILIES:
            return error
    return UnsupportedFamilyError(
        f"absorb has no entry for the architecture {config['model_type']!r} of {name} and cannot "
        f"prove one, as {reason}; choose a model of an architecture that it knows "
        f"({', '.join(sorted(FAMILIES))})"
    )


def _is_quantized(config: Mapping[str, Any]) -> bool:
    return bool(config.get("quantization_config") or config.get("compression_config"))


def _is_causal(config: Mapping[str, Any]) -> bool:
    """Whether the named class is a causal language model, where one is named."""
    if config.get("is_encoder_decoder"):
        return False
    named = config.get("architectures")
    classes = [str(name) for name in named] if isinstance(named, list) else []
    endings = ("ForCausalLM", "LMHeadModel")
    return not classes or any(name.endswith(endings) for name in classes)


@torch.no_grad()
def refuse_unusable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse what cannot compute, since its configuration is damaged, or computes NaN."""
    with reading(name):
        logits = model(torch.tensor([[0, 1]]), use_cache=False).logits
        tokenizer.decode(tokenizer("a")["input_ids"])
        lead = lead_of(tokenizer).tolist()
    named = {"BOS": tokenizer.bos_token_id, "EOS": tokenizer.eos_token_id}
    for role, token in (*named.items(), *(("a text's beginning", token) for token in lead)):
        if token is not None and token not in range(model.config.vocab_size):
            raise AbsorbError(
                f"{name} has no token {token}, which its tokenizer calls {role}; fetch both again"
            )
    if not logits.isfinite().all():
        raise AbsorbError(
            f"{name} computes NaN or infinity; check its config.json, or choose another model"
        )


def refuse_non_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse NaN and infinity, naming the first tensor that has one."""
    for key, parameter in model.named_parameters():
        if not _is_finite(parameter.detach()):
            raise AbsorbError(
                f"{name} has NaN or infinity in {key}; fetch it again or choose another model"
            )


def refuse_unfaithful(
    folder: Path,
    model: PreTrainedModel,
    types: Mapping[str, torch.dtype],
    name: str,
    known: Collection[str] = (),
) -> None:
    """Refuse a folder unless it gives the model back: parameters of these types, finite.

    What lies deeper in the folder, as the plan does, is looked at for NaN and infinity as well;
    files that are `known` are not.
    """
    held = headers(weight_files(folder, name))
    config = type(model.config).from_pretrained(folder)
    found = forecast(type(model), config, held, name).types
    for key, dtype in types.items():
        if found.get(key) != dtype:
            raise AbsorbError(
                f"{name} has {key} in {dtype} and it was written in {found.get(key)}; "
                "update transformers and safetensors"
            )
    for file in sorted(folder.rglob("*.safetensors")):
        if file.relative_to(folder).as_posix() not in known:
            refuse_non_finite_in(file, name)


def refuse_non_finite_in(file: Path, name: str) -> None:
    """Refuse a file of weights with NaN or infinity, which are those of what people call `name`."""
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not a mapping
            if not _is_finite(tensors.get_tensor(key)):
                raise AbsorbError(
                    f"{name} has NaN or infinity in {key}; convert with --steps 0, or from "
                    "weights in a type with a larger range, such as bfloat16 or float32"
                )


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
