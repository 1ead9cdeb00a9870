"""Sinks on every path: the same numbers as the plain formula, in every situation of a model."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import accelerate
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from transformers import PreTrainedModel, StaticCache
from transformers.integrations import flash_attention

from absorb.fold.graft import twin
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.models import modeling_absorb
from absorb.models.decoder import Decoder
from absorb.models.families import family_of
from absorb.models.modeling_absorb import (
    NEUTRAL,
    OPERATORS,
    How,
    WithSinks,
    eager_attention,
    flex_attention,
    sink_attention,
)
from absorb.runtime.reading import led
from tests.helpers.tiny import HEAD_DIM, HEADS, KV_HEADS, LAYERS, VOCABULARY, tiny

WINDOW = 5  # shorter than the texts, so that it hides something
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": WINDOW},
    "phi3": {"num_key_value_heads": HEADS},
    "mistral": {"sliding_window": WINDOW},
    "olmo2": {},
    "cohere2": {"sliding_window": WINDOW},
}
FORMS = ("logit", "key", "mixed")
EVERY = pytest.mark.parametrize("family", FAMILIES)
BOTH = pytest.mark.parametrize("form", FORMS)
N = 2  # sink tokens in the form `key`
LENGTH = 16


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@cache
def stock(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny(family, dtype, **FAMILIES[family])


def in_form(form: str, student: PreTrainedModel) -> PreTrainedModel:
    """The same model with neutral sinks in the layers that have logits, and no keys drawn yet."""
    config = copy.deepcopy(student.config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = {"logit": (), "key": range(LAYERS), "mixed": (1,)}[form]
    config.absorb |= {
        "sink": [f"layers.{layer}.self_attn" for layer in range(LAYERS) if layer not in layers],
        "sink_key": [f"layers.{layer}.self_attn" for layer in layers],
        "sink_shape": [config.num_key_value_heads, N, head_dim],
    }
    model = type(student)(config).eval()
    model.load_state_dict(student.state_dict(), strict=False)
    return model


@torch.no_grad()
def sinked(
    family: str, form: str = "logit", dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A tiny model whose sinks take about half of the weight."""
    model = in_form(
        form,
        twin(
            Decoder(tiny(family, dtype, **FAMILIES[family], **overrides), family_of(family))
        ).model,
    )
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "sink" in name:
            parameter.copy_(draw(*parameter.shape, seed=seed) + (name.endswith("sink")))
    return model.to(dtype)


@cache
def subject(family: str, form: str) -> PreTrainedModel:
    """Shared by many tests, which leave it as it is."""
    return sinked(family, form)


def texts(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)


def padded(left: bool) -> dict[str, Tensor]:
    """Two texts of unequal length, with what a tokenizer gives for them."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, slice(0, 6) if left else slice(-6, None)] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": texts() * mask, "attention_mask": mask, "position_ids": positions}


SITUATIONS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "plain": lambda: {"input_ids": texts()},
    "left_padding": lambda: padded(left=True),
    "right_padding": lambda: padded(left=False),
    "packed": lambda: {
        "input_ids": texts(),
        "position_ids": torch.cat([torch.arange(7), torch.arange(9)])[None].expand(2, -1),
        "use_cache": False,  # transformers looks for packed texts only where there is no cache
    },
    "one_token": lambda: {"input_ids": texts()[:, :1]},
}
EACH = pytest.mark.parametrize("situation", SITUATIONS)


def logits(model: PreTrainedModel, implementation: str, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of every token that is not padding: (tokens, vocabulary)."""
    model.set_attn_implementation(implementation)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with torch.no_grad():
        return model(**inputs).logits[real]


def drift(after: Tensor, before: Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())


@EVERY
@BOTH
@EACH
def test_the_default_path_equals_eager(family: str, form: str, situation: str) -> None:
    model, inputs = subject(family, form), SITUATIONS[situation]()
    assert drift(logits(model, "sdpa", inputs), logits(model, "eager", inputs)) < 2e-5


