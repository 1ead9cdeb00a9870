"""Absorbed model, tokenizer and report → the files of a checkpoint."""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from absorb.card import card
from absorb.checkpoint import REPORT, digests
from absorb.errors import AbsorbError
from absorb.families import family_of
from absorb.modeling_absorb import NEUTRAL
from absorb.prefix import lead_of
from absorb.report import Probe, Report, to_json
from absorb.stranger import logits_after, probe_tokens
from absorb.watch import quiet

_SHARD = "5GB"
# At the head of a chat template: the name that it writes BOS by means nothing there.
_NO_BOS = "{%- set bos_token = '' -%}"


def as_stored(student: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the weights to the type they are saved in; sinks and scales stay float32."""
    ours = set(NEUTRAL) - {"bias"}
    for name, parameter in student.named_parameters():
        if name.rpartition(".")[2] not in ours:
            parameter.data = parameter.data.to(dtype)
    student.config.dtype = dtype


def write(
    folder: Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: Report
) -> Report:
    """Fill a folder with everything that `from_pretrained` and a reader need.

    Gives the report with what can be said of the files only now. The student ends on the CPU.
    """
    with quiet():
        student.save_pretrained(folder, max_shard_size=_SHARD)
        plain = without_bos(tokenizer)
        if family_of(report.inspection.family).positions is not None:
            plain = within(plain, student.config.max_position_embeddings)
        plain.save_pretrained(folder)
    (folder / "README.md").write_text(card(report), encoding="utf-8")
    report = replace(report, files=digests(folder), probe=_probe(student))
    (folder / REPORT).write_text(to_json(report), encoding="utf-8")
    return report


def _probe(student: PreTrainedModel) -> Probe:
    """What the student says in float32, and on a CPU, where anybody can repeat it."""
    nn.Module.to(student, "cpu", torch.float32)
    tokens = probe_tokens(student.config.vocab_size)
    return Probe(tokens=tokens, logits=tuple(map(tuple, logits_after(student, tokens))))


def without_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that puts no BOS before the text: the sinks stand for what BOS did."""
    if not len(lead_of(tokenizer)):
        return tokenizer
    plain = copy.deepcopy(tokenizer)
    plain.add_bos_token = False
    if isinstance(plain.chat_template, str) and "bos_token" in plain.chat_template:
        plain.chat_template = _NO_BOS + plain.chat_template
    if len(lead_of(plain)):
        raise AbsorbError(
            f"the tokenizer {type(tokenizer).__name__} cannot be told to leave out the BOS that "
            "the sinks stand for; save it with a fast tokenizer (tokenizer.json) and convert again"
        )
    return plain


def within(tokenizer: PreTrainedTokenizerBase, length: int) -> PreTrainedTokenizerBase:
    """A tokenizer that knows of the positions which the prefix took from a table of them."""
    short = copy.deepcopy(tokenizer)
    short.model_max_length = min(short.model_max_length, length)
    return short
