"""More of `fuzzing`: what tokenizers put around a text, chat templates, and texts of any kind."""

import bz2
import csv
import gzip
import io
import json
import lzma
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.load import checks, session
from absorb.load.files import reading
from absorb.load.opening.tokenizer import is_failure, lead_of, leads_left, without_bos
from absorb.load.vocabulary import read_tokenizer
from absorb.schema.settings import ModelRef
from tests.helpers.fuzzing import (
    NASTY,
    TO_THE_END,
    VALUES,
    Bench,
    Draw,
    Target,
    edited,
    ends_in_order,
    garbled,
)
from tests.helpers.tiny import tiny

CHATS = (
    [{"role": "user", "content": "a b"}],
    [{"role": "system", "content": "c"}, {"role": "user", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
)
_TOKENS = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 4}


def _copied(bench: Bench, folder: Path, *names: str) -> Path:
    """A model in a folder whose files of these names may be written to."""
    model = folder / "model"
    model.mkdir()
    for file in bench.model().iterdir():
        (model / file.name).symlink_to(file)
    for name in names:
        if (model / name).exists():
            (model / name).unlink()
            shutil.copy(bench.model() / name, model / name)
    return model


def _tried(bench: Bench, draw: Draw, folder: Path, model: Path) -> None:
    """Read the tokenizer as a conversion does, or convert, and look at it.

    Reading weights takes most of the time, and they are the same in every case.
    """
    turn = draw(st.sampled_from(range(TO_THE_END)))
    if turn == TO_THE_END // 2:
        ends_in_order(folder, "convert", model, "--text", bench.long, "--steps", "0")
    elif turn % 10 == 5:
        ends_in_order(folder, "convert", model, "--plan", bench.model(), "--steps", "0")
    else:
        with suppress(AbsorbError):
            _taken(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer("a")
    except BaseException as error:  # what cannot be loaded was refused, by the command above
        if not is_failure(error):
            raise
        return
    prefix = draw(st.sampled_from([(), (1,), (1, 5), (2,), (5,)]))
    plain = without_bos(tokenizer, prefix)
    left = leads_left(tokenizer, prefix)
    lead = lead_of(tokenizer).tolist()
    assert bool(len(lead_of(plain))) == ("The tokenizer" in left)
    for text in ("a b", "", "c\nd"):
        whole, bare = (one(text)["input_ids"] for one in (tokenizer, plain))
        assert whole in (bare, lead + bare)
    _compare_chats(tokenizer, plain, prefix)


def _taken(folder: Path) -> None:
    """What load.source.load does with a tokenizer."""
    name, model = "model", _model()
    with reading(name):
        tokenizer = read_tokenizer(folder, ModelRef(name=name), model.config)
    checks.refuse_unusable(model, tokenizer, name)
    session.forget(tokenizer)
    session.rehearse(model, without_bos(tokenizer), name)


@cache
def _model() -> PreTrainedModel:
    return tiny("llama", torch.float32)


def _compare_chats(
    tokenizer: PreTrainedTokenizerBase, plain: PreTrainedTokenizerBase, prefix: tuple[int, ...]
) -> None:
    """A chat is what it was, or that without what the tokenizer or the prefix begins with."""
    lead = lead_of(tokenizer).tolist() or [*prefix[:1]]
    opening = "".join(tokenizer.convert_ids_to_tokens(lead))
    for chat in CHATS:
        before, after = (_rendered(one, chat) for one in (tokenizer, plain))
        assert after in (before, str(before).replace(opening, "", 1))


def _rendered(tokenizer: Any, chat: list[dict[str, str]]) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:
        return None


def _piece(draw: Draw) -> dict[str, Any]:
    if draw(st.booleans()):
        token = draw(st.sampled_from([*_TOKENS, "<s>", "<s>", "[none]"]))
        return {"SpecialToken": {"id": token, "type_id": draw(st.integers(0, 1))}}
    return {"Sequence": {"id": draw(st.sampled_from(["A", "A", "B"])), "type_id": 0}}


def _processor(draw: Draw, depth: int = 0) -> dict[str, Any] | None:
    kinds = ["TemplateProcessing"] * 4 + ["BertProcessing", "RobertaProcessing", "ByteLevel"]
    kind = draw(st.sampled_from([*kinds, "Sequence", "none"] if depth < 2 else kinds))
    ends = {"cls": [draw(st.sampled_from([*_TOKENS])), draw(st.integers(0, 3))], "sep": ["</s>", 2]}
    trims = {"trim_offsets": draw(st.booleans()), "add_prefix_space": draw(st.booleans())}
    if kind == "none":
        return None
    if kind == "Sequence":
        inner = [_processor(draw, depth + 1) for _ in range(draw(st.integers(0, 3)))]
        return {"type": kind, "processors": [one for one in inner if one is not None]}
    if kind == "ByteLevel":
        return {"type": kind, "use_regex": True, **trims}
    if kind != "TemplateProcessing":
        return {"type": kind, **ends, **(trims if kind == "RobertaProcessing" else {})}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    first, last = ([_piece(draw) for _ in range(draw(st.integers(0, 2)))] for _ in range(2))
    known = {
        token: {"id": token, "ids": [number] * draw(st.integers(1, 2)), "tokens": [token]}
        for token, number in _TOKENS.items()
    }
    pair = [*first, text, {"Sequence": {"id": "B", "type_id": 1}}, *last]
    single = [*first, text, *last]
    return {"type": kind, "single": single, "pair": pair, "special_tokens": known}


def _post_processor(bench: Bench, draw: Draw, folder: Path) -> None:
    model = _copied(bench, folder, "tokenizer.json", "tokenizer_config.json")
    file, settings = model / "tokenizer.json", model / "tokenizer_config.json"
    content = json.loads(file.read_text())
    processor = _processor(draw)
    damaged = processor is not None and draw(st.integers(0, 4)) == 0
    content["post_processor"] = edited(draw, processor) if damaged else processor
    file.write_text(json.dumps(content))
    told = json.loads(settings.read_text())
    told["bos_token"] = draw(st.sampled_from(["<s>", "<s>", None, "</s>", "a"]))
    kinds = ["LlamaTokenizer", "GemmaTokenizer", "GPT2Tokenizer"]
    told["tokenizer_class"] = draw(st.sampled_from([told["tokenizer_class"]] * 6 + kinds))
    settings.write_text(json.dumps(told))
    _tried(bench, draw, folder, model)


_FRAGMENTS = [
    "<s>",
    "<s>",
    "</s>",
    "{{ bos_token }}",
    "{{- bos_token -}}",
    "{{ bos_token + 'x' }}",
    "{% set bos_token = 'y' %}",
    "{% set b = bos_token %}{{ b }}",
    "{%- if tools %}<s>{%- endif %}",
    "{%+ if messages[0].role == 'system' %}<s>{% else %}z{% endif -%}",
    "{% for m in messages %}{{ bos_token if loop.first }}{{ m.content }}\n{% endfor %}",
    "{% for m in messages %}{{ m.role }}: {{ m['content'] }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% macro f(x) %}<s>{{ x }}{% endmacro %}{{ f(1) }}",
    "{{ raise_exception('no') }}",
    "{{ nothing.at.all }}",
    "{{ strftime_now('%d') }}",
    "{# a remark #}",
    "{% raw %}{{ bos_token }}{% endraw %}",
    "{% if add_generation_prompt %}[x]{% endif %}",
    "{% endset %}",
    "{{ whole_chat }}",
    "{% if %}",
    " ",
    "\n",
    "\r\n",
    "  \t",
    "a",
]


def _chat_template(bench: Bench, draw: Draw, folder: Path) -> None:
    model = _copied(bench, folder, "tokenizer.json", "chat_template.jinja")
    parts = st.one_of(st.sampled_from(_FRAGMENTS), st.sampled_from(_FRAGMENTS), st.text(max_size=3))
    texts = st.lists(parts, max_size=5).map("".join).map(_writable)
    (model / "chat_template.jinja").write_text(draw(texts), newline="")
    for name in draw(st.lists(st.sampled_from(["tool_use", "rag", "x y"]), max_size=1)):
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / f"{name}.jinja").write_text(draw(texts), newline="")
    if draw(st.booleans()):
        content = json.loads((model / "tokenizer.json").read_text())
        content["post_processor"] = _processor(draw)
        (model / "tokenizer.json").write_text(json.dumps(content))
    _tried(bench, draw, folder, model)


def _writable(text: str) -> str:
    return text.encode(errors="replace").decode()


_WORDS = st.one_of(
    st.text(max_size=20).map(_writable),
    st.sampled_from(["a b c", "a,b", 'a "b"', "a\nb", "", " ", "[1]", "{", "text", "\u2028"]),
)


def _records(draw: Draw) -> bytes:
    """Records of some kind, or plain text."""
    texts: list[Any] = draw(st.lists(_WORDS, min_size=1, max_size=5))
    if draw(st.integers(0, 4)) == 0:
        texts.append(draw(VALUES))
    objects = [{draw(st.sampled_from(["text"] * 9 + ["Text"])): text, "id": 1} for text in texts]
    kind = draw(st.sampled_from(["lines", "array", "strings", "pretty", "table", "plain", "nasty"]))
    if kind == "lines":
        text = "".join(json.dumps(one) + draw(st.sampled_from(["\n", "\r\n"])) for one in objects)
    elif kind in ("array", "strings"):
        text = json.dumps(objects if kind == "array" else texts)
    elif kind == "pretty":
        text = "\n".join(json.dumps(one, indent=2) for one in objects)
    elif kind == "table":
        file = io.StringIO()
        rows = csv.writer(file, delimiter=draw(st.sampled_from(",\t;|")))
        rows.writerows([["text", "id"], *([one, draw(_WORDS)] for one in texts)])
        text = file.getvalue()
    else:
        text = "\n".join(map(str, texts))
    if kind == "nasty":
        return draw(st.sampled_from(NASTY)) + text.encode(errors="replace")
    coding = draw(st.sampled_from(["utf-8"] * 4 + ["utf-8-sig", "utf-16", "utf-32", "utf-16-le"]))
    return text.encode(coding, errors="replace")


def _parquet(draw: Draw) -> bytes:
    pyarrow, parquet = _arrow()
    column = draw(st.sampled_from(["text", "text", "Text", "a"]))
    values = st.one_of(st.lists(_WORDS, max_size=4), st.lists(st.integers(0, 9), max_size=4))
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({column: draw(values)}), file)
    return file.getvalue()


