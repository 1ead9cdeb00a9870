"""tokenizer.json → what llama.cpp must know of a tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import TokenType

from absorb.errors import AbsorbError
from absorb.load.files import read_json

_FILE = "tokenizer.json"
# How a text is cut before merges, and what llama.cpp calls that.
_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS: dict[tuple[str, ...], str] = {
    ("by words",): "gpt-2",
    ("by digits", "by words"): "smollm",
    (rf"{_WORDS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",): "llama-bpe",
    (rf"{_WORDS}|{_LETTERS}|\p{{N}}|{_REST}",): "qwen2",
}
_SPACE = "▁"  # how SentencePiece spells a space


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A tokenizer in the words of GGUF. `scores` are SentencePiece's, `merges` those of others."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[TokenType]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_first: bool = False  # whether a text begins as if a space stood before it


def vocabulary(folder: Path, size: int, name: str) -> Vocabulary:
    """The tokenizer in a folder, filled up to `size` tokens with some that nothing makes.

    An AbsorbError says why llama.cpp cannot have it.
    """
    told = read_json(folder / _FILE, name)
    model = told["model"]
    if model.get("type") != "BPE":
        raise _unknown(name, f"of the kind {model.get('type')}")
    tokens, kinds = _tokens(told, size)
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    if model.get("byte_fallback"):
        return Vocabulary(
            model="llama",
            pre="default",
            tokens=tokens,
            kinds=[_of_bytes(*one) for one in zip(tokens, kinds, strict=True)],
            scores=_scores(tokens, merges),
            space_first=_puts_a_space_first(told, name),
        )
    return Vocabulary(
        model="gpt2",
        pre=_cut(told, name),
        tokens=tokens,
        kinds=kinds,
        merges=[" ".join(pair) for pair in merges],
    )


def _unknown(name: str, what: str) -> AbsorbError:
    return AbsorbError(
        f"the tokenizer of {name} is {what}, which absorb cannot tell llama.cpp; export it by "
        "--to native"
    )


def _tokens(told: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Every token by its id, and its kind."""
    names = {index: token for token, index in told["model"]["vocab"].items()}
    added = {one["id"]: one for one in told.get("added_tokens", [])}
    names |= {index: one["content"] for index, one in added.items()}
    if strange := names.keys() - range(size):
        raise AbsorbError(
            f"the tokenizer has a token {max(strange)} and the model has {size}; fetch both again"
        )
    tokens, kinds = [], []
    for index in range(size):
        tokens.append(names.get(index, f"[PAD{index}]"))
        if index not in names:
            kinds.append(TokenType.UNUSED)
        elif index not in added:
            kinds.append(TokenType.NORMAL)
        else:
            special = added[index]["special"]
            kinds.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    return tokens, kinds


def _of_bytes(token: str, kind: TokenType) -> TokenType:
    """The kind of a token in SentencePiece, which spells what it does not know in bytes."""
    if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
        return TokenType.BYTE
    return TokenType.UNKNOWN if token == "<unk>" else kind


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """The earlier a merge that makes a token, the higher its score, as SentencePiece has it."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    last = float(len(merges))
    return [-float(ranks.get(token, last)) for token in tokens]


def _puts_a_space_first(told: dict[str, Any], name: str) -> bool:
    """Whether a space is put before a text; other ways to change it are refused."""
    steps = [*_steps(told.get("normalizer"), "normalizers")]
    steps += [*_steps(told.get("pre_tokenizer"), "pretokenizers")]
    first = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == _SPACE:
            first = True
        elif kind == "Metaspace" and step["replacement"] == _SPACE and not step.get("split", True):
            first = step.get("prepend_scheme", "always") != "never"
        elif kind != "Replace" or (step["pattern"], step["content"]) != ({"String": " "}, _SPACE):
            raise _unknown(name, f"one with a {kind} of its own")
    return first


def _cut(told: dict[str, Any], name: str) -> str:
    """What llama.cpp calls the way a byte-level tokenizer cuts a text."""
    kinds = [step["type"] for step in _steps(told.get("normalizer"), "normalizers")]
    if {*kinds} - {"NFC"}:  # which llama.cpp leaves to who writes the text
        raise _unknown(name, f"one that changes text by {', '.join(kinds)}")
    cut = tuple(filter(None, map(_described, _steps(told.get("pre_tokenizer"), "pretokenizers"))))
    if cut not in _CUTS:
        raise _unknown(name, f"one that cuts text {' and '.join(cut) or 'nowhere'}")
    return _CUTS[cut]


def _described(step: dict[str, Any]) -> str:
    """What a step of a byte-level tokenizer does, nothing where it only spells bytes."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "by words" if step.get("use_regex", True) else ""
    if kind == "Digits" and step.get("individual_digits"):
        return "by digits"
    plain = kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert")
    return str(step["pattern"].get("Regex", kind)) if plain else f"by {kind} in its own way"


def _steps(step: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """The steps that a part of a tokenizer consists of."""
    if step is None:
        return []
    found: list[dict[str, Any]] = step[parts] if step["type"] == "Sequence" else [step]
    return found