@EVERY
@EACH
def test_neutral_sinks_equal_stock(family: str, situation: str) -> None:
    inputs = SITUATIONS[situation]()
    neutral = twin(Decoder(stock(family), family_of(family))).model
    expected = logits(stock(family), "eager", inputs)
    assert drift(logits(neutral, "sdpa", inputs), expected) < 2e-5
    assert drift(logits(subject(family, "logit"), "sdpa", inputs), expected) > 0.01


@EVERY
@torch.no_grad()
def test_a_padded_text_gives_what_it_gives_alone(family: str) -> None:
    model = subject(family, "key")
    inputs = padded(left=True)
    alone = logits(model, "sdpa", {"input_ids": inputs["input_ids"][:1, 6:]})
    assert drift(logits(model, "sdpa", inputs)[: LENGTH - 6], alone) < 2e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2"])
@torch.no_grad()
def test_sink_keys_are_the_prefix_they_were_read_from(family: str) -> None:
    """To the last digit of the float32 inside stock norms; a window would lose the real prefix."""
    model = tiny(family, torch.float64)
    model.set_attn_implementation("eager")  # stock sdpa drops the softcap of Gemma 2, or refuses it
    prefix = torch.tensor([1, 9])
    student = in_form("key", twin(Decoder(model, family_of(family))).model).double()
    read = prefix_of(Decoder(model, family_of(family)), prefix)
    before = model.base_model(prefix[None], position_ids=torch.arange(-N, 0)[None], use_cache=True)
    expected = model(led(texts(), prefix)).logits[:, N:]
    here = [sink.keys for sink in read.layers]
    for keys, start in ((here, N), ([c.keys[0] for c in before.past_key_values.layers], 0)):
        for layer, key, sink in zip(student.model.layers, keys, read.layers, strict=True):
            layer.self_attn.sink_key.copy_(key)
            layer.self_attn.sink_value.copy_(sink.values)
        positions = torch.arange(start, start + LENGTH)[None]
        given = student(texts(), position_ids=positions, use_cache=False).logits
        assert drift(given, expected) < 1e-5
    assert drift(model(texts()).logits, expected) > 0.01


# --- the attention function by itself ------------------------------------------------------------


def layer_with_sinks(form: str, heads: int, kv_heads: int, width: int = HEAD_DIM) -> Any:
    parameters = (
        {"sink": draw(heads, seed=5)}
        if form == "logit"
        else {
            "sink_key": draw(kv_heads, N, width, seed=5),
            "sink_value": draw(kv_heads, N, width, seed=6),
        }
    )
    return SimpleNamespace(is_causal=True, training=True, **parameters)


def formula(
    query: Tensor, key: Tensor, value: Tensor, sinks: dict[str, Tensor], allowed: Tensor
) -> Tensor:
    """Sink attention written down without any of the code under test."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
    if "sink" in sinks:
        extra = sinks["sink"][None, :, None, None].expand(*scores.shape[:3], 1)
        values = torch.zeros_like(value[:, :, :1])
    elif sinks:
        extra = query @ sinks["sink_key"].repeat_interleave(groups, 0).mT * query.shape[-1] ** -0.5
        values = sinks["sink_value"].repeat_interleave(groups, 0).expand(len(value), -1, -1, -1)
    else:
        extra, values = scores[..., :0], value[:, :, :0]
    return torch.cat([scores, extra], -1).softmax(-1) @ torch.cat([value, values], 2)


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
MASKS = {
    "causal": None,
    "window": CAUSAL.triu(-WINDOW),
    "padding": CAUSAL.repeat(2, 1, 1, 1).masked_fill(torch.arange(LENGTH) > 11, False),
}
SHAPES = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (3, 1)])


def attended(
    function: Callable[..., Any],
    module: Any,
    inputs: list[Tensor],
    mask: Tensor | None,
    **more: Any,
) -> Tensor:
    """The output (batch, heads, queries, head_dim)."""
    scaling = inputs[0].shape[-1] ** -0.5
    out: Tensor = function(module, *inputs, mask, scaling=scaling, **more)[0].transpose(1, 2)
    return out


def leaves(*tensors: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", ["logit", "key"])
@pytest.mark.parametrize("by_operator", [("cpu",), ()])  # a GPU has no operator for few keys
@SHAPES
def test_output_and_gradients_are_those_of_the_formula(
    mask: str,
    form: str,
    by_operator: tuple[str, ...],
    heads: int,
    kv_heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(modeling_absorb, "BY_OPERATOR", by_operator)
    module = layer_with_sinks(form, heads, kv_heads)
    names = [name for name in vars(module) if name.startswith("sink")]
    shapes = [(2, count, LENGTH, HEAD_DIM) for count in (heads, kv_heads, kv_heads)]
    inputs = leaves(*(draw(*shape, seed=seed) for seed, shape in enumerate(shapes)))
    sinks = dict(zip(names, leaves(*(getattr(module, name) for name in names)), strict=True))
    module.__dict__.update(sinks)
    allowed = CAUSAL if MASKS[mask] is None else MASKS[mask]
    expected = formula(*inputs, sinks, allowed)
    given = attended(sink_attention, module, inputs, MASKS[mask])
    weight = draw(*given.shape, seed=9)
    everything = [*inputs, *sinks.values()]
    right = torch.autograd.grad(expected, everything, weight)
    ours = torch.autograd.grad(given, everything, weight)
    assert drift(given, expected) < 1e-12
    assert max(drift(a, b) for a, b in zip(ours, right, strict=True)) < 1e-12


def errors(out: Tensor, expected: Tensor, inputs: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative errors, in norm, of the output and of the gradient of every input."""
    weight = draw(*out.shape, seed=9).to(out.device)
    given = torch.autograd.grad(out, inputs, weight.to(out.dtype))
    right = torch.autograd.grad(expected, exact, weight)
    pairs = zip((out, *given), (expected, *right), strict=True)
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


