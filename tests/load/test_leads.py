"""What a tokenizer and its chat templates put first: the sinks stand for it, and nobody adds it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import (
    BertProcessing,
    ByteLevel,
    RobertaProcessing,
    Sequence,
    TemplateProcessing,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import absorb
from absorb.errors import AbsorbError
from absorb.load.opening.tokenizer import lead_of, leads_left, without_bos
from absorb.load.source import Source, load
from absorb.measure.prefix import find_prefix
from absorb.models.families import FAMILIES
from absorb.schema.codec import from_json
from absorb.schema.report import Lead, Report
from absorb.schema.settings import ModelRef, Thresholds
from absorb.show.card import card
from absorb.text.samples import opening_of
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import TEMPLATE, letters, tiny_tokenizer

BOS, EOS = 1, 2
IDS = {"<s>": BOS, "</s>": EOS, "<unk>": 0, "z": 29}
TEXTS = ("a b", "", "a\nb", "<s>a")
CHATS = (
    [{"role": "user", "content": "a b"}],
    [{"role": "system", "content": "c"}, {"role": "user", "content": "a b"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2,
)


def around(single: str, pair: str | None = None) -> TemplateProcessing:
    known = [(token, number) for token, number in IDS.items() if token in single]
    return TemplateProcessing(single=single, pair=pair, special_tokens=known)


def made(processor: Any = None, **settings: Any) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a post-processor, special tokens and templates of its own."""
    backend = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    if processor is not None:
        backend.post_processor = processor
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **settings}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def reloaded(tokenizer: Any, folder: Path) -> Any:
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


PROCESSORS: dict[str, tuple[Any, list[int], list[int]]] = {
    "bos": (around("<s> $A", "<s> $A $B:1"), [BOS], []),
    "bos and eos": (around("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"), [BOS], [EOS]),
    "llama 3": (
        Sequence([ByteLevel(trim_offsets=False), around("<s> $A", "<s> $A <s> $B:1")]),
        [BOS],
        [],
    ),
    "roberta": (RobertaProcessing(("</s>", EOS), ("<s>", BOS)), [BOS], [EOS]),
    "bert": (BertProcessing(("</s>", EOS), ("<s>", BOS)), [BOS], [EOS]),
    "two tokens": (around("<unk> <s> $A", "<unk> <s> $A $B:1"), [0, BOS], []),
    "eos as bos": (around("</s> $A </s>", "</s> $A $B:1"), [EOS], [EOS]),
    "a letter": (around("z $A", "z $A $B:1"), [29], []),
    "none in pairs": (around("<s> $A", "$A $B:1"), [BOS], []),
    "eos alone": (around("$A </s>", "$A $B:1 </s>:1"), [], [EOS]),
    "nothing": (ByteLevel(), [], []),
}


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("name", PROCESSORS)
def test_what_stands_first_goes_and_all_else_stays(
    name: str, bos: str | None, tmp_path: Path
) -> None:
    processor, lead, behind = PROCESSORS[name]
    tokenizer = made(processor, bos_token=bos)
    assert lead_of(tokenizer).tolist() == lead
    bare = tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert tokenizer("a b")["input_ids"] == [*lead, *bare, *behind]
    plain = without_bos(tokenizer)
    for one in (plain, reloaded(plain, tmp_path)):
        assert lead_of(one).tolist() == []
        for text in TEXTS:
            assert lead + one(text)["input_ids"] == tokenizer(text)["input_ids"]
            bare = [t(text, add_special_tokens=False)["input_ids"] for t in (one, tokenizer)]
            assert bare[0] == bare[1]
        pair, whole = (t("a", "b") for t in (one, tokenizer))
        led = len(lead) if whole["input_ids"][: len(lead)] == lead else 0
        for key in ("input_ids", "token_type_ids"):
            assert pair.get(key) == (whole[key][led:] if key in whole else None)
    assert leads_left(tokenizer, lead) == {}


@pytest.mark.parametrize("trims", [True, False])
def test_offsets_are_as_before(trims: bool) -> None:
    processor = RobertaProcessing(("</s>", EOS), ("<s>", BOS), trim_offsets=trims)
    tokenizer = made(processor)
    offsets = [
        t("a b  c", return_offsets_mapping=True)["offset_mapping"]
        for t in (tokenizer, without_bos(tokenizer))
    ]
    assert offsets[0][1:] == offsets[1]


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GemmaTokenizer", "GPT2Tokenizer"])
def test_a_class_that_would_add_it_again_is_loaded_without(kind: str, tmp_path: Path) -> None:
    made(around("<s> $A")).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": kind, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert lead_of(tokenizer).tolist() == [BOS]
    again = reloaded(without_bos(tokenizer), tmp_path / "again")
    assert lead_of(again).tolist() == []
    assert [BOS, *again("a b")["input_ids"]] == tokenizer("a b")["input_ids"]


