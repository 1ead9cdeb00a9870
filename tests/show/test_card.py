"""A model card says what its report says, in words that the Hub and the command line understand."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import absorb
from absorb.cli import main as cli
from absorb.cli.options import settled
from absorb.pipelines.convert import warn_of_loss
from absorb.schema.codec import from_json
from absorb.schema.proof import Proof
from absorb.schema.report import Report, verdict
from absorb.schema.settings import Job
from absorb.show.card import card, command
from absorb.show.rows import score_rows

RECORD = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-absorbed" / "absorb.json"


@pytest.fixture(scope="module")
def record() -> Report:
    """A conversion of a model from the Hub."""
    return from_json(Report, RECORD.read_text())


def test_a_card_is_made_of_the_report_alone(converted: Path) -> None:
    report = from_json(Report, (converted / "absorb.json").read_text())
    assert card(report) == (converted / "README.md").read_text()


def test_only_of_what_an_import_registers_is_said_that_it_does(record: Report) -> None:
    said = "After `import absorb` neither is needed."
    assert card(record).count(said) == 1
    proof = Proof(entry="", learned_positions=False, checks=(), left_out=())
    for more in ({"whole": "qwen2_vl"}, {"proof": proof}):
        assert said not in card(replace(record, inspection=replace(record.inspection, **more)))


def test_no_figure_is_less_than_nothing(record: Report) -> None:
    tiny = replace(record.converted, divergence=-1e-6)
    assert "-0.0" not in card(replace(record, converted=tiny))


def test_the_hub_reads_the_metadata(record: Report) -> None:
    data = ModelCard(card(record)).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.license == "apache-2.0"
    assert "absorb" in data.tags
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert results["perplexity"] == round(record.converted.perplexity, 3)
    assert results["perplexity in W8A8, static per tensor"] == round(
        record.converted.quantized["w8a8-static"], 3
    )


def test_a_conversion_that_is_worse_in_float_says_so_and_what_helps(record: Report) -> None:
    assert verdict(record) is None
    worse = replace(record.original, perplexity=1.034 * record.original.perplexity)
    bad = replace(record, converted=worse)
    said = verdict(bad)
    assert said is not None
    assert "3.4% worse" in said
    assert "--text FILE" in said
    assert f"{said[1:]}." in card(bad)
    [_, (_, _, shown), *_] = score_rows(bad.original, bad.converted)
    assert shown.endswith(" (+3.4%)")
    [_, (_, _, shown), *_] = score_rows(record.original, record.converted)
    assert "%" not in shown


def test_a_conversion_by_logits_that_is_worse_names_auto(record: Report) -> None:
    worse = replace(record.original, perplexity=2 * record.original.perplexity)
    job = replace(record.inspection.job, sink="logit")
    bad = replace(record, converted=worse, inspection=replace(record.inspection, job=job))
    assert "--sink auto" in str(verdict(bad))


def test_users_of_commands_and_of_python_are_warned_alike(
    record: Report, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_loss(record)
    assert not caplog.messages
    worse = replace(record.original, perplexity=2 * record.original.perplexity)
    bad = replace(record, converted=worse)
    warn_of_loss(bad)
    assert caplog.messages == [verdict(bad)]


def test_what_is_not_on_the_hub_has_no_base_model(converted: Path) -> None:
    data = ModelCard((converted / "README.md").read_text()).data.to_dict()
    assert not {"base_model", "base_model_relation"} & data.keys()
    assert data["license"] == "mit"


def test_a_card_and_its_report_keep_to_themselves_where_things_lay(
    converted: Path, original: Path
) -> None:
    for name in ("README.md", "absorb.json"):
        text = (converted / name).read_text()
        assert str(original.parent) not in text
        assert str(converted.parent) not in text
    assert (
        "absorb convert tiny-llama --out DIR --text text.txt --sink logit --steps 0\n"
        in (converted / "README.md").read_text()
    )


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--steps 12 --train sinks --seed 7 --device cpu",
        "--sink auto --residual-target 2 --prefix 'a b' --for w4a4 --minutes 1.5",
        "--threshold sink_weight=0.5 --threshold divergence=0.02 --trust-remote-code",
        "--revision v1 --force",
        "--plan made --steps 0",
    ],
)
def test_the_command_makes_the_same_job(options: str) -> None:
    def job_of(words: list[str]) -> Job:
        chosen = cli.convert.make_context("convert", words).params
        return settled(Job, {"name": chosen.pop("model"), **chosen})

    job = job_of(["a/b", "--out", "DIR", *shlex.split(options)])
    words = shlex.split(command(job))
    assert words[:2] == ["absorb", "convert"]
    assert job_of(words[2:]) == replace(job, force=False)


def test_a_plan_has_decided_what_the_command_leaves_out(record: Report) -> None:
    job = replace(record.inspection.job, plan=Path("folder/model"), sink="key")
    assert command(job) == "absorb convert demo --out DIR --plan model"


def test_only_keys_are_said_to_end_where_rope_changes(record: Report) -> None:
    inspection = record.inspection
    for keyed in ((), (1, 2)):
        for limit in (None, 4096):
            made = replace(inspection, keyed_layers=keyed, rope_changes_at=limit)
            text = card(replace(record, inspection=made))
            assert ("4,096 tokens" in text) == (keyed == (1, 2) and limit is not None)


def test_the_lines_for_weight_decay_name_what_the_model_has(record: Report) -> None:
    """That they do it is tried in scripts/soak/trainers.py."""
    inspection = record.inspection
    names = ("sink", "sink_key", "sink_value", "input_scale", "output_scale")
    every = tuple(range(len(inspection.layers)))
    for keyed, left in (((), (0, 3, 4)), ((2,), (0, 1, 2, 3, 4)), (every, (1, 2, 3, 4))):
        text = card(replace(record, inspection=replace(inspection, keyed_layers=keyed)))
        listed = ", ".join(f'"{names[i]}"' for i in left)
        assert f"ours = ({listed})" in text


def test_a_card_says_what_made_it(record: Report) -> None:
    text = card(record)
    assert f"absorb {absorb.__version__}" in text
    assert all(f"{name} {version}" in text for name, version in record.inspection.versions.items())
    assert '"revision": "COMMIT"' in text
