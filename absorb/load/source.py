"""ModelRef → Source: the model to convert or evaluate, checked, in float32, with its tokenizer.

What can be refused from the configuration and the list of files is refused before any weight is
downloaded or read.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.load import checks, download, gguf_file, session, wrapped
from absorb.load import files as stored
from absorb.load.architecture.classes import (
    Prover,
    class_of,
    config_class,
    family_of_folder,
    settled,
)
from absorb.load.forecast import forecast, most_of, refuse_deeper, refuse_mismatch
from absorb.load.opening.tokenizer import without_bos
from absorb.load.vocabulary import read_tokenizer
from absorb.models import modeling_absorb
from absorb.models.decoder import Decoder
from absorb.models.family import Family
from absorb.models.resting.streaming import Streaming
from absorb.models.whole import Whole
from absorb.runtime import ranks
from absorb.runtime.precision import ADDED, free_memory
from absorb.runtime.quiet import quiet_load
from absorb.schema.places import expanded
from absorb.schema.proof import Proof
from absorb.schema.settings import ModelRef

DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"
_ALIGNMENT = 64  # bytes, of what torch allocates on a CPU
_FINGERPRINT_VALUES = 4096  # of each parameter, at most
# What a conversion holds of a model at once, in bytes a weight: the original, the student, another
# student with logits alone, the weights before they were rounded, and what a layer computes. To
# train all of the student it holds gradients, what AdamW remembers, the best step, and copies.
HELD, HELD_TO_TRAIN = 20, 48
_SPARE = 4  # weights rest on the device where it has so many times the room


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model, ready to be measured: a stock one, unless a converted one was asked for as well."""

    name: str  # for people, and for `base_model` on a model card; never a path
    model: PreTrainedModel  # float32, on the CPU, in eval mode
    tokenizer: PreTrainedTokenizerBase
    family: Family
    dtype: torch.dtype  # that most weights were stored in; float32 for a quantised .gguf file
    # That every single parameter was stored in, by its name; where there is none, `dtype`.
    types: Mapping[str, torch.dtype] = field(default_factory=dict)
    license: str | None
    commit: str | None  # of the Hub repository
    streaming: Streaming | None = None
    whole: Whole | None = None  # that it was taken out of, and is to be written with
    proof: Proof | None = None  # of a family without an entry in FAMILIES

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.model, self.family, self.streaming, is_part=self.whole is not None)

    def placed(self, device: torch.device, room: int, held: int) -> "Source":
        """The source with its model on a device, or with weights that come there one by one.

        What is at hand takes `held` bytes a weight in all, of which the device has `room`.
        """
        if held * sum(p.numel() for p in self.model.parameters()) <= room:
            nn.Module.to(self.model, device, torch.float32)
            return self
        streaming = Streaming(self.model, self.decoder.layers, device)
        if sum(p.nbytes for p in self.model.parameters()) * _SPARE <= room:
            streaming.hold()
        return replace(self, streaming=streaming)

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
            values = parameter.detach().flatten()[::every].float().cpu().contiguous()
            digest.update(f"{name} {tuple(parameter.shape)} ".encode() + values.numpy().tobytes())
        return digest.hexdigest()


def load(
    ref: ModelRef,
    *,
    measured: bool = False,
    device: torch.device | None = None,
    held: int = HELD,
    prove: Prover | None = None,
) -> Source:
    """The model that `ref` names, or an AbsorbError that says why not.

    `prove` gives the family of a model whose architecture has no entry, by its configuration.

    Where it is only to be measured, a model that absorb has converted will do, and one of an
    architecture that it does not know. With a `device` the model is placed there; one of which it
    cannot hold so many bytes a weight stays as it is stored, in its files until it is asked for.
    """
    room = None if device is None else ranks.for_each(free_memory(device), device)
    most = None if room is None else room // held  # weights
    source = _read(ref, measured, most, prove)
    checks.refuse_non_finite(source.whole.model if source.whole else source.model, source.name)
    checks.refuse_unusable(source.model, source.tokenizer, source.name)
    if getattr(source.model.config, "attn_logit_softcapping", None):
        # Other stock attention may leave the cap out and say nothing.
        source.model.set_attn_implementation("eager")
    source.model.config.name_or_path = source.name
    source.tokenizer.name_or_path = source.name
    session.forget(source.tokenizer)
    if not measured:
        session.rehearse(source.model, without_bos(source.tokenizer), ref.name)
    return source if device is None or room is None else source.placed(device, room, held)


