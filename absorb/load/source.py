"""ModelRef → Source: the model to convert or evaluate, checked, in float32, with its tokenizer.

What can be refused from the configuration and the list of files is refused before any weight is
downloaded or read.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from absorb.errors import AbsorbError
from absorb.load import checks, download, gguf_file, wrapped
from absorb.load.unlisted import outlined
from absorb.models import modeling_absorb
from absorb.models.family import Family
from absorb.runtime.quiet import quiet_load
from absorb.schema.settings import ModelRef, expanded

DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"
_ALIGNMENT = 64  # bytes, of what torch allocates on a CPU
_FINGERPRINT_VALUES = 4096  # of each parameter, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model, ready to be measured: a stock one, unless a converted one was asked for as well."""

    name: str  # for people, and for `base_model` on a model card; never a path
    model: PreTrainedModel  # float32, on the CPU, in eval mode
    tokenizer: PreTrainedTokenizerBase
    family: Family
    dtype: torch.dtype  # that most weights were stored in; float32 for a quantised .gguf file
    license: str | None
    commit: str | None  # of the Hub repository

    @property
    def converted(self) -> bool:
        return isinstance(self.model, modeling_absorb.Absorbed)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the parameters: their names, shapes, and some thousand values of each.

        It takes a fraction of a second, and no two trainings have it in common. Rounding the
        weights changes it.
        """
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            every = -(-parameter.numel() // _FINGERPRINT_VALUES)
            values = parameter.detach().flatten()[::every].cpu().contiguous()
            digest.update(f"{name} {tuple(parameter.shape)} ".encode() + values.numpy().tobytes())
        return digest.hexdigest()


def load(ref: ModelRef, *, measured: bool = False) -> Source:
    """The model that `ref` names, or an AbsorbError that says why not.

    Where it is only to be measured, a model that absorb has converted will do, and one of an
    architecture that it does not know.
    """
    source = _read(ref, measured)
    checks.refuse_non_finite(source.model, source.name)
    checks.refuse_unusable(source.model, source.tokenizer, source.name)
    if getattr(source.model.config, "attn_logit_softcapping", None):
        # Other stock attention may leave the cap out and say nothing.
        source.model.set_attn_implementation("eager")
    source.model.config.name_or_path = source.name
    source.tokenizer.name_or_path = source.name
    return source


def _read(ref: ModelRef, measured: bool) -> Source:
    path = expanded(ref.name)
    if ref.name != "demo" and not path.exists() and download.is_repository(ref.name):
        return _from_hub(ref, measured)
    if ref.revision is not None:
        raise AbsorbError(
            f"{ref.name} is not a Hub repository and has no revisions; drop --revision"
        )
    if ref.text_only and not path.is_dir():
        raise AbsorbError(f"{ref.name} is a language model and nothing else; drop --text-only")
    if ref.name == "demo":
        return _from_gguf(gguf_file.demo(), DEMO)
    if path.is_dir():
        return _from_folder(path, ref, path.resolve().name, None, measured)
    if path.is_file():
        return _from_gguf(path, path.name)
    raise AbsorbError(
        f"{ref.name} does not exist; name a Hub repository (owner/name), a folder, a .gguf file "
        "or demo"
    )


def _tokenizer(folder: Path, ref: ModelRef) -> Any:
    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=ref.trust_remote_code
        )
    except ValueError as error:
        if "trust_remote_code=True" not in str(error):
            raise
        raise AbsorbError(
            f"{ref.name} brings a tokenizer with code of its own, which is not run unasked; "
            "read that code, then pass --trust-remote-code"
        ) from None


def _from_hub(ref: ModelRef, measured: bool) -> Source:
    folder = download.description(ref)
    ref = _or_part(ref, folder, measured)
    checks.family_in(folder, ref.name, measured, ref.text_only)
    commit = folder.name  # the cache keeps every commit in a folder of its name
    return _from_folder(download.weights(ref, commit), ref, ref.name, commit, measured)


def _or_part(ref: ModelRef, folder: Path, measured: bool) -> ModelRef:
    """What is only measured reads text, so of a whole it is the language model inside."""
    whole = measured and checks.has_part(folder, ref.name)
    return replace(ref, text_only=True) if whole else ref


def _from_folder(
    folder: Path, ref: ModelRef, name: str, commit: str | None, measured: bool
) -> Source:
    ref = _or_part(ref, folder, measured)
    family = checks.family_in(folder, ref.name, measured, ref.text_only)
    files = checks.weight_files(folder, ref.name)
    elements, tensors = checks.stored_elements(files)
    dtype = checks.stored_dtype(elements, ref.name)
    checks.refuse_deeper(folder, tensors, ref.name)
    with checks.unchanged(files), checks.reading(ref.name), quiet_load(files):
        tokenizer = _tokenizer(folder, ref)
        kind = _class_of(folder, ref.text_only)
        checks.refuse_larger(_outline(kind, folder), elements.total(), ref.name)
        loading: Any = kind.from_pretrained(
            folder,
            disable_mmap=True,  # a file that is written to later must not change the weights
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are in `info`, and refused by name
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    model, info = loading
    checks.refuse_mismatch(info, model, ref.name)
    if ref.text_only:
        model = wrapped.taken_out(model, ref.name)
        if family is not None:
            # Some wholes change settings of their part unknown to config.json, as PaliGemma does.
            family = checks.family_of_config(model.config.to_dict(), ref.name)
    _align(model)
    if family is None:
        with checks.reading(ref.name):
            family = outlined(model, ref.name)
    return Source(
        name=name,
        model=model,
        tokenizer=tokenizer,
        family=family,
        dtype=dtype,
        license=_license(folder),
        commit=commit,
    )


@torch.no_grad()
def _align(model: PreTrainedModel) -> None:
    """Move weights that lie just anywhere to where torch puts its own.

    What is read as it is stored stays in the bytes of its file, wherever these begin, and the last
    bit of a product depends on that: two runs would differ.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def _outline(kind: Any, folder: Path) -> PreTrainedModel:
    """The model that the configuration of a folder describes, without memory for its weights."""
    config = kind.config_class.from_pretrained(folder)
    with torch.device("meta"):
        outline: PreTrainedModel = kind(config)
    return outline


