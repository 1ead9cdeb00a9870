"""Causal language models whose outliers are parameters.

This file is written by absorb beside every checkpoint, so it stands alone: it needs torch and
transformers, nothing else. It defines no architecture. An absorbed model is the stock transformers
model named in config.json, with parameters mixed in at the places that config.absorb names:

    sink          one logit per query head, in the softmax denominator of an attention layer
    sink_key      keys (kv_heads, n, head_dim) that every query also attends to, already rotated to
                  positions -n .. -1 where there is RoPE, of the shape config.absorb["sink_shape"]
    sink_value    the values of these keys, in the same layers
    input_scale   one factor per channel, on what a module reads from the residual stream
    output_scale  one factor per channel, on what a module writes to it
    bias          a bias for a linear layer that has none in the stock model

A layer has a `sink`, or a `sink_key` with its `sink_value`. Neither counts as a token: positions,
caches and masks are those of the text alone, and no sliding window leaves a sink behind.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    initialization,
    modeling_flash_attention_utils,
)
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch where there is CUDA
    triton = None

PREFIX = "Absorb"

# What each parameter is when it does nothing. A sink far below every logit takes no weight: with
# large biases on queries and keys logits fall below -1,000, and -inf has no gradient. No key does
# nothing: whoever asks for the form `key` must say which.
NEUTRAL = {
    "sink": -10_000.0,
    "sink_key": 0.0,
    "sink_value": 0.0,
    "input_scale": 1.0,
    "output_scale": 1.0,
    "bias": 0.0,
}
_ADDED = NEUTRAL.keys() - {"bias"}  # what no stock module has


# --- what a sink does to attention ---------------------------------------------------------------


def _sinks(
    module: Any, query: Tensor, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits (batch or 1, heads, queries or 1, n), and values (1, heads, n, head_dim) if any.

    query is (batch, heads, queries, head_dim), or all query heads of a KV head laid out as queries.
    """
    if hasattr(module, "sink"):
        return module.sink.view(1, query.shape[1], -1, 1), None
    groups = query.shape[1] // len(module.sink_key)
    key, value = (
        part.repeat_interleave(groups, 0)[None] for part in (module.sink_key, module.sink_value)
    )
    wide = torch.promote_types(query.dtype, key.dtype)
    with torch.autocast(query.device.type, enabled=False):  # stock operators sum in float32 as well
        logits = query.to(wide) @ key.to(wide).mT * scaling
    return (logits if softcap is None else softcap * (logits / softcap).tanh()), value


def _together(logits: Tensor) -> Tensor:
    """One logit (batch or 1, heads, queries or 1) as heavy as all n sinks."""
    return logits[..., 0] if logits.shape[-1] == 1 else logits.logsumexp(-1)


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in which a head may also attend to sinks. All other paths are tested against it.

    query is (batch, heads, queries, head_dim), key and value are (batch, kv_heads, keys, head_dim).
    Gives the output (batch, queries, heads, head_dim) and weights (batch, heads, queries, keys)
    that sum to less than one: the rest went to the sinks.
    """
    key, value, causal = _causal(module, query, key, value, attention_mask, is_causal)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        attention_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attention_mask is not None:
        scores = scores + _additive(attention_mask, scores.dtype)
    logits, sink_value = _sinks(module, query, scaling, softcap)
    logits = logits.to(scores.dtype).expand(*scores.shape[:-1], -1)
    weights = torch.cat([scores, logits], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
    sink_weights, weights = weights[..., key.shape[2] :], weights[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, dropout, module.training)
    out = weights @ value
    if sink_value is not None:
        out = out + sink_weights @ sink_value.to(out.dtype)
    return out.transpose(1, 2).contiguous(), weights


def _causal(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: Any
) -> tuple[Tensor, Tensor, bool]:
    """Whether a query sees only the keys up to its own; the keys and values that any query sees."""
    length = query.shape[2]
    # In this order: a compiler with dynamic shapes cannot take `length > 1` for a bool.
    causal = length > 1 and mask is None and (module.is_causal if is_causal is None else is_causal)
    if causal and key.shape[2] > length:
        # The first read into a static cache: the rest of it is empty.
        key, value = key[:, :, :length], value[:, :, :length]
    return key, value, bool(causal)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to the logits, its rows aligned as CUDA operators want them."""
    if mask.dtype == torch.bool:
        # Not -inf: a row without a single key (padding) must give zeros and not NaN. Nor the least
        # number there is: operators that work in base 2 multiply it by 1.44.
        floor = torch.full((), torch.finfo(dtype).min / 4, dtype=dtype, device=mask.device)
        mask = torch.where(mask, torch.zeros_like(floor), floor)
    mask = mask.to(dtype)
    if mask.device.type == "cuda" and mask.shape[-1] % 16:
        mask = nn.functional.pad(mask, (0, -mask.shape[-1] % 16))[..., : mask.shape[-1]]
    return mask


