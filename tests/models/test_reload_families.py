"""Every family is saved, and loaded by a process in which absorb is not installed."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from absorb.cli.main import main
from absorb.fold.graft import graft
from absorb.fold.plan import Plan
from absorb.fold.sinks.choose import fit_sinks
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.schema.findings import Removal, SpikeNeuron
from absorb.schema.training import LENGTH
from tests.helpers import warm
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

# In mixed form a layer has keys and the others logits, so it stands for both.
# Of these transformers 5.17 itself saves a configuration that its model does not read.
UNSAVED = {"lfm2", "lfm2_moe"} if transformers.__version__.startswith("5.17.") else set()
CASES = [(name, "mixed") for name in FAMILIES if name not in UNSAVED]
CASES += [("llama", "logit"), ("gpt2", "logit")]
PARTS = 4
LOAD = """
import sys
from pathlib import Path
sys.modules["absorb"] = None  # as if it were not installed
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
root = Path(sys.argv[1])
logits = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    again = root.with_name("again") / folder.name
    kind = AutoModelForCausalLM
    model = kind.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = load_file(root / "tokens.safetensors")["tokens"]
    experts = "grouped_mm" if hasattr(model.config, "num_experts_per_tok") else "eager"
    assert model.config._experts_implementation == experts, folder.name
    with torch.no_grad():
        logits[folder.name] = model(tokens).logits
        model.save_pretrained(again)
        model = kind.from_pretrained(again, trust_remote_code=True).eval()
        assert torch.equal(model(tokens).logits, logits[folder.name]), folder.name
        settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
        cached = model.generate(tokens, use_cache=True, **settings)
        assert torch.equal(cached, model.generate(tokens, use_cache=False, **settings)), folder.name
save_file(logits, root / "logits.safetensors")
"""


pytestmark = pytest.mark.usefixtures("little_text")


def test_a_model_with_learned_positions_converts_exactly(text_file: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model = tiny("gpt2", torch.float32, max_position_embeddings=1024, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "gpt2")
    out = tmp_path / "out"
    arguments = ["convert", str(tmp_path / "gpt2"), "--out", str(out), "--steps", "0"]
    arguments += ["--text", str(text_file)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "absorb.json").read_text())["inspection"]["divergence"] < 1e-6
    assert json.loads((out / "config.json").read_text())["n_positions"] == 1023
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 1023


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_a_prefix_that_runs_off_the_position_table_is_refused(
    model_type: str, text_file: Path, tmp_path: Path
) -> None:
    room = 40
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    settings = {"max_position_embeddings": LENGTH + room, "vocab_size": len(tokenizer)}
    tiny(model_type, torch.float32, **settings).save_pretrained(tmp_path)
    text = ["--text", str(text_file)]
    fits = CliRunner().invoke(main, ["inspect", str(tmp_path), "--prefix", "a" * room, *text])
    assert fits.exit_code == 0, fits.output
    refused = CliRunner().invoke(main, ["inspect", str(tmp_path), "--prefix", "a" * (room + 1)])
    assert refused.exit_code == 1
    said = f"--prefix is {room + 1} tokens long and {tmp_path.name} has positions for {room} before"
    assert said in refused.stderr
    assert "sampling" not in refused.stderr  # it is refused before anything takes long
    assert "Traceback" not in refused.stderr


# Some at a time, for one process: a fixture of all would be made by each worker that gets a test.
@pytest.mark.parametrize("cases", [CASES[at::PARTS] for at in range(PARTS)], ids=range(PARTS))
def test_families_reload_where_absorb_is_not_installed(
    cases: list[tuple[str, str]], tokens: Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    before = {case: logits_of(*case, tokens, folder / " ".join(case)) for case in cases}
    environment = {**os.environ, "HF_HOME": str(folder.with_name("hub")), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(folder)]
    done = warm.run(command, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    after = load_file(folder / "logits.safetensors")
    for case, logits in before.items():
        # A state is added up over tokens, and in another process not always to the last bit.
        off = 1e-5 if FAMILIES[case[0]].some else 0.0
        name = " ".join(case)
        torch.testing.assert_close(after[name], logits, rtol=0, atol=off, msg=name)


@torch.no_grad()
def logits_of(model_type: str, form: str, tokens: Tensor, folder: Path) -> Tensor:
    """Save the family's tiny model with everything absorbed, in float32.

    In mixed form one of its layers has keys.
    """
    family, model = FAMILIES[model_type], tiny(model_type, torch.float32)
    model.set_experts_implementation("grouped_mm" if "experts" in family.down else "eager")
    prefix = prefix_of(Decoder(model, family), torch.tensor([1, 9]))
    sinks = fit_sinks(Decoder(model, family), prefix, tokens)
    if form == "mixed":
        sinks[1] = prefix.layers[1]
    spike = SpikeNeuron(layer=1, neuron=7, contribution=1.0)
    plan = Plan(
        prefix=(1, 9),
        sinks=tuple(sinks),
        removals=(Removal(spike=spike, divergence=0.0),),
        residual=2.0 ** (torch.arange(model.config.hidden_size) % 5),
        smoothing={},
    )
    student = graft(Decoder(model, family), plan).model
    student.save_pretrained(folder)
    return student(tokens).logits
