"""Whatever goes wrong, a conversion ends in one sentence and leaves nothing half-written."""

import json
import os
import resource
import shutil
import signal
import struct
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from absorb.cli.main import main
from absorb.cli.terminal import UserErrors
from absorb.load import source
from absorb.load.source import load
from absorb.schema.settings import ModelRef
from absorb.ship.plan_file import PLAN, read_plan
from absorb.ship.staging import staged
from absorb.text.corpus import read_ids
from tests.conftest import shorten_texts
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer
from tests.helpers.warm import warm

# What a conversion says on stderr as it enters each of its stages.
STAGES = (
    "loading",
    "reading text",
    "choosing the prefix",
    "removing spike neurons",
    "fitting sinks",
    "measuring inputs",
    "fine-tuning",
    "evaluating",
    "writing",
)
ENDS = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGKILL: -signal.SIGKILL,
    signal.SIGHUP: 129,
}
# What cleans up is the same for signals that can be caught: each stage is interrupted by one.
SOME = ("loading", "fine-tuning", "writing")
CASES = [*product(STAGES, [signal.SIGINT]), *product(SOME, [signal.SIGTERM, signal.SIGKILL])]
CASES += [("fine-tuning", signal.SIGHUP)]  # a terminal that is closed

pytestmark = pytest.mark.usefixtures("little_text")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", torch.float32, num_hidden_layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    text = "".join(chr(97 + n * n * 7 % 23 + n % 3) for n in range(13_000))
    (folder / "text.txt").write_text(text)
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def arguments(model: Path, out: Path) -> list[str]:
    text = str(model / "text.txt")
    return ["convert", str(model), "--out", str(out), "--text", text, "--steps", "2"]


def convert(model: Path, out: Path) -> Result:
    return CliRunner().invoke(main, arguments(model, out))


def refused(model: Path, sentence: str) -> None:
    """The conversion is refused with a sentence and leaves nothing."""
    result = convert(model, model.parent / "out")
    assert result.exit_code == 1, result.exception
    assert sentence in result.stderr
    assert not [*model.parent.glob("out*")]


def run(log: Path, words: list[str], largest: int | None = None) -> None:
    """In another process: the command line, with its stderr in a file."""
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    shorten_texts(pytest.MonkeyPatch())
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.exit(main(words))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "number"), CASES)
def test_a_signal_at_any_stage_leaves_nothing(
    stage: str, number: signal.Signals, model: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = warm.Process(target=run, args=(log, arguments(model, out)))
    process.start()
    while not (log.exists() and stage in log.read_text()):
        assert process.is_alive(), log.read_text()
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    if process.exitcode == 0:  # it was over before the signal came
        assert (out / "absorb.json").is_file()
        return
    assert process.exitcode == ENDS[number], log.read_text()
    assert "Traceback" not in log.read_text()
    assert not out.exists()
    if number is signal.SIGKILL:  # nobody could clean up: the next conversion does
        with staged(out, force=False) as partial:
            (partial / "absorb.json").write_text("")
        shutil.rmtree(out)
    assert not [*tmp_path.glob("out*")]


@pytest.mark.parametrize("largest", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_disk_that_takes_no_more_is_one_sentence(
    largest: int, model: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = warm.Process(target=run, args=(log, arguments(model, out), largest))
    process.start()
    process.join()
    said = log.read_text()
    assert process.exitcode == 1
    assert "Traceback" not in said
    assert not [*tmp_path.glob("out*")]


def test_a_source_that_vanishes_once_it_is_read_does_no_harm(copy: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = warm.Process(target=run, args=(log, arguments(copy, out)))
    process.start()
    while not (log.exists() and "choosing the prefix" in log.read_text()):
        time.sleep(0.002)
    shutil.rmtree(copy)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert (out / "absorb.json").is_file()


@pytest.mark.parametrize("truncated", [True, False])
def test_a_source_that_is_written_to_once_it_is_read_does_no_harm(
    truncated: bool, copy: Path, tmp_path: Path
) -> None:
    whole, out, log = tmp_path / "whole" / "out", tmp_path / "out", tmp_path / "log"
    assert convert(copy, whole).exit_code == 0
    process = warm.Process(target=run, args=(log, arguments(copy, out)))
    process.start()
    while not (log.exists() and "choosing the prefix" in log.read_text()):
        time.sleep(0.002)
    file = copy / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as content:
        content.truncate(9) if truncated else content.write(b"\x3f" * size)
    process.join()
    assert process.exitcode == 0, log.read_text()
    for name in ("model.safetensors", "plan/plan.safetensors", "absorb.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_weights_lie_where_torch_puts_them(model: Path) -> None:
    loaded = load(ModelRef(name=str(model))).model
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())


def test_a_source_that_is_written_to_while_it_is_read_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, forecast = copy / "model.safetensors", source.forecast

    def told_and_written(*arguments: Any) -> Any:
        content = file.read_bytes()
        file.write_bytes(content[:-4] + b"\0\0\0\0")
        return forecast(*arguments)

    monkeypatch.setattr(source, "forecast", told_and_written)
    refused(copy, "changed while it was read; try again once it is complete")


def test_a_plan_that_is_written_to_once_it_is_read_does_no_harm(
    model: Path, tmp_path: Path
) -> None:
    assert convert(model, tmp_path / "out").exit_code == 0
    file = tmp_path / "out" / PLAN
    plan, _ = read_plan(file, load(ModelRef(name=str(model))))
    residual = plan.residual.tolist()
    with file.open("r+b") as content:
        content.write(b"\x3f" * file.stat().st_size)
    assert plan.residual.tolist() == residual


@pytest.mark.parametrize("length", [0, 7, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length_is_refused(copy: Path, length: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    refused(copy, "could not be read")


def test_a_bit_that_flips_in_a_name_is_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"lm_head", b"lm_heae", 1))
    refused(copy, "lacks lm_head.weight")


def test_a_name_that_is_a_path_is_no_path(copy: Path) -> None:
    file = copy / "model.safetensors"
    save_file({**load_file(file), "../../escaped": torch.zeros(1)}, file, metadata={"format": "pt"})
    refused(copy, "without a use for it")
    assert not [*copy.parent.parent.glob("**/escaped*")]


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "a\x00b", ""])
def test_an_index_that_leads_elsewhere_is_refused(copy: Path, shard: str) -> None:
    (copy / "model.safetensors").rename(copy.parent / "other.safetensors")
    index = {"weight_map": {"lm_head.weight": shard}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, "no file beside it")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**12),
        ("intermediate_size", 10**12),
        ("hidden_size", "32"),
        ("num_attention_heads", 0),
        ("num_attention_heads", None),
        ("rms_norm_eps", float("nan")),
        ("architectures", 3),
        ("rope_parameters", []),
    ],
)
def test_a_damaged_configuration_is_refused_at_once(copy: Path, key: str, value: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, key: value}))
    started = time.process_time()  # of this process alone: others may have the cores
    result = convert(copy, copy.parent / "out")
    assert time.process_time() - started < 20
    if result.exit_code == 0:
        assert key == "architectures"  # absorb does not need it
        return
    assert result.exit_code == 1, result.exception
    assert not [*copy.parent.glob("out*")]