def _class_of(folder: Path, text_only: bool) -> Any:
    """What loads the model of a folder: a class of transformers, or our own on top of one.

    Never the model's own code, trusted or not: a family describes the stock class.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if text_only:
        return wrapped.whole_class(config["model_type"])
    converted = checks.stock_type(config)
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[converted or config["model_type"]]]
    return modeling_absorb.absorbed(stock) if converted else stock


def _from_gguf(path: Path, name: str) -> Source:
    # Linked into a folder of its own, lest transformers read tokenizer files that lie beside it.
    with TemporaryDirectory() as folder, checks.reading(name), quiet_load([path]):
        link = Path(folder, "model.gguf")
        link.symlink_to(path.resolve())
        with gguf_file.parsed_once():
            header = gguf_file.header(link, name)
            config = gguf_file.config(link, header, name)
            family = checks.family_of_config(config.to_dict(), name)
            tokenizer = gguf_file.tokenizer(link, header, name)
            model, info = gguf_file.model(link, config)
        checks.refuse_mismatch(info, model, name)
        gguf_file.refuse_unread(header, model, name)
    return Source(
        name=name,
        model=model,
        tokenizer=tokenizer,
        family=family,
        dtype=gguf_file.stored_dtype(header),
        license=gguf_file.text(header, "general.license"),
        commit=None,
    )


def _license(folder: Path) -> str | None:
    """The `license` in the front matter of a model card."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*(\S+)", front[1], re.MULTILINE) if front else None
    return found[1].strip("\"'") if found else None
