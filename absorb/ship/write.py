"""Absorbed model, tokenizer and report → the files of a checkpoint."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from absorb.load.checks import refuse_non_finite_in, refuse_unfaithful
from absorb.load.files import refuse_no_numbers
from absorb.load.opening.tokenizer import within, without_bos
from absorb.load.source import Source
from absorb.load.wrapped import TEMPLATE
from absorb.models.decoder import Decoder
from absorb.runtime.precision import stored_type
from absorb.runtime.quiet import quiet
from absorb.schema.codec import to_json
from absorb.schema.report import Probe, Report
from absorb.ship.isolated import logits_after, probe_tokens
from absorb.ship.staging import REPORT, digests
from absorb.ship.weights import help_save, save
from absorb.show.card import card


def write(folder: Path, student: Decoder, source: Source, report: Report) -> Report:
    """Fill a folder with everything that `from_pretrained` and a reader need.

    Gives the report with what can be said of the files only now. The student ends on the CPU. What
    was written is read again, and an AbsorbError says what of it nobody could use.
    """
    name, types = _name(source), _types(student, source)
    refuse = partial(refuse_non_finite_in, name=name)
    with quiet():
        model, known = save(student, folder, source.dtype, source.types, source.whole, refuse)
        model.config.dtype = source.dtype  # transformers takes that of the first weight
        model.config.save_pretrained(folder)
        plain = without_bos(source.tokenizer, report.inspection.prefix)
        if student.family.positions is not None:
            plain = within(plain, student.config.max_position_embeddings)
        plain.save_pretrained(folder)
        for file, content in processors(source, report.inspection.prefix):
            (folder / file).write_bytes(content)
        refuse_unfaithful(folder, model, types, name, known)
    (folder / "README.md").write_text(card(report), encoding="utf-8")
    report = replace(report, files=digests(folder, known), probe=_probe(student))
    (folder / REPORT).write_text(to_json(report), encoding="utf-8")
    refuse_no_numbers(folder, name, "convert with --steps 0, or choose another model")
    return report


def help_write(folder: Path, student: Decoder, source: Source) -> None:
    """What a process does for the first one, which is in `write`: it writes a share of the weights.

    None where few are to be written, and nothing to its own folder.
    """
    refuse = partial(refuse_non_finite_in, name=_name(source))
    with quiet():
        help_save(student, folder, source.dtype, source.types, source.whole, refuse)


def _name(source: Source) -> str:
    return f"the model converted from {source.name}"


def _types(student: Decoder, source: Source) -> dict[str, torch.dtype]:
    """The type that everything is to be written in, by the name that it gets."""
    parameters = student.model.named_parameters(remove_duplicate=False)
    own = {
        key: stored_type(key, source.dtype, source.types) or torch.float32 for key, _ in parameters
    }
    if source.whole is None:
        return own
    named = source.whole.name_of(student)
    others = {key: tensor.dtype for key, tensor in source.whole.others()}
    return {named(key): kind for key, kind in own.items()} | others


def processors(source: Source, prefix: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    """What reads pictures and chats, as it was, save that no chat begins with the prefix."""
    files = source.whole.files if source.whole else {}
    for name, content in files.items():
        if name == TEMPLATE:
            tokenizer = copy.copy(source.tokenizer)
            tokenizer.chat_template = json.loads(content)["chat_template"]
            plain = {"chat_template": without_bos(tokenizer, prefix).chat_template}
            content = json.dumps(plain, indent=2).encode()
        yield name, content


def _probe(student: Decoder) -> Probe:
    """What the student says in float32: on a CPU, where anybody can repeat it.

    Weights that stream come to their device all the same, as a CPU takes minutes for so many.
    """
    if student.streaming:
        stored = student.streaming.form
        # In place, as there may be no room for one more of the embedding.
        student.streaming.form = lambda weight: weight.data.copy_(stored(weight))
    else:
        nn.Module.to(student.model, "cpu", torch.float32)
    tokens = probe_tokens(student.config.vocab_size)
    logits = logits_after(student.model, tokens, student.device)
    return Probe(tokens=tokens, logits=tuple(map(tuple, logits)))
