"""The whole journey on a tiny model: convert, then load where absorb is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from absorb.cli.main import main
from absorb.load.opening.tokenizer import without_bos
from absorb.models import modeling_absorb
from tests.helpers import warm
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("little_text")


LOAD = """
import sys
sys.modules["absorb"] = None  # as if it were not installed
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

folder, again = sys.argv[1:]
load = lambda kind, where, **more: kind.from_pretrained(where, trust_remote_code=True, **more)
torch.set_num_threads(1)
model = load(AutoModelForCausalLM, folder).eval()
assert load(AutoConfig, folder).model_type == "absorb_llama"
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = torch.arange(5, 25)[None]
with torch.no_grad():
    logits = model(tokens).logits
    hidden = load(AutoModel, folder).eval()(tokens).last_hidden_state
    assert torch.equal(model.lm_head(hidden), logits)
    model.save_pretrained(again)
    assert torch.equal(load(AutoModelForCausalLM, again).eval()(tokens).logits, logits)

    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    cached = model.generate(tokens, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **settings))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], 1)
    mask = (torch.arange(24)[None] >= 4).long()
    left = model.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(left[:, 4:], cached)

    eager = load(AutoModelForCausalLM, folder, attn_implementation="eager").eval()
    assert (eager(tokens).logits - logits).abs().max() < 1e-4
    weights = eager(tokens, output_attentions=True).attentions[0]
    assert weights.sum(-1).max() < 1
    half = load(AutoModelForCausalLM, folder, dtype=torch.bfloat16).eval()
    sinks = [p for n, p in half.named_parameters() if n.rpartition(".")[2].startswith("sink")]
    assert {sink.dtype for sink in sinks} == {torch.float32}
    assert half.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert (half(tokens).logits.float() - logits).abs().max() < 0.05 * logits.abs().max()
try:
    load(AutoModelForCausalLM, folder, attn_implementation="flash_attention_2")
except ValueError as error:
    assert "would drop the sinks" in str(error)
else:
    raise AssertionError("flash_attention_2 was accepted")
model.config._attn_implementation_internal = "sdpa"
try:
    model(tokens)
except ValueError as error:
    assert "would drop the sinks" in str(error)
else:
    raise AssertionError("stock attention was accepted")
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("loaded without its code")
print(logits.double().sum().item())
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny("llama", torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    result = CliRunner().invoke(main, ["convert", str(source), "--out", str(out), "--steps", "2"])
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    assert "fine-tune: 2 steps" in result.stderr
    return out


def test_the_checkpoint_is_complete(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["model_type"] == "absorb_llama"
    heads = {"AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    assert {"AutoConfig", "AutoModel", *heads} <= set(config["auto_map"])
    code = Path(str(modeling_absorb.__file__))
    assert (converted / code.name).read_bytes() == code.read_bytes()
    names = {path.name for path in converted.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names
    assert (converted / "plan" / "plan.safetensors").is_file()
    assert not list(converted.parent.glob("*.partial"))


def test_the_report_is_about_this_checkpoint(converted: Path) -> None:
    report = json.loads((converted / "absorb.json").read_text())
    assert report["recipe"]["steps"] == 2
    assert report["losses"]["held_out"][0][0] == 0
    best = min(value for _, value in report["losses"]["held_out"])
    kept = dict(report["losses"]["held_out"])[report["losses"]["kept"]]
    assert kept == best
    assert f"{report['converted']['perplexity']:.3f}" in (converted / "README.md").read_text()


def test_it_reloads_where_absorb_is_not_installed(converted: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(converted), str(tmp_path / "again")]
    done = warm.run(command, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = Path(str(modeling_absorb.__file__))
    assert (tmp_path / "again" / code.name).read_bytes() == code.read_bytes()


def test_a_converted_model_is_refused(converted: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(converted)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "is absorbed already" in result.stderr
    assert "Traceback" not in result.stderr


def test_inspect_prints_json_alone_on_stdout(source: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(source), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["family"] == "llama"


def test_misuse_is_told_from_refusal(tmp_path: Path) -> None:
    assert CliRunner().invoke(main, ["convert", "demo"]).exit_code == 2
    missing = CliRunner().invoke(main, ["inspect", str(tmp_path / "nothing")])
    assert missing.exit_code == 1


def test_a_conversion_by_the_clock_is_reported(
    source: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["convert", str(source), "--out", str(out), "--text", str(text_file)]
    command += ["--minutes", "0.02"]
    assert CliRunner().invoke(main, [*command, "--steps", "1"]).exit_code == 2
    assert CliRunner().invoke(main, [*command[:-1], "0"]).exit_code == 2
    assert CliRunner().invoke(main, [*command[:-1], "nan"]).exit_code == 2
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "fine-tune: 0.02 minutes of steps" in result.stderr
    assert "Fine-tune: 0.02 minutes of steps" in (out / "README.md").read_text()
    report = json.loads((out / "absorb.json").read_text())
    assert (report["recipe"]["steps"], report["recipe"]["minutes"]) == (None, 0.02)
    assert report["losses"]["training"]


def test_help_does_not_wait_for_torch() -> None:
    script = "import sys; from absorb.cli.main import main; main(['--help'], standalone_mode=False)"
    script += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_key_form_converts_and_reloads_as_the_teacher(
    source: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "key"
    command = ["convert", str(source), "--out", str(out), "--steps", "0", "--sink", "key"]
    command += ["--text", str(text_file)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "absorb.json").read_text())["inspection"]
    assert report["job"]["sink"] == "key"
    assert "a key and a value in every layer" in (out / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    teacher = AutoModelForCausalLM.from_pretrained(source)
    tokens = torch.arange(5, 25)[None]
    read = torch.cat([torch.tensor([report["prefix"]]), tokens], 1)
    with torch.no_grad():
        behind = teacher(read).logits[:, len(report["prefix"]) :]
        # The tiny model has no outliers that were removed: the two are the same but for rounding.
        assert (model(tokens).logits - behind).abs().max() < 1e-4
        assert (teacher(tokens).logits - behind).abs().max() > 1e-2


def test_neither_tokenizer_nor_chat_template_brings_the_bos_back() -> None:
    tokenizer = tiny_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    bos = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    backend["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": bos},
    }
    adds = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        bos_token="<s>",
        chat_template=tokenizer.chat_template,
    )
    chat = [{"role": "user", "content": "a b"}]
    assert adds("a b")["input_ids"][0] == 1
    assert adds.apply_chat_template(chat, tokenize=False).startswith("<s>")
    plain = without_bos(adds)
    assert 1 not in plain("a b")["input_ids"]
    assert plain.apply_chat_template(chat, tokenize=False) == "a b"
