"""The language model inside one that reads images as well."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from absorb.errors import AbsorbError

# What a configuration says outside of its parts about the weights of all.
_OF_THE_WHOLE = {"quantization_config", "compression_config"}


def inside(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The part of a configuration that describes the language model, which stands in another."""
    model_type, part = str(config.get("model_type")), config.get("text_config")
    if not isinstance(part, dict) or model_type not in CONFIG_MAPPING:
        raise AbsorbError(f"{name} is a language model and nothing else; drop --text-only")
    if CONFIG_MAPPING[model_type] not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise AbsorbError(
            f"{name} is a {model_type} model, and transformers has no class for these that reads "
            "images and text; choose another model"
        )
    return {**part, **{key: config[key] for key in _OF_THE_WHOLE & config.keys()}}


def whole_class(model_type: str) -> Any:
    """The class of the model that has another inside."""
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[model_type]]


def taken_out(whole: PreTrainedModel, name: str) -> PreTrainedModel:
    """The language model of a model that reads images too, as a causal model of its own.

    It is the same body and the same head: on text it computes what the whole does.
    """
    body: Any = whole.get_decoder()
    head: Any = whole.get_output_embeddings()
    config = body.config
    config.tie_word_embeddings = head.weight is body.get_input_embeddings().weight
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = kind(config)
    if type(getattr(model, model.base_model_prefix)) is not type(body):
        raise AbsorbError(
            f"the language model of {name}, a {type(body).__name__}, does not stand alone in "
            "transformers; choose another model"
        )
    setattr(model, model.base_model_prefix, body)
    model.set_output_embeddings(head)
    model.generation_config = whole.generation_config
    alone: PreTrainedModel = model.eval()
    return alone


def types_of(
    model: PreTrainedModel, whole: PreTrainedModel, types: Mapping[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """The types of parameters of the `whole`, under the names that they have in what is taken out.

    To be asked before any of them is replaced.
    """
    named = {p: name for name, p in whole.named_parameters(remove_duplicate=False)}
    known = model.named_parameters(remove_duplicate=False)
    return {name: types[named[parameter]] for name, parameter in known}
