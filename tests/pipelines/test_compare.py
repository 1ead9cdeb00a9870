"""`absorb eval`: figures agree with other computations, and what cannot be measured is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import absorb
from absorb.cli.main import main
from absorb.errors import AbsorbError
from absorb.load import source as loading
from absorb.load.source import load
from absorb.measure import timing
from absorb.measure.score import in_formats
from absorb.measure.tally import kurtosis
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.pipelines import compare
from absorb.quantize.formats import FORMATS
from absorb.runtime.hooks import watching
from absorb.runtime.reading import Subject
from absorb.schema.settings import ModelRef
from absorb.schema.training import LENGTH as SAMPLED_LENGTH
from absorb.show.rows import comparison_rows
from absorb.text import gather
from absorb.text.gather import HELD_OUT_ROWS
from absorb.text.windows import windows
from scripts.release.tables import compared, score_row
from tests.helpers.tiny import HEAD_DIM, KV_HEADS, LAYERS, tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

LENGTH = gather.WINDOW


def written(folder: Path, tokens: int) -> Path:
    draw = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 26, (tokens,), generator=draw) + ord("a")
    path = folder / "text.txt"
    path.write_text("".join(map(chr, letters.tolist())))
    return path


def saved(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("source"), tiny("llama", torch.float32))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape, another function, another family."""
    return saved(tmp_path_factory.mktemp("other"), tiny("qwen3", torch.float32))


@pytest.fixture(scope="module")
def converted(source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    command = ["convert", str(source), "--out", str(out), "--steps", "0", "--sink", "key"]
    command += ["--text", str(text_file)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("text"), 4 * LENGTH)


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST", 0.0)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def measured(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def rows_of(path: Path, rows: int) -> Tensor:
    ids = tiny_tokenizer()(path.read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)


@torch.no_grad()
def test_figures_are_those_of_transformers(source: Path, other: Path, text: Path) -> None:
    found = measured(source, "--against", other, "--text", text, "--formats", "w8a8-token")
    assert (found["rows"], found["length"], found["reference"]) == (3, LENGTH, other.name)
    rows = rows_of(text, 3)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (source, other)]
    outputs = [model(rows, labels=rows, output_hidden_states=True) for model in models]
    for standing, out in zip(found["models"], outputs, strict=True):
        assert standing["perplexity"] == pytest.approx(math.exp(out.loss), rel=1e-4)
        low, high = standing["interval"]
        assert low < standing["perplexity"] < high
        assert standing["formats"]["w8a8-token"] == pytest.approx(math.exp(out.loss), rel=0.05)
    logs = [out.logits[:, :-1].log_softmax(-1) for out in outputs]
    kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean()
    agreement = (logs[0].argmax(-1) == logs[1].argmax(-1)).float().mean()
    first, reference = found["models"]
    assert first["divergence"] == pytest.approx(float(kl), rel=1e-3)
    assert first["agreement"] == pytest.approx(float(agreement))
    assert (reference["divergence"], reference["agreement"]) == (pytest.approx(0, abs=1e-6), 1)
    # transformers gives the last stream only behind the final norm.
    streams = torch.stack(outputs[0].hidden_states[1:-1])
    peaks = streams.abs().amax(-1).flatten(1)
    ratios = peaks.amax(1) / peaks.median(1).values
    assert first["token_ratio"] >= float(ratios.max()) * (1 - 1e-5)
    assert first["stream_peak"] >= float(peaks.max()) * (1 - 1e-5)


