"""Damaged and hostile inputs, drawn at random, and the commands that read them.

A target draws a case and tries it in an empty folder. Whatever it is, the command must end in
order: with exit code 0 and a checkpoint that is complete, or with one sentence, exit code 1 or 2,
and nothing written.
"""

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from click.testing import CliRunner
from hypothesis import strategies as st

from absorb.cli.main import main
from absorb.errors import AbsorbError
from absorb.measure.tasks import questions_in
from absorb.schema.codec import from_json
from absorb.schema.report import Report
from absorb.show.card import card
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

FAMILIES = ("llama", "gpt2", "gemma2", "mixtral")
# One case in so many is converted to the end where nothing is wrong with it; the others are stopped
# by a plan of another model, or by a text that is too short, once they have been read.
TO_THE_END = 100

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True, slots=True)
class Bench:
    """What cases are made from: a folder of tiny models, one of them converted."""

    home: Path

    def model(self, family: str = "llama") -> Path:
        return self.home / family

    @property
    def made(self) -> Path:
        return self.home / "made"

    @property
    def long(self) -> Path:
        return self.home / "long.txt"

    @property
    def short(self) -> Path:
        return self.home / "short.txt"


def bench_in(home: Path) -> Bench:
    """Make everything that cases are made from."""
    for family in FAMILIES:
        tiny(family, torch.float32, max_position_embeddings=512).save_pretrained(home / family)
        tiny_tokenizer().save_pretrained(home / family)
    tiny("llama", torch.float32).save_pretrained(home / "sharded", max_shard_size="40KB")
    tiny("llama", torch.float32).save_pretrained(home / "adapted")
    adapter = {"base_model_name_or_path": "someone/base", "peft_type": "LORA", "r": 4}
    (home / "adapted" / "adapter_config.json").write_text(json.dumps(adapter))
    for model in ("sharded", "adapted"):
        tiny_tokenizer().save_pretrained(home / model)
    bench = Bench(home)
    bench.short.write_text("a b c")
    bench.long.write_text("".join(chr(97 + n * n * 7 % 23 + n % 3) for n in range(11_000)))
    low = ("channel_ratio=1.3", "massive_value=1", "massive_ratio=1", "divergence=1")
    thresholds = [word for one in low for word in ("--threshold", one)]
    ends_in_order(home, "convert", bench.model(), "--text", bench.long, "--steps", "0", *thresholds)
    (home / "out").rename(bench.made)
    return bench


def ends_in_order(folder: Path, command: str, *arguments: object) -> int:
    """Run a command whose output, if any, is `out` in a folder; the exit code."""
    out = folder / "out"
    target = ["--out", str(out)] if command == "convert" else []
    result = CliRunner().invoke(main, [command, *map(str, arguments), *target])
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    assert result.exit_code in (0, 1, 2), result.exit_code
    if result.exit_code:
        assert "absorb: " in result.stderr or "Error: " in result.stderr, result.stderr
        assert "Traceback" not in result.output
    complete = result.exit_code == 0 and command == "convert"
    left = sorted(path.name for path in folder.glob("out*"))
    assert left == ["out"] * complete, left
    if complete:
        from_json(Report, (out / "absorb.json").read_text())
        assert (out / "model.safetensors").is_file()
    return result.exit_code


# Plain data gone wrong

_NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([10**6, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**18)]),
    st.floats(),
    st.sampled_from([0.0, 1e-300, 1e300, 4.0]),
)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    _NUMBERS,
    st.text(max_size=8),
    st.sampled_from(["\ud800", "\x00", "../../etc/passwd", "llama", "gelu", "eager", "NaN", "1"]),
)
VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