def _read(ref: ModelRef, measured: bool, most: int | None, prove: Prover | None) -> Source:
    path = expanded(ref.name)
    if ref.name != "demo" and not path.exists() and download.is_repository(ref.name):
        return _from_hub(ref, measured, most, prove)
    if ref.revision is not None:
        raise AbsorbError(
            f"{ref.name} is not a Hub repository and has no revisions; drop --revision"
        )
    if ref.text_only and not path.is_dir():
        raise AbsorbError(f"{ref.name} is a language model and nothing else; drop --text-only")
    if ref.name == "demo":
        return _from_gguf(gguf_file.demo(), DEMO)
    if path.is_dir():
        folder = (download.snapshot_in(path.resolve()) or path).resolve()
        name, commit = download.repository_of(folder) or (folder.name, None)
        return _from_folder(folder, ref, name, commit, measured, most, prove)
    if path.is_file():
        # Where a cache keeps the content of a file, it has no name.
        name, commit = download.repository_of(path.absolute().parent) or (path.name, None)
        return replace(_from_gguf(path, path.name), name=name, commit=commit)
    raise AbsorbError(
        f"{ref.name} does not exist; name a Hub repository (owner/name), a folder, a .gguf file "
        "or demo"
    )


def _from_hub(ref: ModelRef, measured: bool, most: int | None, prove: Prover | None) -> Source:
    folder = download.description(ref)
    family_of_folder(folder, ref, measured, prove)  # before weights are fetched
    weights = download.weights(ref, folder)
    # The cache keeps every commit in a folder of its name.
    return _from_folder(weights, ref, ref.name, folder.name, measured, most, prove)


def _from_folder(
    folder: Path,
    ref: ModelRef,
    name: str,
    commit: str | None,
    measured: bool,
    most: int | None,
    prove: Prover | None,
) -> Source:
    family, proof = family_of_folder(folder, ref, measured, prove)
    files = stored.weight_files(folder, ref.name)
    held = stored.headers(files)
    settings = stored.read_json(folder / "config.json", ref.name)
    refuse_deeper(settings, len(held), ref.name)
    with (
        stored.unchanged(files),
        stored.reading(ref.name),
        quiet_load(files),
        session.shown(folder, files, ref.name) as shown,
    ):
        kind = class_of(settings)
        config = config_class(settings, kind).from_pretrained(shown)
        tokenizer = read_tokenizer(folder, ref, config)
        expected = forecast(kind, config, held, ref.name)
        stays = most is not None and sum(one.elements for one in held.values()) > most
        dtype = _held_in(expected.types, stays, whole=wrapped.has_part(settings))
        model, info = _given(kind, config, shown, dtype, stays)
    refuse_mismatch(info, model, held, ref.name)
    types: Mapping[str, torch.dtype] = expected.types
    whole = None
    if wrapped.has_part(settings):
        narrow = dtype == torch.float64 and not stays
        model, types, whole = wrapped.part_of(model, config, types, folder, ref, measured, narrow)
    if not stays:
        _align(model)
    return Source(
        name=name,
        model=model,
        tokenizer=tokenizer,
        family=settled(family, model, settings, ref.name),
        dtype=expected.dtype if whole else most_of(model, types),
        types=types,
        license=_license(folder),
        commit=commit,
        whole=whole,
        proof=proof,
    )


def _held_in(types: Mapping[str, torch.dtype], stays: bool, whole: bool) -> torch.dtype:
    """The one type that the weights of a folder are loaded in."""
    # Sinks and scales are float32 in any model.
    stock = (held for name, held in types.items() if name.rpartition(".")[2] not in ADDED)
    widest = reduce(torch.promote_types, stock)
    # Nothing that is only copied may lose a bit.
    exact = whole and widest == torch.float64
    return widest if stays or exact else torch.float32


def _given(
    kind: Any, config: Any, folder: Path, dtype: torch.dtype, mapped: bool
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model of a folder in one type, and what transformers missed in loading it.

    Of its files only what is asked for is read, where they are `mapped`.
    """
    loading: Any = kind.from_pretrained(
        folder,
        config=config,
        # A file that is written to later must not change the weights.
        disable_mmap=not mapped,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # they are in what it missed, and refused by name
        local_files_only=True,
        output_loading_info=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    model, info = loading
    return model, info


@torch.no_grad()
def _align(model: PreTrainedModel) -> None:
    """Move weights that lie just anywhere to where torch puts its own.

    What is read as it is stored stays in the bytes of its file, wherever these begin, and the last
    bit of a product depends on that: two runs would differ.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def _from_gguf(path: Path, name: str) -> Source:
    # Linked into a folder of its own, lest transformers read tokenizer files that lie beside it.
    with TemporaryDirectory() as folder, stored.reading(name), quiet_load([path]):
        link = Path(folder, "model.gguf")
        link.symlink_to(path.resolve())
        with gguf_file.parsed_once():
            header = gguf_file.header(link, name)
            config = gguf_file.config(link, header, name)
            family = checks.family_of_config(config.to_dict(), name)
            tokenizer = gguf_file.tokenizer(link, header, name)
            model, info = gguf_file.model(link, config)
        refuse_mismatch(info, model, {}, name)
        gguf_file.refuse_unread(header, model, name)
    return Source(
        name=name,
        model=model,
        tokenizer=tokenizer,
        family=family,
        dtype=gguf_file.stored_dtype(header),
        types=gguf_file.stored_types(header, model),
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