@torch.no_grad()
def test_a_converted_folder_is_measured_without_running_its_code(
    source: Path, converted: Path, text: Path, tmp_path: Path
) -> None:
    code = converted / "modeling_absorb.py"
    before, trap = code.read_text(), tmp_path / "trap"
    code.write_text(f"open({str(trap)!r}, 'w')\n")
    try:
        found = measured(converted, "--against", source, "--text", text, "--formats", "w4a4")
    finally:
        code.write_text(before)
    assert not trap.exists()
    student, original = found["models"]
    assert (student["converted"], original["converted"]) == (True, False)
    assert student["formats"].keys() == {"w4a4"}
    rows = rows_of(text, 3)
    model = AutoModelForCausalLM.from_pretrained(converted, trust_remote_code=True)
    expected = math.exp(model(rows, labels=rows).loss)
    assert student["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert student["perplexity"] != pytest.approx(original["perplexity"], rel=1e-4)


@torch.no_grad()
def test_an_original_reads_the_bos_that_its_tokenizer_adds(text: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny("llama", torch.float32), tiny_tokenizer()
    bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = bos
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = torch.cat([torch.ones(3, 1, dtype=torch.long), rows_of(text, 3)], 1)
    labels = rows.clone()
    labels[:, :2] = -100  # the first token of the text is not counted either
    [found] = measured(tmp_path, "--text", text, "--formats", "w8a8-token")["models"]
    loss = model(rows, labels=labels).loss
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_model_writes_its_own_text_converted_or_not(source: Path, converted: Path) -> None:
    for folder in (source, converted):
        found = measured(folder, "--formats", "w8a8-static")
        assert "sampled" in found["text_origin"]
        assert (found["rows"], found["length"]) == (HELD_OUT_ROWS["cpu"], SAMPLED_LENGTH)


def test_the_table_has_a_column_for_every_model_and_a_row_for_every_format(
    source: Path, other: Path, text: Path
) -> None:
    both = run(source, "--against", other, "--text", text, "--formats", "w8a8-static,nvfp4")
    assert both.exit_code == 0, both.output
    assert both.stdout.splitlines()[0].split() == [source.name, other.name]
    assert f"KL from {other.name}" in both.stdout
    for form in ("w8a8-static", "nvfp4"):
        assert both.stdout.count(f"perplexity in {FORMATS[form].label} ") == 1
    assert "MXFP4" not in both.stdout
    alone = run(source, "--text", text, "--formats", "nvfp4").stdout
    assert "perplexity" in alone
    assert "KL" not in alone


def test_what_does_not_fit_a_format_is_said_to_overflow(text: Path, tmp_path: Path) -> None:
    model = tiny("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e7
    folder = saved(tmp_path, model)
    arguments = (folder, "--text", text, "--formats", "stream-fp16,stream-int8")
    [found] = measured(*arguments)["models"]
    assert found["formats"]["stream-fp16"] is None
    assert math.isfinite(found["formats"]["stream-int8"])
    lines = run(*arguments).stdout.splitlines()
    assert [line.split()[-1] for line in lines if "FP16" in line] == ["overflows"]


@torch.no_grad()
def test_each_head_and_each_matrix_has_its_figure(source: Path, text: Path) -> None:
    [found] = measured(source, "--text", text, "--formats", "w8a8-token")["models"]
    rows, model = rows_of(text, 3), AutoModelForCausalLM.from_pretrained(source)
    model.set_attn_implementation("eager")
    seen: list[Tensor] = []
    with watching([model.model.layers[1].mlp.down_proj], lambda _, x: seen.append(x), inputs=True):
        weights = [model(row[None], output_attentions=True).attentions for row in rows]
    expected = torch.stack([torch.stack(layers)[:, 0, :, 1:, 0].mean(-1) for layers in weights])
    torch.testing.assert_close(torch.tensor(found["head_weights"]), expected.mean(0))
    assert found["first_weight"] == pytest.approx(float(expected.mean()), rel=1e-4)
    expected = torch.stack([kurtosis(values) for values in seen]).mean()
    name = "model.layers.1.mlp.down_proj"
    assert found["input_kurtosis"][name] == pytest.approx(float(expected), rel=1e-4)
    assert found["input_kurtosis"].keys() == Decoder(model, FAMILIES["llama"]).linears.keys()


def test_memory_is_that_of_the_weights_and_of_their_keys_and_values(
    source: Path, converted: Path, text: Path
) -> None:
    arguments = (source, "--against", converted, "--text", text, "--formats", "w8a8-token")
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("float16", 2)):
        found = measured(*arguments, "--dtype", dtype)
        assert (found["dtype"], found["device"]) == (dtype, "cpu")
        model = AutoModelForCausalLM.from_pretrained(source)
        original, student = (each["speed"] for each in found["models"])
        assert original["weights"] == size * sum(p.numel() for p in model.parameters())
        assert student["weights"] > original["weights"]
        assert original["cache"] == size * LENGTH * 2 * LAYERS * KV_HEADS * HEAD_DIM
        assert min(original["prefill"], original["decode"]) > 0
        expected = [perplexity(folder, text) for folder in (source, converted)]
        for each, value in zip(found["models"], expected, strict=True):
            assert each["perplexity"] == pytest.approx(value, rel=1e-4 if size == 4 else 0.02)


@torch.no_grad()
def perplexity(folder: Path, text: Path) -> float:
    rows = rows_of(text, 3)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return math.exp(model(rows, labels=rows).loss)


def test_misuse_is_told_with_what_there_is(source: Path, text: Path) -> None:
    unknown = run(source, "--text", text, "--formats", "w8a8-static,int3")
    assert unknown.exit_code == 2
    assert "'int3'" in unknown.stderr
    assert all(name in unknown.stderr for name in FORMATS)
    assert run(source, "--text", text.parent / "nothing.txt").exit_code == 2
    assert run().exit_code == 2


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (0, "holds no text"),
        (LENGTH - 1, "tokens and 1024 are needed"),
        (2 * LENGTH - 2, "tokens and 1024 are needed"),
    ],
)
def test_too_short_a_text_is_refused(
    tokens: int, sentence: str, source: Path, tmp_path: Path
) -> None:
    refused(run(source, "--text", written(tmp_path, tokens)), sentence)


