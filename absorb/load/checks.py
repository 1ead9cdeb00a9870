"""What absorb refuses to convert, each with the sentence that says why and what to do."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from absorb.errors import AbsorbError
from absorb.load import wrapped
from absorb.models.families import family_of, suited
from absorb.models.family import Family, UnsupportedFamilyError
from absorb.schema.codec import parsed

# What configurations call the number of their layers.
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_CONVERTED = "absorb_"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What safetensors calls the types of weights that are not quantised.
STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Make one sentence of whatever the libraries below raise for a damaged file."""
    try:
        yield
    except AbsorbError:
        raise
    except Exception as error:
        raise AbsorbError(
            f"{name} could not be read ({_first_line(error)}); "
            "check that its files are complete and belong together"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def family_in(
    folder: Path, name: str, measured: bool = False, text_only: bool = False
) -> Family | None:
    """The family of the model in a folder, which has a sound configuration and a tokenizer.

    With `text_only` that of the language model inside it. Where it is only to be measured, that of
    the stock model beneath a converted one, and None for an architecture that absorb does not know.
    """
    config = _read_json(folder / "config.json", name)
    if text_only:
        config = wrapped.inside(config, name)
    stock = stock_type(config) if measured else None
    if stock is not None:
        config = {key: value for key, value in config.items() if key != "absorb"}
        config["model_type"] = stock
    family = None
    try:
        family = family_of_config(config, name)
    except UnsupportedFamilyError:
        if not measured or config["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise AbsorbError(
            f"{name} has no tokenizer; save one beside the model, as {TOKENIZER_FILES[0]}"
        )
    return family


def has_part(folder: Path, name: str) -> bool:
    """Whether the model in a folder has a language model inside, beside other parts."""
    return isinstance(_read_json(folder / "config.json", name).get("text_config"), dict)


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
    if _is_quantised(config):
        raise AbsorbError(f"{name} is quantised; convert the model it was made from, then quantise")
    if not _is_causal(config):
        raise AbsorbError(
            f"{name} is a {model_type} model that does not predict the next token from a decoder "
            "alone; absorb converts decoder-only language models"
        )
    inside = config.get("text_config")
    if isinstance(inside, dict):
        raise UnsupportedFamilyError(
            f"{name} is a {model_type} model, in which a language model "
            f"({inside.get('model_type', 'of a type that it does not name')}) is one part among "
            "others; pass --text-only to convert that part, as a model of its own"
        )
    return suited(family_of(model_type), config)


def _is_quantised(config: Mapping[str, Any]) -> bool:
    return bool(config.get("quantization_config") or config.get("compression_config"))


def _is_causal(config: Mapping[str, Any]) -> bool:
    """Whether the named class is a causal language model, where one is named.

    A model with a `text_config` has more parts than text, and no family: it is refused by its type.
    """
    if config.get("is_encoder_decoder"):
        return False
    named = config.get("architectures")
    classes = [str(name) for name in named] if isinstance(named, list) else []
    endings = ("ForCausalLM", "LMHeadModel")
    return not classes or "text_config" in config or any(name.endswith(endings) for name in classes)


def _read_json(file: Path, name: str) -> dict[str, Any]:
    if not file.is_file():
        raise AbsorbError(
            f"{name} has no {file.name}, so it is not a transformers model; "
            "name a folder or repository that holds one, or a .gguf file"
        )
    try:
        content = parsed(file.read_bytes())
    except ValueError as error:
        raise AbsorbError(
            f"the {file.name} of {name} is not JSON ({error}); fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise AbsorbError(f"the {file.name} of {name} is not a JSON object; fetch it again")
    return content


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files that hold the model, all of them there."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise AbsorbError(
            f"{name} has no weights in the safetensors format, and absorb reads no pickle files "
            "(.bin, .pt), which can run any code; save the model again with save_pretrained"
        )
    shards = _shards(_read_json(folder / INDEX, name), name)
    files = [folder / shard for shard in shards]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise AbsorbError(f"{name} lacks {', '.join(missing) or 'its weights'}; fetch it again")
    return files


def _shards(index: Mapping[str, Any], name: str) -> list[str]:
    """The files that an index names. They lie beside it: one elsewhere is nobody's business."""
    places = index.get("weight_map")
    shards = {str(shard) for shard in places.values()} if isinstance(places, dict) else set()
    for shard in shards:
        if not shard or Path(shard).name != shard or "\0" in shard:
            raise AbsorbError(
                f"the {INDEX} of {name} names {shard!r}, which is no file beside it; fetch it again"
            )
    return sorted(shards)


@contextmanager
def unchanged(files: list[Path]) -> Iterator[None]:
    """Refuse files that somebody writes to meanwhile: what is read of them may belong to two."""

    def marks() -> list[tuple[int, int, int]]:
        return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in map(Path.stat, files)]

    before = marks()
    yield
    for file, then, now in zip(files, before, marks(), strict=True):
        if then != now:
            raise AbsorbError(f"{file} changed while it was read; try again once it is complete")


