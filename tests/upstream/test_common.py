"""transformers' own tests of every model, on absorbed models."""

import copy
import sys
import unittest
from fnmatch import filter as filter_names
from fnmatch import fnmatchcase
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.models.auto import modeling_auto

from absorb.fold.graft import twin
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.models import modeling_absorb
from absorb.models.decoder import Decoder
from absorb.models.families import family_of
from tests.helpers.tiny import HEAD_DIM, HEADS, HIDDEN, VOCABULARY, tiny


def stand_in(module: str, **contents: Any) -> None:
    """A module of transformers' tests that its source distribution leaves out."""
    name = f"transformers_tests.{module}"
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(contents)


class GenerationTesterMixin:
    """Left out: tests/models/test_generation.py is ours."""


class ExportTesterMixin:
    """Left out: tests/models/test_attention.py exports a model."""


stand_in("generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
stand_in("exporters.test_export", ExportTesterMixin=ExportTesterMixin)
stand_in(
    "utils.test_configuration_utils",
    config_common_kwargs={
        "output_hidden_states": True,
        "chunk_size_feed_forward": 5,
        "id2label": {0: "label"},
    },
)

from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

LAYERS = 2  # more than two are refused
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {},
    "mixtral": {"head_dim": HEAD_DIM},
}
KEYED = {"logit": 0, "mixed": 1, "key": LAYERS}  # how many of the layers have keys, by form
# In mixed form there are parameters of both kinds.
CASES = [(family, "mixed") for family in FAMILIES if family != "llama"]
CASES += [("llama", "logit"), ("llama", "key")]
# Those that need a GPU, another package or another kind of model skip themselves.
SKIPPED = {
    "*.test_can_set_attention_dynamically": "our attention has its own names and refusals",
    "*.test_sdpa_can_dispatch_non_composite_models": "our attention has its own names",
    "*.test_keep_in_fp32_modules_exist": "one list names the sinks of both forms",
    "gpt2.test_can_init_all_missing_weights": "transformers draws c_proj so only in its own code",
}
# What sinks and scales begin with here: at the value where they do nothing, nothing would be seen.
AT_WORK = {
    "sink": 1.0,
    "sink_key": 0.5,
    "sink_value": 0.3,
    "input_scale": 2.0,
    "output_scale": 0.5,
    "bias": 0.0,
}


@cache
def subject(family: str, form: str) -> tuple[PreTrainedConfig, Any, Any]:
    """The configuration of an absorbed model, its class, and that with a language model head."""
    stock = tiny(family, torch.float32, num_hidden_layers=LAYERS, **FAMILIES[family])
    sinks = prefix_of(Decoder(stock, family_of(family)), torch.tensor([1, 9])).layers[: KEYED[form]]
    config = twin(Decoder(stock, family_of(family)), sinks).model.config
    config._attn_implementation = None  # as before there is a model
    base, causal = (modeling_absorb.absorbed(type(model)) for model in (stock.base_model, stock))
    register(type(config), base, causal)
    return config, base, causal


def register(config: type[PreTrainedConfig], base: Any, causal: Any) -> None:
    """Let the tests know our classes by name: those that they do not know they leave out."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, base, exist_ok=True)
    AutoModelForCausalLM.register(config, causal, exist_ok=True)
    modeling_auto.MODEL_MAPPING_NAMES[config.model_type] = base.__name__
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = causal.__name__


class ModelTester:
    """What the tests ask for: the sizes of a model, its configuration and inputs."""

    num_hidden_layers, num_attention_heads, hidden_size = LAYERS, HEADS, HIDDEN
    vocab_size = VOCABULARY
    batch_size, seq_length = 3, 7
    is_training = True

    def __init__(self, config: PreTrainedConfig, causal: Any) -> None:
        self.config = config
        self.causal_lm_class = causal

    def get_config(self) -> PreTrainedConfig:
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        tokens = torch.randint(3, VOCABULARY, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class Common(ModelTesterMixin, TrainingTesterMixin, GenerationTesterMixin):
    family: str
    form: str
    model_tester: Any = None
    # Where it is off, nothing checks that weights which a checkpoint lacks get a value.
    test_can_init_all_missing_weights_before_2023 = True
    # Enough for models this small, in a third of the time.
    training_overfit_steps = 100
    training_overfit_learning_rate = 5e-3

    def setUp(self) -> None:
        for pattern, reason in SKIPPED.items():
            if fnmatchcase(f"{self.family}.{self._testMethodName}", pattern):
                self.skipTest(reason)
        torch.manual_seed(0)
        patch = pytest.MonkeyPatch()
        self.addCleanup(patch.undo)
        patch.setattr(modeling_absorb, "NEUTRAL", AT_WORK)
        config, *self.all_model_classes = subject(self.family, self.form)
        self.model_tester = ModelTester(config, self.all_model_classes[1])

    def test_config(self) -> None:
        config = self.model_tester.get_config()
        ConfigTester(self, type(config), absorb=config.absorb).run_common_tests()


def test_what_is_skipped_is_there() -> None:
    names = [f"{family}.{name}" for family in FAMILIES for name in dir(Common)]
    assert all(filter_names(names, pattern) for pattern in SKIPPED)


for _family, _form in CASES:
    _name = f"Test_{_family}_{_form}"
    globals()[_name] = type(
        _name,
        (Common, unittest.TestCase),
        {"family": _family, "form": _form, "__module__": __name__},
    )
