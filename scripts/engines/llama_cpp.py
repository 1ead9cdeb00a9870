"""What llama.cpp makes of a .gguf file, by its C interface, from the package llama-cpp-py-sync.

    python -m scripts.engines.llama_cpp logits FILE TOKENS.json OUT.npy
    python -m scripts.engines.llama_cpp quantize FILE OUT.gguf TYPE
    python -m scripts.engines.llama_cpp tokenize FILE TEXTS.json

`logits` reads rows of tokens and writes logits (rows, length, vocabulary); `tokenize` prints the
tokens of texts, as a server reads a prompt.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

ffi, lib = get_ffi(), get_lib()
TYPES = {"q8_0": 7, "q4_k_m": 15}  # enum llama_ftype


@ffi.callback("void(enum ggml_log_level, const char *, void *)")
def silent(*_: Any) -> None:
    pass


def loaded(file: str) -> Any:
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(file.encode(), settings)
    if model == ffi.NULL:
        sys.exit(f"llama.cpp does not load {file}")
    return model


def logits(file: str, tokens: str, out: str) -> None:
    rows = json.loads(Path(tokens).read_text())
    model, length = loaded(file), len(rows[0])
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = length
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # the cache in float32
    settings.flash_attn_type = 0
    context = lib.llama_init_from_model(model, settings)
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    said = []
    for row in rows:
        batch = lib.llama_batch_init(length, 0, 1)
        batch.n_tokens = length
        for place, token in enumerate(row):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        assert lib.llama_decode(context, batch) == 0
        buffer = ffi.buffer(lib.llama_get_logits(context), length * size * 4)
        said.append(np.frombuffer(buffer, np.float32).reshape(length, size).copy())
        lib.llama_batch_free(batch)
    np.save(out, np.stack(said))


def quantize(file: str, out: str, kind: str) -> None:
    settings = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    settings.nthread, settings.ftype = 1, TYPES[kind]
    assert lib.llama_model_quantize(file.encode(), out.encode(), settings) == 0


def tokenize(file: str, texts: str) -> None:
    vocabulary = lib.llama_model_get_vocab(loaded(file))
    found = []
    for text in json.loads(Path(texts).read_text()):
        words = text.encode()
        room = ffi.new("llama_token[]", len(words) + 8)
        # With what the file says is to be added, and special tokens read as such.
        count = lib.llama_tokenize(vocabulary, words, len(words), room, len(room), True, True)
        found.append([room[place] for place in range(count)])
    print(json.dumps(found))


if __name__ == "__main__":
    lib.llama_log_set(silent, ffi.NULL)
    {"logits": logits, "quantize": quantize, "tokenize": tokenize}[sys.argv[1]](*sys.argv[2:])