# --- the operators of stock attention ------------------------------------------------------------

_aten: Any = torch.ops.aten


class _How(NamedTuple):
    dropout: float
    causal: bool
    scale: float


class _Given(NamedTuple):
    """What an operator gives: seed and offset are those of its dropout."""

    out: Tensor
    lse: Tensor
    seed: Tensor | None = None
    offset: Tensor | None = None


def _cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: _How) -> _Given:
    return _Given(
        *_aten._scaled_dot_product_flash_attention_for_cpu.default(
            query, key, value, how.dropout, how.causal, attn_mask=mask, scale=how.scale
        )
    )


def _cpu_backward(gradient: Tensor, inputs: Sequence[Any], given: _Given, how: _How) -> Any:
    query, key, value, mask = inputs
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        gradient, query, key, value, *given[:2], how.dropout, how.causal, attn_mask=mask,
        scale=how.scale,
    )  # fmt: skip


def _cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: _How) -> _Given:
    out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention.default(
        query, key, value, mask, True, how.dropout, how.causal, scale=how.scale
    )
    return _Given(out, lse, seed, offset)


def _cudnn_backward(gradient: Tensor, inputs: Sequence[Any], given: _Given, how: _How) -> Any:
    query, key, value, mask = inputs
    return _aten._scaled_dot_product_cudnn_attention_backward.default(
        gradient, query, key, value, *given, mask, None, None, query.shape[2], key.shape[2],
        how.dropout, how.causal, scale=how.scale,
    )  # fmt: skip


def _flash(query: Tensor, key: Tensor, value: Tensor, _: Tensor | None, how: _How) -> _Given:
    out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_flash_attention.default(
        query, key, value, how.dropout, how.causal, scale=how.scale
    )
    return _Given(out, lse, seed, offset)


def _flash_backward(gradient: Tensor, inputs: Sequence[Any], given: _Given, how: _How) -> Any:
    query, key, value, _ = inputs
    return _aten._scaled_dot_product_flash_attention_backward.default(
        gradient, query, key, value, *given[:2], None, None, query.shape[2], key.shape[2],
        how.dropout, how.causal, *given[2:], scale=how.scale,
    )  # fmt: skip


def _efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: _How) -> _Given:
    return _Given(
        *_aten._scaled_dot_product_efficient_attention.default(
            query, key, value, mask, True, how.dropout, how.causal, scale=how.scale
        )
    )


def _efficient_backward(gradient: Tensor, inputs: Sequence[Any], given: _Given, how: _How) -> Any:
    query, key, value, mask = inputs
    # Nobody trains a mask: its gradient, the last, is not asked for.
    return _aten._scaled_dot_product_efficient_attention_backward.default(
        gradient, query, key, value, mask, *given, how.dropout, [True, True, True, False],
        how.causal, scale=how.scale,
    )[:3]  # fmt: skip


