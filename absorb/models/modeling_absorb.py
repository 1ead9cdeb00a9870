"""Language models whose outliers are parameters.

This file is written by absorb beside every checkpoint, so it stands alone: it needs torch and
transformers, nothing else. It defines no architecture. An absorbed model is the stock transformers
model named in config.json, with parameters mixed in at the places that config.absorb names:

    sink          one logit per query head, in the softmax denominator of an attention layer
    sink_key      keys (kv_heads, n, head_dim) that every query also attends to, already rotated to
                  positions -n .. -1 where there is RoPE, of the shape config.absorb["sink_shape"]
    sink_value    the values of these keys, in the same layers
    input_scale   one factor per channel, on what a module reads from the residual stream
    output_scale  one factor per channel, on what a module gives, to the stream or to the head
    entry_scale   the same on all that enters the stream, where pictures stand beside words
    bias          a bias for a linear layer that has none in the stock model
    gate_in       (rank, hidden), of the shape config.absorb["gate_shape"]: what reads the output y
                  of a norm, after its scales; with gate_out it is a gate on every channel of y,
    gate_out      (rank, hidden): y * 2 sigmoid(silu(y @ gate_in.T) @ gate_out)

A layer has a `sink`, or a `sink_key` with its `sink_value`. Neither counts as a token: positions,
caches and masks are those of the text alone, and no sliding window leaves a sink behind.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

import transformers

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 16):
    raise ImportError(
        "this checkpoint needs transformers 5.16 or newer; you have " + transformers.__version__
    )

import torch
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
from transformers.models.auto import modeling_auto

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
    "entry_scale": 1.0,
    "bias": 0.0,
    "gate_in": 0.0,
    "gate_out": 0.0,
}
_BESIDE = {"sink_value": "sink_key", "gate_out": "gate_in"}  # what is where another one is
_ADDED = NEUTRAL.keys() - {"bias"}  # what no stock module has


# --- the model -----------------------------------------------------------------------------------


class Absorbed(PreTrainedModel):
    """Mixed into a stock class in front of its own bases."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        text: Any = config.get_text_config(
            decoder=True
        )  # of the language model inside, if there is one
        if text is not config:
            text.base_model_tp_plan = _without_attention(text.base_model_tp_plan)
        super().__init__(config, *args, **kwargs)
        if text is not config:
            name = self._check_and_adjust_attn_implementation(text._attn_implementation)
            text._attn_implementation_internal = name
        self.register_forward_pre_hook(_refuse_no_tokens, with_kwargs=True)
        config.auto_map = auto_map(config)
        heads, hidden = (text.num_attention_heads,), (text.hidden_size,)
        keys, gates = config.absorb.get("sink_shape"), config.absorb.get("gate_shape")
        sizes = {"sink": heads, "sink_key": keys, "sink_value": keys}
        sizes |= {"input_scale": hidden, "output_scale": hidden}
        sizes |= {"gate_in": gates, "gate_out": gates}
        for name, size in sizes.items():
            for module in self._sites(_BESIDE.get(name, name)):
                _add(module, name, size)
        for module in self._sites("entry_scale"):
            _register(module, "entry_scale", hidden)
            module.register_forward_pre_hook(_scale_entry, with_kwargs=True)
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
        name, keyed = str(attn_implementation), "sink_key" in self.config.absorb
        if name == "vllm" and not keyed and _reads_sinks(name):
            KERNELS.add(name)
            return name
        # Flash attention 2 takes no sinks: do not send anybody to install it first.
        if "flash" in name and name != "flash_attention_2" and not keyed:
            found = super()._check_and_adjust_attn_implementation(name, *args, **kwargs)
            if _takes_sinks():
                KERNELS.add(found)
                return found
        raise _refusal(name)