def _places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside plain data."""
    inside = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in inside:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from _places(value, (*path, key))


def edited(draw: Draw, data: Any) -> Any:
    """The data with one to three of its values replaced, dropped, doubled or added to."""
    data = json.loads(json.dumps(data))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(data))
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        holder = data
        for key in way:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add"]))
        if action == "replace":
            holder[last] = draw(VALUES)
        elif action == "drop":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = draw(VALUES)
        else:
            holder.append(draw(VALUES))
    return data


def garbled(draw: Draw, content: bytes) -> bytes:
    """Bytes cut short, with bits flipped, or with something put in."""
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    action = draw(st.sampled_from(["cut", "flip", "insert", "replace"]))
    if action == "cut":
        return content[:at]
    if action == "flip" and content:
        return (
            content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        )
    put = draw(st.one_of(st.binary(max_size=6), st.sampled_from(NASTY)))
    return content[:at] + put + content[at + (len(put) if action == "replace" else 0) :]


NASTY = [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe", b"\x00", b"\xed\xa0\x80"]
NASTY += [b"NaN", b"-Infinity", b'"\\ud800"', b"1e999"]


def _damaged_json(draw: Draw, file: Path) -> bytes:
    """A file of JSON whose values, or whose bytes, are not what they were."""
    if draw(st.integers(0, 3)) == 0:
        return garbled(draw, file.read_bytes())
    if draw(st.integers(0, 30)) == 0:
        return json.dumps(draw(VALUES)).encode()
    return json.dumps(edited(draw, json.loads(file.read_text()))).encode()


def _damaged_tensors(draw: Draw, content: bytes) -> bytes:
    """A safetensors file with damage to its header, or anywhere."""
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = content[8 : 8 + size], content[8 + size :]
    action = draw(st.sampled_from(["length", "bytes", "values", "anywhere"]))
    if action == "anywhere":
        return garbled(draw, content)
    if action == "length":
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + content[8:]
    if action == "bytes":
        header = garbled(draw, header)
    else:
        header = json.dumps(edited(draw, json.loads(header))).encode()
    return struct.pack("<Q", len(header)) + header + rest


# Targets: each draws a case, and says how to try it


def _linked(bench: Bench, family: str, folder: Path, name: str, content: bytes) -> Path:
    """A model in a folder, like that of a family but for one file."""
    model = folder / "model"
    model.mkdir()
    for file in bench.model(family).iterdir():
        if file.name != name:
            (model / file.name).symlink_to(file)
    (model / name).write_bytes(content)
    return model


def _model_file(
    name: str, bench: Bench, draw: Draw, folder: Path, models: tuple[str, ...] = FAMILIES
) -> None:
    family = draw(st.sampled_from(models))
    file = bench.model(family) / name
    content = (
        _damaged_tensors(draw, file.read_bytes())
        if name.endswith(".safetensors")
        else _damaged_json(draw, file)
    )
    model = _linked(bench, family, folder, name, content)
    if draw(st.sampled_from(range(TO_THE_END))) == TO_THE_END // 2:
        ends_in_order(folder, "convert", model, "--text", bench.long, "--steps", "1")
    elif draw(st.booleans()):
        ends_in_order(folder, "convert", model, "--plan", bench.model(), "--steps", "0")
    else:
        ends_in_order(folder, "eval", model, "--text", bench.short)


def _plan(bench: Bench, draw: Draw, folder: Path) -> None:
    content = (bench.made / "plan" / "plan.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    if draw(st.integers(0, 3)) == 0:
        content = _damaged_tensors(draw, content)
    else:
        found = json.loads(header["__metadata__"]["absorb_inspection"])
        header["__metadata__"]["absorb_inspection"] = json.dumps(edited(draw, found))
        written = json.dumps(header).encode()
        content = struct.pack("<Q", len(written)) + written + rest
    plan = folder / "plan.safetensors"
    plan.write_bytes(content)
    whole = draw(st.sampled_from(range(TO_THE_END))) == TO_THE_END // 2
    text = bench.long if whole else bench.short
    options = ("--plan", plan, "--text", text, "--steps", "0")
    ends_in_order(folder, "convert", bench.model(), *options)


def _text(bench: Bench, draw: Draw, folder: Path) -> None:
    path = folder / draw(st.sampled_from(["text.txt", "text.jsonl"]))
    good = json.dumps({"text": "a b c"}).encode()
    lines = st.one_of(
        st.binary(max_size=30),
        st.text(max_size=30).map(lambda text: json.dumps({"text": text}).encode()),
        VALUES.map(lambda value: json.dumps({"text": value}).encode()),
        VALUES.map(lambda value: json.dumps(value).encode()),
        st.sampled_from([*NASTY, good]),
    )
    content = b"\n".join(draw(st.lists(lines, max_size=4)))
    path.write_bytes(garbled(draw, content) if draw(st.booleans()) else content)
    command = draw(st.sampled_from(["convert", "inspect", "eval"]))
    ends_in_order(folder, command, bench.model(), "--text", path)


def _report(bench: Bench, draw: Draw, folder: Path) -> None:
    text = _damaged_json(draw, bench.made / "absorb.json").decode(errors="surrogateescape")
    with suppress(ValueError):
        card(from_json(Report, text)).encode()


def _questions(bench: Bench, draw: Draw, folder: Path) -> None:
    path = folder / "riddles.jsonl"
    good = {"question": "a", "choices": ["b", "c"], "label": 0}
    lines = [json.dumps(edited(draw, good)).encode() for _ in range(draw(st.integers(0, 3)))]
    content = b"\n".join([*lines, json.dumps(good).encode()])
    path.write_bytes(garbled(draw, content) if draw(st.booleans()) else content)
    with suppress(AbsorbError):
        questions_in(path)


_OPTIONS = ("--revision", "--text", "--sink", "--residual-target", "--prefix", "--seed", "--device")
_OPTIONS += ("--steps", "--minutes", "--train", "--for", "--plan", "--threshold", "--x")
_WORDS = ["\x00", "\udcff", "", "nan", "inf", "-1", "1e999", "9" * 5000, "/", ".", "a/b", "0", "1"]
_WORDS += ["divergence=0.1", "sink_weight=nan", "massive_value=", "=1"]


def _arguments(bench: Bench, draw: Draw, folder: Path) -> None:
    words = st.one_of(st.sampled_from(_WORDS), st.text(max_size=12))
    options = draw(st.lists(st.tuples(st.sampled_from(_OPTIONS), words), max_size=3))
    model = draw(st.one_of(st.just(str(bench.model())), words.filter(lambda w: w not in "/.")))
    flat = [part for pair in options for part in pair]
    stop = [] if "--plan" in flat else ["--plan", bench.model()]
    ends_in_order(folder, "convert", model, *flat, *stop)


Target = Callable[[Bench, Draw, Path], None]
TARGETS: dict[str, Target] = {
    "config.json": partial(_model_file, "config.json"),
    "plan.safetensors": _plan,
    "text": _text,
    "absorb.json": _report,
    "model.safetensors": partial(_model_file, "model.safetensors"),
    "index.json": partial(_model_file, "model.safetensors.index.json", models=("sharded",)),
    "adapter_config.json": partial(_model_file, "adapter_config.json", models=("adapted",)),
    "tokenizer.json": partial(_model_file, "tokenizer.json"),
    "tokenizer_config.json": partial(_model_file, "tokenizer_config.json"),
    "generation_config.json": partial(_model_file, "generation_config.json"),
    "arguments": _arguments,
    "questions": _questions,
}


@contextmanager
def empty_folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)