@dataclass(frozen=True)
class _Operator:
    """One of the operators behind scaled_dot_product_attention."""

    forward: Callable[..., _Given]
    backward: Callable[..., Any]
    grouped: bool  # one mask and one KV head may serve several query heads
    rereads: bool  # but then it reads keys and values once for each of them


_CPU = _Operator(_cpu, _cpu_backward, grouped=True, rereads=True)
_CUDNN = _Operator(_cudnn, _cudnn_backward, grouped=True, rereads=False)
_FLASH = _Operator(_flash, _flash_backward, grouped=True, rereads=False)
_EFFICIENT = _Operator(_efficient, _efficient_backward, grouped=False, rereads=True)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@cache
def _generation() -> int:
    """Of the GPU: 8 is Ampere, 9 is Hopper."""
    return torch.cuda.get_device_capability()[0]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _enabled(name: str) -> bool:
    """Whether the user lets stock attention use an operator."""
    return bool(getattr(torch.backends.cuda, f"{name}_sdp_enabled")())


def _cuda_operator(query: Tensor, mask: Tensor | None, dropout: float) -> _Operator | None:
    """The operator that stock attention would use, or a faster one of those it might."""
    # Not torch.backends.cuda.can_use_*: a compiler cannot trace their argument.
    generation, width = _generation(), query.shape[-1]
    full = query.dtype == torch.float32
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and width % 8 == 0 and generation >= 8:
        # On these, cuDNN is far ahead of flash on many queries. The numbers mean others on ROCm.
        ahead = generation in (9, 10) and torch.version.hip is None and query.shape[2] > 1
        if ahead and width <= 128 and not dropout and _enabled("cudnn"):
            return _CUDNN
        if mask is None and width <= 256 and _enabled("flash"):
            return _FLASH
    halved = half and (generation >= 8 or query.dtype == torch.float16)
    fits = (full and width % 4 == 0) or (halved and width % 8 == 0)
    return _EFFICIENT if fits and _enabled("mem_efficient") else None


