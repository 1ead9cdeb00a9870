"""A model that reads pictures too is converted whole, and nothing changes but what reads text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from absorb.cli.main import main
from absorb.errors import AbsorbError
from absorb.fold.graft import graft
from absorb.fold.plan import Plan
from absorb.fold.sinks.choose import fit_sinks
from absorb.fold.sinks.forms import LayerSink
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.load.source import Source, load
from absorb.load.wrapped import alone, whole_class
from absorb.models.families import FAMILIES, INSIDE, family_of
from absorb.models.whole import named_in
from absorb.schema.settings import ModelRef
from absorb.ship.weights import save
from absorb.ship.write import processors
from tests.helpers.tiny import HIDDEN
from tests.helpers.wrappers import WRAPPERS, saved, saved_with_processor, with_picture

PREFIX = torch.tensor([[1, 9]])
# One with a mask of its own for pictures, one with positions in three directions, one in which
# pictures are added behind the first layers as well; and all others.
_FIRST = ("gemma3", "qwen2_vl", "qwen3_vl")
EVERY = pytest.mark.parametrize(
    "model_type",
    [*_FIRST, *(pytest.param(n, marks=pytest.mark.slow) for n in WRAPPERS if n not in _FIRST)],
)
# float32 sums in another order; a patch that is not scaled, or a sink that is not seen, moves
# logits by a tenth of the largest.
UNCHANGED = 2e-5


def keys_of(source: Source) -> tuple[LayerSink | None, ...]:
    return prefix_of(source.decoder, PREFIX[0], -PREFIX.shape[1]).layers


def scales() -> Tensor:
    """Powers of two up to 16, in another order than channels."""
    return 2.0 ** (torch.arange(HIDDEN) * 7 % 5)


def converted(source: Source, sinks: tuple[LayerSink | None, ...], folder: Path) -> PreTrainedModel:
    """What a stranger loads of a conversion with these sinks, and large residual scales."""
    plan = Plan(prefix=(1, 9), sinks=sinks, removals=(), residual=scales(), smoothing={})
    model, _ = save(
        graft(source.decoder, plan), folder, source.dtype, source.types, whole=source.whole
    )
    model.config.save_pretrained(folder)
    return opened(folder, trust_remote_code=True)


def opened(folder: Path, **options: Any) -> PreTrainedModel:
    kind: Any = AutoModelForImageTextToText
    model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return model


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def hands_on(model_type: str) -> bool:
    """Whether layers of its language model hand on a state, which no key can bring."""
    return "self_attn" in family_of(WRAPPERS[model_type].text).some


def behind(model: PreTrainedModel, model_type: str, rows: Tensor) -> Tensor:
    """The logits of the original for words and a picture that it reads after the prefix."""
    whole = torch.cat([PREFIX, rows], 1)
    told = WRAPPERS[model_type].pictures(whole)
    logits: Tensor = model(whole, **told).logits[:, PREFIX.shape[1] :]
    return logits


@EVERY
@torch.no_grad()
def test_pictures_meet_the_prefix_and_the_scaled_stream_as_words_do(
    model_type: str, tokens: Tensor, tmp_path: Path
) -> None:
    folder, rows = saved(model_type, tmp_path / "whole"), with_picture(tokens[:1])
    source, original = load(ModelRef(name=str(folder))), opened(folder)
    expected = behind(original, model_type, rows)
    sinks = keys_of(source)
    if hands_on(model_type):  # then scales alone are to change nothing
        sinks = (None,) * len(sinks)
        expected = original(rows, **WRAPPERS[model_type].pictures(rows)).logits
    model = converted(source, sinks, tmp_path / "out")
    assert type(model).__module__.startswith("transformers_modules.")
    told = WRAPPERS[model_type].pictures(rows)
    assert apart(model(rows, **told).logits, expected) < UNCHANGED
    without = rows.clamp_max(59)
    assert apart(model(without).logits, expected) > 1e-2
    if not hands_on(model_type):
        assert apart(original(rows, **told).logits, expected) > 1e-2
        words = rows[:, :6]
        text = original(torch.cat([PREFIX, words], 1)).logits[:, PREFIX.shape[1] :]
        assert apart(model(words).logits, text) < UNCHANGED


@EVERY
def test_all_but_the_language_model_is_copied_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    """In whatever type it is stored, and types that hold more than float32 among them."""
    folder = saved(model_type, tmp_path / "whole", tied=True)
    file, kinds = folder / "model.safetensors", (torch.float64, torch.bfloat16, torch.float32)
    stored = {
        name: tensor.to(kinds[number % 3]) + torch.pi * (number % 3 == 0)
        for number, (name, tensor) in enumerate(sorted(load_file(file).items()))
    }
    save_file(stored, file, {"format": "pt"})
    source = load(ModelRef(name=str(folder)))
    converted(source, keys_of(source), tmp_path / "out")
    assert source.whole is not None
    names = {name for name, _ in source.whole.others()}
    written = load_file(tmp_path / "out/model.safetensors")
    assert names <= written.keys()
    assert len(names) > 4
    # transformers may give what it stores other names, and split or join it, as it was split.
    before = sorted(digest(one) for one in stored.values())
    after = [digest(written[name]) for name in names]
    assert all(one in before for one in after)


@pytest.mark.parametrize("model_type", ["gemma3", "glm4v_moe"])
@torch.no_grad()
def test_weights_that_stream_are_written_as_those_at_hand(
    model_type: str, tokens: Tensor, tmp_path: Path
) -> None:
    """And buffers with them, as those by which a router prefers experts."""
    folder = saved(model_type, tmp_path / "whole")
    at_hand, streaming = (load(ModelRef(name=str(folder))) for _ in range(2))
    streaming = streaming.placed(torch.device("cpu"), room=0, held=1)
    assert streaming.streaming is not None
    places = tmp_path / "at hand", tmp_path / "streaming"
    for source, place in zip((at_hand, streaming), places, strict=True):
        converted(source, keys_of(at_hand), place)
    one, other = (load_file(place / "model.safetensors") for place in places)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def digest(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    raw = tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), (tensor.numel(),), raw


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_may_be_chosen_and_what_reads_pictures_follows(
    name: str, tokens: Tensor, tmp_path: Path
) -> None:
    source, rows = load(ModelRef(name=str(saved("gemma3", tmp_path / "whole")))), tokens[:1]
    rows = with_picture(rows)
    told = WRAPPERS["gemma3"].pictures(rows)
    model = converted(source, keys_of(source), tmp_path / "out")
    expected = model(rows, **told).logits
    again = opened(tmp_path / "out", trust_remote_code=True, attn_implementation=name)
    assert apart(again(rows, **told).logits, expected) < UNCHANGED
    model.set_attn_implementation(name)
    assert apart(model(rows, **told).logits, expected) < UNCHANGED
    with pytest.raises(ValueError, match="would drop the sinks"):
        model.set_attn_implementation("flash_attention_2")


@torch.no_grad()
def test_what_logits_leave_out_of_pictures_is_of_the_size_of_what_they_leave_out_of_words(
    tmp_path: Path,
) -> None:
    """Logits that were fitted on text alone, in a model whose pictures are noise."""
    folder = saved("llava", tmp_path / "whole")
    source, original = load(ModelRef(name=str(folder))), opened(folder)
    known = prefix_of(source.decoder, PREFIX[0])
    text = torch.randint(3, 60, (17, 24), generator=torch.Generator().manual_seed(0))
    sinks = tuple(fit_sinks(source.decoder, known, text[1:]))
    model = converted(source, sinks, tmp_path / "out")
    left: dict[str, float] = {}
    words = text[:1]
    for name, rows in {"words": words, "picture": with_picture(words)}.items():
        told = WRAPPERS["llava"].pictures(rows) if name == "picture" else {}
        before = torch.cat([PREFIX, rows], 1)
        expected = original(before, **told).logits[:, PREFIX.shape[1] :]
        effect = original(rows, **told).logits - expected
        left[name] = float((model(rows, **told).logits - expected).norm() / effect.norm())
    assert 0 < left["words"] < 1, left
    assert left["picture"] < 1.5 * left["words"], left


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_parts_deeper_than_there_are_tensors_are_refused(part: str, tmp_path: Path) -> None:
    file = saved("llava", tmp_path) / "config.json"
    settings = json.loads(file.read_text())
    settings[part]["num_hidden_layers"] = 10**9
    file.write_text(json.dumps(settings))
    with pytest.raises(AbsorbError, match=r"num_hidden_layers 1e\+09 and there are \d+ tensors"):
        load(ModelRef(name=str(tmp_path)))


def test_processors_go_along_without_code_and_no_chat_of_theirs_begins_with_the_prefix(
    tmp_path: Path,
) -> None:
    folder = saved_with_processor(tmp_path / "whole")
    (folder / "chat_template.jinja").unlink()
    legacy = {"chat_template": "{{ bos_token }}{{ messages[0]['content'] }}"}
    (folder / "chat_template.json").write_text(json.dumps(legacy))
    named = {"image_processor_type": "A", "auto_map": {"AutoImageProcessor": "code.A"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(named))
    source = load(ModelRef(name=str(folder)))
    files = dict(processors(source, (source.tokenizer.bos_token_id,)))
    assert files.keys() == {
        "chat_template.json",
        "preprocessor_config.json",
        "processor_config.json",
    }
    assert files["processor_config.json"] == (folder / "processor_config.json").read_bytes()
    assert json.loads(files["preprocessor_config.json"]) == {"image_processor_type": "A"}
    tokenizer = source.tokenizer
    tokenizer.chat_template = json.loads(files["chat_template.json"])["chat_template"]
    chat = [{"role": "user", "content": "a b"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "a b"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
def test_a_known_language_model_is_found_in_whatever_is_around_it(model_type: str) -> None:
    """All but two that hold a model with its head, or a part of one, as their language model."""
    config: Any = CONFIG_MAPPING[model_type]()
    part = getattr(config, "text_config", None)
    if getattr(part, "model_type", None) not in {*FAMILIES, *INSIDE}:
        pytest.skip("its language model has no entry")
    try:
        with torch.device("meta"):
            whole = whole_class({"model_type": model_type})(config)
    except (ImportError, ValueError) as error:
        pytest.skip(f"its own defaults make none here: {error}")
    if part.model_type == "opt":
        with pytest.raises(AbsorbError, match="stands for none that absorb knows"):
            alone(whole, "it", standing=False)
        return
    model = alone(whole, "it", standing=False)
    assert named_in(whole.base_model, model.base_model) in {"language_model", "text_model"}
    assert named_in(whole, model.get_output_embeddings()) == "lm_head"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.slow
@pytest.mark.usefixtures("little_text", "at_home")
@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_vl"])
@torch.no_grad()
def test_by_the_command_it_is_converted_verified_and_measured(
    model_type: str, text_file: Path, tmp_path: Path
) -> None:
    folder, out = saved(model_type, tmp_path / "whole", tied=True), tmp_path / "out"
    result = run("convert", folder, "--out", out, "--steps", "0", "--text", text_file)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "absorb.json").read_text())
    assert report["inspection"]["whole"] == model_type
    card = (out / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card
    assert "pipeline_tag: image-text-to-text" in card
    assert "what reads pictures is bit for bit that of the original" in card.replace("\n", " ")
    verified = run("verify", out)
    assert verified.exit_code == 0, verified.output
    asked = ("--json", "--formats", "w8a8-token", "--windows", 2, "--length", 64)
    result = run("eval", out, "--against", folder, "--text", text_file, *asked)
    assert result.exit_code == 0, result.stderr
    ours, theirs = json.loads(result.stdout)["models"]
    assert ours["converted"]
    assert not theirs["converted"]
    export = run("export", out, "--out", tmp_path / "export")
    assert export.exit_code == 1
    assert "reads pictures too" in export.stderr
    again = run("convert", out, "--out", tmp_path / "again")
    assert again.exit_code == 1
    assert "absorbed already" in again.stderr


def test_what_does_not_stand_alone_in_transformers_is_converted_whole_or_not_at_all(
    tmp_path: Path,
) -> None:
    result = run("inspect", saved("qwen2_vl", tmp_path), "--text-only")
    assert result.exit_code == 1
    assert "a Qwen2VLTextModel, does not stand alone in transformers" in result.stderr
    assert "drop --text-only to convert the whole" in result.stderr


def test_what_adds_to_its_text_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

    plain: Any = LlavaForConditionalGeneration.forward

    def louder(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.logits = out.logits.tanh()
        return out

    folder = saved("llava", tmp_path)
    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", louder)
    result = run("inspect", folder)
    assert result.exit_code == 1
    assert "does more to its text than its language model does" in result.stderr
