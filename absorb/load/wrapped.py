"""The language model inside one that reads images as well."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from absorb.errors import AbsorbError
from absorb.load.files import read_json
from absorb.models import modeling_absorb
from absorb.models.whole import Whole, named_in, taken_out, with_head
from absorb.schema.settings import ModelRef

# What a configuration says outside of its parts about the weights of all.
_OF_THE_WHOLE = {"quantization_config", "compression_config", "absorb"}
_CONVERTED = "absorb_"
# The files that say how images, videos and chats are read.
PROCESSORS = "*processor_config.json"
TEMPLATE = "chat_template.json"
# Two ways to the same logits differ by rounding.
_SAME = 1e-4


def has_part(config: Mapping[str, Any]) -> bool:
    """Whether the model of a configuration has a language model inside, beside other parts."""
    return isinstance(config.get("text_config"), dict)


def inside(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The part of a configuration that describes the language model, which stands in another."""
    model_type, part = _stock_type(config), config.get("text_config")
    if not isinstance(part, dict) or model_type not in CONFIG_MAPPING:
        raise AbsorbError(f"{name} is a language model and nothing else; drop --text-only")
    if CONFIG_MAPPING[model_type] not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise AbsorbError(
            f"{name} is a {model_type} model, and transformers has no class for these that reads "
            "images and text; choose another model"
        )
    return {**part, **{key: config[key] for key in _OF_THE_WHOLE & config.keys()}}


def _stock_type(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type")).removeprefix(_CONVERTED)


def whole_class(config: Mapping[str, Any]) -> Any:
    """The class of the model that has another inside."""
    stock = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[_stock_type(config)]]
    return modeling_absorb.absorbed(stock) if "absorb" in config else stock


def part_of(
    outer: PreTrainedModel,
    config: PretrainedConfig,
    types: Mapping[str, torch.dtype],
    folder: Path,
    ref: ModelRef,
    measured: bool,
    narrow: bool,
) -> tuple[PreTrainedModel, Mapping[str, torch.dtype], Whole | None]:
    """The language model of another model, the types it was stored in, and what it is written with.

    What is only measured reads text, and is written with nothing. It becomes float32 if `narrow`.
    """
    model = alone(outer, ref.name, standing=ref.text_only and not measured)
    own = _types_of(model, outer, types)
    if narrow:
        nn.Module.to(model, torch.float32)
    if measured or ref.text_only:
        return model, own, None
    return model, own, _whole_of(outer, model, config, types, folder, ref.name)


def alone(whole: PreTrainedModel, name: str, standing: bool) -> PreTrainedModel:
    """The language model of a model that reads images too, as a causal model of its own.

    If it is to be `standing` alone, its class is one of transformers.
    """
    body: Any = whole.get_decoder()
    known: Any = MODEL_MAPPING.get(type(body.config), None)
    if known is None or known.__name__ != type(body).__name__:
        raise AbsorbError(
            f"the language model of {name} is a {type(body).__name__}, which stands for none that "
            "absorb knows; choose another model"
        )
    if standing:
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(body.config), None)
        if kind is None:
            raise AbsorbError(
                f"the language model of {name}, a {type(body).__name__}, does not stand alone in "
                "transformers; drop --text-only to convert the whole"
            )
        return taken_out(whole, kind)
    return taken_out(whole, with_head(known))


def _whole_of(
    model: PreTrainedModel,
    part: PreTrainedModel,
    settings: PretrainedConfig,
    types: Mapping[str, torch.dtype],
    folder: Path,
    name: str,
) -> Whole:
    """What the language model `part` was taken out of. Refuses one whose text it does not say."""
    tokens = torch.arange(1, 8)[None]
    with torch.no_grad():
        given, expected = (one(tokens, use_cache=False).logits for one in (part, model))
    if not (given - expected).abs().max() <= _SAME * expected.abs().max():
        raise AbsorbError(
            f"{name} does more to its text than its language model does; pass --text-only to "
            "convert that alone"
        )
    head: Any = model.get_output_embeddings()
    return Whole(
        model=model,
        settings=settings.to_dict(),
        types=types,
        body=named_in(model, part.base_model),
        head=named_in(model, head),
        files=_files(folder, name),
    )


def _files(folder: Path, name: str) -> dict[str, bytes]:
    """The files of processors, without the code that they name: their classes are transformers'."""
    found = {}
    for file in sorted(folder.glob(PROCESSORS)):
        known = read_json(file, name)
        code = known.pop("auto_map", None)
        found[file.name] = json.dumps(known, indent=2).encode() if code else file.read_bytes()
    if (folder / TEMPLATE).is_file():
        found[TEMPLATE] = (folder / TEMPLATE).read_bytes()
    return found


def _types_of(
    model: PreTrainedModel, whole: PreTrainedModel, types: Mapping[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """The types of parameters of the `whole`, under the names that they have in what is taken out.

    To be asked before any of them is replaced.
    """
    named = {p: name for name, p in whole.named_parameters(remove_duplicate=False)}
    known = model.named_parameters(remove_duplicate=False)
    return {name: types[named[parameter]] for name, parameter in known}