def _refuse_no_tokens(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse an empty prompt, which a tokenizer without BOS makes of an empty text."""
    given = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    if any(tensor is not None and not tensor.numel() for tensor in given):
        raise ValueError(
            "the prompt is empty, and what the sinks stand for cannot be asked what comes after "
            "it: give at least one token"
        )


def _scale_entry(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Scale the rows that a language model is given: those of words, and of patches of pictures.

    The latter may be added behind the first layers as well.
    """
    if kwargs.get("inputs_embeds") is None:
        tokens, *rest = args or (kwargs.pop("input_ids"),)
        args, kwargs["inputs_embeds"] = (None, *rest), module.get_input_embeddings()(tokens)
    scale: Tensor = module.entry_scale
    kwargs["inputs_embeds"] = kwargs["inputs_embeds"] * scale.to(kwargs["inputs_embeds"])
    deep = kwargs.get("deepstack_visual_embeds")
    if deep is not None:
        kwargs["deepstack_visual_embeds"] = [rows * scale.to(rows) for rows in deep]
    return args, kwargs


def _register(module: Any, name: str, size: Sequence[int]) -> None:
    """Give a module a parameter."""
    # Heads of some architectures hold a model in which all this is done already.
    if name not in module._parameters:
        # float32 whatever the dtype of the model: a few numbers that everything else depends on.
        value = torch.full(tuple(size), NEUTRAL[name], dtype=torch.float32)
        module.register_parameter(name, nn.Parameter(value))


def _add(module: Any, name: str, size: Sequence[int]) -> None:
    """Give a module a parameter, and the forward that uses it."""
    _register(module, name, size)
    stock: Any = type(module)
    if not stock.__name__.endswith("Absorbed"):
        scaled = _scaled_embedding if isinstance(module, nn.Embedding) else _scaled_norm
        module.__class__ = _with_forward(stock, _attention if name.startswith("sink") else scaled)


def stock_classes(config: Any) -> dict[str, Any]:
    """The classes that the AutoModels of transformers have for a stock configuration, by these."""
    found = {}
    for name, auto in vars(modeling_auto).items():
        classes = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and classes is not None and config in classes:
            found[name] = classes[config]
    # Some are composed of several models, and of the configurations of these.
    return {n: cls for n, cls in found.items() if getattr(cls, "config_class", None) is config}


def auto_map(config: PretrainedConfig) -> dict[str, str]:
    """What config.json says of the classes in this file, for AutoConfig and the AutoModels."""
    stock = type(config).__mro__[1]
    module = __name__.rpartition(".")[2]
    classes = {"AutoConfig": stock, **stock_classes(stock)}
    return {auto: f"{module}.{PREFIX}{cls.__name__}" for auto, cls in classes.items()}


@cache
def absorbed(base: Any) -> Any:
    """The absorbed twin of a stock class: Qwen3ForCausalLM gives AbsorbQwen3ForCausalLM."""
    inner: Any = transformers.MODEL_MAPPING[base.config_class]
    body = {
        "__module__": __name__,
        "config_class": _absorbed_config(base.config_class),
        "_keep_in_fp32_modules_strict": [*(base._keep_in_fp32_modules_strict or ()), *_ADDED],
        # Some heads call the model inside otherwise, and leave the weights of a causal one.
        "base_model_prefix": inner.base_model_prefix,
    }
    twin: Any = type(PREFIX + base.__name__, (Absorbed, base), body)
    autos = [auto for auto, cls in stock_classes(base.config_class).items() if cls is base]
    twin.register_for_auto_class("AutoModelForCausalLM" if base.can_generate() else autos[0])
    # Heads of some architectures ask for the model inside them by its configuration.
    body_class = twin if base is inner else absorbed(inner)
    transformers.AutoModel.register(twin.config_class, body_class, exist_ok=True)
    return twin


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


@cache
def _absorbed_config(stock: Any) -> Any:
    weights: Any = vars(PretrainedConfig)["output_attentions"]
    body = {
        "__module__": __name__,
        # Under the stock one a load without trust_remote_code would just drop the sinks.
        "model_type": f"absorb_{stock.model_type}",
        "output_attentions": weights.setter(_eager_by_its_stock_name(weights.fset)),
        "validate": _eager_by_its_stock_name(stock.validate),
        "base_model_tp_plan": _without_attention(stock.base_model_tp_plan),
    }
    twin: Any = type(PREFIX + stock.__name__, (stock,), body)
    twin.register_for_auto_class()
    return twin


def __getattr__(name: str) -> Any:
    """Make the twins that config.json names in auto_map, when they are first asked for."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None)
    if not name.startswith(PREFIX) or stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _absorbed_config(stock) if issubclass(stock, PretrainedConfig) else absorbed(stock)


# --- modules with parameters mixed in ------------------------------------------------------------


@cache
def _with_forward(stock: Any, forward: Any) -> Any:
    """A stock class with another forward.

    A forward bound to the instance gets lost where modules are replicated, or where fast kernels
    are put in place of a class's forward; engines replace a class whose name ends in RMSNorm.
    """
    name = f"{stock.__name__}Absorbed"
    body = {
        "__module__": __name__,
        "forward": forward,
        "handed_scaling": property(_handed_scaling),
        # Without the name of its stock class no kernel from the Hub takes its place.
        "kernel_layer_name": name,
        # Nobody finds this class by its name: a copy in another process is made as we make it.
        "__reduce__": lambda module: (_blank, (stock, forward), module.__dict__),
    }
    return type(name, (stock,), body)


def _blank(stock: Any, forward: Any) -> Any:
    """A module with another forward, before it has a state."""
    cls = _with_forward(stock, forward)
    return cls.__new__(cls)


def _stock(module: Any) -> Any:
    return type(module).__mro__[1]


def _attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A stock attention layer that has sinks: it never runs without them."""
    name = module.config._attn_implementation
    if name not in IMPLEMENTATIONS.values():
        kwargs["s_aux"] = _sinks_for(module, name)
    return _stock(module).forward(module, *args, **kwargs)


def _read_by_vllm(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Any:
    """Never run. vLLM looks in the source of a layer for what it hands to attention, and where."""
    attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    return attention_interface(
        self, query, key, value, mask, scaling=self.handed_scaling, s_aux=self.sink
    )


_attention.__wrapped__ = _read_by_vllm  # type: ignore[attr-defined]


def _handed_scaling(module: Any) -> float:
    """What a stock attention layer hands on as its scale: not OPT's, which scales its queries."""
    by_itself = "scaling=1.0" in inspect.getsource(_stock(module).forward)
    return 1.0 if by_itself else module.scaling


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type to scale in: float16 holds what is written to the stream, not what a norm undoes."""
    return torch.float32 if dtype == torch.float16 else dtype


def _scaled_norm(module: Any, hidden_states: Tensor) -> Tensor:
    """`output_scale * norm(input_scale * hidden_states)`, with the scales that the norm has.

    And behind its gate, if it has one.
    """
    dtype = _wide(hidden_states.dtype)
    scaled = hidden_states.to(dtype)
    if hasattr(module, "input_scale"):
        scaled = scaled * module.input_scale.to(dtype)
    normed = _normed(module, scaled)
    if hasattr(module, "output_scale"):
        normed = normed * module.output_scale.to(dtype)
    if hasattr(module, "gate_in"):
        normed = normed * _gate(module, normed)
    return normed.to(hidden_states.dtype)


def _gate(module: Any, normed: Tensor) -> Tensor:
    """What each channel that a norm gives is multiplied by: from 0 to 2, and 1 by no gate_out."""
    read, given = module.gate_in.to(normed.dtype), module.gate_out.to(normed.dtype)
    return 2 * torch.sigmoid(nn.functional.silu(normed @ read.T) @ given)


def _scaled_embedding(module: Any, input_ids: Tensor) -> Tensor:
    """The rows of a stock embedding times `output_scale`, before pictures stand beside them."""
    scale: Tensor = module.output_scale.to(module.weight.dtype)
    if hasattr(module, "embed_scale"):
        # Gemma's factor, after which alone a row may not fit float16 any more.
        scale = scale * module.embed_scale.to(scale.dtype)
    return nn.Embedding.forward(module, input_ids) * scale


# Where torch computes an RMSNorm in one kernel. On a CPU it does not, and in bfloat16 takes three
# times as long as the stock norm.
FUSED_NORMS = ("cuda",)


def _normed(module: Any, scaled: Tensor) -> Tensor:
    """What the stock norm gives, in the type of `scaled`."""
    stock = _stock(module)
    if isinstance(module, nn.LayerNorm):
        # Of the stock norms only this one wants its weights in the type of what it reads.
        weight, bias = (p if p is None else p.to(scaled) for p in (module.weight, module.bias))
        if stock.__name__ == "NemotronLayerNorm1P":
            weight = weight + 1
        return nn.functional.layer_norm(scaled, module.normalized_shape, weight, bias, module.eps)
    # Llama's formula. Gemma's, which adds one to the weight, has another name for its epsilon.
    llamas = stock.__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    if llamas and scaled.device.type in FUSED_NORMS:
        # One kernel where the stock norm has seven: this pays for what the sinks cost.
        weight = module.weight.to(scaled)
        return nn.functional.rms_norm(scaled, weight.shape, weight, module.variance_epsilon)
    found: Tensor = stock.forward(module, scaled)
    return found


# --- what a sink does to attention ---------------------------------------------------------------

Sinks = tuple[Tensor, ...]  # logits (heads,), or keys (kv_heads, n, head_dim) and their values


class How(NamedTuple):
    """How queries meet keys; `causal` only counts where no mask says what they see."""

    scale: float
    causal: bool = True
    dropout: float = 0.0
    softcap: float | None = None


def eager(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Sinks, how: How
) -> tuple[Tensor, Tensor]:
    """Attention in which a head may also attend to sinks. All other paths are tested against it.

    query is (batch, heads, queries, head_dim), key and value are (batch, kv_heads, keys, head_dim).
    Gives the output (batch, queries, heads, head_dim) and weights (batch, heads, queries, keys)
    that sum to less than one: the rest went to the sinks.
    """
    key, value, causal = _causal(query, key, value, mask, how)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = _capped(query @ key.transpose(2, 3) * how.scale, how)
    if causal:
        mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores + _additive(mask, scores.dtype)
    logits, sink_value = _logits_and_values(query, sinks, how)
    logits = logits.to(scores.dtype).expand(*scores.shape[:-1], -1)
    weights = torch.cat([scores, logits], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
    sink_weights, weights = weights[..., key.shape[2] :], weights[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, how.dropout)
    out = weights @ value
    if sink_value is not None:
        out = out + sink_weights @ sink_value.to(out.dtype)
    return out.transpose(1, 2).contiguous(), weights


def _logits_and_values(query: Tensor, sinks: Sinks, how: How) -> tuple[Tensor, Tensor | None]:
    """Logits (batch or 1, heads, queries or 1, n), and values (1, heads, n, head_dim) if any."""
    if len(sinks) == 1:
        return sinks[0].view(1, -1, 1, 1), None
    groups = query.shape[1] // len(sinks[0])
    wide = torch.promote_types(query.dtype, sinks[0].dtype)
    key, value = (part.to(wide).repeat_interleave(groups, 0)[None] for part in sinks)
    with _without_autocast(query.device.type):
        return _capped(query.to(wide) @ key.mT * how.scale, how), value


def _capped(logits: Tensor, how: How) -> Tensor:
    return logits if how.softcap is None else how.softcap * torch.tanh(logits / how.softcap)


def _without_autocast(device: str) -> Any:
    """Products in the dtype of what is multiplied. Stock operators sum in float32 as well."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _causal(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: How
) -> tuple[Tensor, Tensor, bool]:
    """The keys and values that any query sees; whether each sees only those up to its own."""
    length = query.shape[2]
    # In this order: a compiler with dynamic shapes cannot take `length > 1` for a bool.
    causal = length > 1 and mask is None and how.causal
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


def fast(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Sinks, how: How
) -> tuple[Tensor, Tensor | None]:
    """The same as `eager`, without weights and at the speed of stock attention."""
    query, key, value = _autocast(query, key, value)
    asked, (batch, heads, length, width) = (query, key, value, mask), query.shape
    key, value, causal = _causal(query, key, value, mask, how)
    mask = None if mask is None else _additive(mask, query.dtype)
    operator = _operator_for(query, value, mask, how)
    if operator is None:
        return eager(*asked, sinks, how)
    if length == 1 and operator.rereads and (mask is None or mask.shape[1] == 1):
        # The query heads of a KV head as its queries: keys and values are read once.
        query = query.reshape(batch, key.shape[1], -1, width)
    elif not operator.grouped:
        groups = heads // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if mask is not None and not operator.grouped:
        mask = mask.expand(*query.shape[:3], -1)
    inputs, how = (query, key, value, mask), How(how.scale, causal, how.dropout)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, *sinks)):
        out = WithSinks.apply(operator, how, *inputs, *sinks)  # type: ignore[no-untyped-call]
    else:
        given = operator.forward(inputs, how)
        out = _joined(query, sinks, how.scale, given.out, _rows(given.lse, query), trained=False)
    return out.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Under autocast, tensors in its dtype, doubles aside: as stock attention does for itself."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


