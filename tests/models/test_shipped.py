"""The file that lies beside a checkpoint, as other programs use it."""

import copy
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from absorb.fold.graft import twin
from absorb.fold.sinks.forms import KeySink
from absorb.models import modeling_absorb
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES, family_of
from absorb.models.modeling_absorb import NEUTRAL, stock_classes
from tests.helpers import warm
from tests.helpers.tiny import HEAD_DIM, LAYERS, kv_heads, tiny
from tests.models.test_attention import draw, drift, sinked, texts

CODE = Path(str(modeling_absorb.__file__))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("form", ["logit", "key"])
@torch.no_grad()
def test_a_model_may_be_pickled_and_copied(family: str, form: str) -> None:
    model = sinked(family, form)
    expected = model(texts()).logits
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(again(texts()).logits, expected)
        assert {type(m) for m in again.modules()} == {type(m) for m in model.modules()}
    assert torch.equal(model(texts()).logits, expected)


@torch.no_grad()
def test_another_process_may_unpickle_a_model(tmp_path: Path) -> None:
    model = sinked("llama", "mixed")
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps((model, texts())))
    script = """import pickle, sys
model, texts = pickle.loads(open(sys.argv[1], "rb").read())
print(float(model(texts).logits.sum()))"""
    said = warm.run([sys.executable, "-c", script, file]).stdout
    assert float(said) == pytest.approx(float(model(texts()).logits.sum()), abs=1e-3)


@torch.no_grad()
def with_everything(family: str) -> Any:
    """A model with keys in its first layer, logits in the others, and scales."""
    room = torch.zeros(kv_heads(family), 2, HEAD_DIM)
    keys = [KeySink(keys=room, values=room), *[None] * (LAYERS - 1)]
    model = twin(Decoder(tiny(family, torch.float32), family_of(family)), keys).model
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if name.rpartition(".")[2] in NEUTRAL.keys() - {"bias"}:
            drawn = draw(*parameter.shape, seed=seed)
            parameter.copy_(drawn if "sink" in name else (0.1 * drawn).exp())
    return model


def body(model: Any, tokens: Tensor) -> Tensor:
    hidden: Tensor = model.base_model(tokens).last_hidden_state
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_head_of_the_stock_model_keeps_the_sinks(family: str, tmp_path: Path) -> None:
    model = with_everything(family)
    model.save_pretrained(tmp_path / "causal")
    expected = body(model, texts())
    stock = type(model.config).__mro__[1]
    autos = stock_classes(stock)
    assert {"AutoModel", "AutoModelForCausalLM"} <= autos.keys()
    assert set(model.config.auto_map) == {"AutoConfig", *autos}
    for auto, cls in autos.items():
        load = getattr(transformers, auto).from_pretrained
        # How a head is saved is the same in every family: one family saves each, others the body.
        again = [tmp_path / auto] if family == "llama" or auto == "AutoModel" else []
        for folder in (tmp_path / "causal", *again):
            head = load(folder, trust_remote_code=True)
            assert type(head).__name__ == f"Absorb{cls.__name__}"
            assert head.config.auto_map == model.config.auto_map
            assert drift(body(head.eval(), texts()), expected) < 1e-6
            head.save_pretrained(tmp_path / auto)


def test_a_head_learns_with_the_sinks(tmp_path: Path) -> None:
    sinked("llama", "mixed").save_pretrained(tmp_path)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(tmp_path, trust_remote_code=True, num_labels=3)
    model.config.pad_token_id = 0
    model(texts(), labels=torch.tensor([0, 2])).loss.backward()
    sinks = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in NEUTRAL]
    assert len(sinks) > 3
    assert all(p.grad is not None for p in sinks)
    assert model.score.weight.grad.any()


def test_an_older_transformers_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("__version__ = '4.57.1'")
    (tmp_path / CODE.name).write_bytes(CODE.read_bytes())
    command = [sys.executable, "-c", f"import {CODE.stem}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    sentence = "this checkpoint needs transformers 5.16 or newer; you have 4.57.1"
    assert done.stderr.splitlines()[-1] == f"ImportError: {sentence}"


class Plain(nn.Module):
    """Tokens in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


@pytest.mark.parametrize("form", ["logit", "key"])
@torch.no_grad()
def test_what_is_exported_is_the_formula(form: str) -> None:
    """The log-sum-exp of torch's operators means nothing to those who read a graph."""
    plain = Plain(sinked("llama", form))
    expected = plain(texts())
    exported = torch.export.export(plain, (texts(),), strict=False)
    traced = torch.jit.trace(plain, (texts(),), check_trace=False)
    for graph, run in ((exported.graph, exported.module()), (traced.inlined_graph, traced)):
        assert "softmax" in str(graph)
        assert "flash_attention" not in str(graph)
        assert drift(run(texts()), expected) < 1e-5


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime")),
    reason="needs onnxscript and onnxruntime",
)
@pytest.mark.parametrize("form", ["logit", "key"])
@torch.no_grad()
def test_onnx_computes_the_same(form: str, tmp_path: Path) -> None:
    import onnxruntime

    plain, file = Plain(sinked("llama", form)), str(tmp_path / "model.onnx")
    torch.onnx.export(plain, (texts(),), file, dynamo=True, input_names=["tokens"], verbose=False)
    found = onnxruntime.InferenceSession(file).run(None, {"tokens": texts().numpy()})[0]
    assert drift(torch.tensor(found), plain(texts())) < 1e-5
