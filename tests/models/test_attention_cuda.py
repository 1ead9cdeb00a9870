"""Sinks beside every CUDA operator, on the GPU: pytest tests/models/test_attention_cuda.py

With TRITON_INTERPRET=1 what is said of our own kernels alone can be tested without one.
"""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from absorb.models import modeling_absorb
from absorb.models.modeling_absorb import (
    cuda_operator,
    eager_attention,
    flex_attention,
    sink_attention,
)
from tests.models.test_attention import (
    ALLOWED,
    attended,
    draw,
    drift,
    errors,
    formula,
    gradients,
    layer_with_sinks,
    leaves,
    padded,
    sinked,
    texts,
)

HERE = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and modeling_absorb.triton is not None
cuda = pytest.mark.skipif(not HERE, reason="needs a CUDA GPU")
pytestmark = pytest.mark.skipif(not HERE and not INTERPRETED, reason="needs a CUDA GPU")
DEVICE = "cuda" if HERE else "cpu"

STOCK = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LENGTH = 131  # not a multiple of anything: some operators pad their log-sum-exp
FORMS = pytest.mark.parametrize("form", ["logit", "key"])
BATCH = 2


def masks(length: int) -> dict[str, Tensor]:
    causal = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[None, None]
    late = torch.arange(length, device="cuda") > length - 20
    return {
        "window": causal.triu(-31),
        "padding": causal.repeat(BATCH, 1, 1, 1).masked_fill(late, False),
    }