def test_a_configuration_nested_without_end_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("[" * 100_000)
    refused(copy, "not JSON")


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path, model: Path) -> None:
    small = tmp_path / "small"
    tiny("llama", torch.float32, vocab_size=20).save_pretrained(small)
    tiny_tokenizer().save_pretrained(small)
    shutil.copy(model / "text.txt", small)
    refused(small, "and the model has 20")


def test_a_hundred_megabytes_on_one_line_are_not_all_tokenised(model: Path, tmp_path: Path) -> None:
    path, source = tmp_path / "text.txt", load(ModelRef(name=str(model)))
    path.write_text("ab cd " * 17_000_000)
    started = time.process_time()
    ids = read_ids(path, source, 10_000)
    assert time.process_time() - started < 10
    few = source.tokenizer("ab cd " * 10_000, add_special_tokens=False)["input_ids"]
    assert ids[:10_000] == few[:10_000]


def test_memory_that_is_full_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, UserErrors("take less"):
        torch.empty(2**50)
    assert ended.value.code == 1
    assert "the memory is full, so nothing was written; take less" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["\x00"], ["m", "--prefix", "\udcff"], ["m", "--plan", "a\x00"]])
def test_arguments_that_are_no_text_are_misuse(words: list[str]) -> None:
    result = CliRunner().invoke(main, ["convert", "--out", "out", *words])
    assert result.exit_code == 2
    assert "is not text in UTF-8" in result.stderr


@pytest.mark.parametrize(
    "words", [["verify", ""], ["convert", "m", "--out", ""], ["convert", "m", "--out="]]
)
def test_what_is_empty_is_misuse_and_not_the_current_folder(words: list[str]) -> None:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "an argument is empty" in result.stderr


def test_a_limit_of_no_tasks_is_misuse() -> None:
    result = CliRunner().invoke(main, ["eval", "m", "--limit", "5"])
    assert result.exit_code == 2
    assert "--limit is of the questions of --tasks" in result.stderr


def test_a_file_and_a_folder_need_two_names(model: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "page")
    result = CliRunner().invoke(main, ["inspect", str(model), "--html", place, "--png", place])
    assert result.exit_code == 2
    assert "name two places" in result.stderr
    assert not [*tmp_path.iterdir()]


def test_a_name_too_long_is_refused(model: Path) -> None:
    result = convert(model, Path("o" * 300))
    assert result.exit_code == 1, result.exception
    assert "absorb: " in result.stderr


def test_a_reader_that_wants_no_more_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BrokenPipeError), UserErrors():
        raise BrokenPipeError
    assert capsys.readouterr().err == ""


def test_an_interruption_says_how_to_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("absorb.pipelines.produce.produce", interrupted)
    out = tmp_path / "out"
    for options, sentence in (
        ([], "absorb: interrupted; nothing was written"),
        (
            ["--resume"],
            f"absorb: interrupted; run the same command again, and it goes on from {out}",
        ),
    ):
        result = CliRunner().invoke(main, [*arguments(model, out), *options])
        assert (result.exit_code, result.stderr.startswith(sentence)) == (130, True), result.stderr