def _choose(query: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> _Operator | None:
    if query.shape[-1] != value.shape[-1]:
        return None
    if query.device.type == "cpu" and not dropout:
        return _CPU
    return _cuda_operator(query, mask, dropout) if query.device.type == "cuda" else None


# --- two passes over the output, each one kernel on a GPU ----------------------------------------


# Launching a kernel of ours takes as long as six of torch's: it pays where there is much to read.
_MUCH = 2**18


def _fusible(out: Tensor) -> bool:
    """Whether a kernel of ours may read a tensor, and should. A compiler makes its own kernels."""
    here = triton is not None and out.device.type == "cuda" and out.stride(-1) == 1
    return here and out.numel() > _MUCH and not torch.compiler.is_compiling()


def _rescale(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """out (batch, heads, queries, width) times sigmoid(lse - sinks), which may overwrite out.

    lse is (batch, heads, queries), and sinks broadcast against it.
    """
    if _fusible(out):
        _launch(_rescale_rows, out, out, lse, sinks.expand_as(lse))
        return out
    factor = torch.sigmoid(lse - sinks)[..., None]
    if not torch.compiler.is_compiling():
        # In place, so that in half precision a factor in float32 costs nothing more.
        return out.mul_(factor)
    # A tensor of its own: to one that was overwritten, or cast to the dtype it had, the compiler of
    # torch 2.11 gives no gradient, and says nothing.
    rescaled = out * factor
    return rescaled if rescaled.dtype == out.dtype else rescaled.to(out.dtype)


def _row_products(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of left * right over the last dimension, in dtype."""
    if _fusible(left) and _fusible(right):
        sums = left.new_empty(left.shape[:-1], dtype=dtype)
        _launch(_multiply_rows, left, right, sums, sums)
        return sums
    # A product of bfloat16 is as exact as its factors, but one of float16 may underflow.
    product = left * (right.to(dtype) if right.dtype == torch.float16 else right)
    return product.sum(-1, dtype=dtype)


def _launch(kernel: Any, *tensors: Tensor) -> None:
    """Run a kernel over two wide tensors (batch, heads, rows, width) and two of their rows."""
    batch, heads, rows, width = tensors[0].shape
    here = tensors[0].get_device()
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    block = 64 if rows >= 64 else 16
    grid = ((rows + block - 1) // block, batch * heads)
    # Entering the device takes as long as the launch, and it is nearly always the current one.
    with torch.cuda.device(here) if here != torch.cuda.current_device() else nullcontext():
        kernel[grid](*tensors, *strides, heads, rows, width, block, triton.next_power_of_2(width))


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _tile(pointer, sb, sh, sr, heads, block: tl.constexpr):  # type: ignore[no-untyped-def]
        """Pointers to the rows of this program: (block,)."""
        both = tl.program_id(1).to(tl.int64)
        rows = tl.program_id(0) * block + tl.arange(0, block)
        return pointer + (both // heads) * sb + (both % heads) * sh + rows * sr

    @triton.jit  # type: ignore[untyped-decorator]
    def _rescale_rows(  # type: ignore[no-untyped-def]
        _, out, lse, sinks, ab, ah, ar, bb, bh, br, lb, lh, lr, sb, sh, sr,
        heads, rows, width: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
    ):  # fmt: skip
        mine = tl.program_id(0) * block + tl.arange(0, block) < rows
        total = tl.load(_tile(lse, lb, lh, lr, heads, block), mask=mine, other=0.0)
        sink = tl.load(_tile(sinks, sb, sh, sr, heads, block), mask=mine, other=0.0)
        factor = 1 / (1 + tl.exp((sink - total).to(tl.float32)))
        column = tl.arange(0, wide)
        inside = mine[:, None] & (column < width)[None]
        place = _tile(out, bb, bh, br, heads, block)[:, None] + column
        row = tl.load(place, mask=inside)
        tl.store(place, (row.to(tl.float32) * factor[:, None]).to(row.dtype), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _multiply_rows(  # type: ignore[no-untyped-def]
        left, right, sums, _, ab, ah, ar, bb, bh, br, lb, lh, lr, sb, sh, sr,
        heads, rows, width: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
    ):  # fmt: skip
        mine = tl.program_id(0) * block + tl.arange(0, block) < rows
        column = tl.arange(0, wide)
        inside = mine[:, None] & (column < width)[None]
        first = tl.load(
            _tile(left, ab, ah, ar, heads, block)[:, None] + column, mask=inside, other=0.0
        )
        second = tl.load(
            _tile(right, bb, bh, br, heads, block)[:, None] + column, mask=inside, other=0.0
        )
        product = tl.sum(first.to(tl.float32) * second.to(tl.float32), 1)
        tl.store(_tile(sums, lb, lh, lr, heads, block), product, mask=mine)


# --- sinks beside a stock operator ---------------------------------------------------------------


def _with_sinks(given: _Given, query: Tensor, logits: Tensor, values: Tensor | None) -> Tensor:
    """The output of an operator, as it is with the sinks; the operator's own may be overwritten."""
    lse, sinks = _rows(given.lse, query), _together(logits)
    out = _rescale(given.out, lse, sinks)
    if values is not None:
        weights = torch.exp(logits - torch.logaddexp(lse, sinks)[..., None])
        out = out + weights.to(out.dtype) @ values.to(out.dtype)
    return out


def _rows(lse: Tensor, query: Tensor) -> Tensor:
    """Log-sum-exp of every row: (batch, heads, queries). Some operators pad it, or add a 1."""
    return lse.flatten(2)[..., : query.shape[2]]


class _WithSinks(torch.autograd.Function):
    """Sink attention over the stock operators, with exact gradients.

    A sink only rescales a row: out_sink = out * sigmoid(lse - sink). All gradients are what the
    stock backward gives for lse' = logaddexp(lse, sink) and out' = out_sink. Autograd through the
    lse of the stock operators would be silently wrong: it carries no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operator: _Operator,
        how: _How,
        logits: Tensor,
        values: Tensor | None,
        *inputs: Any,
    ) -> Tensor:
        given = operator.forward(*inputs, how)
        out = _with_sinks(given, inputs[0], logits, values)
        # In place, so that padding stays: only the operator and this function ever see it.
        rows = _rows(given.lse, inputs[0])
        rows.copy_(torch.logaddexp(rows, _together(logits)))
        ctx.save_for_backward(logits, values, *inputs, out, *given[1:])
        ctx.operator, ctx.how = operator, how
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        logits, values, *saved = ctx.saved_tensors
        inputs, given = saved[:4], _Given(*saved[4:])
        total = _rows(given.lse, inputs[0])
        grads = ctx.operator.backward(gradient, inputs, given, ctx.how)
        weights = torch.exp(logits - total[..., None])
        effect = -_row_products(gradient, given.out, total.dtype)[..., None]
        grad_values = None
        if values is not None:
            wide = gradient.to(total.dtype)
            effect = effect + wide @ values.to(total.dtype).mT
            grad_values = (weights.mT @ wide).sum(0, keepdim=True).to(values.dtype)
        grad_logits = (weights * effect).sum_to_size(logits.shape).to(logits.dtype)
        return None, None, grad_logits, grad_values, *grads, None


def sink_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same as eager_attention, without weights and at the speed of stock attention."""
    query, key, value = _autocast(query, key, value)
    asked, (batch, heads, length, width) = (query, key, value), query.shape
    key, value, causal = _causal(module, query, key, value, attention_mask, is_causal)
    mask = None if attention_mask is None else _additive(attention_mask, query.dtype)
    operator = None if softcap is not None else _choose(query, value, mask, dropout)
    if operator is None:
        return eager_attention(module, *asked, attention_mask, scaling, dropout, softcap, is_causal)
    if length == 1 and operator.rereads and (mask is None or mask.shape[1] == 1):
        # The query heads of a KV head as its queries: keys and values are read once.
        query = query.reshape(batch, key.shape[1], -1, width)
    elif not operator.grouped:
        groups = heads // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if mask is not None and not operator.grouped:
        mask = mask.expand(*query.shape[:3], -1)
    logits, values = _sinks(module, query, scaling, None)
    inputs, how = (query, key, value, mask), _How(dropout, causal, scaling)
    trained = (query, key, value, logits, values)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        out = _WithSinks.apply(operator, how, logits, values, *inputs)  # type: ignore[no-untyped-call]
    else:
        out = _with_sinks(operator.forward(*inputs, how), query, logits, values)
    return out.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Under autocast, tensors in its dtype: stock attention does this for itself."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


# --- attention of other makers -------------------------------------------------------------------


# Where its log-sum-exp carries a gradient.
_FLEX_DEVICES = ("cuda", "xpu")


def flex_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same by torch's flex attention, whose log-sum-exp carries a gradient.

    Not by transformers' function around it, which rounds the log-sum-exp to the model's dtype.
    """
    if query.device.type not in _FLEX_DEVICES or dropout or torch.is_tensor(attention_mask):
        raise ValueError(
            "flex_attention has no log-sum-exp on CPU, no dropout and no dense masks; load the "
            "model with attn_implementation 'sdpa' (the default) or 'eager'"
        )
    query, key, value = _autocast(query, key, value)

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):
        # Its kernels only share keys among 2, 4, 8 .. heads.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out, aux = compile_friendly_flex_attention(
        query,
        key,
        value,
        training=module.training,
        score_mod=None if softcap is None else capped,
        block_mask=attention_mask,
        enable_gqa=query.shape[1] != key.shape[1],
        scale=scaling,
        return_aux=AuxRequest(lse=True),
    )
    lse: Tensor = aux.lse  # type: ignore[union-attr]
    logits, values = _sinks(module, query, scaling, softcap)
    sinks = _together(logits)
    out = out * torch.sigmoid(lse - sinks)[..., None]
    if values is not None:
        out = out + torch.exp(logits - torch.logaddexp(lse, sinks)[..., None]) @ values
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


# What a caller may ask for as attn_implementation, and the name under which we register ours.
# The stock names must not survive: transformers would run them without sinks, and say nothing.
IMPLEMENTATIONS = {
    None: "absorb",
    "sdpa": "absorb",
    "eager": "absorb_eager",
    "flex_attention": "absorb_flex",
}
# An attention function without a mask function of the same name is given no mask at all.
for _name, _function, _mask in (
    ("absorb", sink_attention, "sdpa"),
    ("absorb_eager", eager_attention, "eager"),
    ("absorb_flex", flex_attention, "flex_attention"),
):
    ALL_ATTENTION_FUNCTIONS.register(_name, _function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_mask])

# Kernels of the flash-attention packages that were seen to take sinks, by transformers' names.
_KERNELS: set[str] = set()


def _takes_sinks() -> bool:
    """Whether the flash-attention kernel that transformers loaded last has an argument for them."""
    loaded = modeling_flash_attention_utils._process_flash_kwargs_fn
    named = getattr(loaded, "keywords", {}).get("supports_mapping", {})
    return bool(named.get("s_aux") or named.get("learnable_sink"))


def _refusal(name: str | None) -> ValueError:
    return ValueError(
        f"attention {name!r} would drop the sinks of this model; load it with attn_implementation "
        "'sdpa' (the default, which runs torch's own flash attention 2), 'eager' or "
        "'flex_attention', or export it to an architecture with sinks of its own, such as gpt_oss"
    )


def _sinks_for(module: Any, name: str) -> Tensor:
    """The sinks of a layer, for a kernel that takes them."""
    if name not in _KERNELS or ALL_ATTENTION_FUNCTIONS[name] is not flash_attention_forward:
        raise _refusal(name)
    if torch.is_grad_enabled() and module.sink.requires_grad:
        raise ValueError(
            f"attention {name!r} has no gradient for sinks; train with attn_implementation 'sdpa' "
            "(the default), or call the model under torch.no_grad()"
        )
    sink: Tensor = module.sink
    return sink


# --- the model -----------------------------------------------------------------------------------


@cache
def _with_forward(stock: Any, forward: Any) -> Any:
    """A stock class with another forward.

    A forward bound to the instance gets lost where modules are replicated, or where fast kernels
    are put in place of a class's forward; engines replace a class whose name ends in RMSNorm.
    """
    name = f"{stock.__name__}Absorbed"
    # Without the name of its stock class no kernel from the Hub takes its place.
    body = {"__module__": __name__, "forward": forward, "kernel_layer_name": name}
    return type(name, (stock,), body)


def _change(module: Any, forward: Any) -> None:
    stock: Any = type(module)
    module.__class__ = _with_forward(stock, forward)


def _stock(module: Any) -> Any:
    return type(module).__mro__[1]


def _attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A stock attention layer that has sinks: it never runs without them."""
    name = module.config._attn_implementation
    if name not in IMPLEMENTATIONS.values():
        kwargs["s_aux"] = _sinks_for(module, name)
    return _stock(module).forward(module, *args, **kwargs)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type to scale in: float16 holds what is written to the stream, not what a norm undoes."""
    return torch.float32 if dtype == torch.float16 else dtype


def _scaled_rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    # Fused it is not one kernel on a CPU, and in bfloat16 three times as slow as the stock norm.
    norm = _fused_rms_norm if hidden_states.device.type == "cuda" else _scaled_norm
    return norm(module, hidden_states)


def _fused_rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    """A stock RMSNorm of `input_scale * hidden_states`, in two kernels where the stock has eight.

    This pays for what the sinks cost.
    """
    dtype = _wide(hidden_states.dtype)
    scaled = hidden_states.to(dtype) * module.input_scale.to(dtype)
    weight = module.weight.to(dtype)
    normed = nn.functional.rms_norm(scaled, weight.shape, weight, module.variance_epsilon)
    return normed.to(hidden_states.dtype)


def _scaled_norm(module: Any, hidden_states: Tensor) -> Tensor:
    """`output_scale * norm(input_scale * hidden_states)`, with the scales that the norm has."""
    dtype = _wide(hidden_states.dtype)
    scaled = hidden_states.to(dtype)
    if hasattr(module, "input_scale"):
        scaled = scaled * module.input_scale.to(dtype)
    normed = _normed(module, scaled)
    if hasattr(module, "output_scale"):
        normed = normed * module.output_scale.to(dtype)
    return normed.to(hidden_states.dtype)


def _normed(module: Any, scaled: Tensor) -> Tensor:
    """What the stock norm gives, in the type of `scaled`."""
    if isinstance(module, nn.LayerNorm):
        # Of the stock norms only this one wants its weights in the type of what it reads.
        weight, bias = (p if p is None else p.to(scaled) for p in (module.weight, module.bias))
        return nn.functional.layer_norm(scaled, module.normalized_shape, weight, bias, module.eps)
    normed: Tensor = _stock(module).forward(module, scaled)
    return normed


def _scaled_embedding(module: Any, input_ids: Tensor) -> Tensor:
    """The rows of a stock embedding times `output_scale`."""
    scale: Tensor = module.output_scale.to(module.weight.dtype)
    if hasattr(module, "embed_scale"):
        # Gemma's factor, after which alone a row may not fit float16 any more.
        scale = scale * module.embed_scale.to(scale.dtype)
    return nn.Embedding.forward(module, input_ids) * scale


def _scaling(module: nn.Module) -> Any:
    """The forward that applies the scales of a module of this kind."""
    if isinstance(module, nn.Embedding):
        return _scaled_embedding
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        # Llama's formula. Gemma's, which adds one to the weight, has another name for it.
        return _scaled_rms_norm
    return _scaled_norm


class Absorbed(PreTrainedModel):
    """Mixed into a stock class in front of its own bases."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        config.auto_map = auto_map(config)
        heads, hidden = config.num_attention_heads, config.hidden_size
        for module in self._sites("sink"):
            _add(module, "sink", heads)
            _change(module, _attention)
        for module in self._sites("sink_key"):
            _add(module, "sink_key", *config.absorb["sink_shape"])
            _add(module, "sink_value", *config.absorb["sink_shape"])
            _change(module, _attention)
        scaled = [(name, m) for name in ("input_scale", "output_scale") for m in self._sites(name)]
        for name, module in scaled:
            _add(module, name, hidden)
        for module in {module for _, module in scaled}:
            _change(module, _scaling(module))
        for module in self._sites("bias"):
            if module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(module.weight.shape[0]))

    def initialize_weights(self) -> None:
        """Sinks and scales that a checkpoint lacks do nothing; else they would be unset memory."""
        # transformers asks the stock class inside this one how to begin, which knows neither.
        new = [m for m in self.modules() if not getattr(m, "_is_hf_initialized", False)]
        super().initialize_weights()  # type: ignore[no-untyped-call]
        for module in new:
            for name in module._parameters.keys() & _ADDED:
                initialization.constant_(getattr(module, name), NEUTRAL[name])

    def _sites(self, kind: str) -> Iterator[Any]:
        patterns = self.config.absorb.get(kind, [])
        for name, module in self.base_model.named_modules():
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                yield module

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for fast experts in the source of a class, and there are none in this
        # file: without this a mixture of experts would go through them in a loop.
        stock: Any = next(c for c in cls.__mro__ if c.__module__.startswith("transformers.models."))
        return bool(stock._can_set_experts_implementation())

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """The name of an attention that runs the sinks. Raises where there is none."""
        if attn_implementation in IMPLEMENTATIONS.values():
            return str(attn_implementation)
        if attn_implementation in IMPLEMENTATIONS:
            return IMPLEMENTATIONS[attn_implementation]
        name = str(attn_implementation)
        # Flash attention 2 takes no sinks: do not send anybody to install it first.
        if "flash" in name and name != "flash_attention_2" and "sink_key" not in self.config.absorb:
            found = super()._check_and_adjust_attn_implementation(name, *args, **kwargs)
            if _takes_sinks():
                _KERNELS.add(found)
                return found
        raise _refusal(name)


def _add(module: nn.Module, name: str, *size: int) -> None:
    # float32 whatever the dtype of the model: a few numbers that everything else depends on.
    value = torch.full(size, NEUTRAL[name], dtype=torch.float32)
    module.register_parameter(name, nn.Parameter(value))


def auto_map(config: PretrainedConfig) -> dict[str, str]:
    """What config.json says of the classes in this file, for AutoConfig and the AutoModels."""
    stock = type(config).__mro__[1]
    classes: dict[str, Any] = {
        "AutoConfig": stock,
        "AutoModel": transformers.MODEL_MAPPING[stock],
        "AutoModelForCausalLM": transformers.MODEL_FOR_CAUSAL_LM_MAPPING[stock],
    }
    module = __name__.rpartition(".")[2]
    return {auto: f"{module}.{PREFIX}{cls.__name__}" for auto, cls in classes.items()}


def absorbed(base: Any) -> type[PreTrainedModel]:
    """The absorbed twin of a stock class: Qwen3ForCausalLM gives AbsorbQwen3ForCausalLM."""
    twins = vars(sys.modules[__name__])
    name = PREFIX + base.__name__
    if name not in twins:
        strict = [*(base._keep_in_fp32_modules_strict or ()), *_ADDED]
        body = {
            "__module__": __name__,
            "config_class": _absorbed_config(base.config_class),
            "_keep_in_fp32_modules_strict": strict,
        }
        twin: Any = type(name, (Absorbed, base), body)
        kind = "AutoModelForCausalLM" if base.can_generate() else "AutoModel"
        twin.register_for_auto_class(kind)
        twins[name] = twin
    return twins[name]  # type: ignore[no-any-return]


def _eager_by_its_stock_name(method: Any) -> Any:
    """A method of a configuration, to which only an attention called eager may give its weights."""

    def named(config: Any, *args: Any) -> None:
        name = config._attn_implementation
        if name != IMPLEMENTATIONS["eager"]:
            method(config, *args)
            return
        config._attn_implementation_internal = "eager"
        try:
            method(config, *args)
        finally:
            config._attn_implementation_internal = name

    return named


def _without_attention(plan: dict[str, Any] | None) -> dict[str, Any] | None:
    """A plan of tensor parallelism in which every rank has all heads, as it has all sinks."""
    blocks = {"self_attn", "attn", "attention"}
    return plan and {name: how for name, how in plan.items() if blocks.isdisjoint(name.split("."))}


def _absorbed_config(stock: Any) -> type[PretrainedConfig]:
    twins = vars(sys.modules[__name__])
    name = PREFIX + stock.__name__
    if name not in twins:
        weights: Any = vars(PretrainedConfig)["output_attentions"]
        body = {
            "__module__": __name__,
            # Under the stock one a load without trust_remote_code would just drop the sinks.
            "model_type": f"absorb_{stock.model_type}",
            "output_attentions": weights.setter(_eager_by_its_stock_name(weights.fset)),
            "validate": _eager_by_its_stock_name(stock.validate),
            "base_model_tp_plan": _without_attention(stock.base_model_tp_plan),
        }
        twin: Any = type(name, (stock,), body)
        twin.register_for_auto_class()
        twins[name] = twin
    return twins[name]  # type: ignore[no-any-return]


def __getattr__(name: str) -> type:
    """Make the twins that config.json names in auto_map, when they are first asked for."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None)
    if not name.startswith(PREFIX) or stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _absorbed_config(stock) if issubclass(stock, PretrainedConfig) else absorbed(stock)