EACH = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
TEMPLATES = {
    "literal": "<s>" + EACH,
    "named": "{{ bos_token }}" + EACH,
    "named, with dashes": " {{- bos_token -}}\n  x " + EACH,
    "in every message": TEMPLATE,
    "only in the first": "{% for m in messages %}{% if loop.first %}<s>{% endif %}"
    "{{ m['content'] }}{% endfor %}",
    "in an expression": "{{ '<s>' + 'x' }}" + EACH,
    "in a macro": "{% macro open() %}{{ bos_token }}{% endmacro %}{{ open() }}" + EACH,
    "in a name of its own": "{% set b = bos_token %}{{ b }}" + EACH,
    "with a system prompt alone": "{% if messages[0]['role'] == 'system' %}<s>{% endif %}" + EACH,
    "behind white space": "\n  {{ bos_token }}" + EACH,
    "before white space": "{{ bos_token }}\n  " + EACH + " \n\n",
    "a line of its own": "{{ bos_token }}\n{%- if true %}\n  {% for m in messages %}\n"
    "    {{ m['content'] }}\n  {% endfor %}\n  {%- endif %}\n  ",
    "and a generation prompt": "<s>" + EACH + "{% if add_generation_prompt %}[x]{% endif %}",
    "and tools": "{% if tools %}<s>{{ tools | tojson }}{% endif %}" + EACH,
    "and marks": "<s>{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
    "and an error": "{{ bos_token }}{% if messages | length > 1 %}{{ raise_exception('no') }}"
    "{% endif %}" + EACH,
}
NONE = {
    "none": EACH,
    "in the middle": "x<s>" + EACH,
    "another": "</s>" + EACH,
    "broken": "<s>{% if %}",
    "an error": "<s>{{ raise_exception('no') }}",
}


def rendered(tokenizer: Any, name: str | None = None) -> list[str]:
    def given(chat: Any, more: bool) -> str:
        options = {"add_generation_prompt": more, "tools": [{"a": 1}] if more else None}
        try:
            found = tokenizer.apply_chat_template(
                chat, chat_template=name, tokenize=False, **options
            )
        except Exception as error:
            return type(error).__name__
        return str(found)

    return [given(chat, more) for chat in CHATS for more in (False, True)]


def without(chat: str, opening: str = "<s>") -> str:
    space = chat[: len(chat) - len(chat.lstrip())]
    return space + chat.lstrip().removeprefix(opening)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_chat_begins_with_what_the_sinks_stand_for(
    name: str, adds: bool, tmp_path: Path
) -> None:
    """Added by the tokenizer, or by the template alone and the prefix begins with it."""
    tokenizer = made(around("<s> $A") if adds else None, chat_template=TEMPLATES[name])
    before = rendered(tokenizer)
    assert any(chat.lstrip().startswith("<s>") for chat in before)
    plain = without_bos(tokenizer, (BOS, 5))
    expected = [without(chat) for chat in before]
    assert rendered(plain) == expected
    assert rendered(reloaded(plain, tmp_path)) == expected
    assert leads_left(tokenizer, (BOS, 5)) == {}


@pytest.mark.parametrize("name", NONE)
def test_a_template_that_does_not_begin_with_it_is_left_alone(name: str) -> None:
    tokenizer = made(around("<s> $A"), chat_template=NONE[name])
    assert without_bos(tokenizer).chat_template == NONE[name]
    assert leads_left(tokenizer, (BOS,)) == {}


