"""Chat templates: what chats begin with by them, and templates by which they do not.

A template is a program, so what it does is told by what it gives of some chats, before and after.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER, _ANSWER = (
    {"role": role, "content": f"{role} a b"} for role in ("system", "user", "assistant")
)
_PARTS = {"role": "user", "content": [{"type": "text", "text": "a b"}]}
_CHATS = ([_USER], [_SYSTEM, _USER], [_USER, _ANSWER], [_SYSTEM, _USER, _ANSWER, _USER], [_PARTS])
_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {}},
    },
}
_MORE: tuple[dict[str, Any], ...] = (
    {},
    {"add_generation_prompt": True},
    {"tools": [_TOOL], "documents": [{"title": "a", "text": "b"}]},
)
# BOS by its name, as the first thing that a template writes.
_NAMED = re.compile(r"\A(\s*\{\{-?\s*)bos_token(\s*-?\}\})")
# The line break ends a line: of its own, so that no white space of the template is the block's.
_NO_BOS = "{% set bos_token = '' %}\n"
_LAST_LINE = re.compile(r"(?:\A|\n)[ \t]+\Z")

Templates = dict[str, str]


def without_opening(tokenizer: PreTrainedTokenizerBase, opening: str) -> Any:
    """The chat template or templates of a tokenizer, so that no chat begins with `opening`.

    Nothing else of any chat changes. A template for which that cannot be had stays as it is.
    """
    known = tokenizer.chat_template
    if isinstance(known, dict):
        return {name: _without(tokenizer, text, opening) for name, text in known.items()}
    return _without(tokenizer, known, opening)


def openings(tokenizer: PreTrainedTokenizerBase, possible: list[str]) -> dict[str, str]:
    """Which of the possible openings chats begin with, the last of them, by name of template."""
    known = tokenizer.chat_template or {}
    named = known if isinstance(known, dict) else {"default": known}
    found = {}
    for name, template in named.items():
        chats = [chat.lstrip() for chat in _chats(tokenizer, template) if chat is not None]
        for opening in possible:
            if any(chat.startswith(opening) for chat in chats):
                title = "The chat template" if name == "default" else f"The chat template `{name}`"
                found[title] = opening
    return found


def _without(tokenizer: PreTrainedTokenizerBase, template: str, opening: str) -> str:
    before = _chats(tokenizer, template)
    wanted = [None if chat is None else _cut(chat, opening) for chat in before]
    if wanted == before:
        return template
    spans = _answers(tokenizer, template)
    for edited in _edits(template, opening):
        after = _chats(tokenizer, edited)
        right = all(w is None or w == a for w, a in zip(wanted, after, strict=True))
        if right and _answers(tokenizer, edited) == spans:
            return edited
    return template


def _cut(chat: str, opening: str) -> str:
    """A chat without its opening, which white space may stand before."""
    begins = chat.lstrip().startswith(opening)
    return chat.replace(opening, "", 1) if begins else chat


def _edits(template: str, opening: str) -> Iterator[str]:
    """Templates that may give the same without the opening, those that change least first."""
    if template.startswith(opening):
        yield template.removeprefix(opening)
    yield _NAMED.sub(r"\1''\2", template)
    yield _NO_BOS + template
    # All that it writes is kept, and written without the opening. The last line break of a template
    # is not written; white space before a block is not either, unless the block has a plus. The
    # templates of llama.cpp have no `replace` of the first alone.
    inner = template.removesuffix("\n")
    plus = "+" if _LAST_LINE.search(inner) else ""
    word = json.dumps(opening, ensure_ascii=False)
    yield (
        f"{{% set whole_chat %}}\n{inner}{{%{plus} endset %}}"
        f"{{% set parts = whole_chat.split({word}) %}}"
        f"{{{{ parts[0] ~ (parts[1:] | join({word})) if whole_chat.lstrip().startswith({word}) "
        "else whole_chat }}"
    )


def _chats(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str | None]:
    """What a template gives of every chat: None where it raises, as its author may have meant."""
    plain = {"tokenize": False}
    return [_given(tokenizer, template, chat, more | plain) for chat in _CHATS for more in _MORE]


def _answers(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int | None]:
    """How many tokens of every chat are marked as the assistant's, where a template marks them."""
    marks = {"return_assistant_tokens_mask": True, "return_dict": True}
    chats = _CHATS if "endgeneration" in template else ()
    given = [_given(tokenizer, template, chat, marks) for chat in chats]
    return [None if one is None else sum(one["assistant_masks"]) for one in given]


def _given(
    tokenizer: Any, template: str, chat: list[dict[str, Any]], options: dict[str, Any]
) -> Any:
    try:
        return tokenizer.apply_chat_template(chat, chat_template=template, **options)
    except Exception:  # whatever its author thought of
        return None
