"""A native granite_swa folder → one .gguf file for llama.cpp.

The package gguf does not know the architecture by name, and needs not: it is a word in the header.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from absorb.errors import AbsorbError
from absorb.load.files import weight_files
from absorb.schema.settings import Weights
from absorb.ship.export.native import Tensors
from absorb.ship.export.vocabulary import Vocabulary, vocabulary

ARCHITECTURE = "granite_swa"
# One set of frequencies, whatever the length of a text: llama.cpp goes by the length of its context
# where there are two, and has no dynamic ones.
_ROTATIONS = {"default", "linear", "yarn", "llama3"}
_TYPES: dict[Weights, tuple[Kind, LlamaFileType]] = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
}
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FREQUENCIES = "rope_freqs.weight"


def refuse(config: PretrainedConfig) -> None:
    """Refuse what llama.cpp cannot run, by name, before anything is written."""
    if config.model_type != ARCHITECTURE:
        raise AbsorbError(f"llama.cpp does not know {config.model_type}; export it by --to native")
    kind = config.rope_parameters["rope_type"]
    if kind not in _ROTATIONS:
        raise AbsorbError(
            f"this model has RoPE of the kind {kind}, and llama.cpp rotates by another rule; "
            "export it by --to native"
        )
    if config.hidden_act != "silu":
        raise AbsorbError(
            f"this model has the activation {config.hidden_act}, and llama.cpp has silu in "
            f"{ARCHITECTURE}; export it by --to native"
        )


def write(file: Path, native: Path, weights: Weights, title: str, license_: str | None) -> None:
    """Write the model in the folder `native` as a .gguf file."""
    config = AutoConfig.from_pretrained(native)
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    writer.add_name(title)
    if license_ is not None:
        writer.add_license(license_)
    writer.add_file_type(_TYPES[weights][1])
    _add_settings(writer, config)
    _add_tokenizer(writer, native, vocabulary(native, config.vocab_size, title))
    with ExitStack() as stack:
        _write_tensors(writer, Tensors(weight_files(native, title), stack), config, weights)


def _add_settings(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_logit_scale(config.logits_scaling)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_sliding_window(config.sliding_window)
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    writer.add_sliding_window_pattern(slides)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_scaling_attn_factors(_frequencies(config)[1])
    rotated = [theta != 0 for theta in config.layer_rope_theta]
    writer.add_array(f"{ARCHITECTURE}.attention.rope_pattern", rotated)


def _frequencies(config: PretrainedConfig) -> tuple[Tensor, float]:
    """What the frequencies of plain RoPE are divided by, and what rotated vectors are times."""
    theta, dim = config.rope_parameters["rope_theta"], config.head_dim
    plain = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return torch.ones(dim // 2), 1.0
    scaled, size = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return (plain / scaled).float(), float(size)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, words: Vocabulary) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    if words.scores:
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.space_first)
    else:
        writer.add_token_merges(words.merges)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    roles: dict[str, Callable[[int], None]] = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "pad": writer.add_pad_token_id,
        "unk": writer.add_unk_token_id,
    }
    for role, add in roles.items():
        token = getattr(tokenizer, f"{role}_token_id")
        if token is not None:
            add(token)
    # The sinks stand for it. llama.cpp adds one to SentencePiece models unless it is told.
    writer.add_add_bos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _write_tensors(
    writer: gguf.GGUFWriter, tensors: Tensors, config: PretrainedConfig, weights: Weights
) -> None:
    """Headers of all tensors first, then one after the other."""
    kinds = {}
    for name in tensors:
        # Sinks, biases and norms are a few numbers that everything else depends on.
        kinds[name] = _TYPES[weights][0] if len(tensors.shape(name)) == 2 else Kind.F32
        size = 4 if kinds[name] == Kind.F32 else 2
        count = int(np.prod(tensors.shape(name)))
        writer.add_tensor_info(
            _renamed(name), tensors.shape(name), np.dtype("f4"), size * count, kinds[name]
        )
    factors, scaled = _frequencies(config)[0], config.rope_parameters["rope_type"] != "default"
    if scaled:
        writer.add_tensor_info(
            _FREQUENCIES, factors.shape, np.dtype("f4"), factors.nbytes, Kind.F32
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind in kinds.items():
        writer.write_tensor_data(_stored(name, _ordered(name, tensors[name], config), kind))
    if scaled:
        writer.write_tensor_data(factors.numpy())
    writer.close()


def _renamed(name: str) -> str:
    stem, _, last = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{last}"
    _, _, layer, inside = stem.split(".", 3)
    if last == "sinks":
        return f"blk.{layer}.attn_sinks.weight"
    return f"blk.{layer}.{_INSIDE[inside]}.{last}"


def _ordered(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    """Queries and keys as llama.cpp rotates them: neighbours, and not the halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return tensor
    halves = tensor.view(count, 2, config.head_dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _stored(name: str, tensor: Tensor, kind: Kind) -> NDArray[Any]:
    values: NDArray[Any] = tensor.float().contiguous().numpy()
    stored: NDArray[Any] = gguf.quants.quantize(values, kind)
    if kind == Kind.F16 and not np.isfinite(stored).all():
        raise AbsorbError(f"{name} overflows float16; export it by --type bf16 or --type f32")
    return stored
