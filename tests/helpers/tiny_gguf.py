"""A tiny Llama as a .gguf file, laid out as llama.cpp's converter does."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import PreTrainedModel

from tests.helpers.tiny_tokenizer import MERGES, SPECIAL, TEMPLATE, TOKENS

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
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


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    quantized: bool = False,
    tokenizer: bool = True,
    extra: Callable[[GGUFWriter], None] = lambda writer: None,
    skip: str = "",
    half: bool = False,
) -> None:
    """Write the model in float32, or its matrices in Q8_0 or float16.

    `extra` may add to it; the tensor `skip` stays out.
    """
    writer = GGUFWriter(path, "llama")
    _write_header(writer, model)
    if tokenizer:
        _write_tokenizer(writer)
    extra(writer)
    for key, parameter in model.named_parameters():
        name = _name(key)
        if name == skip:
            continue
        values = _ordered(key, parameter.detach().float().numpy(), model)
        if quantized and values.ndim == 2 and values.shape[1] % 32 == 0:  # the block size
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            narrow = half and values.ndim == 2
            writer.add_tensor(name, values.astype(numpy.float16) if narrow else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(key: str) -> str:
    for ours, theirs in NAMES.items():
        key = key.replace(ours, theirs)
    return key


def _ordered(key: str, values: numpy.ndarray, model: PreTrainedModel) -> numpy.ndarray:
    """llama.cpp rotates neighbouring channels, transformers the two halves of a head."""
    heads = {
        "q_proj": model.config.num_attention_heads,
        "k_proj": model.config.num_key_value_heads,
    }
    for projection, count in heads.items():
        if projection in key:
            halves = values.reshape(count, 2, -1, values.shape[1])
            return numpy.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    return values


def _write_header(writer: GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_name("Tiny Llama")
    writer.add_license("mit")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: GGUFWriter) -> None:
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL)
    kinds += [gguf.TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