def rounded(heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value as models give them: heads beside head_dim in memory."""
    return [
        draw(BATCH, LENGTH, count, width, seed=seed).to(DEVICE, dtype).transpose(1, 2)
        for seed, count in enumerate((heads, kv_heads, kv_heads))
    ]


def on_cuda(form: str, heads: int, kv_heads: int, width: int) -> tuple[Any, dict[str, Tensor]]:
    """A layer, and its sinks in float32."""
    module = layer_with_sinks(form, heads, kv_heads, width)
    sinks = {
        name: tensor.to(DEVICE, torch.float32).requires_grad_()
        for name, tensor in vars(module).items()
        if name.startswith("sink")
    }
    module.__dict__.update(sinks)
    return module, sinks


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_absorb, "cuda_operator", lambda *_: name)


@cuda
@pytest.mark.parametrize(
    ("name", "dtype", "mask"),
    [
        ("cudnn", torch.bfloat16, None),
        ("cudnn", torch.float16, None),
        ("cudnn", torch.bfloat16, "padding"),
        ("flash", torch.bfloat16, None),
        ("flash", torch.float16, None),
        ("efficient", torch.bfloat16, None),
        ("efficient", torch.float16, "padding"),
        ("efficient", torch.float32, None),
        ("efficient", torch.float32, "window"),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("much", [0, 2**40])  # with kernels of our own, and with torch's
@FORMS
def test_errors_are_no_worse_than_those_of_the_same_operator_without_sinks(
    name: str,
    dtype: torch.dtype,
    mask: str | None,
    heads: int,
    kv_heads: int,
    width: int,
    much: int,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(name, monkeypatch)
    monkeypatch.setattr(modeling_absorb, "FUSED_FROM", {1: much, 2: much})
    given = rounded(heads, kv_heads, width, dtype)
    hidden = None if mask is None else masks(LENGTH)[mask]
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device="cuda").tril()
    allowed = allowed if hidden is None else hidden
    inputs, exact = leaves(*given, dtype=dtype), leaves(*given)
    repeated = [inputs[0], *(t.repeat_interleave(heads // kv_heads, 1) for t in inputs[1:])]
    with sdpa_kernel(STOCK[name]):
        stock = torch.nn.functional.scaled_dot_product_attention(
            *repeated, attn_mask=hidden, is_causal=hidden is None
        )
    usual = errors(stock, formula(*exact, {}, allowed), inputs, exact)

    module, sinks = on_cuda(form, heads, kv_heads, width)
    exact_sinks = dict(zip(sinks, leaves(*sinks.values()), strict=True))
    expected = formula(*exact, exact_sinks, allowed)
    out = attended(sink_attention, module, inputs, hidden)
    found = errors(out, expected, [*inputs, *sinks.values()], [*exact, *exact_sinks.values()])
    limits = [*usual, *[max(usual)] * len(sinks)]
    assert [(e, limit) for e, limit in zip(found, limits, strict=True) if e > ALLOWED * limit] == []


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fastest_operator_that_fits_is_chosen(dtype: torch.dtype) -> None:
    query, mask = rounded(4, 4, 64, dtype)[0], masks(LENGTH)["padding"]
    if dtype == torch.float32:
        assert cuda_operator(query, None, 0.0) == "efficient"
        return
    first = "cudnn" if torch.cuda.get_device_capability()[0] in (9, 10) else None
    assert cuda_operator(query, None, 0.0) == (first or "flash")
    assert cuda_operator(query, mask, 0.0) == (first or "efficient")
    assert cuda_operator(query, mask, 0.1) == "efficient"
    assert cuda_operator(query[:, :, :1], None, 0.0) == "flash"


@cuda
@pytest.mark.parametrize("name", STOCK)
@FORMS
def test_one_query_reads_a_cache(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(name, monkeypatch)
    query, key, value = rounded(8, 2, 64, torch.bfloat16)
    module, sinks = on_cuda(form, 8, 2, 64)
    out = attended(sink_attention, module, [query[:, :, -1:], key, value], None)
    everything = torch.ones(1, LENGTH, dtype=torch.bool, device="cuda")
    exact = [tensor.double() for tensor in (query[:, :, -1:], key, value)]
    wide = {name: tensor.double() for name, tensor in sinks.items()}
    assert drift(out.double(), formula(*exact, wide, everything)) < 0.01


@cuda
@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_a_row_without_keys_has_only_its_sinks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(name, monkeypatch)
    inputs = leaves(*rounded(4, 4, 64, torch.bfloat16), dtype=torch.bfloat16)
    module, _ = on_cuda("logit", 4, 4, 64)
    mask = masks(LENGTH)["padding"]
    mask[0, :, :3] = False
    out = attended(sink_attention, module, inputs, mask)
    assert not out[0, :, :3].any()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), inputs))


@cuda
def test_the_first_read_into_a_static_cache_sees_no_empty_keys() -> None:
    query, key, value = rounded(4, 4, 64, torch.bfloat16)
    module, _ = on_cuda("logit", 4, 4, 64)
    short = query[:, :, :50]
    cached = attended(sink_attention, module, [short, key, value], None)
    alone = attended(sink_attention, module, [short, key[:, :, :50], value[:, :, :50]], None)
    assert torch.equal(cached, alone)


@cuda
@pytest.mark.parametrize("name", ["flash", "efficient"])
@FORMS
def test_gradients_are_those_of_what_dropout_left(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(name, monkeypatch)
    dtype = torch.float16 if name == "flash" else torch.float32
    inputs = leaves(*rounded(4, 4, 64, dtype), dtype=dtype)
    module, sinks = on_cuda(form, 4, 4, 64)

    def dropped(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attended(sink_attention, module, inputs, None, dropout=0.2)

    whole = attended(sink_attention, module, inputs, None)
    with torch.no_grad():
        mean = torch.stack([dropped(seed).float() for seed in range(400)]).mean(0)
    assert drift(dropped(0).float(), whole.float()) > 0.1
    assert drift(mean, whole.float()) < 0.1
    # The same draw a step to either side: a slope that the gradients must explain.
    everything, step = [*inputs, *sinks.values()], 0.05
    weight = draw(*whole.shape, seed=9).to("cuda", dtype)
    found = torch.autograd.grad(dropped(0), everything, weight)
    for tensor, gradient in zip(everything, found, strict=True):
        direction = gradient.float() / gradient.float().norm() * tensor.float().norm() * step
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                before = tensor.clone()
                tensor.add_((sign * direction).to(tensor.dtype))
                ends.append(float((dropped(0).double() * weight.double()).sum()))
                tensor.copy_(before)
        slope = float((gradient.double() * direction.double()).sum()) * 2
        assert ends[0] - ends[1] == pytest.approx(slope, rel=0.1)


@cuda
@pytest.mark.parametrize("softcap", [None, 1.5])
@FORMS
def test_flex_attention_equals_eager(form: str, softcap: float | None) -> None:
    inputs = leaves(*rounded(4, 2, 64, torch.float32), dtype=torch.float32)
    module, sinks = on_cuda(form, 4, 2, 64)
    mask_function = modeling_absorb.ALL_MASK_ATTENTION_FUNCTIONS["absorb_flex"]
    blocks = mask_function(batch_size=BATCH, q_length=LENGTH, kv_length=LENGTH, device="cuda")
    flexed = attended(flex_attention, module, inputs, blocks, softcap=softcap)
    plain = attended(eager_attention, module, inputs, None, softcap=softcap)
    assert drift(flexed, plain) < 2e-3
    everything = [*inputs, *sinks.values()]
    weight = draw(*plain.shape, seed=9).to(plain)
    pairs = zip(
        *(torch.autograd.grad(out, everything, weight) for out in (flexed, plain)), strict=True
    )
    assert max(drift(a, b) for a, b in pairs) < 1e-2


@cuda
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "qwen3"])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@FORMS
@torch.no_grad()
def test_models_agree_with_eager(family: str, implementation: str, form: str) -> None:
    torch.compiler.reset()  # flex_attention is compiled anew for each mask, up to a limit
    # flex_attention takes no smaller heads.
    model = sinked(family, form, head_dim=16).to("cuda")
    for inputs in (padded(left=True), padded(left=False), {"input_ids": texts()}):
        inputs = {name: tensor.to("cuda") for name, tensor in inputs.items()}
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        model.set_attn_implementation("eager")
        expected = model(**inputs).logits[real]
        model.set_attn_implementation(implementation)
        assert drift(model(**inputs).logits[real], expected) < 5e-3


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@FORMS
def test_models_compile_without_a_break(dtype: torch.dtype, form: str) -> None:
    torch.compiler.reset()
    model = sinked("llama", form).to("cuda", dtype)
    inputs = {"input_ids": texts().cuda()}
    plain = gradients(model, inputs)
    compiled: Any = torch.compile(model, fullgraph=True)
    found = gradients(compiled, inputs)
    near = 1e-2 if dtype == torch.float32 else 0.1
    assert (
        max(
            float((found[f"_orig_mod.{n}"] - g).norm() / g.norm())
            for n, g in plain.items()
            if g.any()
        )
        < near
    )


@cuda
@torch.no_grad()
def test_a_compiled_static_cache_generates_the_same() -> None:
    model = sinked("llama").to("cuda")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    tokens = texts().cuda()
    plain = model.generate(tokens, **settings)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **settings), plain)


# --- our own kernels -----------------------------------------------------------------------------


def attended_by(
    fused: bool, inputs: list[Tensor], module: Any, sinks: list[Tensor], patch: Any
) -> list[Tensor]:
    """Output and all gradients, by our kernels or by torch's."""
    patch.setattr(modeling_absorb, "fusible", lambda *_: fused)
    out = attended(sink_attention, module, inputs, None)
    weight = draw(*out.shape, seed=9).to(out)
    return [out, *torch.autograd.grad(out, [*inputs, *sinks], weight)]


def laid_out(
    dense: bool, dtype: torch.dtype, heads: int, rows: int, width: int, seed: int
) -> Tensor:
    """As models lay tensors out, or cut from a larger one."""
    if dense:
        return draw(BATCH, rows, heads, width, seed=seed).to(DEVICE, dtype).transpose(1, 2)
    larger = draw(BATCH, heads, rows + 3, width + 8, seed=seed).to(DEVICE, dtype)
    return larger[:, :, 1 : rows + 1, :width]


NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("count", [0, 1, 2, 3])  # keys of sinks in every KV head; 0: logits
@pytest.mark.parametrize("width", [64, 80, 128] if HERE else [24])
@pytest.mark.parametrize("rows", [1, 19, 131] if HERE else [1, 19, 70])
@pytest.mark.parametrize("dense", [True, False])
def test_our_kernels_give_what_torch_gives(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    count: int,
    width: int,
    rows: int,
    dense: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sinks = {"sink": draw(heads, seed=5)}
    if count:
        names = ("sink_key", "sink_value")
        sinks = {n: draw(kv_heads, count, width, seed=len(n)) for n in names}
    sinks = {n: t.to(DEVICE, torch.float32).requires_grad_() for n, t in sinks.items()}
    module = SimpleNamespace(is_causal=True, training=True, **sinks)
    read = max(rows, 19)
    shapes = ((heads, rows, width), (kv_heads, read, width), (kv_heads, read, width))
    given = [laid_out(dense, dtype, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    inputs = [tensor.requires_grad_() for tensor in given]
    ours, torchs = (
        attended_by(fused, inputs, module, list(sinks.values()), monkeypatch)
        for fused in (True, False)
    )
    far = [
        float((a - b).double().norm() / b.double().norm())
        for a, b in zip(ours, torchs, strict=True)
    ]
    assert max(far) < NEAR[dtype]
