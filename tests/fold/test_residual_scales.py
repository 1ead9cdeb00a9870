"""Outlier channels come down to the target, and a stream beyond float16's range into it."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from absorb.cli.main import main
from absorb.fold.graft import graft, twin
from absorb.fold.plan import Plan
from absorb.fold.residual import residual_scales
from absorb.measure.findings import find
from absorb.measure.outliers import Measurement, measure
from absorb.models import modeling_absorb
from absorb.models.decoder import Decoder, site_at
from absorb.models.families import FAMILIES, family_of
from absorb.models.family import Family
from absorb.runtime.precision import as_stored
from absorb.runtime.reading import led
from absorb.schema.codec import from_json
from absorb.schema.findings import OutlierChannel
from absorb.schema.report import Report
from absorb.schema.settings import Sink, Thresholds
from absorb.show.rows import finding_rows
from absorb.show.tables import listing
from tests.helpers.plans import plan_of
from tests.helpers.tiny import HIDDEN, tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

BOS = torch.tensor([1])
OUTLIERS = [7, 21]
CARD = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-absorbed"
LARGE, LARGER = 1e4, 3e4
LARGEST = torch.finfo(torch.float16).max
# Norms of every kind, at both ends of a layer. A router would magnify rounding, so no experts.
OVERFLOWING = pytest.mark.parametrize(
    "model_type", ["gemma2", "gemma3_text", "llama", "qwen3", "glm4", "cohere", "phi"]
)


@pytest.fixture
def text() -> Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randint(3, 64, (16, 24), generator=draw)


@torch.no_grad()
def overflowing(family: Family) -> PreTrainedModel:
    """The tiny model with all that writes the stream made large, and two channels larger still.

    Its norms make the stream small again. Its weights are those of a bfloat16 checkpoint, and fit
    float16.
    """
    model = tiny(family.model_type, torch.float32)
    size = torch.full((HIDDEN,), LARGE)
    size[OUTLIERS] = LARGER
    if not site_at(Decoder(model, family).layers[0], family.writes[0]).is_norm:
        size *= 2.5  # the entries of a matrix are smaller than the weights of a norm
    model.get_submodule(family.embedding).weight.mul_(size).clamp_(-LARGEST / 4, LARGEST / 4)
    for layer in Decoder(model, family).layers:
        for name in family.writes:
            enlarge(layer, name, size, family.norm_offset)
        for name in family.reads:
            enlarge(layer, name, size.min() / size, family.norm_offset)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    assert all(parameter.abs().max() < LARGEST for parameter in model.parameters())
    return model


def enlarge(layer: nn.Module, name: str, size: Tensor, norm_offset: float) -> None:
    """Multiply what a norm or a matrix gives."""
    if site_at(layer, name).is_norm:
        weight = site_at(layer, name).module.weight
        weight.copy_((weight + norm_offset) * size - norm_offset)
    else:
        site_at(layer, name).weight.mul_(size[:, None])
    bias = site_at(layer, name).bias
    if bias is not None:
        bias.mul_(size)


@torch.no_grad()
def converted(
    model: PreTrainedModel, family: Family, text: Tensor, form: Sink
) -> tuple[Measurement, Plan, PreTrainedModel]:
    """What was measured and planned, and the student as its bfloat16 checkpoint holds it."""
    measurement = measure(Decoder(model, family), text, BOS)
    findings = find(measurement, Thresholds())
    scales = residual_scales(measurement, findings, target=1)
    prefix = tuple(BOS.tolist())
    plan = plan_of(Decoder(model, family), findings, scales, prefix, text, budget=0.0, form=form)
    student = graft(Decoder(model, family), plan).model
    as_stored(Decoder(student, family), torch.bfloat16)
    return measurement, plan, student


def stored(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy with weights of another type."""
    copied = copy.deepcopy(model)
    family = family_of(model.config.model_type.removeprefix("absorb_"))
    as_stored(Decoder(copied, family), dtype)
    return copied


