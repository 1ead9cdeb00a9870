"""An option is declared once, and commands, Python, cards and records have it from there."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from inspect import getdoc, signature
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from absorb import AbsorbError
from absorb.api import asked, taking_options_of
from absorb.cli.main import main
from absorb.cli.options import options_from, settled
from absorb.schema.codec import from_json, to_json
from absorb.schema.declared import Range, filled, option
from absorb.schema.report import Report
from absorb.schema.settings import Distillation, Job, ModelRef, Thresholds
from absorb.show.card import command

RECORD = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-absorbed" / "absorb.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tinted(Distillation):
    """The fine-tune, with an option more."""

    tint: Literal["red", "blue"] = option("red", "Of what shines.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TintedJob(Job):
    """A job with that and two more, one of which decides the tint."""

    distillation: Tinted = field(default_factory=Tinted)
    glow: float = option(3.0, "How much it shines.", range=Range(least=1, most=9))
    scheme: Path | None = option(None, "Tints of an earlier day.", decides=("tint",))


@click.command()
@click.argument("model")
@options_from(TintedJob)
def paint(model: str, **options: Any) -> None:
    """What `convert` would be: it prints the command of the job that it makes."""
    click.echo(command(settled(TintedJob, {"name": model, "out": Path("out"), **options})))


@taking_options_of(TintedJob)
def painted(**options: Any) -> TintedJob:
    """The same in Python."""
    return filled(TintedJob, {"name": "m", "out": Path("out"), **asked(TintedJob, options)})


def run(*words: str) -> Any:
    return CliRunner().invoke(paint, [*words])


def test_an_option_that_is_added_is_one_of_the_command() -> None:
    told = " ".join(run("--help").output.split())
    assert "--tint [red|blue] Of what shines. [default: red]" in told
    assert "--glow FLOAT How much it shines. [default: 3]" in told
    for words, sentence in (
        (("--glow", "10"), "--glow is 10.0 and must be a number from 1 to 9"),
        (("--glow", "nan"), "--glow is nan and must be a number from 1 to 9"),
        (("--tint", "green"), "'green' is not one of 'red', 'blue'"),
        (("--tint", "red", "--scheme", "s"), "--scheme has decided what --tint would; drop one"),
    ):
        result = run("m", *words)
        assert (result.exit_code, sentence in result.stderr) == (2, True), result.output


def test_an_option_that_is_added_is_an_argument_in_python() -> None:
    parameters = signature(painted).parameters
    assert parameters["tint"].default == "red"
    assert (parameters["glow"].default, parameters["glow"].annotation) == (3.0, float)
    assert parameters["scheme"].annotation == str | Path | None
    assert "glow: How much it shines." in str(getdoc(painted))
    assert painted(glow=4).glow == 4
    assert painted(tint="blue").distillation.tint == "blue"
    assert painted(scheme="s").scheme == Path("s")
    for options, sentence in (
        ({"glow": 10}, "^glow is 10 and must be a number from 1 to 9"),
        ({"tint": "green"}, "^tint is 'green' and must be one of 'red', 'blue'"),
        ({"tint": "blue", "scheme": "s"}, "^scheme has decided what tint would; drop one of them"),
    ):
        with pytest.raises(AbsorbError, match=sentence):
            painted(**options)


def test_an_option_that_is_added_is_in_the_command_of_a_card() -> None:
    words = ["--tint", "blue", "--glow", "4.5"]
    assert run("m", *words).output == f"absorb convert m --out DIR {' '.join(words)}\n"
    assert run("m", "--tint", "red", "--glow", "3").output == "absorb convert m --out DIR\n"
    decided = replace(painted(tint="blue"), scheme=Path("far/away"))
    assert command(decided) == "absorb convert m --out DIR --scheme away"


def test_an_option_that_is_added_is_in_the_record() -> None:
    job = painted(tint="blue", glow=4)
    inspection = replace(from_json(Report, RECORD.read_text()).inspection, job=job)
    written = json.loads(to_json(inspection))["job"]
    assert written["distillation"]["tint"] == "blue"
    assert from_json(TintedJob, json.dumps(written)) == job
    for name, value in (("glow", 10), ("glow", True), ("scheme", 5), ("glare", 1)):
        with pytest.raises(ValueError, match=f"{name}|{value}"):
            from_json(TintedJob, json.dumps({**written, name: value}))


def test_a_record_keeps_to_itself_where_things_lay() -> None:
    written = to_json(painted(scheme="far/away"))
    assert from_json(TintedJob, written).scheme == Path("away")
    assert "far" not in written


def test_thresholds_are_given_by_name() -> None:
    words = ["--threshold", "sink_weight=0.5", "--threshold", "divergence=1e-05"]
    assert run("m", *words).output == f"absorb convert m --out DIR {' '.join(words)}\n"
    thresholds = Thresholds(sink_weight=0.5, divergence=1e-05)
    job = Job(model=ModelRef(name="m"), out=Path("out"), thresholds=thresholds)
    assert command(job).endswith(" ".join(words))


@pytest.mark.parametrize("name", ["convert", "inspect"])
@pytest.mark.parametrize(
    ("threshold", "sentence"),
    [
        (
            "weight=1",
            "'weight=1' is no NAME=VALUE where NAME is one of sink_weight, massive_value,",
        ),
        ("0.5", "'0.5' is no NAME=VALUE"),
        ("divergence", "'' is not a valid float"),
        ("divergence=much", "'much' is not a valid float"),
        ("divergence=-1", "divergence is -1.0 and must be a number from 0 to 1e+09"),
        ("divergence=nan", "divergence is nan and must be a number from 0 to 1e+09"),
    ],
)
def test_a_threshold_that_is_none_is_misuse(name: str, threshold: str, sentence: str) -> None:
    out = ["--out", "out"] if name == "convert" else []
    result = CliRunner().invoke(main, [name, "m", *out, "--threshold", threshold])
    assert result.exit_code == 2
    assert sentence in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("convert m --out o --steps 1 --minutes 1", "--steps and --minutes both set the length"),
        ("convert m --out o --steps -1", "--steps is -1 and must be a whole number from 0"),
        ("convert m --out o --seed 0 --minutes 0", "--minutes is 0.0 and must be a number above 0"),
        ("convert m --out o --plan p --sink logit", "--plan has decided what --sink would"),
        ("convert m --out o --plan p --gates norm", "--plan has decided what --gates would"),
        ("convert m --out o --gates norm --steps 0", "--gates norm without a fine-tune does"),
        ("eval m --limit 5", "--limit is of the questions of --tasks; add some, or drop --limit"),
        ("eval m --formats fp8,int3", "--formats is 'int3' and must be one of 'w8a8-static'"),
        ("eval m --formats fp8,", "a name between two commas is missing"),
        ("push d r --create-pr --revision v", "drop --create-pr or --revision"),
    ],
)
def test_misuse_is_told_by_flags(line: str, sentence: str) -> None:
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == 2
    assert sentence in " ".join(result.stderr.split())


@pytest.mark.parametrize("columns", ["80", "100"])
def test_the_help_of_convert_fits_on_a_screen(columns: str) -> None:
    told = CliRunner().invoke(main, ["convert", "--help"], env={"COLUMNS": columns}).output
    assert len(told.splitlines()) <= 45
    shown = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", told, re.MULTILINE))
    flags = {flag for parameter in main.commands["convert"].params for flag in parameter.opts}
    assert shown == flags - {"model"} | {"--help"}


def test_settings_need_neither_torch_nor_click() -> None:
    heavy = "{'torch', 'transformers', 'click', 'huggingface_hub'}"
    script = f"import sys, absorb.schema.settings; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
