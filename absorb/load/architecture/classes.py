"""config.json → the class of a model, its configuration and its family.

All of transformers or on top of it: never the model's own code, trusted or not, since a family
describes the stock class.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from absorb.load import checks, session, wrapped
from absorb.load import files as stored
from absorb.load.architecture.unlisted import inferred_family
from absorb.models import modeling_absorb
from absorb.models.family import Family, UnsupportedFamilyError
from absorb.schema.proof import Proof
from absorb.schema.settings import ModelRef

# The family of the models of a class with a configuration, and what was shown of it.
Prover = Callable[[Any, Any], tuple[Family, Proof]]


def family_of_folder(
    folder: Path, ref: ModelRef, measured: bool, prove: Prover | None
) -> tuple[Family | None, Proof | None]:
    """The family of the model in a folder, and its proof where it has no entry.

    Neither where a model is only to be measured of which nothing can be proved.
    """
    family = checks.family_in(folder, ref.name, measured, ref.text_only, prove is not None)
    settings = stored.read_json(folder / "config.json", ref.name)
    stock = checks.stock_type(settings)
    if family is not None or prove is None or wrapped.has_part(settings):
        return family, None
    settings["model_type"] = stock or settings["model_type"]
    try:
        return proved_family(settings, ref, prove)
    except UnsupportedFamilyError:
        if measured and stock is None:
            return None, None
        raise


def proved_family(
    settings: Mapping[str, Any], ref: ModelRef, prove: Prover
) -> tuple[Family, Proof]:
    """The family of a stock model with these settings in its config.json, which has no entry."""
    plain = {name: value for name, value in settings.items() if name not in ("absorb", "auto_map")}
    kind, config = stock_of(plain, ref.name)
    try:
        return prove(kind, config)
    except UnsupportedFamilyError as error:
        raise checks.unproved(plain, ref.name, str(error)) from error


def stock_of(settings: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """The class of transformers for a config.json, and the configuration that it has there."""
    with stored.reading(name):
        plain = session.without_session(dict(settings))
        config = CONFIG_MAPPING[settings["model_type"]].from_dict(plain)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config


def class_of(settings: Mapping[str, Any]) -> Any:
    """What loads the model of a configuration."""
    if wrapped.has_part(settings):
        return wrapped.whole_class(settings)
    converted = checks.stock_type(settings)
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[converted or settings["model_type"]]]
    return modeling_absorb.absorbed(stock) if converted else stock


def config_class(settings: Mapping[str, Any], kind: Any) -> Any:
    """The class of a configuration, which some architectures have on top of another's model."""
    known = not wrapped.has_part(settings) and checks.stock_type(settings) is None
    return CONFIG_MAPPING[settings["model_type"]] if known else kind.config_class


def settled(
    family: Family | None, model: PreTrainedModel, settings: Mapping[str, Any], name: str
) -> Family:
    """The family of a model that is loaded, by what it says of itself."""
    if family is None:
        with stored.reading(name):
            return inferred_family(model, name)
    if not wrapped.has_part(settings):
        return family
    # Some wholes change settings of their part unknown to config.json, as PaliGemma does.
    inside: Any = model.base_model.config
    return checks.family_of_config(inside.to_dict(), name)
