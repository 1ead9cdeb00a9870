"""A checkpoint is verified as long as it is what absorb wrote, and every change to it is named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import absorb
from absorb.cli.main import main
from absorb.errors import AbsorbError
from absorb.schema.settings import ModelRef, Sink
from absorb.ship.staging import digests
from absorb.ship.verify import read_report, verify
from tests.helpers import warm
from tests.helpers.tiny import tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("little_text")


PACKAGE = Path(absorb.__file__).parent


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A converted model that may be changed."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


def wrong(folder: Path) -> list[str]:
    return verify(ModelRef(name=str(folder)), lambda _: None).wrong


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def edit_report(folder: Path, part: str, **changes: Any) -> None:
    content = json.loads((folder / "absorb.json").read_text())[part]
    edit(folder / "absorb.json", **{part: content | changes})


def relist(folder: Path) -> None:
    """List the files as they are now, as somebody would who wants a change to go unnoticed."""
    edit(folder / "absorb.json", files=digests(folder))


def test_what_absorb_wrote_is_verified(folder: Path) -> None:
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")  # the Hub adds it
    (folder / ".cache").mkdir()
    (folder / ".cache" / "old.bin").write_text("")
    result = CliRunner().invoke(main, ["verify", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [check["name"] for check in found["checks"]] == ["files", "code", "report", "logits"]
    assert not any(check["wrong"] for check in found["checks"])
    assert found["checks"][1]["found"] == f"modeling_absorb.py of absorb {absorb.__version__}"


def test_the_present_code_is_stamped_as_that_of_the_present_version() -> None:
    released = json.loads((PACKAGE / "ship" / "released.json").read_text())
    digest = hashlib.sha256((PACKAGE / "models" / "modeling_absorb.py").read_bytes()).hexdigest()
    assert released[absorb.__version__] == digest, "run python -m scripts.release.stamp"


def removed(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flipped(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def unlisted(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")


def pickled_and_listed(folder: Path) -> None:
    pickled(folder)
    relist(folder)


def other_code(folder: Path) -> None:
    with (folder / "modeling_absorb.py").open("a") as file:
        file.write("\nraise SystemExit('run')\n")
    relist(folder)


def more_code(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit('run')\n")
    relist(folder)


def code_elsewhere(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "someone/else--model.Model"})
    relist(folder)


def tokenizer_code(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "fast.Fast"]})
    relist(folder)


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"auto_map": 3}')
    relist(folder)


def other_scales(folder: Path) -> None:
    edit_report(folder, "inspection", residual_scales={"3": 64.0})


def other_type(folder: Path) -> None:
    edit_report(folder, "inspection", dtype="float16")


def other_conversion(folder: Path) -> None:
    edit_report(folder, "inspection", text_origin="elsewhere.txt")


def other_layers(folder: Path) -> None:
    edit_report(folder, "inspection", keyed_layers=[1])


def change(folder: Path, ending: str, factor: float) -> None:
    """Multiply all tensors whose names end so."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(ending):
            tensors[name] *= factor
    save_file(tensors, file, metadata={"format": "pt"})
    relist(folder)


def scaled_weights(folder: Path) -> None:
    change(folder, ".input_scale", 2)


def no_model(folder: Path) -> None:
    edit(folder / "config.json", hidden_size="wide")
    relist(folder)


