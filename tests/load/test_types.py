"""Every parameter has a type of its own: buffers have no say, and nothing is rounded unasked."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import absorb
from absorb.errors import AbsorbError
from absorb.load.source import Source, load
from absorb.models.modeling_absorb import NEUTRAL
from absorb.runtime.precision import as_stored, in_one_type
from absorb.schema.report import Report
from absorb.schema.settings import ModelRef
from absorb.ship.staging import staged
from absorb.ship.verify import read_report
from absorb.ship.write import write
from tests.helpers.tiny import LAYERS, tiny
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_tokenizer import tiny_tokenizer

ADDED = NEUTRAL.keys() - {"bias"}
MASK = torch.ones(1, 1, 256, 256).tril()  # more elements than all weights together
Tensors = dict[str, Tensor]
Naming = Callable[[str], str]


def saved(folder: Path, model_type: str, dtype: torch.dtype, **settings: Any) -> Path:
    tiny(model_type, dtype, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def edit(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Write other tensors, and give them."""
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    save_file(tensors, file, metadata={"format": "pt"})
    return tensors


def loaded(folder: Path) -> Source:
    return load(ModelRef(name=str(folder)))


def in_layers(stem: str, **buffers: Tensor) -> dict[str, Tensor]:
    return {
        f"{stem.format(i)}.{name.replace('__', '.')}": value.clone()
        for i in range(LAYERS)
        for name, value in buffers.items()
    }


BUFFERS: dict[str, tuple[str, dict[str, Tensor], Naming]] = {
    **{
        f"pythia-{kind}": (
            "gpt_neox",
            in_layers(
                "gpt_neox.layers.{}.attention",
                bias=MASK.to(kind),
                masked_bias=torch.tensor(-1e9),
                rotary_emb__inv_freq=torch.rand(1),
            ),
            str,
        )
        for kind in (torch.uint8, torch.bool, torch.float32)
    },
    "gpt2-without-a-prefix": (
        "gpt2",
        in_layers("h.{}.attn", bias=MASK),
        lambda name: name.removeprefix("transformer."),
    ),
    "position-ids": ("llama", {"model.embed_tokens.position_ids": torch.arange(4096)}, str),
    "cached-rotations": (
        "llama",
        in_layers(
            "model.layers.{}.self_attn.rotary_emb",
            cos_cached=torch.rand(1, 1, 4096, 8),
            sin_cached=torch.rand(1, 1, 4096, 8),
        ),
        str,
    ),
    "causal-mask": ("phi3", {"model.causal_mask": torch.ones(512, 512).bool()}, str),
}


@pytest.mark.parametrize("case", BUFFERS)
def test_buffers_are_no_weights(case: str, tmp_path: Path) -> None:
    model_type, buffers, naming = BUFFERS[case]
    positions = {"max_position_embeddings": 512} if model_type == "gpt2" else {}
    folder = saved(tmp_path / "model", model_type, torch.float16, **positions)
    edit(folder, lambda tensors: {naming(k): t for k, t in tensors.items()} | buffers)
    source = loaded(folder)
    assert source.dtype == torch.float16
    assert {*source.types.values()} == {torch.float16}
    expected = tiny(model_type, torch.float16, **positions).state_dict()
    assert all(t.equal(expected[k].float()) for k, t in source.model.state_dict().items())


def test_integers_beside_a_missing_weight_do_not_make_a_model_quantised(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "gpt_neox", torch.float16)
    masks = in_layers("gpt_neox.layers.{}.attention", bias=MASK.bool())
    edit(folder, lambda tensors: tensors | masks)
    edit(folder, lambda tensors: {k: t for k, t in tensors.items() if "final_layer_norm" not in k})
    with pytest.raises(AbsorbError, match=r"lacks gpt_neox\.final_layer_norm\.bias"):
        loaded(folder)