# Where its log-sum-exp carries a gradient.
FLEX_DEVICES = ("cuda", "xpu")


def flex(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | Any, sinks: Sinks, how: How
) -> tuple[Tensor, None]:
    """The same by torch's flex attention, whose log-sum-exp carries a gradient.

    Not by transformers' function around it, which rounds the log-sum-exp to the model's dtype.
    """
    if query.device.type not in FLEX_DEVICES or how.dropout or torch.is_tensor(mask):
        raise ValueError(
            "flex_attention has no log-sum-exp on CPU, no dropout and no dense masks; load the "
            "model with attn_implementation 'sdpa' (the default) or 'eager'"
        )
    query, key, value = _autocast(query, key, value)
    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):
        # Its kernels only share keys among 2, 4, 8 .. heads.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    capped = None if how.softcap is None else lambda score, *_: _capped(score, how)
    given = {"score_mod": capped, "block_mask": mask, "scale": how.scale}
    given |= {"enable_gqa": query.shape[1] != key.shape[1], "return_aux": AuxRequest(lse=True)}
    out, aux = compile_friendly_flex_attention(query, key, value, **given)
    lse: Tensor = aux.lse[..., None]  # type: ignore[union-attr]
    logits, values = _logits_and_values(query, sinks, how)
    total = torch.logaddexp(lse, logits.logsumexp(-1, keepdim=True))
    out = out * torch.exp(lse - total)
    if values is not None:
        out = out + torch.exp(logits - total) @ values
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