def test_two_windows_are_enough(source: Path, tmp_path: Path) -> None:
    path = written(tmp_path, 2 * LENGTH)
    assert measured(source, "--text", path, "--formats", "w8a8-clipped")["rows"] == 1


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    return written(folder, 9 * 64).rename(folder / "other.txt")


def test_fixed_ranges_come_from_the_calibration_file(
    source: Path, text: Path, calibration: Path
) -> None:
    size = ("--windows", 3, "--length", 64, "--formats", "w8a8-static,w8a8-token")
    found = measured(source, "--text", text, "--calibration", calibration, *size)
    assert (found["rows"], found["length"]) == (3, 64)
    assert (found["text_origin"], found["calibration_origin"]) == ("text.txt", "other.txt")
    loaded = load(ModelRef(name=str(source)))
    held_out, seen = windows(loaded, text, 3, 64), windows(loaded, calibration, 8, 64)
    subject = Subject(decoder=loaded.decoder)
    expected = in_formats(subject, ["w8a8-static", "w8a8-token"], held_out, seen)
    assert found["models"][0]["formats"] == pytest.approx(expected, rel=1e-6)
    shared = measured(source, "--text", text, *size)
    assert shared["calibration_origin"] == "text.txt"
    formats = shared["models"][0]["formats"]
    assert formats["w8a8-token"] == pytest.approx(expected["w8a8-token"], rel=1e-6)
    assert formats["w8a8-static"] != pytest.approx(expected["w8a8-static"], rel=1e-6)


def test_ranges_of_the_measured_file_itself_come_from_other_rows(source: Path, text: Path) -> None:
    size = ("--windows", 3, "--length", 64, "--formats", "w8a8-static")
    both = [
        measured(source, "--text", text, *given, *size)
        for given in ((), ("--calibration", text.parent / ".." / text.parent.name / text.name))
    ]
    assert both[0]["text_sha256"] == both[1]["text_sha256"]
    assert both[0]["models"][0]["formats"] == both[1]["models"][0]["formats"]


def test_sampled_text_may_be_measured_with_ranges_of_a_file(source: Path, tmp_path: Path) -> None:
    given = written(tmp_path, 8 * SAMPLED_LENGTH)
    found = measured(source, "--calibration", given, "--formats", "w8a8-static")
    assert "sampled" in found["text_origin"]
    assert (found["rows"], found["length"]) == (HELD_OUT_ROWS["cpu"], SAMPLED_LENGTH)


def test_windows_that_cannot_be_had_are_refused(
    source: Path, text: Path, calibration: Path, tmp_path: Path
) -> None:
    short = run(source, "--text", text, "--calibration", calibration)
    refused(short, f"tokens and {8 * LENGTH} are needed; name a longer text")
    model = saved(tmp_path / "short", tiny("gpt2", torch.float32))
    for length, known in ((56, True), (57, False)):
        size = ("--length", length, "--windows", 1, "--formats", "w8a8-token")
        if known:
            assert measured(model, "--text", text, *size)["length"] == length
        else:
            refused(run(model, "--text", text, *size), "measures on 65; choose a model with more")
    for misuse in (("--windows", 3), ("--length", 64), ("--text", text, "--length", 1)):
        assert run(source, *misuse).exit_code == 2