def test_every_template_of_several_is_changed(tmp_path: Path) -> None:
    several = [
        {"name": "default", "template": TEMPLATES["literal"]},
        {"name": "tool_use", "template": TEMPLATES["and tools"]},
        {"name": "rag", "template": NONE["none"]},
    ]
    tokenizer = made(around("<s> $A"), chat_template=several)
    plain = without_bos(tokenizer)
    again = reloaded(plain, tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    for name in ("default", "tool_use", "rag"):
        expected = [without(chat) for chat in rendered(tokenizer, name)]
        assert rendered(plain, name) == rendered(again, name) == expected


def test_marks_of_the_assistant_stay_where_they_are() -> None:
    tokenizer = made(around("<s> $A"), chat_template=TEMPLATES["and marks"])
    options = {"return_assistant_tokens_mask": True, "return_dict": True}
    masks = [
        t.apply_chat_template(CHATS[2], **options)["assistant_masks"]
        for t in (tokenizer, without_bos(tokenizer))
    ]
    assert masks[0][1:] == masks[1]
    assert sum(masks[1]) == 2


def test_an_opening_of_several_tokens_goes_whole() -> None:
    processor = around("<unk> <s> $A")
    tokenizer = made(processor, bos_token=None, chat_template="<unk><s>" + EACH)
    assert rendered(without_bos(tokenizer)) == [
        c.removeprefix("<unk><s>") for c in rendered(tokenizer)
    ]
    part = made(processor, bos_token=None, chat_template="<unk>x" + EACH)
    assert without_bos(part).chat_template == part.chat_template


def test_an_opening_that_no_sink_stands_for_is_told() -> None:
    tokenizer = made(chat_template=TEMPLATES["literal"])
    assert without_bos(tokenizer, (5,)) is tokenizer
    assert leads_left(tokenizer, (5,)) == {"The chat template": (BOS,)}
    twice = made(chat_template={"default": "<s><s>" + EACH, "other": EACH})
    assert leads_left(twice, (BOS,)) == {"The chat template": (BOS,)}
    named = made(chat_template={"default": EACH, "other": "<s>" + EACH})
    assert leads_left(named, ()) == {"The chat template `other`": (BOS,)}


class Stubborn(PreTrainedTokenizerFast):
    """A tokenizer whose code puts BOS first, whatever it is told."""

    def _encode_plus(self, *texts: Any, add_special_tokens: bool = True, **options: Any) -> Any:
        found = super()._encode_plus(*texts, add_special_tokens=False, **options)
        if add_special_tokens and isinstance(found["input_ids"], list):
            found["input_ids"] = [BOS, *found["input_ids"]]
        return found


def test_a_tokenizer_that_cannot_be_told_stays_and_is_told_of() -> None:
    backend = tiny_tokenizer().backend_tokenizer
    tokenizer = Stubborn(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert lead_of(tokenizer).tolist() == [BOS]
    assert without_bos(tokenizer) is tokenizer
    assert leads_left(tokenizer, (BOS,)) == {"The tokenizer": (BOS,)}


def source(tokenizer: Any, **settings: Any) -> Source:
    return Source(
        name="tiny",
        model=tiny("llama", torch.float32, max_position_embeddings=512, **settings),
        tokenizer=tokenizer,
        family=FAMILIES["llama"],
        dtype=torch.float32,
        license=None,
        commit=None,
    )


def test_the_prefix_begins_with_all_that_the_tokenizer_puts_first() -> None:
    given = source(made(around("<unk> </s> $A"), bos_token=None))
    rows = torch.tensor(given.tokenizer(letters(7 * 64), add_special_tokens=False)["input_ids"])
    trials = find_prefix(given, None, rows.view(7, 64), Thresholds())
    assert all(trial.prefix[:2] == (0, EOS) for trial in trials)
    assert opening_of(given) == [0, EOS]
    chats = replace(given, tokenizer=made(around("</s> $A"), chat_template=TEMPLATE))
    assert opening_of(chats) == [EOS]


def saved(folder: Path, tokenizer: Any, **settings: Any) -> Path:
    source(tokenizer, **settings).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_lead_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    tokenizer = made(around("<s> $A"))
    tokenizer.add_tokens([f"[{number}]" for number in range(20)])
    last = len(tokenizer) - 1
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[19] $A", special_tokens=[("[19]", last)]
    )
    folder = saved(tmp_path / "model", tokenizer)
    with pytest.raises(AbsorbError, match=f"has no token {last}, .* beginning; fetch both again"):
        load(ModelRef(name=str(folder)))


def converted(folder: Path, tokenizer: Any, **options: Any) -> tuple[Report, Any]:
    text = folder / "text.txt"
    text.write_text(letters(9_000))
    model = saved(folder / "model", tokenizer)
    report = absorb.convert(model, folder / "out", text=text, steps=0, **options)
    assert card(report) == (folder / "out" / "README.md").read_text()
    assert from_json(Report, (folder / "out" / "absorb.json").read_text()) is not None
    return report, AutoTokenizer.from_pretrained(folder / "out")


def test_a_checkpoint_adds_nothing_and_its_card_says_so(tmp_path: Path) -> None:
    tokenizer = made(around("<unk> <s> $A </s>"), bos_token=None, chat_template="<unk><s>" + EACH)
    report, after = converted(tmp_path, tokenizer)
    assert report.inspection.prefix[:2] == (0, BOS)
    assert report.leads == ()
    assert "Neither the tokenizer nor a chat template adds one." in card(report)
    assert [0, BOS, *after("a b")["input_ids"]] == tokenizer("a b")["input_ids"]
    assert rendered(after) == [chat.removeprefix("<unk><s>") for chat in rendered(tokenizer)]


def test_a_card_tells_what_is_left_and_what_it_costs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = made(chat_template=TEMPLATES["named"])
    report, after = converted(tmp_path, tokenizer, prefix="a")
    assert rendered(after) == rendered(tokenizer)
    [lead] = report.leads or ()
    assert (lead.by, lead.text) == ("The chat template", "<s>")
    said = "The chat template puts `'<s>'` first all the same, and it is read as text: behind it"
    assert said in card(report)
    assert said in caplog.text
    assert f"{abs(lead.cost):.1%} {'lower' if lead.cost < 0 else 'higher'}" in card(report)
    dear = replace(report, leads=(Lead(by="The tokenizer", text="</s>", cost=0.25),))
    assert "The tokenizer puts `'</s>'` first all the same" in card(dear)
    assert "held-out text is 25.0% higher." in card(dear)