def not_finite(model: PreTrainedModel, tokens: Tensor) -> list[str]:
    """The modules that give anything but finite numbers."""
    broken: list[str] = []

    def see(name: str, out: object) -> None:
        parts = out if isinstance(out, tuple) else (out,)
        if not all(part.isfinite().all() for part in parts if torch.is_tensor(part)):
            broken.append(name)

    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: see(name, out))
        for name, module in model.named_modules()
        if name  # the whole gives no tensor, and its parts gave all that is in it
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return broken


def drift(after: Tensor, before: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float((after.float() - before).abs().max() / before.abs().max())


@OVERFLOWING
@torch.no_grad()
def test_a_stream_beyond_float16_fits_it_once_converted(model_type: str, text: Tensor) -> None:
    family = FAMILIES[model_type]
    model, rows = overflowing(family), led(text, BOS)
    measurement, plan, student = converted(model, family, text, "key")
    assert measurement.token_peak[:, :, 1:].median() > LARGEST
    assert not_finite(stored(model, torch.float16), rows)

    half = stored(student, torch.float16)
    assert not not_finite(half, text)
    teacher = model(rows).logits[:, 1:]
    rounded = stored(model, torch.bfloat16)(rows).logits[:, 1:].float()
    rounding = drift(rounded, teacher)
    logits = half(text).logits
    # float16 keeps three bits more than bfloat16, so rounding errs by an eighth; half is for luck.
    assert drift(logits, teacher) < rounding / 2
    assert drift(logits, rounded) < 1.5 * rounding
    unscaled = graft(Decoder(model, family), replace(plan, residual=torch.ones(HIDDEN))).model
    assert not_finite(stored(unscaled, torch.float16), text)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "llama"])
@torch.no_grad()
def test_sink_logits_leave_float16_enough_room_too(model_type: str, text: Tensor) -> None:
    family = FAMILIES[model_type]
    model = overflowing(family)
    _, _, student = converted(model, family, text, "logit")
    half = stored(student, torch.float16)
    assert not not_finite(half, text)
    full = stored(student, torch.float32)(text).logits
    rounding = drift(student(text).logits, full)
    assert drift(half(text).logits, full) < rounding / 2


@pytest.mark.parametrize("model_type", ["gemma2", "llama", "phi"])
def test_every_kind_of_norm_lets_its_scale_learn(model_type: str, text: Tensor) -> None:
    family = FAMILIES[model_type]
    _, _, student = converted(overflowing(family), family, text, "logit")
    as_stored(Decoder(student, family), torch.float32)
    student(text).logits.square().mean().backward()
    scales = [p for name, p in student.named_parameters() if name.endswith("input_scale")]
    assert len(scales) == student.config.num_hidden_layers * len(family.reads) + 1
    assert all(bool(scale.grad.any()) for scale in scales)


@torch.no_grad()
def test_the_target_is_what_an_outlier_channel_is_brought_down_to(text: Tensor) -> None:
    model, family = tiny("llama", torch.float32), FAMILIES["llama"]
    model.get_input_embeddings().weight[:, OUTLIERS] = 40.0
    measurement = measure(Decoder(model, family), text, BOS)
    findings = find(measurement, Thresholds())
    assert sorted(found.channel for found in findings.outlier_channels) == OUTLIERS
    usual = measurement.channel_mean.median(1).values[:, None]
    for target, least, most in ((1, 0.7, 1.5), (4, 2.8, 6), (0.5, 0.35, 0.75)):
        scales = residual_scales(measurement, findings, target)
        left = (measurement.channel_mean / usual / scales).amax(0)
        assert all(least < float(left[channel]) < most for channel in OUTLIERS)
        assert (scales != 1).nonzero().flatten().tolist() == OUTLIERS
    assert (residual_scales(measurement, findings, 1000) == 1).all()