# --- attention by the names of transformers ------------------------------------------------------


def _for_layers(attend: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function as transformers calls it, with the layer first."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        causal, dropout = options.get("is_causal"), options.get("dropout", 0.0)
        how = How(
            options["scaling"],
            getattr(module, "is_causal", True) if causal is None else causal,
            dropout if module.training else 0.0,
            options.get("softcap"),
        )
        return attend(query, key, value, attention_mask, _sinks_of(module, query), how)

    return attention


def _sinks_of(module: Any, query: Tensor) -> Sinks:
    if hasattr(module, "sink_key"):
        return module.sink_key, module.sink_value
    # What reads pictures has none, nor have layers that were left as they are.
    nothing = query.new_full(query.shape[1:2], NEUTRAL["sink"], dtype=torch.float32)
    return (getattr(module, "sink", nothing),)


eager_attention, sink_attention, flex_attention = map(_for_layers, (eager, fast, flex))

# What a caller may ask for as attn_implementation, and the name under which we register ours.
# The stock names must not survive: transformers would run them without sinks, and say nothing.
IMPLEMENTATIONS = {
    None: "absorb",
    "sdpa": "absorb",
    "eager": "absorb_eager",
    "flex_attention": "absorb_flex",
}
for _stock_name, _function in (
    ("sdpa", sink_attention),
    ("eager", eager_attention),
    ("flex_attention", flex_attention),
):
    _name = IMPLEMENTATIONS[_stock_name]
    ALL_ATTENTION_FUNCTIONS.register(_name, _function)
    # An attention function without a mask function of its name is given no mask at all.
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_stock_name])

# Kernels of the flash-attention packages that were seen to take sinks, by transformers' names.
KERNELS: set[str] = set()