# An output that is rounded, rescaled and rounded again has the error of two roundings (√2 of one),
# and of a third where a key's output is added. Gradients inherit it through `dO · out`.
ALLOWED = 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["logit", "key"])
def test_errors_are_no_worse_than_those_of_stock_attention(dtype: torch.dtype, form: str) -> None:
    length, width = 128, 64
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    module = layer_with_sinks(form, 4, 2, width)
    rounded = [draw(2, heads, length, width, seed=heads).to(dtype) for heads in (4, 2, 2)]
    inputs, exact = leaves(*rounded, dtype=dtype), leaves(*rounded)
    stock_out = torch.nn.functional.scaled_dot_product_attention(
        *inputs, is_causal=True, enable_gqa=True
    )
    usual = errors(stock_out, formula(*exact, {}, allowed), inputs, exact)

    names = [name for name in vars(module) if name.startswith("sink")]
    ours = leaves(*(getattr(module, name) for name in names), dtype=torch.float32)
    module.__dict__.update(zip(names, ours, strict=True))
    exact_sinks = leaves(*ours)
    expected = formula(*exact, dict(zip(names, exact_sinks, strict=True)), allowed)
    out = attended(sink_attention, module, inputs, None)
    found = errors(out, expected, [*inputs, *ours], [*exact, *exact_sinks])
    # Stock attention has no sinks to compare: they may be as wrong as its worst gradient.
    limits = [*usual, *[max(usual)] * len(ours)]
    assert [e / limit for e, limit in zip(found, limits, strict=True) if e > ALLOWED * limit] == []


@pytest.mark.parametrize("function", [sink_attention, eager_attention])
@pytest.mark.parametrize("form", ["logit", "key"])
def test_a_row_without_keys_has_only_its_sinks(function: Any, form: str) -> None:
    module = layer_with_sinks(form, 4, 2)
    inputs = leaves(*(draw(2, heads, LENGTH, HEAD_DIM, seed=heads) for heads in (4, 2, 2)))
    mask = CAUSAL.repeat(2, 1, 1, 1)
    mask[0, :, :3] = False
    out = attended(function, module, inputs, mask)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), inputs))
    if form == "logit":
        assert not out[0, :, :3].any()
    else:
        scores = inputs[0] @ module.sink_key.repeat_interleave(2, 0).mT * HEAD_DIM**-0.5
        alone = scores.softmax(-1) @ module.sink_value.repeat_interleave(2, 0)
        assert drift(out[0, :, :3], alone[0, :, :3]) < 1e-6
    assert out[0, :, 3:].any()


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    module = layer_with_sinks("logit", 4, 2)
    inputs = [draw(2, heads, LENGTH, HEAD_DIM, seed=heads) for heads in (4, 2, 2)]
    torch.manual_seed(0)
    draws = [attended(sink_attention, module, inputs, None, dropout=0.3) for _ in range(400)]
    whole = attended(sink_attention, module, inputs, None)
    assert drift(draws[0], draws[1]) > 0.1
    assert drift(torch.stack(draws).mean(0), whole) < 0.1
    module.training = False
    assert drift(attended(eager_attention, module, inputs, None, dropout=0.3), whole) < 1e-6


