"""A plan file alone redoes a conversion to the bit, and what is no plan for a model is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from absorb.cli.main import main
from absorb.errors import AbsorbError
from absorb.fold import decide
from absorb.fold.graft import graft
from absorb.fold.plan import STREAM, Plan
from absorb.fold.sinks.forms import KeySink, LogitSink
from absorb.fold.smoothing import searched_scales
from absorb.load.source import Source, load
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.family import Family
from absorb.schema.findings import Removal, SpikeNeuron
from absorb.schema.report import Inspection, Order, versions
from absorb.schema.settings import Job, ModelRef, Sink
from absorb.ship.plan_file import PLAN, fits_in, read_plan, write_plan
from tests.helpers.plans import plan_of
from tests.helpers.tiny import HIDDEN, LAYERS, NOTHING, tiny
from tests.helpers.tiny_tokenizer import letters, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("little_text")


# Low enough that neurons of a tiny model are removed and channels of its stream are rescaled.
LOW = ["--threshold", "channel_ratio=1.3", "--threshold", "massive_value=1"]
LOW += ["--threshold", "massive_ratio=1", "--threshold", "divergence=1"]

# In the form `auto` one layer has keys and the others logits, so it stands for both.
CASES = [(name, "auto") for name in FAMILIES]
CASES += [(name, form) for name in ("llama", "gpt2") for form in ("logit", "key")]


def absorb(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def saved(folder: Path, dtype: torch.dtype = torch.float32, model_type: str = "llama") -> Path:
    tiny(model_type, torch.float32).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def converted(model: Path, out: Path, *options: str) -> Path:
    result = absorb("convert", model, "--out", out, "--steps", "0", *options)
    assert result.exit_code == 0, result.output
    return out


def report(folder: Path) -> dict:
    return json.loads((folder / "absorb.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def made(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "first"
    return converted(model, out, "--sink", "logit", "--text", str(text_file), *LOW)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sink", "dtype"),
    [("logit", torch.float32), ("auto", torch.bfloat16), ("key", torch.float32)],
    ids=str,
)
def test_the_plan_file_alone_gives_the_same_weights_whatever_the_text(
    sink: str,
    dtype: torch.dtype,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = saved(tmp_path / "model", dtype)
    monkeypatch.setattr(decide, "MOST_LEFT_OUT", (0.3,))
    text = ["--text", str(text_file)]
    first = converted(model, tmp_path / "first", "--sink", sink, *text, *LOW)
    found = report(first)["inspection"]
    keyed = len(found["keyed_layers"])
    assert {"logit": keyed == 0, "auto": 0 < keyed < LAYERS, "key": keyed == LAYERS}[sink]
    assert found["removals"]
    assert found["residual_scales"]
    shutil.copy(first / PLAN, tmp_path / "alone.safetensors")
    plan = ["--plan", str(tmp_path / "alone.safetensors")]
    (tmp_path / "other.txt").write_text(letters(9_000, seed=1))
    text = ["--text", str(tmp_path / "other.txt")]
    second = converted(model, tmp_path / "second", *plan, *text)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes(), name
    assert report(second)["inspection"]["text_sha256"] != found["text_sha256"]


def test_a_conversion_by_a_plan_reports_the_same_figures_and_says_where_it_is_from(
    model: Path, made: Path, text_file: Path, tmp_path: Path
) -> None:
    out, text = tmp_path / "out", ["--text", str(text_file)]
    result = absorb("convert", model, "--plan", made, "--out", out, "--steps", "0", *text)
    assert result.exit_code == 0, result.output
    assert "reading text" in result.stderr
    assert "read from first" in result.stdout
    assert "read from first" in (out / "README.md").read_text()
    for work in ("measuring the stream", "choosing the prefix", "fitting sinks", "removing"):
        assert work not in result.stderr
    before, after = report(made), report(out)
    assert after["inspection"]["job"]["plan"] == "first"
    assert after["original"] == before["original"]
    assert after["converted"] == before["converted"]
    told_apart = {"job", "divergence"}
    for name in before["inspection"].keys() - told_apart:
        assert after["inspection"][name] == before["inspection"][name], name
    kept = after["inspection"]["job"]["thresholds"]
    assert kept == before["inspection"]["job"]["thresholds"]
    again = tmp_path / "again"
    converted(model, again, "--plan", str(out), *text)
    assert (again / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_a_conversion_by_a_plan_can_be_fine_tuned(
    model: Path, made: Path, text_file: Path, tmp_path: Path
) -> None:
    out, text = tmp_path / "out", ["--text", text_file]
    result = absorb("convert", model, "--plan", made / PLAN, "--out", out, "--steps", "2", *text)
    assert result.exit_code == 0, result.output
    assert len(report(out)["losses"]["training"]) == 2


# Every family


RESIDUAL = 2.0 ** (torch.arange(HIDDEN) % 5)


def planned(source: Source, sink: str, tokens: Tensor) -> Plan:
    """A plan of nothing but sinks, in the form `auto` with keys in one layer."""

    def made(form: Sink) -> Plan:
        return plan_of(
            Decoder(source.model, source.family), NOTHING, RESIDUAL, (1, 9), tokens, 0.0, form
        )

    if sink != "auto" or source.family.gated:  # behind a gate there are keys alone
        return made("key" if source.family.gated else sink)
    logit, key = made("logit"), made("key")
    return replace(logit, sinks=(logit.sinks[0], key.sinks[1], *logit.sinks[2:]))


def inspected(source: Source, plan: Plan, sink: str) -> Inspection:
    return Inspection(
        model=source.name,
        commit=None,
        license=None,
        fingerprint=source.fingerprint,
        family=source.family.model_type,
        dtype="float32",
        layers=(),
        text_origin="",
        text_sha256="",
        prefix=plan.prefix,
        prefix_text="",
        prefix_trials=(),
        token_text={},
        findings=NOTHING,
        removals=plan.removals,
        keyed_layers=plan.keyed_layers,
        residual_scales={},
        divergence=0.0,
        logit_divergence=None,
        versions=versions(),
        job=Job(model=ModelRef(name="tiny"), out=Path("out"), sink=sink),
    )


def source_of(family: Family) -> Source:
    return Source(
        name=f"tiny {family.model_type}",
        model=tiny(family.model_type, torch.float32),
        tokenizer=tiny_tokenizer(),
        family=family,
        dtype=torch.float32,
        license=None,
        commit=None,
    )


@pytest.mark.parametrize(("model_type", "sink"), CASES)
@torch.no_grad()
def test_a_plan_of_any_family_survives_being_written_and_read(
    model_type: str, sink: str, tokens: Tensor, tmp_path: Path
) -> None:
    family = FAMILIES[model_type]
    source = source_of(family)
    plan = planned(source, sink, tokens)
    spike = SpikeNeuron(layer=1, neuron=7, contribution=1.0)
    plan = replace(
        plan,
        removals=(Removal(spike=spike, divergence=0.0),),
        smoothing=searched_scales(
            Decoder(graft(Decoder(source.model, family), plan).model, family), tokens
        ),
    )
    write_plan(tmp_path / PLAN, plan, inspected(source, plan, sink))
    read, _ = read_plan(tmp_path, source)
    before = graft(Decoder(source.model, family), plan).model.state_dict()
    after = graft(Decoder(source.model, family), read).model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@torch.no_grad()
def test_whoever_needs_logits_later_has_them_from_the_file_alone(
    tokens: Tensor, tmp_path: Path
) -> None:
    source = source_of(FAMILIES["llama"])
    plan = plan_of(
        Decoder(source.model, source.family), NOTHING, RESIDUAL, (1, 9), tokens, 0.0, "auto", 0.0
    )
    assert len(plan.keyed_layers) == len(plan.sinks)
    smoothing = searched_scales(
        Decoder(graft(Decoder(source.model, source.family), plan).model, source.family), tokens
    )
    plan = replace(plan, smoothing=smoothing)
    write_plan(tmp_path / PLAN, plan, inspected(source, plan, "auto"))
    read, _ = read_plan(tmp_path, source)
    assert not read.as_logits.keyed_layers
    model = graft(Decoder(source.model, source.family), read.as_logits).model
    expected = graft(Decoder(source.model, source.family), plan.as_logits).model
    assert "sink_key" not in " ".join(model.state_dict())
    assert torch.equal(model(tokens).logits, expected(tokens).logits)


# Refusals


@pytest.fixture(scope="module")
def source(model: Path) -> Source:
    return load(ModelRef(name=str(model)))


def edited(made: Path, folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """The plan of a checkpoint with other tensors."""
    tensors = load_file(made / PLAN)
    edit(tensors)
    with safe_open(made / PLAN, "pt") as content:
        save_file(tensors, folder / "edited.safetensors", metadata=content.metadata())
    return folder / "edited.safetensors"


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: [tensors.pop(name)]


def put(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


def shorten(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (drop("sinks.1.logits"), "lacks sinks.1.logits"),
        (drop("smoothing.mlp.up_proj"), "lacks smoothing.mlp.up_proj"),
        (shorten("sinks.2.value"), r"holds sinks.2.value of the shape \(1, 8\) and not \(2, 8\)"),
        (shorten("residual"), r"holds residual of the shape \(31,\) and not \(32,\)"),
        (put("sinks.0.error", float("nan")), "has NaN or infinity in sinks.0.error"),
        (
            put("smoothing.mlp.up_proj", float("inf")),
            "has NaN or infinity in smoothing.mlp.up_proj",
        ),
        (put("residual", 0), "has a divisor in residual that is not above zero"),
        (lambda tensors: tensors.update(more=torch.ones(1)), "holds more, unknown"),
        (
            lambda tensors: tensors.update({"sinks.1.keys": torch.ones(2, 1, 8)}),
            "holds sinks.1.keys, unknown",
        ),
    ],
)
def test_a_damaged_plan_is_refused(
    edit: Callable[[dict[str, Tensor]], None],
    sentence: str,
    made: Path,
    source: Source,
    tmp_path: Path,
) -> None:
    with pytest.raises(AbsorbError, match=f"{sentence}, so it is damaged; fetch it again"):
        read_plan(edited(made, tmp_path, edit), source)


def test_a_truncated_plan_is_refused(made: Path, source: Source, tmp_path: Path) -> None:
    content = (made / PLAN).read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(AbsorbError, match="cannot be read as a plan"):
            read_plan(tmp_path / "cut", source)


def test_what_is_no_plan_is_refused(made: Path, source: Source, tmp_path: Path) -> None:
    with pytest.raises(AbsorbError, match=r"nowhere does not exist; name a folder"):
        read_plan(tmp_path / "nowhere", source)
    with pytest.raises(AbsorbError, match=r"plan.safetensors does not exist; name a folder"):
        read_plan(tmp_path, source)
    with pytest.raises(AbsorbError, match=r"model.safetensors is not a plan"):
        read_plan(made / "model.safetensors", source)
    with pytest.raises(AbsorbError, match=r"absorb.json cannot be read as a plan"):
        read_plan(made / "absorb.json", source)


def test_a_pickle_is_not_opened(source: Source, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return Path.touch, (tmp_path / "exploded",)

    torch.save(Bomb(), tmp_path / "bomb")
    with pytest.raises(AbsorbError, match="cannot be read as a plan"):
        read_plan(tmp_path / "bomb", source)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"family": "llama", "colour": 1}'])
def test_a_plan_of_another_version_is_refused(
    text: str, made: Path, source: Source, tmp_path: Path
) -> None:
    with safe_open(made / PLAN, "pt") as content:
        [name] = content.metadata()
    save_file(load_file(made / PLAN), tmp_path / "other", metadata={name: text})
    with pytest.raises(AbsorbError, match="was written by another version of absorb"):
        read_plan(tmp_path / "other", source)


def test_a_plan_beside_the_weights_is_found_too(made: Path, source: Source, tmp_path: Path) -> None:
    shutil.copy(made / PLAN, tmp_path)
    plan, inspection = read_plan(tmp_path, source)
    assert inspection == read_plan(made, source)[1]
    assert plan.prefix == inspection.prefix


def test_an_engine_that_takes_all_safetensors_for_weights_finds_no_others(made: Path) -> None:
    assert [file.name for file in made.glob("*.safetensors")] == ["model.safetensors"]


def test_the_plan_of_another_model_is_refused(
    model: Path, made: Path, source: Source, tmp_path: Path
) -> None:
    other = load(ModelRef(name=str(model)))
    other.model.model.layers[2].mlp.down_proj.weight.data[5] += 1e-3
    with pytest.raises(AbsorbError, match=r"is the plan of .*, and .* has other weights; convert"):
        read_plan(made, other)
    other = source_of(FAMILIES["qwen2"])
    with pytest.raises(AbsorbError, match="a llama model, and tiny qwen2 is a qwen2 model"):
        read_plan(made, other)
    read_plan(made, source)


def test_a_refusal_is_one_sentence_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    result = absorb("convert", model, "--plan", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"absorb: {tmp_path / PLAN} does not exist; name a folder")
    assert "sampling" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option",
    [
        ("--prefix", "a"),
        ("--sink", "logit"),
        ("--residual-target", "1"),
        ("--threshold", "divergence=0.01"),
    ],
    ids=lambda option: option[0],
)
def test_what_the_plan_has_decided_cannot_be_asked_for(
    option: tuple[str, str], model: Path, made: Path, tmp_path: Path
) -> None:
    result = absorb("convert", model, "--plan", made, "--out", tmp_path / "out", *option)
    assert result.exit_code == 2
    assert f"--plan has decided what {option[0]} would; drop one of them" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_orders_of_channels_are_reported_and_come_again_by_the_plan(
    model_type: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tmp_path / "model", model_type=model_type)
    text = ["--text", str(text_file), "--for", "mxfp4"]
    first = converted(model, tmp_path / "first", *text)
    orders = report(first)["inspection"]["orders"]
    assert {order["channels"] for order in orders} & {"stream", FAMILIES[model_type].down}
    assert all(0 < order["share"] < 1 for order in orders)
    assert "orders of channels" in (first / "README.md").read_text()
    second = converted(model, tmp_path / "second", *text, "--plan", str(first))
    monkeypatch.setattr("absorb.load.source.free_memory", lambda device: 0)
    streamed = converted(model, tmp_path / "streamed", *text, "--plan", str(first))
    weights = load_file(first / "model.safetensors")
    for name, tensor in load_file(second / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    for name, tensor in load_file(streamed / "model.safetensors").items():
        # A sum in another order may take a nudge of a weight to the other side.
        close = torch.isclose(tensor, weights[name], rtol=1e-5, atol=1e-6)
        assert close.float().mean() > 0.98, name


def test_an_order_that_names_a_channel_twice_is_refused(
    model: Path, made: Path, tmp_path: Path
) -> None:
    plan, inspection = read_plan(made, load(ModelRef(name=str(model))))
    order = torch.arange(HIDDEN)
    order[3] = 2
    named = Order(channels=STREAM, layers=(0,), share=0.9)
    file = tmp_path / "plan.safetensors"
    write_plan(file, replace(plan, orders={STREAM: order}), replace(inspection, orders=(named,)))
    result = absorb("convert", model, "--plan", file, "--out", tmp_path / "out", "--steps", "0")
    assert result.exit_code == 1
    assert "leaves out a channel" in result.stderr


def test_the_values_of_a_fit_come_in_the_order_of_the_checkpoint(
    model: Path, made: Path, tmp_path: Path
) -> None:
    plan, inspection = read_plan(made, load(ModelRef(name=str(model))))
    fit = plan.sinks[0]
    assert isinstance(fit, LogitSink)
    heads, width = fit.value.shape
    keys = torch.zeros(heads, len(plan.prefix), width)
    sink = KeySink(keys=keys, values=keys.clone(), error=torch.zeros(()), fit=fit)
    order = torch.arange(heads * width).view(heads, width).flip(1).flatten().expand(LAYERS, -1)
    name = FAMILIES["llama"].output
    plain = replace(plan, sinks=(sink, *plan.sinks[1:]))
    ordered = replace(plain, orders={name: order})
    keyed = replace(inspection, keyed_layers=(0,))
    named = replace(keyed, orders=(Order(channels=name, layers=(0,), share=0.9),))
    for folder, one, found in (("plain", plain, keyed), ("ordered", ordered, named)):
        (tmp_path / folder).mkdir()
        write_plan(tmp_path / folder / PLAN, one, found)
    values = [fits_in(tmp_path / folder)[0].value for folder in ("plain", "ordered")]
    assert torch.equal(values[1], values[0].flip(1))
    assert not torch.equal(*values)
