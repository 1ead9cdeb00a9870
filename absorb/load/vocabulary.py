"""A folder → its tokenizer, or the one reason of several why it cannot be read here."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from absorb.errors import AbsorbError
from absorb.load.files import first_line
from absorb.schema.settings import ModelRef

# Any of these makes a tokenizer. What stands first is what transformers reads first.
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
# What a SentencePiece model, being a protocol buffer, and a table of tiktoken are read with.
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
_TIKTOKEN = {"tiktoken": "tiktoken"}
_MISTRAL = {"mistral_common": "mistral-common"}


def read_tokenizer(
    folder: Path, ref: ModelRef, config: PreTrainedConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=ref.trust_remote_code,
        )
    except Exception as error:
        raise AbsorbError(_reason(folder, ref.name, error)) from error
    return tokenizer


def _reason(folder: Path, name: str, error: Exception) -> str:
    """Why a tokenizer cannot be read. transformers tries several ways and names the last one."""
    if "trust_remote_code=True" in str(error):
        return (
            f"{name} brings a tokenizer with code of its own, which is not run unasked; "
            "read that code, then pass --trust-remote-code"
        )
    file = next((folder / file for file in FILES if (folder / file).is_file()), folder)
    missing = list(_missing_packages(file))
    if missing:
        return (
            f"the {file.name} of {name} cannot be read without {' and '.join(missing)}; run `pip "
            f"install {' '.join(missing)}`, or save the tokenizer as {FILES[0]}"
        )
    if isinstance(error, ImportError):
        return (
            f"the tokenizer of {name} needs a package that is not installed here "
            f"({first_line(error)}); install it, or save the tokenizer as {FILES[0]}"
        )
    cause = "it is of no known kind" if _is_of_no_kind(file) else first_line(error)
    return (
        f"the tokenizer of {name} could not be read from {file.name} ({cause}); check that its "
        "files are complete and belong together"
    )


def _missing_packages(file: Path) -> Iterator[str]:
    """What is not installed here and a file of a tokenizer is read with, as pip calls it."""
    for module, package in _readers(file).items():
        if not _is_installed(module):
            yield package


def _readers(file: Path) -> dict[str, str]:
    """The modules that read a file, which its content tells, and their packages."""
    if file.name == "tekken.json":
        return _MISTRAL
    if file.suffix != ".model":
        return {}
    first = file.read_bytes()[:256]
    if first[:1] == b"\n":  # the first field of the message: a piece
        return _SENTENCEPIECE
    return _TIKTOKEN if _is_table(first) else {}


def _is_table(first: bytes) -> bool:
    """Whether a file begins as a table of tiktoken does: a token in base64, and its number."""
    words = first.partition(b"\n")[0].split()
    return len(words) == 2 and words[1].isdigit()


def _is_of_no_kind(file: Path) -> bool:
    return file.suffix == ".model" and not _readers(file)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is not there either
        return False
