"""Causal language models whose outliers are parameters.

This file is written by absorb beside every checkpoint, so it stands alone: it needs torch and
transformers, nothing else. It defines no architecture. An absorbed model is the stock transformers
model named in config.json, with parameters mixed in at the places that config.absorb names:

    sink          one logit per query head, in the softmax denominator of an attention layer
    input_scale   one factor per channel, on what a module reads from the residual stream
    output_scale  one factor per channel, on what a module writes to it
    bias          a bias for a linear layer that has none in the stock model
"""

import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "Absorb"

# What a caller may ask for as attn_implementation, and the name under which we register ours.
# The stock names must not survive: transformers would run them without sinks, and say nothing.
IMPLEMENTATIONS = {None: "absorb", "sdpa": "absorb", "eager": "absorb_eager"}

# What each parameter is when it does nothing. A sink far below every logit takes no weight, and
# unlike one of -inf it gets a gradient as soon as it matters.
NEUTRAL = {"sink": -100.0, "input_scale": 1.0, "output_scale": 1.0, "bias": 0.0}


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in which a head may also attend to nothing, with weight exp(sink).

    query is (batch, heads, queries, head_dim), key and value are (batch, kv_heads, keys, head_dim).
    Gives the output (batch, queries, heads, head_dim) and weights (batch, heads, queries, keys)
    that sum to less than one: the rest went to the sink.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + _additive(attention_mask, scores)
    sink = module.sink.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1, dtype=torch.float32)[..., :-1]
    weights = nn.functional.dropout(weights.to(value.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _additive(mask: Tensor | None, scores: Tensor) -> Tensor:
    """The mask as numbers to add to the scores; without one, attention is causal."""
    if mask is None:
        queries, keys = scores.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(
            keys - queries
        )
    if mask.dtype != torch.bool:
        return mask
    # Not -inf: a row without a single key (padding) must give zeros and not NaN.
    floor = torch.full((), torch.finfo(scores.dtype).min, dtype=scores.dtype, device=mask.device)
    return torch.where(mask, torch.zeros_like(floor), floor)


class _Flash(torch.autograd.Function):
    """Sink attention over the stock flash operators, with exact gradients.

    A sink only rescales a row: out_sink = out * sigmoid(lse - sink). Its gradient is what the stock
    backward gives for lse' = logaddexp(lse, sink) and out' = out_sink. Autograd through the lse of
    the stock operators would be silently wrong: it carries no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Any:
        causal = mask is None and query.shape[2] > 1
        if query.device.type == "cpu":
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, causal, attn_mask=mask, scale=scaling
            )
        else:
            out, lse, *ctx.lengths, seed, offset, _ = (
                torch.ops.aten._scaled_dot_product_flash_attention(
                    query, key, value, 0.0, causal, False, scale=scaling
                )
            )
            ctx.random = (seed, offset)
        out = out * torch.sigmoid(lse - sink.view(1, -1, 1)).unsqueeze(-1).to(out.dtype)
        ctx.save_for_backward(query, key, value, out, lse, sink, mask)
        ctx.causal, ctx.scaling = causal, scaling
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, out, lse, sink, mask = ctx.saved_tensors
        logit = sink.view(1, -1, 1)
        total = torch.logaddexp(lse, logit)
        tensors = (gradient, query, key, value, out, total)
        if query.device.type == "cpu":
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *tensors, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scaling
            )
        else:
            grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                *tensors, *ctx.lengths, 0.0, ctx.causal, *ctx.random, scale=ctx.scaling
            )
        share = torch.sigmoid(logit - lse)
        grad_sink = -(share * (gradient.float() * out.float()).sum(-1)).sum((0, 2))
        return *grads, grad_sink.to(sink.dtype), None, None


def _flash_can(query: Tensor, mask: Tensor | None, dropout: float, softcap: float | None) -> bool:
    if dropout or softcap is not None:
        return False
    if query.device.type == "cpu":
        return True
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.device.type == "cuda" and half and mask is None and query.shape[-1] <= 256


def sink_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same as eager_attention, without weights and at the speed of stock attention."""
    if not _flash_can(query, attention_mask, dropout, softcap):
        return eager_attention(module, query, key, value, attention_mask, scaling, dropout, softcap)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attention_mask is not None:
        attention_mask = _additive(attention_mask, query)
    sink = module.sink.float()
    out = _Flash.apply(query, key, value, sink, attention_mask, scaling)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("absorb", sink_attention)
ALL_ATTENTION_FUNCTIONS.register("absorb_eager", eager_attention)
# An attention function without a mask function of the same name is given no mask at all.
for _name in ("absorb", "absorb_eager"):
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _require_sinks(module: Any, _: tuple[Any, ...]) -> None:
    name = module.config._attn_implementation
    if name not in IMPLEMENTATIONS.values():
        raise ValueError(
            f"attention {name!r} was put in place of absorb's and would drop the sinks; "
            "load the model with attn_implementation 'sdpa' or 'eager'"
        )


def _scale_input(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * module.input_scale.to(args[0].dtype), *args[1:])


def _scale_output(module: Any, _: tuple[Tensor, ...], out: Tensor) -> Any:
    return out * module.output_scale.to(out.dtype)


class Absorbed(PreTrainedModel):
    """Mixed into a stock class in front of its own bases."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        config.auto_map = auto_map(config)
        heads, hidden = config.num_attention_heads, config.hidden_size
        for module in self._sites("sink"):
            _add(module, "sink", heads)
            module.register_forward_pre_hook(_require_sinks)
        for module in self._sites("input_scale"):
            _add(module, "input_scale", hidden)
            module.register_forward_pre_hook(_scale_input)
        for module in self._sites("output_scale"):
            _add(module, "output_scale", hidden)
            module.register_forward_hook(_scale_output)
        for module in self._sites("bias"):
            if module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(module.weight.shape[0]))

    def _sites(self, kind: str) -> Iterator[Any]:
        for name, module in self.base_model.named_modules():
            if any(fnmatchcase(name, pattern) for pattern in self.config.absorb[kind]):
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
        if attn_implementation in IMPLEMENTATIONS.values():
            return attn_implementation  # type: ignore[return-value]
        if attn_implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation {attn_implementation!r} would drop the sinks of this model; "
                "use 'sdpa' (the default) or 'eager'"
            )
        return IMPLEMENTATIONS[attn_implementation]


def _add(module: nn.Module, name: str, size: int) -> None:
    # float32 whatever the dtype of the model: a few numbers that everything else depends on.
    value = torch.full((size,), NEUTRAL[name], dtype=torch.float32)
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
        strict = [*(base._keep_in_fp32_modules_strict or ()), "sink", "input_scale", "output_scale"]
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


def _absorbed_config(stock: type[PretrainedConfig]) -> type[PretrainedConfig]:
    twins = vars(sys.modules[__name__])
    name = PREFIX + stock.__name__
    if name not in twins:
        # Under the stock model_type a load without trust_remote_code would just drop the sinks.
        body = {"__module__": __name__, "model_type": f"absorb_{stock.model_type}"}
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
