"""The post-processor of a fast tokenizer, which puts tokens around a text, without its lead.

Its JSON is that of tokenizer.json (tokenizers/src/processors).
"""

import json
from typing import Any

from tokenizers import Tokenizer

Processor = dict[str, Any]
_NO_WORDS = {"type": "BPE", "vocab": {}, "merges": []}


def without_lead(processor: Any, lead: list[int]) -> Any:
    """A post-processor that puts no `lead` before the first text, and all else where it was."""
    edited = _edited(json.loads(processor.__getstate__()), lead)
    whole = {"version": "1.0", "added_tokens": [], "model": _NO_WORDS, "post_processor": edited}
    return Tokenizer.from_str(json.dumps(whole)).post_processor


def _edited(processor: Processor, lead: list[int]) -> Processor:
    kind = processor["type"]
    if kind == "Sequence":
        return {**processor, "processors": [_edited(one, lead) for one in processor["processors"]]}
    if kind == "BertProcessing":
        return _edited(_as_template(processor, second=1, between=[]), lead)
    if kind == "RobertaProcessing":
        between = [_special(processor["sep"][0], 0)]
        template = _edited(_as_template(processor, second=0, between=between), lead)
        return {"type": "Sequence", "processors": [_offsets(processor), template]}
    if kind != "TemplateProcessing":
        return processor
    known = processor["special_tokens"]
    ways = {way: _cut(processor[way], known, lead) for way in ("single", "pair")}
    return {**processor, **ways}


def _cut(pieces: list[Processor], known: Processor, lead: list[int]) -> list[Processor]:
    """The pieces of a template without those before the text, where these are the lead."""
    first = next((i for i, piece in enumerate(pieces) if "Sequence" in piece), 0)
    ids = [token for piece in pieces[:first] for token in _token(piece, known)["ids"]]
    return pieces[first:] if ids == lead else pieces


def _token(piece: Processor, known: Processor) -> Processor:
    token: Processor = known[piece["SpecialToken"]["id"]]
    return token


def _as_template(processor: Processor, second: int, between: list[Processor]) -> Processor:
    """BERT's or RoBERTa's processing, which has no parts to take out, as a template.

    `second` is the type of the second text, and `between` what more stands between the two.
    """
    ends, begins = processor["sep"], processor["cls"]
    single = [_special(begins[0], 0), _text("A", 0), _special(ends[0], 0)]
    known = {
        token: {"id": token, "ids": [number], "tokens": [token]} for token, number in (ends, begins)
    }
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *between, _text("B", second), _special(ends[0], second)],
        "special_tokens": known,
    }


def _special(token: str, kind: int) -> Processor:
    return {"SpecialToken": {"id": token, "type_id": kind}}


def _text(name: str, kind: int) -> Processor:
    return {"Sequence": {"id": name, "type_id": kind}}


def _offsets(processor: Processor) -> Processor:
    """What RoBERTa's processing does to offsets."""
    told = {key: processor[key] for key in ("add_prefix_space", "trim_offsets")}
    return {"type": "ByteLevel", "use_regex": True, **told}