def test_sampled_text_needs_no_more_positions_than_its_rows(tmp_path: Path) -> None:
    model = saved(tmp_path, tiny("gpt2", torch.float32, max_position_embeddings=300))
    found = measured(model, "--formats", "w8a8-token")
    assert found["length"] == SAMPLED_LENGTH


def test_a_table_of_the_readme_is_made_of_what_eval_prints(
    source: Path, converted: Path, text: Path
) -> None:
    formats = ("--formats", "w8a8-static,w8a8-clipped")
    found = measured(converted, "--against", source, "--text", text, *formats)
    models = compared(found)
    student, original = found["models"]
    for name, model in (("original", original), ("converted", student)):
        row = score_row(models[name])
        assert row[:2] == (f"{model['perplexity']:.2f}", f"{model['formats']['w8a8-static']:.2f}")


def test_tokenizer_code_is_run_for_those_who_trust_it_alone(
    source: Path, text: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(source, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    names = {"auto_map": {"AutoTokenizer": [None, "remote.Odd"]}, "tokenizer_class": "Odd"}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    (folder / "remote.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class Odd(PreTrainedTokenizerFast):\n    pass\n"
    )
    refused(run(source, "--against", folder, "--text", text), "--trust-remote-code")
    trusting = ("--trust-remote-code", "--formats", "w8a8-token")
    found = measured(source, "--against", folder, "--text", text, *trusting)
    assert len({model["perplexity"] for model in found["models"]}) == 1


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    refused(run(tmp_path), "not a transformers model")


def test_other_tokens_are_refused(source: Path, text: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "other-tokens", tiny("llama", torch.float32))
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    refused(run(source, "--against", folder, "--text", text), "have different tokenizers")
    wide = saved(tmp_path / "wide", tiny("llama", torch.float32, vocab_size=128))
    refused(run(source, "--against", wide, "--text", text), "have different tokenizers")


def test_a_model_with_few_positions_is_refused(text: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "short", tiny("gpt2", torch.float32))
    refused(run(folder, "--text", text), "short reads 64 tokens at most")


def test_a_converted_folder_without_its_weights_is_refused(
    converted: Path, tmp_path: Path, text: Path
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in converted.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    refused(run(folder, "--text", text), "no weights in the safetensors format")


def refused(result: Result, sentence: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert sentence in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_the_interval_narrows_with_rows_and_holds_the_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    losses = 3 + 0.5 * torch.randn(400, generator=draw)
    widths = []
    for rows in (25, 400):
        low, high = compare.interval(losses[:rows])
        mean = float(losses[:rows].mean())
        assert low < math.exp(mean) < high
        widths.append(math.log(high / low))
        # 95 % of a normal distribution lie within 1.96 of its standard deviations.
        assert widths[-1] == pytest.approx(2 * 1.96 * 0.5 / rows**0.5, rel=0.25)
    assert widths[1] < widths[0] / 3


def test_convert_still_refuses_what_eval_measures(converted: Path) -> None:
    source = load(ModelRef(name=str(converted)), measured=True)
    assert source.converted
    result = CliRunner().invoke(main, ["inspect", str(converted)])
    assert result.exit_code == 1
    assert "is absorbed already" in result.stderr


def test_models_larger_than_the_memory_have_the_same_figures(
    source: Path, converted: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    riddles = tmp_path / "riddles.jsonl"
    riddles.write_text('{"question": "which", "choices": ["a", "b"], "label": 0}\n')
    wish: dict[str, Any] = {"against": [source], "text": text, "formats": ["w8a8-static"]}
    held = absorb.evaluate(converted, **wish)
    monkeypatch.setattr(loading, "free_memory", lambda device: 0)
    streamed = absorb.evaluate(converted, **wish)
    for one, other in zip(streamed.models, held.models, strict=True):
        assert one.speed is None
        for name in ("perplexity", "divergence", "stream_ratio", "kurtosis"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4), name
        assert one.formats == pytest.approx(other.formats, rel=1e-3)
    assert "prefill" not in str(comparison_rows(streamed))
    with pytest.raises(AbsorbError, match="drop --tasks"):
        absorb.evaluate(source, text=text, tasks=[str(riddles)])
