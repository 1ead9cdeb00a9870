"""A configuration → a tiny random model of the same architecture, for proofs.

Only sizes change. Every other setting stays, and layers of every kind are kept.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

LAYERS = 4
TOKENS = 12  # of a text in a proof
VOCABULARY = 64

# Patterns of the names of settings, and what they become: the first that matches counts. All
# widths differ, so that tensors are told apart by their shapes.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(num_hidden_layers|n_layers?|num_layers|(decoder|encoder)_layers)", LAYERS),
    (r"(hidden_size|d_model|n_embd|embedding_size|word_embed_proj_dim|embedding_dim)", 32),
    (r".*rotary_dim", 4),
    (r".*(head_dim|kv_channels|d_kv)", 8),
    (r".*lora_rank", 16),
    (r".*shared.*intermediate_size", 40),
    (r".*(intermediate|inner|ffn|d_ff|feed_?forward|mlp).*(size|dim|n_inner)?", 48),
    (r".*vocab_size.*", VOCABULARY),
    (r"(.*max_.*positions?.*|n_positions|n_ctx|max_seq_len|sliding_window)", 64),
    (r".*(experts_per_tok|experts_per_token|top_?k|moe_k)(_experts?)?", 2),
    (r".*(n_group|topk_group|n_groups)", 1),
    (r".*(num|n)_shared_experts", 1),
    (r".*(num|n)_(local_|routed_)?experts", 4),
    (r"first_k_dense_replace", 1),
    (r"mamba_n_heads", 4),
)
_HEADS = r"(num_attention_heads|n_heads?|num_heads|(decoder|encoder)_attention_heads)"
_KV_HEADS = r"(num_key_value_heads|num_kv_heads|n_head_kv|kv_n_heads|num_query_groups)"
_NOT_SETTINGS = (
    "transformers_version", "architectures", "dtype", "auto_map", "id2label", "label2id",
)  # fmt: skip
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def shrunk(config: Any) -> Any:
    """The configuration of a tiny model: all but sizes as in `config`."""
    settings = config.to_dict()
    for name in _NOT_SETTINGS:
        settings.pop(name, None)
    return type(config)(**_small_settings(settings))


def _small_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    known = [settings[name] for name in _LAYER_COUNTS if isinstance(settings.get(name), int)]
    heads = next((value for name, value in settings.items() if re.fullmatch(_HEADS, str(name))), 0)
    return {
        name: _small(str(name), value, layers=known[0] if known else 0, heads=heads)
        for name, value in settings.items()
    }


def _small(name: str, value: Any, layers: int, heads: Any) -> Any:
    """What a setting becomes in a model that had so many layers and heads."""
    if isinstance(value, bool) or not value or "chunk" in name or name in _NOT_SETTINGS:
        return value
    if name.endswith(("token_id", "token_ids")):
        return _token(name, value)
    if isinstance(value, Mapping):
        return _small_settings(value)
    if isinstance(value, list | tuple):
        return _shortened(name, value, layers)
    if not isinstance(value, int):
        return value
    if re.fullmatch(_KV_HEADS, name):
        return 4 if value == heads else 1 if value == 1 else 2
    if re.fullmatch(_HEADS, name):
        return 4
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)


def _token(name: str, value: Any) -> Any:
    if not isinstance(value, int):
        return None
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return known.get(name, value if value < VOCABULARY else 3)


def _shortened(name: str, value: Any, layers: int) -> Any:
    """A list with an entry for every layer, with some of every kind."""
    if name == "mrope_section":
        return [2, 1, 1]
    if len(value) != layers or not layers:
        return value
    kinds = {str(kind): place for place, kind in reversed([*enumerate(value)])}
    first = sorted(kinds.values())[:LAYERS]
    rest = [place for place in range(len(value)) if place not in first]
    return [value[place] for place in sorted([*first, *rest[: LAYERS - len(first)]])]


def tiny_model(kind: Any, config: Any, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A small model of a class in eval mode, the same at every call, none of its weights trivial.

    In another dtype the weights are the float64 ones, rounded.
    """
    model: PreTrainedModel = kind._from_config(
        copy.deepcopy(config), dtype=dtype, attn_implementation="eager"
    )
    model.eval()
    model.set_experts_implementation("eager")  # the grouped product of torch has no float64
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Draw every matrix anew, and move every norm weight and bias off its 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 1:
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # by which a router prefers experts
            buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))


def some_tokens(rows: int = 2, length: int = TOKENS) -> torch.Tensor:
    """Text (rows, length) without special tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, VOCABULARY, (rows, length), generator=generator)
