"""Absorbed model, tokenizer and report → the files of a checkpoint."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from absorb.load.tokenizer import within, without_bos
from absorb.models.families import family_of
from absorb.runtime.quiet import quiet
from absorb.schema.codec import to_json
from absorb.schema.report import Probe, Report
from absorb.ship.isolated import logits_after, probe_tokens
from absorb.ship.staging import REPORT, digests
from absorb.show.card import card

_SHARD = "5GB"


def write(
    folder: Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: Report
) -> Report:
    """Fill a folder with everything that `from_pretrained` and a reader need.

    Gives the report with what can be said of the files only now. The student ends on the CPU.
    """
    with quiet():
        student.save_pretrained(folder, max_shard_size=_SHARD)
        plain = without_bos(tokenizer, report.inspection.prefix)
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