def test_a_scale_is_a_power_of_two_that_leaves_float16_half_of_its_range(text: Tensor) -> None:
    measurement = measure(Decoder(tiny("llama", torch.float32), FAMILIES["llama"]), text, BOS)
    peaks = torch.tensor([0.0, 1.0, 32_768.0, 32_800.0, 65_536.0, 100_000.0, 8e5, 1e9])
    measured = replace(measurement, channel_peak=peaks)
    nothing = find(measurement, Thresholds())
    expected = [1, 1, 1, 2, 2, 4, 32, 32_768]
    assert residual_scales(measured, nothing, 1).tolist() == expected
    outlier = OutlierChannel(channel=6, layers=(0,), ratio=16.0, share=0.5)
    for ratio, scale in ((16.0, 32), (64.0, 64)):
        found = replace(nothing, outlier_channels=(replace(outlier, ratio=ratio),))
        assert residual_scales(measured, found, 1).tolist() == [*expected[:6], scale, 32_768]


@torch.no_grad()
def test_a_channel_that_is_large_inside_a_layer_alone_is_noticed(text: Tensor) -> None:
    """What attention writes, the MLP takes back before the layer hands anything on."""
    model, family = tiny("llama", torch.float32), FAMILIES["llama"]
    layer = model.model.layers[1]
    for name, sign in ((family.output, 1), (family.down, -1)):
        linear = layer.get_submodule(name)
        linear.weight[5] = 0
        linear.bias = nn.Parameter(torch.zeros(HIDDEN))
        linear.bias[5] = sign * 1e5
    measurement = measure(Decoder(model, family), text, BOS)
    assert measurement.token_peak.max() < 100
    assert residual_scales(measurement, find(measurement, Thresholds()), 1)[5] == 4


def test_the_listing_stays_short_when_every_channel_is_scaled() -> None:
    inspection = from_json(Report, (CARD / "absorb.json").read_text()).inspection
    outliers = {found.channel for found in inspection.findings.outlier_channels}
    scales = {channel: 64.0 if channel in outliers else 2.0 for channel in range(576)}
    scales[99] = 4.0
    rows = finding_rows(replace(inspection, residual_scales=scales))
    text = dict(rows)["residual scales"]
    assert text.startswith(f"{min(outliers)}: 64; ")
    assert text.endswith(f"; 2 to 4 on {576 - len(outliers)} channels to fit float16")
    assert len(listing(rows).splitlines()) < 20


def test_a_checkpoint_of_such_a_model_runs_in_float16(text_file: Path, tmp_path: Path) -> None:
    model = overflowing(FAMILIES["gemma2"])
    stored(model, torch.bfloat16).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    command = ["convert", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--steps", "0"]
    command += ["--text", str(text_file)]
    result = CliRunner().invoke(main, [*command, "--residual-target", "2"])
    assert result.exit_code == 0, result.output
    assert "channels to fit float16" in result.stdout
    report = json.loads((tmp_path / "out" / "absorb.json").read_text())["inspection"]
    assert report["job"]["residual_target"] == 2
    assert len(report["residual_scales"]) == HIDDEN
    tokens = torch.arange(5, 25)[None]
    kind = AutoModelForCausalLM
    half = kind.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float16)
    assert not not_finite(half, tokens)
    stock = kind.from_pretrained(tmp_path / "source", dtype=torch.float16)
    assert not_finite(stock, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_norm_that_a_gpu_runs_equals_the_stock_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = twin(Decoder(tiny("llama", torch.float32), FAMILIES["llama"])).model.to(dtype).model.norm
    norm.input_scale.data = torch.rand(HIDDEN) + 0.5
    norm.weight.copy_(torch.rand(HIDDEN) + 0.5)
    stream = torch.randn(3, 5, HIDDEN, dtype=dtype)
    plain = norm(stream).float()
    monkeypatch.setattr(modeling_absorb, "FUSED_NORMS", ("cpu",))
    fused = norm(stream).float()
    assert dtype != torch.bfloat16 or (fused != plain).any()
    # The fused one rounds once, where the stock one rounds twice.
    assert (fused - plain).abs().max() <= 4 * torch.finfo(dtype).eps * plain.abs().max()