def _reads_sinks(name: str) -> bool:
    """Whether an engine's attention reads the sinks, and so can tell where its kernel has none."""
    function: Any = ALL_ATTENTION_FUNCTIONS.get(name)
    return function is not None and "s_aux" in function.__code__.co_consts


def _takes_sinks() -> bool:
    """Whether the flash-attention kernel that transformers loaded last has an argument for them."""
    loaded = modeling_flash_attention_utils._process_flash_kwargs_fn
    named = getattr(loaded, "keywords", {}).get("supports_mapping", {})
    return bool(named.get("s_aux") or named.get("learnable_sink"))


def _refusal(name: str | None) -> ValueError:
    return ValueError(
        f"attention {name!r} would drop the sinks of this model; load it with attn_implementation "
        "'sdpa' (the default, which runs torch's own flash attention 2), 'eager' or "
        "'flex_attention', or give it to other engines by `absorb export`"
    )


def _sinks_for(module: Any, name: str) -> Tensor:
    """The sinks of a layer, for a kernel that takes them."""
    ours = name == "vllm" or ALL_ATTENTION_FUNCTIONS[name] is flash_attention_forward
    if name not in KERNELS or not ours:
        raise _refusal(name)
    if torch.is_grad_enabled() and module.sink.requires_grad:
        raise ValueError(
            f"attention {name!r} has no gradient for sinks; train with attn_implementation 'sdpa' "
            "(the default), or call the model under torch.no_grad()"
        )
    sink: Tensor = module.sink
    return sink


# --- sinks beside a stock operator ---------------------------------------------------------------


# Devices on which the operator of stock attention beats a formula for so few keys.
BY_OPERATOR = ("cpu",)


def _rows(lse: Tensor, query: Tensor) -> Tensor:
    """Log-sum-exp of every row: (batch, heads, queries). Some operators pad it, or add a 1."""
    return lse.flatten(2)[..., : query.shape[2]]


def _rowwise(logits: Tensor, query: Tensor) -> Tensor:
    """Sink logits beside the rows of all heads: (1, heads, 1), or (1, kv_heads, queries)."""
    return logits.view(1, query.shape[1], -1)


def _joined(
    query: Tensor, sinks: Sinks, scale: float, out: Tensor, lse: Tensor, trained: bool
) -> Tensor:
    """The output of an operator with the sinks. `out` may be overwritten.

    lse (batch, heads, queries) becomes that with the sinks if `trained`: then somebody needs it.
    """
    if fusible(sinks, query, out):
        _launch(_join_rows, query, sinks, scale, lse, out)
        return out
    if len(sinks) == 1:
        other = _rowwise(sinks[0], query)
        # In place, so that in half precision a factor in float32 costs nothing more. But to what
        # was overwritten the compiler of torch 2.11 gives no gradient.
        scaled = torch.mul if torch.compiler.is_compiling() else Tensor.mul_
        joined = _cast(scaled(out, torch.sigmoid(lse - other)[..., None]), out.dtype)
    else:
        alone, other = _to_sinks_alone(query, sinks, scale, lse.dtype)
        mixed = torch.lerp if torch.compiler.is_compiling() else Tensor.lerp_
        # `out` comes first, so that the result is laid out like it: stock backwards count on that.
        joined = mixed(out.to(alone.dtype), alone, torch.sigmoid(other - lse)[..., None])
        joined = _cast(joined, out.dtype)
    if trained:
        # In place, so that padding stays: only the operator and these functions ever see it.
        lse.copy_(torch.logaddexp(lse, other))
    return joined


