"""The Python interface does what the commands do, and converted models load by `import absorb`."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from click import Command

import absorb
from absorb import AbsorbError
from absorb import api as interface
from absorb.cli import main as cli
from absorb.cli import terminal
from absorb.pipelines import prepare as pipeline
from absorb.schema.codec import from_json
from absorb.schema.declared import options_of
from absorb.schema.report import Report
from absorb.schema.settings import Evaluation, Export, Job, Sink, Survey, Thresholds
from tests.helpers import warm

pytestmark = pytest.mark.usefixtures("little_text")


# What has no place in Python: there the result is an object, and huggingface_hub uploads a folder.
ONLY_COMMANDS = {"as_json", "push_to_hub", "html", "png", "family"}

COMMANDS = [
    (absorb.convert, cli.convert),
    (absorb.inspect, cli.inspect),
    (absorb.evaluate, cli.evaluate),
    (absorb.export, cli.export),
]


@pytest.mark.parametrize(("function", "command"), COMMANDS)
def test_the_arguments_are_those_of_the_command(
    function: Callable[..., Any], command: Command
) -> None:
    theirs = {parameter.name for parameter in command.params}
    assert {*signature(function).parameters} == theirs - ONLY_COMMANDS


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (Survey, interface.InspectOptions),
        (Job, interface.ConvertOptions),
        (Evaluation, interface.EvaluateOptions),
        (Export, interface.ExportOptions),
    ],
)
def test_editors_and_type_checkers_are_told_of_every_option(settings: type, told: type) -> None:
    assert get_type_hints(told) == {
        one.name: interface.annotation(one) for one in options_of(settings)
    }


def test_an_unknown_argument_is_refused_as_python_does(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no option 'stpes'; known are revision"):
        absorb.convert("nothing", tmp_path / "out", stpes=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no option 'plan'"):
        absorb.inspect("nothing", plan="somewhere")  # type: ignore[call-arg]


def test_a_conversion_gives_the_report_that_it_writes(converted: Path) -> None:
    report = from_json(Report, (converted / "absorb.json").read_text())
    assert report.recipe.steps == 0
    assert report.inspection.license == "mit"


def test_an_evaluation_knows_originals_and_converted_models(
    original: Path, converted: Path
) -> None:
    text = Path(__file__).parent.parent / "README.md"
    result = absorb.evaluate(converted, against=[original], text=text, formats=["fp8"], windows=2)
    assert [model.converted for model in result.models] == [True, False]
    assert set(result.models[0].formats) == {"fp8"}


def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    def refused(sentence: str, **options: Any) -> None:
        with pytest.raises(AbsorbError, match=re.escape(sentence)):
            absorb.convert("nothing", tmp_path / "out", **options)

    refused("steps and minutes both set the length", steps=1, minutes=1)
    refused("plan has decided what sink would", plan="somewhere", sink="key")
    thresholds = Thresholds(divergence=1)
    refused("plan has decided what thresholds would", plan="somewhere", thresholds=thresholds)
    refused("sink is 'keys' and must be one of 'logit', 'key', 'auto'", sink="keys")
    refused("train is 'none'", train="none")
    refused("is no file to read text from", text=tmp_path / "nothing.txt")
    refused("purpose is 'int4'", purpose="int4")
    refused("steps is -1 and must be a whole number from 0", steps=-1)
    refused("steps is 1.5 and must be a whole number", steps=1.5)
    refused("minutes is 0 and must be a number above 0 to 1e+06", minutes=0)
    refused("minutes is nan and must be a number", minutes=float("nan"))
    refused("residual_target is 0 and must be a number from 0.001", residual_target=0)
    refused("seed is -1 and must be a whole number from 0 to 1e+09", seed=-1)
    refused("device is device(type='cpu') and must be text", device=torch.device("cpu"))
    refused("thresholds is {} and must be Thresholds", thresholds={})
    refused("prefix is [1] and must be text", prefix=[1])
    refused("resume is 'no' and must be True or False", resume="no")
    refused("force is 'no' and must be True or False", force="no")
    refused("text is ['a b'] and must be a path", text=["a b"])
    refused("a b a b  is no file to read text from", text="a b " * 100)
    with pytest.raises(AbsorbError, match="model is of type Linear and must be a name or path"):
        absorb.inspect(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(AbsorbError, match="out is of type NoneType"):
        absorb.export("nothing", None)  # type: ignore[arg-type]
    for named in (absorb.inspect, partial(absorb.convert, "nothing")):
        with pytest.raises(AbsorbError, match=r"aaa\.\.\. is too long for a path"):
            named("a" * 300)
    with pytest.raises(AbsorbError, match="the name of a model is empty"):
        absorb.inspect("")
    with pytest.raises(AbsorbError, match="token_ratio is -1 and must be a number from 0"):
        Thresholds(token_ratio=-1)
    with pytest.raises(AbsorbError, match="sink_weight is inf and must be a number from 0 to 1e"):
        Thresholds(sink_weight=float("inf"))
    for options, sentence in (
        ({"formats": ["int3"]}, "formats is 'int3'"),
        ({"formats": "fp8"}, "formats is 'fp8' and must be a list"),
        ({"against": "demo"}, "against is 'demo' and must be a list"),
        ({"windows": "2"}, "windows is '2' and must be a whole number"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"limit": 0}, "limit is 0 and must be a whole number from 1"),
        ({"limit": 5}, "limit is of the questions of tasks; add some"),
    ):
        with pytest.raises(AbsorbError, match=sentence):
            absorb.evaluate("nothing", **options)  # type: ignore[arg-type]


LOAD = """
import sys
import {first}
import {second}
assert "absorb.models.modeling_absorb" in sys.modules or "torch" not in sys.modules
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
folder, tokens = sys.argv[1], torch.arange(5, 25)[None]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
assert type(model).__module__ == "absorb.models.modeling_absorb"
assert AutoConfig.from_pretrained(folder).model_type == "absorb_llama"
bare = AutoModel.from_pretrained(folder).eval()
with torch.no_grad():
    logits = model(tokens).logits
    assert torch.equal(model.lm_head(bare(tokens).last_hidden_state), logits)
{more}
"""
PIPELINE = """
from transformers import pipeline
assert pipeline("text-generation", model=folder)("a b", max_new_tokens=3)[0]["generated_text"]
"""


@pytest.mark.parametrize(
    ("first", "second", "more"),
    [
        ("absorb", "sys", PIPELINE),
        pytest.param("transformers", "absorb", "", marks=pytest.mark.slow),
        pytest.param("absorb.models.modeling_absorb", "sys", "", marks=pytest.mark.slow),
    ],
)
def test_with_absorb_imported_a_model_needs_no_trust(
    converted: Path, first: str, second: str, more: str
) -> None:
    script = LOAD.format(first=first, second=second, more=more)
    command = [sys.executable, "-c", script, str(converted)]
    # In a warm process transformers is there already, as in one that imports it first.
    run = partial(subprocess.run, capture_output=True, text=True) if first == "absorb" else warm.run
    done = run(command)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("sink", "said"), [("logit", True), ("auto", False), ("key", False)])
def test_layers_that_logits_do_not_fit_are_named(
    sink: Sink,
    said: bool,
    original: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING")
    monkeypatch.setattr(pipeline, "_MOST_IS_LEFT_OUT", 0.05)  # a random model has no sinks
    found = absorb.inspect(original, sink=sink, text=text_file)
    worst = max(layer.fit_error for layer in found.layers)
    assert (worst > 0.05) == said
    assert ("--sink auto keeps the keys of the prefix" in caplog.text) == said
    assert (f"({worst:.2f})" in caplog.text) == said


@pytest.mark.parametrize("sink", ["logit", "auto"])
def test_keys_are_advised_where_they_were_not_tried(
    sink: Sink, converted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = from_json(Report, (converted / "absorb.json").read_text()).inspection
    layers = (replace(found.layers[0], fit_error=0.91), *found.layers[1:])
    pipeline.warn_of_misfits(replace(found, layers=layers, job=replace(found.job, sink=sink)))
    assert "0 (0.91)" in caplog.text
    assert ("--sink auto" in caplog.text) == (sink == "logit")
    assert ("keys do no better" in caplog.text) == (sink == "auto")


def test_a_lost_process_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On GPUs both the signal of torchrun and the wait that it ends tell of it."""
    monkeypatch.setenv("RANK", "0")
    terminal._say_lost.cache_clear()
    with pytest.raises(SystemExit):
        terminal._terminated(signal.SIGTERM, None)
    with pytest.raises(SystemExit), terminal.UserErrors():
        raise RuntimeError("NCCL communicator was aborted")
    assert capsys.readouterr().err.count("of torchrun has ended") == 1


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    ],
)
def test_a_full_memory_is_told_in_a_sentence_whoever_finds_it_full(
    said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), terminal.UserErrors():
        raise RuntimeError(said)
    assert "the memory is full, so nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [SystemExit(143), RuntimeError("Connection closed by peer")])
def test_a_signal_does_not_stop_what_cleans_up(
    ending: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun sends one to a process that has found another lost, and may send two."""
    monkeypatch.setenv("RANK", "0")
    before = signal.signal(signal.SIGTERM, terminal._terminated)
    cleaned: list[str] = []

    @contextmanager
    def cleaning() -> Iterator[None]:
        try:
            yield
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append("all")

    try:
        with pytest.raises(type(ending)), cleaning():
            raise ending
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cleaned == ["all"]


def test_what_nohup_has_said_stands() -> None:
    before = {one: signal.getsignal(one) for one in (signal.SIGHUP, signal.SIGTERM)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminal.UserErrors():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == terminal._terminated
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
