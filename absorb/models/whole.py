"""A model that reads pictures as well as text, and the language model inside it.

All that is measured and changed is the language model, as a causal model of its own: on text it is
what the whole is. What came of it is then written in its place, beside parts that stay as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import processing_auto

from absorb.models.decoder import Decoder
from absorb.models.modeling_absorb import Absorbed, absorbed

# What a configuration says of the class that is loaded, and of who wrote it.
OF_THE_CLASS = ("model_type", "architectures", "auto_map", "transformers_version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What a language model was taken out of. Both have the same modules, so move only that one."""

    model: PreTrainedModel
    settings: Mapping[str, Any]  # config.json
    types: Mapping[str, torch.dtype]  # that everything was stored in, by its name in `model`
    body: str  # where in `model` the language model is, without its head
    head: str
    # What reads pictures and chats, by the name of the file beside the weights.
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        return str(self.settings["model_type"])

    @property
    def _inner(self) -> str:
        """The same place in the model without its head."""
        prefix: Any = self.model.base_model_prefix
        return str(self.body.removeprefix(f"{prefix}."))

    def name_of(self, student: Decoder) -> Callable[[str], str]:
        """What a parameter of a language model, which has this name there, is called in the whole.

        The scale of its embedding belongs to all that enters the stream here: pictures do too.
        """
        model: Any = student.model
        stem, embedding = f"{model.base_model_prefix}.", f"{student.family.embedding}.output_scale"

        def named(name: str) -> str:
            if name == embedding:
                return f"{self.body}.entry_scale"
            inside = name.startswith(stem)
            return f"{self.body}.{name.removeprefix(stem)}" if inside else _in_head(name, self.head)

        return named

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """All that is no part of the language model, as it was stored, by name."""
        parameters = {name for name, _ in self.model.named_parameters()}
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        for name, tensor in self.model.state_dict().items():
            mine = name.startswith((f"{self.body}.", f"{self.head}."))
            if not mine and name not in tied - parameters:
                yield name, tensor.to(self.types.get(name, tensor.dtype))

    def shell(self, student: Decoder) -> PreTrainedModel:
        """The absorbed twin of the whole, for an absorbed language model; without weights."""
        stock: Any = type(self.model)
        cls: Any = absorbed(stock)
        settings = {key: self.settings[key] for key in self.settings.keys() - {*OF_THE_CLASS}}
        # A processor is found by the name of a configuration, or by its own.
        processor = vars(processing_auto)["PROCESSOR_MAPPING_NAMES"].get(self.model_type)
        config = cls.config_class(
            **({"processor_class": processor} if processor else {}),
            **settings,
            absorb=self._sites(student),
        )
        with torch.device("meta"):
            model: PreTrainedModel = cls(config)
        model.generation_config = self.model.generation_config
        return model

    def _sites(self, student: Decoder) -> dict[str, Any]:
        """The sites of the language model, under their names in the whole without its head."""
        own = student.family.embedding.removeprefix(f"{student.model.base_model_prefix}.")
        sites: dict[str, Any] = {}
        for kind, patterns in student.config.absorb.items():
            named = not kind.endswith("_shape")  # that is no list of patterns
            sites[kind] = [f"{self._inner}.{p}" if named else p for p in patterns if p != own]
        return sites | {"entry_scale": [self._inner]}


def _in_head(name: str, head: str) -> str:
    return f"{head}.{name.rpartition('.')[2]}"


def taken_out(whole: PreTrainedModel, kind: Any) -> PreTrainedModel:
    """The language model of a whole as a model of a causal class, absorbed where the whole is.

    It is the same body and the same head.
    """
    body: Any = whole.get_decoder()
    head: Any = whole.get_output_embeddings()
    config = body.config
    config.tie_word_embeddings = head.weight is body.get_input_embeddings().weight
    own = config
    if isinstance(whole, Absorbed):
        kind = absorbed(kind)
        known = {k: v for k, v in config.to_dict().items() if k not in OF_THE_CLASS}
        own = kind.config_class(**known, absorb=_sites_inside(whole, body))
    with torch.device("meta"):
        model = kind(own)
    setattr(model, model.base_model_prefix, body)
    model.set_output_embeddings(head)
    model.generation_config = whole.generation_config
    alone: PreTrainedModel = model.eval()
    return alone


def _sites_inside(whole: PreTrainedModel, body: nn.Module) -> dict[str, Any]:
    """The sites of a converted whole, under their names in its language model."""
    stem = f"{named_in(whole.base_model, body)}."
    sites: dict[str, Any] = whole.config.absorb
    return {
        kind: [p.removeprefix(stem) if isinstance(p, str) else p for p in patterns]
        for kind, patterns in sites.items()
        if kind != "entry_scale"  # which the body brings
    }


def named_in(whole: nn.Module, part: nn.Module) -> str:
    """The name of a module inside another."""
    return str(next(name for name, module in whole.named_modules() if module is part))


@cache
def with_head(body: Any) -> Any:
    """A causal class around the body of a language model, with a head as wholes have it.

    transformers may have none, or one that does more to its logits than the whole does.
    """
    stem: Any = body.__bases__[0]

    class WithHead(stem, GenerationMixin):  # type: ignore[misc]
        config_class = body.config_class

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            setattr(self, self.base_model_prefix, body(config))
            embedding = named_in(self, self.base_model.get_input_embeddings())
            self._tied_weights_keys = {"lm_head.weight": f"{embedding}.weight"}
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
            out = self.base_model(*args, **kwargs)
            return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state))

        @classmethod
        def _can_set_experts_implementation(cls) -> bool:
            # As in what is absorbed: told by the source of a class, which has no experts here.
            return bool(stem._can_set_experts_implementation())

    made: Any = WithHead
    made.forward.__signature__ = signature(body.forward)
    made.__name__ = made.__qualname__ = f"{body.__name__}WithHead"
    return made
