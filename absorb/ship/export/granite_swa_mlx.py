"""granite_swa for MLX: a dense decoder whose attention has a sink logit for each head, and biases.

mlx-lm runs this file where config.json names it as `model_file` and its user trusts it. It needs
mlx-lm and nothing else.
"""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import (
    BaseModelArgs,
    create_attention_mask,
    scaled_dot_product_attention,
)
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.rope_utils import initialize_rope


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    layer_types: list[str]
    layer_rope_theta: list[float]
    sliding_window: int
    rope_parameters: dict[str, Any]
    attention_multiplier: float
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    slides: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slides = [kind == "sliding_attention" for kind in self.layer_types]


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = args.num_attention_heads, args.num_key_value_heads
        self.scale = args.attention_multiplier
        hidden, dim = args.hidden_size, args.head_dim
        self.q_proj = nn.Linear(hidden, self.heads * dim)
        self.k_proj = nn.Linear(hidden, self.kv_heads * dim)
        self.v_proj = nn.Linear(hidden, self.kv_heads * dim)
        self.o_proj = nn.Linear(self.heads * dim, hidden)
        self.sinks = mx.zeros((self.heads,))
        theta = args.layer_rope_theta[layer]
        self.rope = None
        if theta:  # a layer without RoPE has 0
            self.rope = initialize_rope(
                dim, theta, False, args.rope_parameters, args.max_position_embeddings
            )

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        batch, length, _ = x.shape

        def heads(projected: mx.array, count: int) -> mx.array:
            return projected.reshape(batch, length, count, -1).swapaxes(1, 2)

        query = heads(self.q_proj(x), self.heads)
        key = heads(self.k_proj(x), self.kv_heads)
        value = heads(self.v_proj(x), self.kv_heads)
        if self.rope is not None:
            offset = 0 if cache is None else cache.offset
            query, key = self.rope(query, offset=offset), self.rope(key, offset=offset)
        if cache is not None:
            key, value = cache.update_and_fetch(key, value)
        sinks = self.sinks.astype(query.dtype)
        out = scaled_dot_product_attention(
            query, key, value, cache=cache, scale=self.scale, mask=mask, sinks=sinks
        )
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        hidden, inner, bias = args.hidden_size, args.intermediate_size, args.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(args, layer), MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.share = args.residual_multiplier

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache) * self.share
        return x + self.mlp(self.post_attention_layernorm(x)) * self.share


class Inner(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Layer(args, index) for index in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.embed_tokens(inputs) * self.args.embedding_multiplier
        caches = cache or [None] * len(self.layers)
        window = self.args.sliding_window
        masks: dict[bool, Any] = {}
        for slides, one in zip(self.args.slides, caches, strict=True):
            if slides not in masks:
                masks[slides] = create_attention_mask(x, one, window if slides else None)
        for layer, slides, one in zip(self.layers, self.args.slides, caches, strict=True):
            x = layer(x, masks[slides], one)
        return self.norm(x)


class Model(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.model = Inner(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        x = self.model(inputs, cache)
        tied = self.args.tie_word_embeddings
        head = self.model.embed_tokens.as_linear if tied else self.lm_head
        return head(x) / self.args.logits_scaling

    @property
    def layers(self) -> list[Layer]:
        return self.model.layers

    def make_cache(self) -> list[Any]:
        window = self.args.sliding_window
        return [RotatingKVCache(window) if slides else KVCache() for slides in self.args.slides]
