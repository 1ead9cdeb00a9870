"""A server that drops something of a checkpoint is found, and what it drops is named."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import absorb
from absorb.cli.main import main
from absorb.fold.gates import RANK, gated_norms
from absorb.fold.graft import graft
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.modeling_absorb import NEUTRAL
from absorb.ship.served.compare import distances, judged, kinds_in
from tests.helpers.openai_server import Engine, serving
from tests.helpers.plans import neutral_plan
from tests.helpers.tiny import HIDDEN, LAYERS, tiny
from tests.ship.test_export import Case
from tests.ship.test_export import converted as make_converted
from tests.ship.test_verify import relist


@pytest.fixture(scope="module")
def folder(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model whose sinks and biases do much."""
    copy = Path(shutil.copytree(converted, tmp_path_factory.mktemp("endpoint") / "model"))
    draw = torch.Generator().manual_seed(0)
    tensors = load_file(copy / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith((".sink", ".bias")):
            tensors[name] = torch.randn(tensor.shape, generator=draw) + name.endswith("sink")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    relist(copy)
    return copy


def engine(folder: Path, **habits: Any) -> Engine:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Engine(model, AutoTokenizer.from_pretrained(folder), **habits)


def asked(folder: Path, url: str, *more: str) -> Result:
    return CliRunner().invoke(main, ["verify", str(folder), "--endpoint", url, *more])


@torch.no_grad()
def drop(model: Any, named: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        if named(name):
            kind = name.rpartition(".")[2]
            parameter.fill_(NEUTRAL["sink" if kind == "sinks" else kind])


@pytest.mark.parametrize("echo", [True, False])
def test_a_server_that_says_what_the_checkpoint_says_is_verified(folder: Path, echo: bool) -> None:
    served = engine(folder, echo=echo)
    with serving(served) as url:
        result = asked(folder, url)
    assert result.exit_code == 0, result.output
    assert "nats per token from it" in result.output
    assert len(served.asked) == (2 if echo else 1 + 31)


DROPS: dict[str, Callable[[str], bool]] = {
    "the sinks": lambda name: name.endswith(".sink"),
    "all biases of attention": lambda name: name.endswith(".bias"),
    "the biases of o_proj": lambda name: name.endswith("o_proj.bias"),
    "the biases of k_proj": lambda name: name.endswith("k_proj.bias"),
    "the sinks and all biases of attention": lambda name: name.endswith((".sink", ".bias")),
}


@pytest.mark.parametrize("echo", [True, False])
@pytest.mark.parametrize("kind", DROPS)
def test_what_a_server_drops_is_named(folder: Path, kind: str, echo: bool) -> None:
    served = engine(folder, echo=echo)
    drop(served.model, DROPS[kind])
    with serving(served) as url:
        result = asked(folder, f"{url}/v1/")
    assert result.exit_code == 1
    assert f"the server drops {kind}: it is" in result.output


@torch.no_grad()
def gated() -> Any:
    """A tiny model whose gates are open."""
    decoder, draw = Decoder(tiny("llama", torch.float32), FAMILIES["llama"]), torch.Generator()
    rows = torch.randn(LAYERS, RANK, HIDDEN, generator=draw.manual_seed(1))
    gates = dict.fromkeys(gated_norms(decoder), rows)
    model = graft(decoder, neutral_plan(FAMILIES["llama"], gates=gates)).model
    for name, parameter in model.named_parameters():
        if name.endswith(".gate_out"):
            parameter.copy_(torch.randn(parameter.shape, generator=draw.manual_seed(2)))
    return model


@pytest.mark.parametrize(
    ("kind", "ending"), [("the scales", "put_scale"), ("the gates", ".gate_out")]
)
@torch.no_grad()
def test_dropped_parameters_of_norms_are_named(kind: str, ending: str, tokens: Tensor) -> None:
    report: Any = SimpleNamespace(inspection=SimpleNamespace(family="llama"))
    if kind == "the gates":
        student, served = gated(), gated()
    else:
        student, served = (make_converted(Case("llama")).float() for _ in range(2))
    drop(served, lambda name: name.endswith(ending))
    given = served(tokens[:1]).logits[0].log_softmax(-1)
    row = tokens[0].tolist()
    answers = [{token: given[place, token].item()} for place, token in enumerate(row[1:])]
    (sentence,) = judged(distances(student, kinds_in(student, report), row, answers))
    assert f"the server drops {kind}: it is" in sentence


def test_another_model_is_none_of_ours(folder: Path, original: Path) -> None:
    served = engine(original)
    torch.manual_seed(0)
    for parameter in served.model.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    with serving(served) as url:
        result = asked(folder, url)
    assert result.exit_code == 1
    assert "so it serves another model, or this one in low precision" in result.output


def test_a_bos_that_the_server_puts_before_a_text_is_found(folder: Path) -> None:
    with serving(engine(folder, lead=(1,))) as url:
        result = asked(folder, url)
    assert result.exit_code == 1
    assert "it puts a BOS or a template before it" in result.output


def test_refusals_are_one_sentence_each(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{free.getsockname()[1]}"
        refused(asked(folder, down), "does not answer (")
    with serving(engine(folder)) as url:
        refused(asked(folder, url, "--model", "other"), "serves tiny and no other")
        refused(asked(folder, f"{url}/wrong"), "HTTP status 404")
    with serving(engine(folder, log_probabilities=False)) as url:
        refused(asked(folder, url), "offers no log-probabilities")


def refused(result: Result, sentence: str) -> None:
    assert result.exit_code == 1
    assert sentence in result.output
    assert result.output.splitlines()[-1].startswith("absorb: ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "tiny"], "--model is of --endpoint"),
        *(
            (["--endpoint", address], "--endpoint is an address such as http://")
            for address in ("file:///etc/passwd", "http://", "http://[half", "http://here:99999")
        ),
    ],
)
def test_misuse_is_told_before_anything_is_read(words: list[str], sentence: str) -> None:
    result = CliRunner().invoke(main, ["verify", "nowhere", *words])
    assert result.exit_code == 2
    assert sentence in result.output


# Real engines


@contextmanager
def llama_server(file: Path) -> Iterator[str]:
    """The address of llama.cpp's own server with a .gguf file."""
    script = Path(__file__).parents[2] / "scripts" / "engines" / "inside" / "llama_server.py"
    command = [sys.executable, "-P", str(script), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.kill()


@pytest.mark.llama_cpp
def test_llama_cpp_is_verified_and_a_file_without_biases_is_not(
    folder: Path, text_file: Path, tmp_path: Path
) -> None:
    options: Any = {"to": "gguf", "weights": "f32", "text": text_file, "tolerance": 10.0}
    absorb.export(folder, tmp_path / "whole", **options)
    with llama_server(next((tmp_path / "whole").glob("*.gguf"))) as url:
        result = asked(folder, url)
    assert result.exit_code == 0, result.output
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    tensors = load_file(bare / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensors[name] = torch.zeros_like(tensor)
    save_file(tensors, bare / "model.safetensors", {"format": "pt"})
    relist(bare)
    absorb.export(bare, tmp_path / "dropped", **options)
    with llama_server(next((tmp_path / "dropped").glob("*.gguf"))) as url:
        result = asked(folder, url)
    assert result.exit_code == 1
    assert "the server drops all biases of attention" in result.output
