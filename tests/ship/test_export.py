"""Every family that is exported says the same as a stock architecture, setting by setting.

Norms and eager softmax compute in float32 even in a float64 model, and the two sides sum in another
order, so a right export may drift by some 1e-6 of the largest logit. A wrong one drifts by more
than 1e-3, or is refused.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from absorb.errors import AbsorbError
from absorb.fold import residual
from absorb.fold.graft import graft, twin, write_ends
from absorb.fold.plan import Plan
from absorb.fold.sinks.forms import KeySink, LogitSink
from absorb.fold.smoothing import searched_scales
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.family import Family
from absorb.ship.export import native
from absorb.ship.export.targets import ROUTES, Route, config_for, route_of, settings_for
from tests.helpers.plans import neutral_plan, plan_of
from tests.helpers.tiny import COMMON, HIDDEN, LAYERS, NOTHING, tiny

SAME, OTHER = 1e-5, 1e-3
FAR = 8  # positions from which on a scaled RoPE is another one
STREAM = 2.0 ** (torch.arange(256) % 5)  # the first channels of it
SLIDES = ["sliding_attention", "full_attention", "sliding_attention"]


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **more}}


ROPES: dict[str, dict[str, Any]] = {
    "default": rope("default"),
    "linear": rope("linear", factor=2.0),
    "dynamic": {**rope("dynamic", factor=2.0), "max_position_embeddings": FAR},
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=FAR),
    "llama3": rope(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=FAR,
    ),
    "longrope": rope(
        "longrope",
        short_factor=[1.0, 1.5, 2.0, 2.5],
        long_factor=[2.0, 3.0, 4.0, 5.0],
        original_max_position_embeddings=FAR,
    ),
}


@dataclass(frozen=True)
class Case:
    """A tiny model of a family, with these settings."""

    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case("llama", {"rms_norm_eps": 0.1}),
    "llama, tied": Case("llama", {"tie_word_embeddings": True}),
    "llama, biases": Case("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama, one key to a query": Case("llama", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    "mistral": Case("mistral"),
    "mistral, window": Case("mistral", {"sliding_window": 6}),
    "ministral, some windows": Case("ministral", {"sliding_window": 5, "layer_types": SLIDES}),
    "qwen2": Case("qwen2"),
    "qwen2, some windows": Case(
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": SLIDES}
    ),
    "smollm3": Case("smollm3", {"mlp_bias": True}),
    "smollm3, windows": Case(
        "smollm3", {"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [0, 1, 0]}
    ),
    "granite": Case("granite"),
    "phi3": Case("phi3"),
    "phi3, window": Case("phi3", {"sliding_window": 6}),
    "phi3, longrope": Case("phi3", {**ROPES["longrope"], "original_max_position_embeddings": FAR}),
    "qwen3": Case("qwen3", {"rms_norm_eps": 0.1}),
    "qwen3, tied, biases": Case("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3, gelu": Case("qwen3", {"hidden_act": "gelu"}),
    "qwen3, window": Case(
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": SLIDES[:1] * LAYERS},
    ),
    **{f"llama, {kind} RoPE": Case("llama", settings) for kind, settings in ROPES.items()},
    **{f"qwen3, {kind} RoPE": Case("qwen3", settings) for kind, settings in ROPES.items()},
}
FLINT = "flint" in CONFIG_MAPPING  # transformers 5.21
KNOWN = {name: case for name, case in CASES.items() if FLINT or case.family != "qwen3"}
every_case = pytest.mark.parametrize("name", KNOWN)


@torch.no_grad()
def converted(case: Case) -> PreTrainedModel:
    """A converted model of logits in which every parameter of ours does something."""
    family = FAMILIES[case.family]
    decoder = twin(Decoder(tiny(case.family, **case.settings), family))
    student = decoder.model
    draw = torch.Generator().manual_seed(1)
    for name, parameter in student.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        if name.endswith(".sink"):
            parameter.copy_(noise)
        elif name.endswith(".bias"):
            parameter.add_(0.3 * noise)
    scaled = neutral_plan(family, residual=STREAM[: student.config.hidden_size])
    for layer in range(len(decoder.layers)):
        residual.write(decoder, scaled, layer)
    write_ends(decoder, scaled)
    return student


def conversion(student: PreTrainedModel, tensors: native.Tensors, **edits: Any) -> Any:
    stock = type(student.config).__mro__[1].model_type  # type: ignore[attr-defined]
    family = FAMILIES[stock]
    made = native.Conversion(
        config=student.config,
        family=family,
        route=ROUTES[stock],
        stream=STREAM[: student.config.hidden_size].double(),
        fits={},
    )
    return replace(made, **edits)


def export(student: PreTrainedModel, place: Path, **edits: Any) -> Path:
    """The folder of the export; `edits` go to what the exporter is told."""
    student.save_pretrained(place / "converted")
    with ExitStack() as stack:
        tensors = native.Tensors([place / "converted" / "model.safetensors"], stack)
        told = conversion(student, tensors, **edits)
        config = config_for(told.route, told.config)
        (place / "exported").mkdir(exist_ok=True)
        native.write(place / "exported", config, native.exported(tensors, told))
    return place / "exported"


def loaded(folder: Path, config: PretrainedConfig | None = None) -> PreTrainedModel:
    kind = AutoModelForCausalLM
    model, info = kind.from_pretrained(
        folder, config=config, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def apart(student: PreTrainedModel, model: PreTrainedModel, tokens: Tensor) -> float:
    """How far two models are from one another on text before and after FAR, by the largest logit.

    The short text comes last: what a long one changed in a RoPE must not stay.
    """
    worst = 0.0
    for text in (tokens, tokens[:, : FAR // 2]):
        theirs, ours = student(text).logits, model(text).logits
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    return worst


Made = tuple[PreTrainedModel, Path]


def breaks(act: Callable[[], float]) -> bool:
    """Whether a mistake shows: it is refused, by us or by torch, or in the logits."""
    try:
        return not act() < OTHER
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError, StrictDataclassError):
        return True


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """The converted model of a case, and the folder of its export, made once."""

    @cache
    def make(name: str) -> Made:
        student = converted(KNOWN[name])
        return student, export(student, tmp_path_factory.mktemp("case"))

    return make


@every_case
def test_an_export_says_what_the_converted_model_does(
    name: str, made: Callable[[str], Made], tokens: Tensor
) -> None:
    student, folder = made(name)
    assert apart(student, loaded(folder), tokens) < SAME


def test_every_family_and_every_kind_of_rope_that_is_claimed_has_a_case() -> None:
    assert {case.family for case in CASES.values()} == {*ROUTES}
    for target in {route.target for route in ROUTES.values()}:
        tried = {
            case.settings["rope_parameters"]["rope_type"]
            for case in CASES.values()
            if ROUTES[case.family].target == target and "rope_parameters" in case.settings
        }
        assert tried == target.rotations


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KNOWN if "RoPE" not in name])
@torch.no_grad()
def test_every_tensor_of_an_export_is_seen_in_its_logits(
    name: str, made: Callable[[str], Made], tokens: Tensor
) -> None:
    student, folder = made(name)
    model, expected = loaded(folder), student(tokens).logits
    for key, parameter in model.named_parameters():
        before = parameter.clone()
        parameter += 0.3
        moved = (model(tokens).logits - expected).abs().max() / expected.abs().max()
        assert moved > 10 * SAME, key
        parameter.copy_(before)


# Mistakes


@pytest.mark.parametrize("step", [*native._LAYER])
def test_leaving_out_a_step_shows(
    step: Any, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_LAYER", tuple(s for s in native._LAYER if s is not step))
    if step is native._fitted:
        plan, student = keyed("llama", tokens)
        fits = fits_of(plan, FAMILIES["llama"])
        assert breaks(lambda: compared(student, student, tokens, tmp_path, fits=fits))
    else:
        student = converted(KNOWN["phi3" if step is native._split else "llama"])
        assert breaks(lambda: compared(student, student, tokens, tmp_path))


def test_leaving_the_final_norm_alone_shows(
    tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_OUTSIDE", ())
    student = converted(KNOWN["llama"])
    assert breaks(lambda: compared(student, student, tokens, tmp_path))


def compared(
    student: PreTrainedModel, expected: PreTrainedModel, tokens: Tensor, place: Path, **edits: Any
) -> float:
    return apart(expected, loaded(export(student, place, **edits)), tokens)


@pytest.mark.parametrize("written", FAMILIES["llama"].writes)
def test_leaving_out_what_writes_the_stream_shows(
    written: str, tokens: Tensor, tmp_path: Path
) -> None:
    family = FAMILIES["llama"]
    wrong = replace(family, writes=tuple(name for name in family.writes if name != written))
    student = converted(KNOWN["llama, biases"])
    assert breaks(lambda: compared(student, student, tokens, tmp_path, family=wrong))


def idle(route: Route) -> list[tuple[str, Route]]:
    """The route with each of its entries gone that is not the default."""
    plain = Route(family=route.family, target=route.target)
    names = [one.name for one in fields(Route)]
    gone = [(n, replace(route, **{n: getattr(plain, n)})) for n in names if n != "family"]
    if route.target.rotates_where_it_slides:
        other = replace(route.target, rotates_where_it_slides=False)
        gone.append(("rotates_where_it_slides", replace(route, target=other)))
    each = [
        replace(route, settings=tuple(s for s in route.settings if s != name))
        for name in route.settings
    ]
    return [(n, r) for n, r in gone if r != route] + list(zip(route.settings, each, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "entry", "wrong"),
    [
        (family, name, wrong)
        for family in sorted({case.family for case in KNOWN.values()})
        for name, wrong in idle(ROUTES[family])
    ],
)
def test_no_entry_of_a_route_is_idle(
    family: str, entry: str, wrong: Route, tokens: Tensor, tmp_path: Path
) -> None:
    students = (converted(case) for case in KNOWN.values() if case.family == family)
    assert any(
        breaks(lambda s=student: compared(s, s, tokens, tmp_path, route=wrong))
        for student in students
    ), entry


# What no logits show. Where a head is stored, transformers believes no setting that it is tied.
SILENT = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "use_cache"}
SILENT |= {"initializer_range", "attention_dropout", "tie_word_embeddings"}


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted({r.target.model_type for r in ROUTES.values()}))
def test_no_setting_of_an_export_is_idle(
    target: str, made: Callable[[str], Made], tokens: Tensor
) -> None:
    cases = []
    for name, case in KNOWN.items():
        route = ROUTES[case.family]
        if route.target.model_type == target:
            student, folder = made(name)
            cases.append((student, folder, settings_for(route, student.config)))

    def without(name: str, student: PreTrainedModel, folder: Path, told: dict[str, Any]) -> float:
        settings = {key: value for key, value in told.items() if key != name}
        return apart(student, loaded(folder, CONFIG_MAPPING[target](**settings)), tokens)

    for name in sorted({key for *_, told in cases for key in told} - SILENT):
        shown = (breaks(partial(without, name, *one)) for one in cases)
        assert any(shown), name


# Keys, and scales that a fine-tune moved


@torch.no_grad()
def keyed(family: str, tokens: Tensor) -> tuple[Plan, PreTrainedModel]:
    """A model with keys in its second layer, and the plan that has a fit of them."""
    decoder = Decoder(tiny(family), FAMILIES[family])
    made = {
        form: plan_of(decoder, NOTHING, STREAM[:HIDDEN], (1, 9), tokens, 0.0, form)
        for form in ("logit", "key")
    }
    keys, fit = made["key"].sinks[1], made["logit"].sinks[1]
    assert isinstance(keys, KeySink)
    assert isinstance(fit, LogitSink)
    sinks = list(made["logit"].sinks)
    sinks[1] = replace(keys, fit=fit)
    plan = replace(made["logit"], sinks=tuple(sinks))
    plan = replace(plan, smoothing=searched_scales(graft(decoder, plan), tokens))
    return plan, graft(decoder, plan).model


def fits_of(plan: Plan, entry: Family) -> dict[int, LogitSink]:
    """What `fits_in` reads of the file of a plan."""
    fit = plan.sinks[1].fit
    return {1: replace(fit, value=fit.value / plan.smoothing[entry.value][1].view_as(fit.value))}


@pytest.mark.parametrize("family", sorted({case.family for case in KNOWN.values()}))
def test_keys_become_the_logits_that_were_fitted_to_them(
    family: str, tokens: Tensor, tmp_path: Path
) -> None:
    plan, student = keyed(family, tokens)
    expected = graft(Decoder(tiny(family), FAMILIES[family]), plan.as_logits).model
    assert apart(student, expected, tokens) > 10 * SAME  # a fit is not exact
    fits = fits_of(plan, FAMILIES[family])
    assert compared(student, expected, tokens, tmp_path, fits=fits) < SAME


@pytest.mark.parametrize("part", ["logits", "value", "key_bias"])
def test_no_part_of_a_fit_is_left_out(part: str, tokens: Tensor, tmp_path: Path) -> None:
    plan, student = keyed("llama", tokens)
    expected = graft(Decoder(tiny("llama"), FAMILIES["llama"]), plan.as_logits).model
    fit = fits_of(plan, FAMILIES["llama"])[1]
    wrong = {1: replace(fit, **{part: getattr(fit, part) * 0})}
    assert compared(student, expected, tokens, tmp_path, fits=wrong) > 10 * SAME


@torch.no_grad()
def test_scales_that_a_fine_tune_moved_go_into_norms_as_far_as_they_can(
    tokens: Tensor, tmp_path: Path
) -> None:
    student = converted(KNOWN["llama"])
    draw = torch.Generator().manual_seed(3)
    for name, parameter in student.named_parameters():
        if name.endswith(".input_scale"):
            parameter.mul_(1 + 0.05 * (2 * torch.rand(parameter.shape, generator=draw) - 1))
    model = loaded(export(student, tmp_path))
    lost = apart(student, model, tokens)
    assert SAME < lost < 0.05
    for name, parameter in model.named_parameters():
        if "norm" in name:
            stem = name.removesuffix(".weight")
            stock = student.get_submodule(stem)
            parameter.copy_(stock.weight)  # as if they had not moved at all
    assert apart(student, model, tokens) > 2 * lost
    with ExitStack() as stack:
        tensors = native.Tensors([tmp_path / "converted" / "model.safetensors"], stack)
        moved = native.furthest_apart(tensors, STREAM[:HIDDEN].double())
    assert 1.04 < moved < 1.053


def test_scales_that_were_not_moved_lose_nothing(tmp_path: Path) -> None:
    export(converted(KNOWN["llama"]), tmp_path)
    with ExitStack() as stack:
        tensors = native.Tensors([tmp_path / "converted" / "model.safetensors"], stack)
        assert native.furthest_apart(tensors, STREAM[:HIDDEN].double()) == 1


# Files


def test_a_model_in_several_files_is_the_same_model(
    tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = converted(KNOWN["llama"])
    whole = load_file(export(student, tmp_path / "whole") / "model.safetensors")
    monkeypatch.setattr(native, "_SHARD", 50_000)
    folder = export(student, tmp_path / "parts")
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) > 2
    assert parts[0].name == f"model-00001-of-{len(parts):05}.safetensors"
    assert all(file.stat().st_size < 60_000 for file in parts)
    found = {name: tensor for file in parts for name, tensor in load_file(file).items()}
    assert found.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
    assert apart(student, loaded(folder), tokens) < SAME


@torch.no_grad()
def test_what_overflows_without_the_scales_of_the_stream_is_refused(tmp_path: Path) -> None:
    student = converted(KNOWN["llama"])
    student.model.layers[1].mlp.down_proj.weight[4] = 6e4  # in the channel that is divided by 16
    for parameter in student.parameters():
        parameter.data = parameter.data.half()
    with pytest.raises(AbsorbError, match=r"layers\.1\.mlp\.down_proj\.weight overflows float16"):
        export(student, tmp_path)


@pytest.mark.parametrize("kind", ["lost", "more", "cut"])
def test_tensors_that_do_not_fit_the_architecture_are_named(kind: str, tmp_path: Path) -> None:
    student = converted(KNOWN["llama"])
    student.save_pretrained(tmp_path / "converted")
    file = tmp_path / "converted" / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
    if kind == "lost":
        del tensors[name]
    elif kind == "more":
        tensors[name := "model.layers.1.mlp.side_proj.weight"] = torch.zeros(2, 2)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, {"format": "pt"})
    with ExitStack() as stack:
        read = native.Tensors([file], stack)
        told = conversion(student, read)
        config = config_for(told.route, told.config)
        with pytest.raises(AbsorbError, match=name):
            native.write(tmp_path, config, native.exported(read, told))


# What does not fit


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (Case("phi3", rope("default", partial_rotary_factor=0.5)), "rotates 0.5 of each head"),
        (
            Case("qwen3", {"sliding_window": 5, "use_sliding_window": True, "layer_types": SLIDES}),
            "a window in some layers and not in others",
        ),
        (Case("llama", rope("proportional")), "RoPE of the kind proportional"),
    ],
)
def test_what_an_architecture_cannot_hold_is_refused_by_name(case: Case, sentence: str) -> None:
    config = AutoConfig.for_model(case.family, **{**COMMON, **case.settings})
    with pytest.raises(AbsorbError, match=sentence):
        config_for(ROUTES[case.family], config)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - ROUTES.keys()))
def test_a_family_without_a_route_is_refused_by_name(family: str) -> None:
    with pytest.raises(AbsorbError, match=f"sinks of {family} models; absorb exports granite, "):
        route_of(family)


def test_a_target_that_transformers_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("absorb.ship.export.targets.CONFIG_MAPPING", {})
    with pytest.raises(AbsorbError, match=r"qwen3 is exported as flint.*install 5\.21 or newer"):
        route_of("qwen3")
