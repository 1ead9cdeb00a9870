"""What vLLM's Transformers backend finds in a converted checkpoint, by its own rule, without vLLM.

It reads the source of each layer's attention for the scale and the sinks that this hands to the
attention function, and makes its kernels with them. scripts/engines/vllm.py asks the real engine.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from absorb.fold.graft import twin
from absorb.models import modeling_absorb
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.modeling_absorb import eager_attention
from tests.helpers.tiny import tiny
from tests.models.test_attention import CAUSAL, sinked, texts

ENGINE = "vllm"
every_family = pytest.mark.parametrize("family", FAMILIES)


def handed(forward: Any) -> dict[str, ast.expr]:
    """What vLLM 0.32 finds: the keywords of the one call of a function that is looked up so.

    vllm/model_executor/models/transformers/fusers/attention.py, `interface_call`.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    looked_up = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Subscript | ast.Call)
        and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in looked_up
    ]
    assert len(calls) == 1
    return {str(word.arg): word.value for word in calls[0].keywords}


def resolved(found: ast.expr, module: nn.Module) -> Any:
    """A literal, or an attribute of the layer: vLLM evaluates nothing else (`_resolve`)."""
    if isinstance(found, ast.Constant):
        return found.value
    assert isinstance(found, ast.Attribute)
    assert isinstance(found.value, ast.Name)
    assert found.value.id == "self"
    return getattr(module, found.attr)


class Kernels:
    """An attention function that takes sinks and a scale from what was read, as vLLM's does."""

    def __init__(self, drop_sinks: bool = False) -> None:
        self.drop_sinks = drop_sinks
        self.scales: list[tuple[float, float]] = []  # read, and handed

    @property
    def function(self) -> Any:
        def attention(
            module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **given: Any
        ) -> Any:
            found = handed(type(module).forward)
            sinks = None if self.drop_sinks else resolved(found["s_aux"], module)
            if given.get("s_aux") is not None and sinks is None:
                raise ValueError("applies attention sinks, but they were not passed")
            scale = resolved(found["scaling"], module)
            self.scales.append((scale, given["scaling"]))
            assert isinstance(sinks, nn.Parameter)
            length = q.shape[2]
            mask = CAUSAL[:length, :length].triu(1 - (given.get("sliding_window") or length))
            options = {"scaling": scale, "softcap": given.get("softcap")}
            return eager_attention(module, q, k, v, mask, **options)

        return attention


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    found = Kernels()
    yield from registered(found.function, found)


def registered(function: Any, given: Any) -> Iterator[Any]:
    """Let transformers know an attention function by vLLM's name for a while."""
    ALL_ATTENTION_FUNCTIONS._global_mapping[ENGINE] = function
    try:
        yield given
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping[ENGINE]
        modeling_absorb.KERNELS.discard(ENGINE)


@torch.no_grad()
def converted(family: str) -> PreTrainedModel:
    """A converted model of logits with sinks that take about half of the weight."""
    model = twin(Decoder(tiny(family, torch.float32), FAMILIES[family])).model
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(".sink"):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) + 1)
    return model


@every_family
@torch.no_grad()
def test_vllm_reads_the_scale_and_the_sinks_of_every_family(family: str, kernels: Kernels) -> None:
    model = converted(family)
    model.set_attn_implementation("eager")
    expected = model(texts()).logits
    model.set_attn_implementation(ENGINE)
    assert (model(texts()).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert kernels.scales
    assert all(read == handed for read, handed in kernels.scales)


@every_family
def test_vllm_replaces_nothing_that_has_a_scale(family: str) -> None:
    """It makes embeddings and plain layer norms anew, and RMSNorms by their name or their steps."""
    tied = {"tie_word_embeddings": True}
    decoder = Decoder(tiny(family, torch.float32, **tied), FAMILIES[family])
    for name, module in twin(decoder).model.named_modules():
        if module._parameters.keys() & {"input_scale", "output_scale"}:
            assert not isinstance(module, nn.Embedding), name
            assert type(module) is not nn.LayerNorm, name
            assert not type(module).__name__.endswith("RMSNorm"), name


def test_sinks_that_do_not_reach_the_kernel_are_refused_by_vllm() -> None:
    function = Kernels(drop_sinks=True).function
    for _ in registered(function, None):
        model = converted("llama")
        model.set_attn_implementation(ENGINE)
        with torch.no_grad(), pytest.raises(ValueError, match="were not passed"):
            model(texts())


def test_an_engine_that_reads_no_sinks_is_refused() -> None:
    def attention(module: Any, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return query, None

    for _ in registered(attention, None):
        with pytest.raises(ValueError, match=r"would drop the sinks .* `absorb export`"):
            converted("llama").set_attn_implementation(ENGINE)


def test_keys_are_refused_by_name(kernels: Kernels) -> None:
    model = sinked("llama", "key")
    with pytest.raises(ValueError, match="'vllm' would drop the sinks"):
        model.set_attn_implementation(ENGINE)
    assert not kernels.scales