@pytest.mark.parametrize(
    ("tamper", "sentence"),
    [
        (removed, "tokenizer.json is missing; fetch it again"),
        (cut, "model.safetensors is not as it was written; fetch it again"),
        (flipped, "model.safetensors is not as it was written; fetch it again"),
        (unlisted, "adapter_config.json is no file of this checkpoint; remove it"),
        (pickled, "pytorch_model.bin is a pickle, which can run any code when loaded; remove it"),
        (pickled_and_listed, "pytorch_model.bin is a pickle"),
        (other_code, "modeling_absorb.py is not that of any released version; read it before"),
        (more_code, "custom_generate/generate.py is code that absorb does not write; remove it"),
        (code_elsewhere, "config.json names code outside of modeling_absorb.py (someone/else--"),
        (tokenizer_code, "tokenizer_config.json names code outside of modeling_absorb.py (fast.F"),
        (broken_config, "config.json could not be read"),
        (other_scales, "absorb.json and plan/plan.safetensors are about different conversions"),
        (other_conversion, "absorb.json and plan/plan.safetensors are about different conversions"),
        (other_type, "absorb.json says float16 and the weights are float32"),
        (other_layers, "absorb.json names other layers with sink keys than the weights"),
        (scaled_weights, "absorb.json has other residual scales than the weights"),
        (no_model, "the model does not load without absorb"),
    ],
)
def test_a_change_is_named(
    folder: Path, tamper: Callable[[Path], None], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("absorb.ship.stranger.subprocess", warm)
    tamper(folder)
    assert any(sentence in reason for reason in wrong(folder)), wrong(folder)


@pytest.mark.usefixtures("at_home")
def test_other_logits_are_noticed(folder: Path) -> None:
    change(folder, ".sink", 0.5)
    [reason] = wrong(folder)
    assert "of the largest away from those in absorb.json" in reason


def test_code_that_is_not_ours_is_never_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    (folder / "modeling_absorb.py").write_text(f"open({str(mark)!r}, 'w')\n")
    relist(folder)
    result = CliRunner().invoke(main, ["verify", str(folder)])
    assert result.exit_code == 1
    assert "absorb: modeling_absorb.py is not that of any released version" in result.stderr
    assert "Traceback" not in result.stderr
    assert not mark.exists()


def test_all_files_that_are_wrong_are_named(folder: Path) -> None:
    removed(folder)
    cut(folder)
    unlisted(folder)
    assert len(wrong(folder)) == 3


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"files": []}', '{"inspection": {"layers": 3}}', '"text"', "[" * 10000],
)
def test_a_damaged_report_is_refused(folder: Path, content: str) -> None:
    (folder / "absorb.json").write_text(content)
    with pytest.raises(AbsorbError, match=r"the absorb\.json of .* is damaged"):
        wrong(folder)


@pytest.mark.parametrize("files", [{}, [], None, 3])
def test_a_report_without_an_index_is_refused(folder: Path, files: Any) -> None:
    edit(folder / "absorb.json", files=files)
    with pytest.raises(AbsorbError, match="convert again"):
        wrong(folder)


def test_what_is_no_checkpoint_is_refused(original: Path, tmp_path: Path) -> None:
    for name, sentence in (
        (original, "so absorb did not write it; check the name"),
        (tmp_path / "nothing", "is no folder; name one, or a Hub repository"),
    ):
        result = CliRunner().invoke(main, ["verify", str(name)])
        assert result.exit_code == 1
        assert sentence in result.stderr
        assert result.stdout == ""


@pytest.mark.slow
@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize(
    ("model_type", "sink", "dtype"),
    [
        ("gpt2", "logit", torch.float32),
        ("gemma2", "auto", torch.bfloat16),
        ("olmo2", "key", torch.float32),
        ("mixtral", "logit", torch.bfloat16),
    ],
)
def test_every_form_is_verified(
    model_type: str, sink: Sink, dtype: torch.dtype, text_file: Path, tmp_path: Path
) -> None:
    model = tiny(model_type, dtype, max_position_embeddings=1024)
    model.save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    out = tmp_path / "model"
    absorb.convert(tmp_path / "original", out, text=text_file, steps=0, sink=sink)
    assert wrong(tmp_path / "model") == []
    report = read_report(tmp_path / "model", "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as tensors:
        keyed = [name for name in tensors.keys() if name.endswith("sink_key")]  # noqa: SIM118
    assert len(keyed) == len(report.inspection.keyed_layers)
