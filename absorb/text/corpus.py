"""Text of files and of users → token ids."""

from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.load.source import Source
from absorb.schema.codec import parsed
from absorb.schema.training import LENGTH

# A token of plain text has fewer than so many characters, on average; and what is tokenised beyond
# what is needed, since a word may be cut there.
_CHARACTERS, _SPARE = 8, 64


def read_ids(path: Path, source: Source, count: int) -> list[int]:
    """The tokens of the first documents of a file: `count` or more, or all that there are.

    Documents are divided by the end-of-text token.
    """
    ids: list[int] = []
    tokenizer = source.tokenizer
    divider = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in tqdm(documents(path), desc="reading text", unit="document"):
        ids += _beginning(tokenizer, document, count - len(ids)) + divider
        if len(ids) >= count:
            break
    refuse_unknown_tokens(source, ids, str(path))
    return ids


def _beginning(tokenizer: PreTrainedTokenizerBase, document: str, count: int) -> list[int]:
    """The tokens of a document, or of a beginning of it that holds more than `count`.

    The last few of a beginning may not be those of the document, so there are some to spare.
    """
    length = _CHARACTERS * count
    while True:
        part = tokenizer(document[:length], add_special_tokens=False, verbose=False)
        ids: list[int] = part["input_ids"]
        if len(ids) >= count + _SPARE or length >= len(document):
            return ids
        length = 2 * length + _SPARE


def documents(path: Path) -> list[str]:
    """The different documents of a file, not all empty: one a line in .jsonl, else all of it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AbsorbError(f"{path} cannot be read as UTF-8 text: {error}") from None
    found = [text] if path.suffix != ".jsonl" else _in_lines(path, text)
    if not any(document.strip() for document in found):
        raise AbsorbError(f"{path} holds no text; name a file that does")
    return found


def _in_lines(path: Path, text: str) -> list[str]:
    lines = enumerate(text.split("\n"), 1)  # other line breaks may stand in a string
    # Without repeats, so that no document is measured on that was trained on.
    return list(dict.fromkeys(_field(path, number, line) for number, line in lines if line.strip()))


def _field(path: Path, number: int, line: str) -> str:
    try:
        text = parsed(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise AbsorbError(f"{path}, line {number}: not a JSON object with a string field `text`")
    return text


def encoded(source: Source, text: str) -> tuple[int, ...]:
    """The tokens of the prefix that the user wishes for."""
    ids = source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise AbsorbError(f"--prefix {text!r} holds no token; give text, or leave --prefix out")
    refuse_unknown_tokens(source, ids, "--prefix")
    room = source.model.config.max_position_embeddings - LENGTH
    if source.family.positions is not None and len(ids) > room:
        raise AbsorbError(
            f"--prefix is {len(ids)} tokens long and {source.name} has positions for {room} before "
            f"the {LENGTH} tokens that absorb measures on; give a shorter --prefix"
        )
    return tuple(ids)


def refuse_unknown_tokens(source: Source, ids: list[int], origin: str) -> None:
    """Refuse tokens that the tokenizer has and the model does not."""
    known = source.model.config.vocab_size
    if max(ids, default=0) >= known:
        raise AbsorbError(
            f"the tokenizer of {source.name} makes token {max(ids)} of {origin} and the model has "
            f"{known}; fetch both again, or choose another text"
        )