def _arrow() -> tuple[Any, Any]:
    import pyarrow
    import pyarrow.parquet

    return pyarrow, pyarrow.parquet


_PACKS = [bytes, bytes, gzip.compress, bz2.compress, lzma.compress]
_ENDINGS = [".txt", ".jsonl", ".json", ".csv", ".tsv", ".JSONL", ".jsonl.gz", ".parquet", "", ".md"]


def _texts(bench: Bench, draw: Draw, folder: Path) -> None:
    paths = []
    for name in ("one", "two"):
        content = _parquet(draw) if draw(st.integers(0, 9)) == 0 else _records(draw)
        if draw(st.integers(0, 3)) == 0:
            content = garbled(draw, content)
        content = draw(st.sampled_from(_PACKS))(content)
        if draw(st.integers(0, 6)) == 0:
            content = garbled(draw, content)
        paths.append(folder / f"{name}{draw(st.sampled_from(_ENDINGS))}")
        paths[-1].write_bytes(content)
    command = draw(st.sampled_from(["convert", "inspect", "eval", "eval"]))
    more: tuple[Any, ...] = ("--steps", "0") if command == "convert" else ()
    if command == "eval" and draw(st.booleans()):
        more = ("--calibration", paths[1])
    if "--calibration" in more and draw(st.booleans()):
        paths[0] = bench.long
        more = (*more, "--windows", "1", "--length", "8", "--formats", "w8a8-static")
    ends_in_order(folder, command, bench.model(), "--text", paths[0], *more)


TEXT_TARGETS: dict[str, Target] = {
    "post-processors": _post_processor,
    "chat templates": _chat_template,
    "texts": _texts,
}