def stored_elements(files: list[Path]) -> tuple[Counter[str], int]:
    """How many elements the files hold of each type, and how many tensors, from their headers."""
    elements: Counter[str] = Counter()
    count = 0
    for file in files:
        with reading(str(file)), safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                part = tensors.get_slice(key)
                elements[part.get_dtype()] += prod(part.get_shape())
                count += 1
    return elements, count


def stored_dtype(elements: Counter[str], name: str) -> torch.dtype:
    """The type of most weights."""
    strange = elements.keys() - STORED.keys()
    if strange:
        raise AbsorbError(
            f"{name} stores weights as {', '.join(sorted(strange))}, so it is quantised; "
            "convert the model it was made from"
        )
    if not elements:
        raise AbsorbError(f"{name} holds no weights; fetch it again")
    return STORED[elements.most_common(1)[0][0]]


def refuse_deeper(folder: Path, tensors: int, name: str) -> None:
    """Refuse more layers than there are tensors: to build them takes for ever."""
    config = _read_json(folder / "config.json", name)
    for key in _LAYERS & config.keys():
        if isinstance(config[key], int | float) and config[key] > tensors:
            raise AbsorbError(
                f"the config.json of {name} says {key} {config[key]:.6g} and there are {tensors} "
                "tensors; fetch both again"
            )


def refuse_larger(model: PreTrainedModel, elements: int, name: str) -> None:
    """Refuse a configuration of a much larger model: what is missing would fill the memory.

    Tied weights are stored once, so up to twice as many may be right.
    """
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > 2 * elements:
        raise AbsorbError(
            f"the config.json of {name} describes a model of {wanted:,} weights and there are "
            f"{elements:,}; fetch both again"
        )


def refuse_mismatch(info: Mapping[str, Any], model: PreTrainedModel, name: str) -> None:
    """Refuse weights of another model: transformers would draw what is missing at random."""
    strange = (
        [f"lacks {key}" for key in sorted(info["missing_keys"])]
        + [f"holds {key} in another shape" for key, *_ in sorted(info["mismatched_keys"])]
        + [f"holds {key} without a use for it" for key in sorted(info["unexpected_keys"])]
    )
    if strange:
        raise AbsorbError(
            f"{name} {strange[0]}: its weights are not those of the {type(model).__name__} that "
            "its configuration describes; fetch both again"
        )


@torch.no_grad()
def refuse_unusable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse what cannot compute, since its configuration is damaged, or computes NaN."""
    with reading(name):
        logits = model(torch.tensor([[0, 1]]), use_cache=False).logits
        tokenizer.decode(tokenizer("a")["input_ids"])
    for role, token in (("BOS", tokenizer.bos_token_id), ("EOS", tokenizer.eos_token_id)):
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
        if not torch.stack(torch.aminmax(parameter.detach())).isfinite().all():
            raise AbsorbError(
                f"{name} has NaN or infinity in {key}; fetch it again or choose another model"
            )