def test_an_evaluated_model_drops_nothing() -> None:
    inputs = {"input_ids": texts()}
    dropping = sinked("llama", attention_dropout=0.5)
    assert torch.equal(
        logits(dropping, "sdpa", inputs), logits(subject("llama", "logit"), "sdpa", inputs)
    )
    assert not torch.equal(dropping.train()(texts()).logits, dropping(texts()).logits)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("form", ["logit", "key"])
def test_every_operator_finds_its_arguments(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the device: only names, shapes and order, which torch checks on `meta` tensors."""
    # On which there is no autocast.
    monkeypatch.setattr(modeling_absorb, "_without_autocast", lambda _: nullcontext())
    inputs = [
        torch.empty(2, 40, 4, 64, device="meta", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    ]
    module = layer_with_sinks(form, 4, 4, 64)
    sinks = [getattr(module, sink).to("meta") for sink in vars(module) if "sink" in sink]
    tensors = [tensor.requires_grad_() for tensor in (*inputs, *sinks)]
    out = WithSinks.apply(OPERATORS[name], How(scale=0.125), *inputs, None, *sinks)
    assert out.shape == inputs[0].shape
    out.backward(torch.empty_like(out))
    assert all(t.grad.shape == t.shape for t in tensors)


@EVERY
def test_sinks_and_scales_outlive_a_change_of_forwards(family: str) -> None:
    """As nn.DataParallel changes them in its replicas, and kernels from the Hub in a model."""
    model = sinked(family)
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):
            parameter.data.copy_(draw(*parameter.shape).exp())
    expected = model(texts()).logits
    for module in model.modules():
        module.forward = MethodType(type(module).forward, module)
    assert torch.equal(model(texts()).logits, expected)


@EVERY
def test_no_engine_takes_a_changed_module_for_a_stock_one(family: str) -> None:
    original = {type(module).__name__ for module in stock(family).modules()}
    kernels = {
        getattr(type(module), "kernel_layer_name", None) for module in stock(family).modules()
    }
    changed = [
        m
        for m in subject(family, "logit").modules()
        if any("scale" in n or n == "sink" for n in m._parameters)
    ]
    assert changed
    for module in changed:
        assert type(module).__name__ not in original
        assert not type(module).__name__.endswith("RMSNorm")
        assert type(module).kernel_layer_name not in kernels


def test_attention_without_gradients_takes_no_detour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(modeling_absorb, "WithSinks")
    assert logits(subject("llama", "key"), "sdpa", {"input_ids": texts()}).isfinite().all()


# --- a model at work -----------------------------------------------------------------------------


def generated(model: PreTrainedModel, **settings: Any) -> Tensor:
    model.set_attn_implementation(settings.pop("implementation", "sdpa"))
    inputs = padded(left=True)
    inputs.pop("position_ids")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **settings}
    settings.setdefault("eos_token_id", -1)
    return model.generate(**inputs, **settings)


@EVERY
@pytest.mark.parametrize("form", ["logit", "key"])
def test_caches_change_nothing(family: str, form: str) -> None:
    model = subject(family, form)
    expected = generated(model, implementation="eager", use_cache=False)
    assert torch.equal(generated(model), expected)
    assert torch.equal(generated(model, cache_implementation="static"), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_beams_and_assistants_change_nothing(family: str) -> None:
    model = subject(family, "logit")
    beams = generated(model, num_beams=3)
    assert torch.equal(generated(model, num_beams=3, implementation="eager"), beams)
    one = {"input_ids": texts()[:1], "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    assistant = twin(Decoder(stock("llama"), family_of("llama"))).model
    model.set_attn_implementation("sdpa")
    assert torch.equal(model.generate(**one, assistant_model=assistant), model.generate(**one))


@EVERY
@torch.no_grad()
def test_a_text_may_be_read_in_chunks(family: str) -> None:
    """Queries that are fewer than the keys, with a dynamic and with a static cache."""
    model = subject(family, "logit")
    whole = logits(model, "sdpa", {"input_ids": texts()}).view(2, LENGTH, -1)
    static = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
    for cached in (None, static):
        first = model(texts()[:, :9], past_key_values=cached, use_cache=True)
        second = model(texts()[:, 9:], past_key_values=first.past_key_values)
        assert drift(torch.cat([first.logits, second.logits], 1), whole) < 2e-5


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@EVERY
@BOTH
def test_training_gives_the_gradients_of_eager(family: str, form: str) -> None:
    model = sinked(family, form)
    inputs = padded(left=False)
    ours = gradients(model, inputs)
    model.set_attn_implementation("eager")
    theirs = gradients(model, inputs)
    assert ours.keys() == theirs.keys()
    assert any(name.endswith(("sink", "sink_value")) for name in ours)
    far = {name: drift(ours[name], theirs[name]) for name in ours if theirs[name].any()}
    assert {name: value for name, value in far.items() if value > 1e-3} == {}


@BOTH
def test_checkpointed_layers_give_the_same_gradients(form: str) -> None:
    model = sinked("llama", form).train()
    plain = gradients(model, {"input_ids": texts()})
    model.gradient_checkpointing_enable()
    again = gradients(model, {"input_ids": texts()})
    assert max(drift(again[name], plain[name]) for name in plain) < 1e-5


@pytest.mark.parametrize(
    ("backend", "form"),
    [
        ("aot_eager", "key"),
        ("inductor", "logit"),  # it begins as aot_eager does
    ],
)
@pytest.mark.slow
def test_a_model_compiles_without_a_break(backend: str, form: str) -> None:
    torch.compiler.reset()
    model = sinked("llama", form, num_hidden_layers=1)
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    plain = gradients(model, {"input_ids": texts()})
    assert drift(compiled(texts()).logits, model(texts()).logits) < 1e-5
    ours = gradients(compiled, {"input_ids": texts()})
    assert (
        max(drift(ours[f"_orig_mod.{name}"], plain[name]) for name in plain if plain[name].any())
        < 1e-3
    )
    with torch.no_grad():
        assert drift(compiled(texts()).logits, model(texts()).logits) < 1e-5


def test_a_model_exports() -> None:
    model = subject("llama", "logit")
    expected = logits(model, "sdpa", {"input_ids": texts()})
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"input_ids": texts(), "use_cache": False}, strict=False
        )
        given = program.module()(input_ids=texts(), use_cache=False).logits
    assert drift(given.flatten(0, 1), expected) < 1e-5


@pytest.mark.parametrize("form", ["logit", "key"])
@torch.no_grad()
def test_offloaded_layers_give_the_same(form: str, tmp_path: Path) -> None:
    model = sinked("gemma2", form)  # has input and output scales
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            parameter.mul_(1.5)
    expected = model(texts()).logits
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "disk"}
    places |= {"model.rotary_emb": "cpu"}
    places |= {f"model.layers.{layer}": "disk" for layer in range(LAYERS)}
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.norm.input_scale.is_meta
    assert torch.equal(loaded(texts()).logits, expected)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model(texts()).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@BOTH
@torch.no_grad()
def test_half_precision_keeps_its_sinks_in_float32(
    dtype: torch.dtype, form: str, tmp_path: Path
) -> None:
    model = sinked("llama", form)
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=dtype)
    sinks = {name: p.dtype for name, p in half.named_parameters() if "sink" in name}
    assert set(sinks.values()) == {torch.float32}
    assert half.model.layers[0].mlp.down_proj.weight.dtype == dtype
    full = model(texts()).logits
    assert drift(half(texts()).logits.float(), full) < 0.05
    with torch.autocast("cpu", dtype):
        assert drift(model(texts()).logits.float(), full) < 0.05


# --- what would drop the sinks -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flash_attention_2", "paged|sdpa", "somebody/attention", "other"])
def test_attention_that_would_drop_the_sinks_is_refused(name: str) -> None:
    model = sinked("llama")
    with pytest.raises(ValueError, match=r"would drop the sinks .* 'sdpa'"):
        model.set_attn_implementation(name)
    model.config._attn_implementation_internal = "sdpa"  # as engines do it
    with pytest.raises(ValueError, match=r"would drop the sinks .* `absorb export`"):
        model(texts())


def test_flex_attention_is_refused_where_it_cannot_run() -> None:
    inputs = [draw(2, heads, LENGTH, HEAD_DIM) for heads in (4, 2, 2)]
    with pytest.raises(ValueError, match="load the model with attn_implementation 'sdpa'"):
        attended(flex_attention, layer_with_sinks("logit", 4, 2), inputs, None)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("form", ["logit", "key"])
@torch.no_grad()
def test_flex_attention_equals_eager(
    form: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not compiled, torch runs it on CPU too, but without gradients."""

    monkeypatch.setattr(modeling_absorb, "compile_friendly_flex_attention", torch_flex_attention)
    monkeypatch.setattr(modeling_absorb, "FLEX_DEVICES", ("cpu",))
    module = layer_with_sinks(form, 4, 2)
    inputs = [draw(2, heads, LENGTH, HEAD_DIM, seed=heads).float() for heads in (4, 2, 2)]
    blocks = create_block_mask(lambda b, h, q, k: q >= k, 2, None, LENGTH, LENGTH, "cpu")
    flexed, eager = (
        attended(function, module, inputs, mask, softcap=softcap)
        for function, mask in ((flex_attention, blocks), (eager_attention, None))
    )
    assert drift(flexed, eager) < 1e-5


@EVERY
@torch.no_grad()
def test_a_kernel_that_takes_sinks_gets_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every architecture passes what we hand to its attention layer on to the kernel."""
    model = sinked(family)
    expected = logits(model, "eager", {"input_ids": texts()})

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: None, **more: Any) -> Tensor:
        module = SimpleNamespace(sink=more["s_aux"], is_causal=True, training=False)
        heads_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        window = more["sliding_window"] or LENGTH
        allowed = CAUSAL.triu(1 - window)
        options = {"scaling": more["softmax_scale"], "softcap": more["softcap"]}
        return eager_attention(module, *heads_first, allowed, **options)[0]

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    monkeypatch.setattr(modeling_absorb, "KERNELS", {"flash_attention_3"})
    model.config._attn_implementation_internal = "flash_attention_3"
    assert drift(model(texts()).logits.flatten(0, 1), expected) < 2e-5
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient for sinks"):
        model(texts())


def test_eager_attention_gives_weights() -> None:
    model = subject("llama", "logit")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(texts(), output_attentions=True).attentions
    assert weights[0].shape == (2, HEADS, LENGTH, LENGTH)
    assert weights[0].sum(-1).max() < 1
    assert KV_HEADS < HEADS


def test_a_configuration_may_ask_for_weights(tmp_path: Path) -> None:
    model = sinked("llama")
    with pytest.raises(ValueError, match="'eager'"):
        model.config.output_attentions = True
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(model(texts()).attentions) == LAYERS
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert len(again(texts()).attentions) == LAYERS


def test_what_a_checkpoint_lacks_does_nothing() -> None:
    """Not what happened to be in memory."""
    model = sinked("gemma2", "mixed")
    added = {name for name in model.state_dict() if name.rpartition(".")[2] in NEUTRAL}
    kept = {name: value for name, value in model.state_dict().items() if name not in added}
    empty = torch.full_like
    with patch.object(torch, "empty_like", lambda *args, **more: empty(*args, 7.0, **more)):
        loaded = type(model).from_pretrained(None, config=model.config, state_dict=kept)
    for name in added:
        assert (loaded.get_parameter(name) == NEUTRAL[name.rpartition(".")[2]]).all(), name
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    loaded.model.norm.input_scale.data.fill_(2.0)
    loaded.init_weights()  # as some trainers do
    assert (loaded.model.norm.input_scale == 2.0).all()