def test_packed_weights_are_quantised_whatever_their_names(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", torch.float16)
    name = "model.layers.0.self_attn.q_proj"

    def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors[f"{name}.weight"]
        return tensors | {f"{name}.qweight": torch.zeros(4, 32, dtype=torch.int32)}

    edit(folder, packed)
    with pytest.raises(AbsorbError, match="stores weights as I32, so it is quantised"):
        loaded(folder)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_what_is_stored_computes_what_transformers_loads(
    model_type: str, tmp_path: Path, tokens: Tensor
) -> None:
    """To the last bit: rotary frequencies and other buffers are not rounded with the weights."""
    folder = saved(tmp_path / "model", model_type, torch.bfloat16)
    source = loaded(folder)
    as_stored(source.decoder, source.dtype, source.types)
    in_one_type(source.model)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        assert source.model(tokens).logits.equal(stock(tokens).logits)


def mixed(tensors: Tensors) -> Tensors:
    """Float32 embedding, head and expert 1, float16 norms and values, and the rest as it was."""
    kinds = {name: torch.float16 for name in tensors if "norm" in name or "v_proj" in name}
    wide = ("lm_head", "embed_tokens", "experts.1.")
    kinds |= {name: torch.float32 for name in tensors if any(part in name for part in wide)}
    # Random digits below those of bfloat16, so that rounding would show.
    noise = torch.Generator().manual_seed(0)
    for name, kind in kinds.items():
        step = torch.rand(tensors[name].shape, generator=noise) * 1e-3
        tensors[name] = (tensors[name].float() * (1 + step)).to(kind)
    return tensors


def test_every_tensor_keeps_its_type(tmp_path: Path, text_file: Path) -> None:
    folder = saved(tmp_path / "mixed", "llama", torch.bfloat16, num_hidden_layers=1)
    before = edit(folder, mixed)
    report = absorb.convert(folder, tmp_path / "out", text=text_file, steps=0, sink="logit")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() <= after.keys()
    assert {k: after[k].dtype for k in before} == {k: before[k].dtype for k in before}
    # No channel of the stream is an outlier here, so the head is what it was.
    assert after["lm_head.weight"].equal(before["lm_head.weight"])
    ours = [name for name in after if name.rpartition(".")[2] in ADDED]
    assert {after[name].dtype for name in ours} == {torch.float32}
    biases = sorted(after.keys() - before.keys() - {*ours})
    assert [name.split(".")[-2] for name in biases] == ["k_proj", "o_proj", "v_proj"]
    for name in biases:  # a new one is stored like the weight beside it
        assert after[name].dtype == after[name.replace("bias", "weight")].dtype
    # Not that of the first weight, as transformers has it.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert report.inspection.dtype == config["dtype"] == "bfloat16"


def test_experts_of_several_types_are_joined_in_the_widest(tmp_path: Path) -> None:
    folder = saved(tmp_path / "mixed", "mixtral", torch.bfloat16)
    edit(folder, mixed)
    types = loaded(folder).types
    assert types["model.layers.0.mlp.experts.gate_up_proj"] == torch.float32  # of expert 1
    assert types["model.layers.0.mlp.gate.weight"] == torch.bfloat16
    assert types["model.layers.0.input_layernorm.weight"] == torch.float16


def test_a_tied_head_has_the_type_of_the_embedding(tmp_path: Path) -> None:
    folder = saved(tmp_path / "tied", "llama", torch.bfloat16, tie_word_embeddings=True)
    wide = "model.embed_tokens.weight"
    edit(folder, lambda tensors: tensors | {wide: tensors[wide].float()})
    types = loaded(folder).types
    assert types["lm_head.weight"] == types[wide] == torch.float32


def test_norms_that_gguf_widened_keep_their_values(tmp_path: Path) -> None:
    model = tiny("llama", torch.float16)
    exact = model.model.norm.weight.data
    wide = model.float()
    wide.model.norm.weight.data = exact.float() * (1 + 1e-5)
    write_gguf(tmp_path / "tiny.gguf", wide, half=True)
    source = loaded(tmp_path / "tiny.gguf")
    assert source.types["model.norm.weight"] == torch.float32
    assert source.types["model.layers.0.input_layernorm.weight"] == torch.float16
    assert source.model.model.norm.weight.equal(wide.model.norm.weight)


@pytest.fixture
def half(original: Path, converted: Path) -> tuple[Any, Source, Report]:
    """A converted model that is to be written in float16, with its source and report."""
    source = replace(loaded(original), dtype=torch.float16, types={})
    student = load(ModelRef(name=str(converted)), measured=True).decoder
    return student, source, read_report(converted, "tiny")


def test_what_a_type_cannot_hold_is_not_written(
    half: tuple[Any, Source, Report], tmp_path: Path
) -> None:
    student, source, report = half
    student.layers[1].mlp.up_proj.weight.data[3, 4] = 1e5  # float16 ends at 65,504
    sentence = r"NaN or infinity in model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(AbsorbError, match=sentence), staged(tmp_path / "out", False) as folder:
        write(folder, student, source, report)
    assert not [*tmp_path.iterdir()]


def test_a_plan_that_is_not_finite_is_not_written(
    half: tuple[Any, Source, Report], tmp_path: Path
) -> None:
    student, source, report = half
    (tmp_path / "plan").mkdir()
    save_file({"residual": torch.tensor([1.0, torch.nan])}, tmp_path / "plan" / "plan.safetensors")
    with pytest.raises(AbsorbError, match="NaN or infinity in residual"):
        write(tmp_path, student, source, report)


def test_a_figure_that_is_no_number_is_not_written(
    half: tuple[Any, Source, Report], tmp_path: Path
) -> None:
    student, source, report = half
    worse = replace(report, converted=replace(report.converted, perplexity=float("inf")))
    with pytest.raises(AbsorbError, match=r"the absorb\.json of .* would hold Infinity"):
        write(tmp_path, student, source, worse)


def test_what_can_be_read_again_is_written(
    half: tuple[Any, Source, Report], tmp_path: Path
) -> None:
    student, source, report = half
    written = write(tmp_path, student, source, report)
    tensors = load_file(tmp_path / "model.safetensors")
    kinds = {t.dtype for name, t in tensors.items() if name.rpartition(".")[2] not in ADDED}
    assert kinds == {torch.float16}
    assert written.files.keys() >= {"model.safetensors", "config.json"}