def _to_sinks_alone(
    query: Tensor, sinks: Sinks, scale: float, kind: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of attention to the keys of sinks and nothing else, of a `kind`."""
    query, how = query.to(kind), How(scale, causal=False)
    if query.device.type in BY_OPERATOR:
        return OPERATORS["cpu"].forward([query, *_as_text(sinks, query), None], how)[:2]
    logits, values = _logits_and_values(query, sinks, how)
    with _without_autocast(query.device.type):
        return logits.softmax(-1) @ values, logits.logsumexp(-1)  # type: ignore[operator]


def _as_text(sinks: Sinks, query: Tensor) -> list[Tensor]:
    """Keys and values of sinks as those of a text, the same in every row of a batch."""
    return [part.to(query.dtype).expand(len(query), -1, -1, -1) for part in sinks]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Cast to the dtype it has, a tensor gets no gradient from the compiler of torch 2.11.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class WithSinks(torch.autograd.Function):
    """Sink attention over the stock operators, with exact gradients.

    The softmax over the text and that over the sinks join by their log-sum-exp. The gradients of
    the text are what the stock backward gives for the output and the log-sum-exp of both together.
    Autograd through the lse of the stock operators would be silently wrong: it carries no gradient.
    """

    @staticmethod
    def forward(ctx: Any, operator: Any, how: How, *tensors: Any) -> Tensor:
        inputs, sinks, query = tensors[:4], tensors[4:], tensors[0]
        given = operator.forward(inputs, how)
        lse = _rows(given.lse, query)
        out = _joined(query, sinks, how.scale, given.out, lse, trained=True)
        ctx.save_for_backward(out, *given[1:], *tensors)
        ctx.operator, ctx.how = operator, how
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved = ctx.saved_tensors
        given, inputs, query, sinks = Given(*saved[:4]), saved[4:8], saved[4], saved[8:]
        of_query, *others = ctx.operator.backward(gradient, inputs, given, ctx.how)
        total, scale = _rows(given.lse, query), ctx.how.scale
        wide = given.out, gradient, of_query
        of_query, *of_sinks = _sink_gradients(query, sinks, scale, total, *wide)
        of_sinks = [found.to(sink.dtype) for found, sink in zip(of_sinks, sinks, strict=True)]
        return None, None, of_query, *others, None, *of_sinks


def _sink_gradients(
    query: Tensor, sinks: Sinks, scale: float, total: Tensor, *wide: Tensor
) -> Sequence[Tensor]:
    """The gradient of the query, to which keys of sinks add theirs, and the gradients of sinks.

    total is the log-sum-exp (batch, heads, queries) with the sinks. The others are the output with
    them, its gradient, and the gradient of the query from the text.
    """
    out, gradient, of_query = wide
    if fusible(sinks, query, *wide):
        found = _launch(_part_rows, query, sinks, scale, total, *wide)
    else:
        # A product of bfloat16 is as exact as its factors, but one of float16 may underflow.
        product = gradient * (out.to(total.dtype) if out.dtype == torch.float16 else out)
        found = product.sum(-1, dtype=total.dtype)
        if len(sinks) == 2:
            return _key_gradients(query, sinks, scale, total, found, *wide)
        found = -torch.exp(_rowwise(sinks[0], query) - total) * found
    if len(sinks) == 1:
        return of_query, found.sum_to_size(_rowwise(sinks[0], query).shape).view_as(sinks[0])
    kv_heads, count, width = sinks[0].shape
    return of_query, *found.view(2, found.shape[1], kv_heads, -1, count, width).sum((1, 3))


def _key_gradients(
    query: Tensor, sinks: Sinks, scale: float, total: Tensor, product: Tensor, *wide: Tensor
) -> Sequence[Tensor]:
    *given, of_query = wide
    query, out, gradient = (tensor.to(total.dtype) for tensor in (query, *given))
    if query.device.type in BY_OPERATOR:
        inputs, how = (query, *_as_text(sinks, query), None), How(scale, causal=False)
        more, *parts = OPERATORS["cpu"].backward(gradient, inputs, Given(out, total), how)
        return of_query.add_(more.to(of_query.dtype)), *(part.sum(0) for part in parts)
    groups = query.shape[1] // len(sinks[0])
    key, value = (part.to(total.dtype).repeat_interleave(groups, 0) for part in sinks)
    with _without_autocast(query.device.type):
        weights = torch.exp(query @ key.mT * scale - total[..., None])
        of_logits = weights * (gradient @ value.mT - product[..., None]) * scale
        of_query.add_(of_logits @ key)
        parts = [of_logits.mT @ query, weights.mT @ gradient]
    return of_query, *(part.unflatten(1, (-1, groups)).sum((0, 2)) for part in parts)


# --- the operators of stock attention ------------------------------------------------------------


class Given(NamedTuple):
    """What an operator gives: seed and offset are those of its dropout."""

    out: Tensor
    lse: Tensor
    seed: Tensor | None = None
    offset: Tensor | None = None


class Operator(NamedTuple):
    """One of the operators behind scaled_dot_product_attention."""

    ahead: Callable[..., Any]
    back: Callable[..., Any]
    drawn: int = 2  # where seed and offset are in what it gives, if it has dropout
    grouped: bool = True  # one mask and one KV head may serve several query heads
    rereads: bool = False  # but then it reads keys and values once for each of them

    def forward(self, inputs: Sequence[Any], how: How) -> Given:
        """For query, key, value and mask."""
        found = self.ahead(*inputs, inputs[3], how.dropout, how.causal, how.scale, True)
        return Given(*found[:2], *found[self.drawn :][:2])

    def backward(self, gradient: Tensor, inputs: Sequence[Any], given: Given, how: How) -> Any:
        """The gradients of query, key and value."""
        lengths = (None, None, inputs[0].shape[2], inputs[1].shape[2])
        more = (gradient, gradient, *given, *lengths, [True, True, True, False])
        return self.back(*inputs, inputs[3], how.dropout, how.causal, how.scale, *more)[:3]


# What is handed to an operator, by the names in their schemas, which call a mask or a gradient so
# or so. All rows of a batch are of one length, and nobody trains a mask.
_AHEAD = ["query", "key", "value", "attn_mask", "attn_bias", "dropout_p", "is_causal", "scale"]
_BACK = ["grad_out", "grad_out_", "out", "logsumexp", "philox_seed", "philox_offset"]
_BACK += ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "grad_input_mask"]


def _by_names(name: str, names: Sequence[str]) -> Callable[..., Any]:
    """An operator that takes, out of arguments of these names, those in its schema."""
    operator = getattr(torch.ops.aten, name).default
    known = [a for a in operator._schema.arguments if a.name in names]
    first = [names.index(a.name) for a in known if not a.kwarg_only]
    last = {a.name: names.index(a.name) for a in known if a.kwarg_only}
    return lambda *given: operator(*[given[i] for i in first], **{n: given[last[n]] for n in last})


def _operator(kind: str, **more: Any) -> Operator:
    name = f"_scaled_dot_product_{kind}"
    ahead = _by_names(name, [*_AHEAD, "compute_log_sumexp"])
    return Operator(ahead, _by_names(f"{name}_backward", _AHEAD + _BACK), **more)


OPERATORS = {
    "cpu": _operator("flash_attention_for_cpu", rereads=True),
    "cudnn": _operator("cudnn_attention", drawn=6),
    "flash": _operator("flash_attention", drawn=6),
    "efficient": _operator("efficient_attention", grouped=False, rereads=True),
}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@cache
def _generation() -> int:
    """Of the GPU: 8 is Ampere, 9 is Hopper."""
    return torch.cuda.get_device_capability()[0]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _enabled(name: str) -> bool:
    """Whether the user lets stock attention use an operator."""
    return bool(getattr(torch.backends.cuda, f"{name}_sdp_enabled")())


def _operator_for(query: Tensor, value: Tensor, mask: Tensor | None, how: How) -> Operator | None:
    """The operator that stock attention would use, or a faster one; None where none will do."""
    # In what is exported the log-sum-exp of these operators would mean nothing.
    exported = torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
    if exported or how.softcap is not None or query.shape[-1] != value.shape[-1]:
        return None
    if query.device.type == "cpu":
        return None if how.dropout else OPERATORS["cpu"]
    name = cuda_operator(query, mask, how.dropout) if query.device.type == "cuda" else None
    return None if name is None else OPERATORS[name]


def cuda_operator(query: Tensor, mask: Tensor | None, dropout: float) -> str | None:
    # Not torch.backends.cuda.can_use_*: a compiler cannot trace their argument.
    generation, width = _generation(), query.shape[-1]
    full = query.dtype == torch.float32
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and width % 8 == 0 and generation >= 8:
        # On these, cuDNN is far ahead of flash on many queries. The numbers mean others on ROCm.
        ahead = generation in (9, 10) and torch.version.hip is None and query.shape[2] > 1
        if ahead and width <= 128 and not dropout and _enabled("cudnn"):
            return "cudnn"
        if mask is None and width <= 256 and _enabled("flash"):
            return "flash"
    halved = half and (generation >= 8 or query.dtype == torch.float16)
    fits = (full and width % 4 == 0) or (halved and width % 8 == 0)
    return "efficient" if fits and _enabled("mem_efficient") else None


# --- the same in one kernel on a GPU -------------------------------------------------------------


# From how many numbers on, by how many tensors sinks are. Launching a kernel of ours takes as long
# as six of torch's: it pays where it stands for more of them, or where there is much to read.
FUSED_FROM = {1: 2**18, 2: 1}


def fusible(sinks: Sinks, *wide: Tensor) -> bool:
    """Whether a kernel of ours may read tensors, and should. A compiler makes its own kernels."""
    if triton is None or wide[0].device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return wide[0].numel() >= FUSED_FROM[len(sinks)] and all(t.stride(-1) == 1 for t in wide)


def _launch(
    kernel: Any, query: Tensor, sinks: Sinks, scale: float, lse: Tensor, *wide: Tensor
) -> Tensor:
    """Run a kernel over tensors (batch, heads, rows, width), a block of rows of a head at a time.

    Gives what it finds about sinks: a number for every row where they are logits, else for every
    block the sums over its rows, (keys and values, blocks * batch, heads, n, width).
    """
    batch, heads, rows, width = query.shape
    columns = triton.next_power_of_2(width)
    block = max(16, 4096 // columns) if rows >= 64 else 16
    blocks = -(-rows // block)
    keyed = len(sinks) == 2
    count = sinks[0].shape[1] if keyed else 0
    # Query heads of a KV head, or sinks of a head: there it stands for several query heads.
    each = heads // len(sinks[0]) if keyed else len(sinks[0]) // heads
    size = (2, blocks * batch, heads, count, width) if keyed else lse.shape
    found = lse.new_empty(size if kernel is _part_rows else 0)
    strides = [stride for tensor in (lse, query, *wide) for stride in tensor.stride()[:3]]
    here = query.get_device()
    # Entering the device takes as long as the launch, and it is nearly always the current one.
    elsewhere = here >= 0 and here != torch.cuda.current_device()
    with torch.cuda.device(here) if elsewhere else nullcontext():
        kernel[batch * heads, blocks](
            sinks[0].contiguous(), sinks[-1].contiguous(), found, lse, query, *wide, *strides,
            scale, heads, rows, each, count, width, block, columns,
        )  # fmt: skip
    return found


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _tile(pointer, sb, sh, sr, heads, block: tl.constexpr):  # type: ignore[no-untyped-def]
        """Pointers to the rows of this program: (block,)."""
        both = tl.program_id(0).to(tl.int64)
        rows = tl.program_id(1) * block + tl.arange(0, block)
        return pointer + (both // heads) * sb + (both % heads) * sh + rows * sr

    @triton.jit  # type: ignore[untyped-decorator]
    def _sink(  # type: ignore[no-untyped-def]
        pointer, index, heads, each, count: tl.constexpr, width: tl.constexpr, column
    ):  # fmt: skip
        """A key or value of the KV head of this program: (1, columns)."""
        place = ((tl.program_id(0) % heads) // each * count + index) * width + column
        return tl.load(pointer + place, mask=column < width, other=0.0).to(tl.float32)[None]

    @triton.jit  # type: ignore[untyped-decorator]
    def _logit(pointer, heads, each, mine, block: tl.constexpr):  # type: ignore[no-untyped-def]
        """The sink of this program's head, or of each of its rows: (block,)."""
        rows = tl.program_id(1) * block + tl.arange(0, block)
        place = (tl.program_id(0) % heads) * each + rows % each
        return tl.load(pointer + place, mask=mine, other=0.0).to(tl.float32)

    @triton.jit  # type: ignore[untyped-decorator]
    def _join_rows(  # type: ignore[no-untyped-def]
        keys, values, _, lse, query, out, lb, lh, lr, qb, qh, qr, ob, oh, orow, scale, heads,
        rows, each, count: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
        columns: tl.constexpr,
    ):  # fmt: skip
        """One sink after the other takes its share: it is as if the text had one key more."""
        mine = tl.program_id(1) * block + tl.arange(0, block) < rows
        column = tl.arange(0, columns)
        inside = mine[:, None] & (column < width)[None]
        place = _tile(out, ob, oh, orow, heads, block)[:, None] + column[None]
        row = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        line = _tile(lse, lb, lh, lr, heads, block)
        total = tl.load(line, mask=mine, other=0.0)
        if count == 0:
            logit = _logit(keys, heads, each, mine, block)
            row = row * tl.sigmoid(total - logit)[:, None]
            total = tl.maximum(total, logit) + tl.log(1 + tl.exp(-tl.abs(total - logit)))
        else:
            asked = _tile(query, qb, qh, qr, heads, block)[:, None] + column[None]
            ask = tl.load(asked, mask=inside, other=0.0).to(tl.float32) * scale
            for index in range(count):
                key = _sink(keys, index, heads, each, count, width, column)
                value = _sink(values, index, heads, each, count, width, column)
                logit = tl.sum(ask * key, 1)
                row = row * tl.sigmoid(total - logit)[:, None]
                row += value * tl.sigmoid(logit - total)[:, None]
                total = tl.maximum(total, logit) + tl.log(1 + tl.exp(-tl.abs(total - logit)))
        tl.store(place, row.to(out.dtype.element_ty), mask=inside)
        tl.store(line, total, mask=mine)

    @triton.jit  # type: ignore[untyped-decorator]
    def _part_rows(  # type: ignore[no-untyped-def]
        keys, values, found, lse, query, out, gradient, of_query, lb, lh, lr, qb, qh, qr, ob, oh,
        orow, gb, gh, gr, db, dh, dr, scale, heads, rows, each, count: tl.constexpr,
        width: tl.constexpr, block: tl.constexpr, columns: tl.constexpr,
    ):  # fmt: skip
        """The part of every row, or of these rows together, in the gradients of sinks."""
        mine = tl.program_id(1) * block + tl.arange(0, block) < rows
        column = tl.arange(0, columns)
        inside = mine[:, None] & (column < width)[None]
        place = _tile(gradient, gb, gh, gr, heads, block)[:, None] + column[None]
        slope = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        place = _tile(out, ob, oh, orow, heads, block)[:, None] + column[None]
        product = tl.sum(slope * tl.load(place, mask=inside, other=0.0).to(tl.float32), 1)
        total = tl.load(_tile(lse, lb, lh, lr, heads, block), mask=mine, other=0.0)
        if count == 0:
            part = -product * tl.exp(_logit(keys, heads, each, mine, block) - total)
            tl.store(_tile(found, heads * rows, rows, 1, heads, block), part, mask=mine)
        else:
            place = _tile(query, qb, qh, qr, heads, block)[:, None] + column[None]
            ask = tl.load(place, mask=inside, other=0.0).to(tl.float32) * scale
            place = _tile(of_query, db, dh, dr, heads, block)[:, None] + column[None]
            row = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            program = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
            half = count * width * tl.num_programs(1) * tl.num_programs(0).to(tl.int64)
            for index in range(count):
                key = _sink(keys, index, heads, each, count, width, column)
                value = _sink(values, index, heads, each, count, width, column)
                weight = tl.exp(tl.sum(ask * key, 1) - total)
                pull = weight * (tl.sum(slope * value, 1) - product)
                row += pull[:, None] * key * scale
                part = found + (program * count + index) * width + column
                tl.store(part, tl.sum(pull[:, None] * ask, 0), mask=column < width)
                tl.store(part + half, tl.sum(weight[:, None] * slope, 0), mask=column < width)
            tl.store(place, row.to(of_query.dtype.element_ty), mask=inside)
