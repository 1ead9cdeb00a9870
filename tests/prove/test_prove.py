"""What is derived wrongly is not proved: each mistake is planted in the code that derives."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from absorb.models.family import Family
from absorb.prove import prove
from absorb.prove.derived.layer import Layer
from absorb.prove.prove import UnprovedError, claimed, proved, with_proved_links
from absorb.schema.proof import Proof

SETTINGS: dict[str, Any] = {"num_hidden_layers": 4}
Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "_KNOWN", {})


def model_of(model_type: str, **settings: Any) -> tuple[Any, Any]:
    """A class and a configuration."""
    config = AutoConfig.for_model(model_type, **{**SETTINGS, **settings})
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config


def asked(model_type: str, **settings: Any) -> tuple[Family, Proof]:
    return proved(*model_of(model_type, **settings))


def planted(target: str, change: Callable[[Any], Any]) -> Plant:
    """What a function of absorb.prove.derived gives, changed."""
    owner, _, name = target.rpartition(".")

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        path = f"absorb.prove.derived.{owner}"
        module: Any = __import__(path, fromlist=[name])
        right = getattr(module, name)
        wrong = lambda *args, **kwargs: change(right(*args, **kwargs))  # noqa: E731
        monkeypatch.setattr(module, name, wrong)

    return plant


def saying(**wrong: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda said: {**said, **wrong}


def without_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = Layer.readers.fget
    monkeypatch.setattr(Layer, "readers", property(lambda layer: right(layer)[1:]))


def with_a_reader_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = Layer.readers.fget
    mlp = lambda layer: [site for site in layer.sites if site.name.endswith("up_proj")]  # noqa: E731
    monkeypatch.setattr(Layer, "readers", property(lambda layer: (*right(layer), *mlp(layer))))


def without_a_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = Layer.name
    names = lambda *args, **kwargs: right(*args, **kwargs).replace("o_proj", "q_proj")  # noqa: E731
    monkeypatch.setattr(Layer, "name", names)


STREAM = "rescaling the stream"
REFUSED: list[tuple[str, str, Plant, str]] = [
    ("a reader is forgotten", "llama", without_a_reader, STREAM),
    ("a reader is one too many", "llama", with_a_reader_too_many, STREAM),
    ("a writer is taken for another", "llama", without_a_writer, STREAM),
    (
        "keys are taken for values",
        "llama",
        planted("heads.derived", saying(value="self_attn.k_proj")),
        "a constant value folds",
    ),
    (
        "heads are taken for blocks",
        "gpt_neox",
        planted("heads.derived", saying(interleaved=False)),
        "a constant value folds",
    ),
    (
        "positions begin at another row",
        "gpt2",
        planted("ends.derived", saying(position_offset=3)),
        "the form key is exact",
    ),
    (
        "a norm inside is taken for the last one",
        "llama",
        planted("ends.derived", saying(final_norm="model.layers.3.input_layernorm")),
        STREAM,
    ),
]
LEFT_OUT: list[tuple[str, str, Plant, str, dict[str, Any]]] = [
    (
        "the gate is taken for up",
        "llama",
        planted("neurons.derived", saying(up="mlp.gate_proj")),
        "smoothing from mlp.gate_proj",
        {"up": None},
    ),
    (
        "an activation is taken for none",
        "starcoder2",
        planted("neurons.derived", saying(up="mlp.c_fc")),
        "smoothing from mlp.c_fc",
        {"up": None},
    ),
    (
        "keys behind a norm are taken for bare ones",
        "qwen3",
        planted("heads.derived", saying(key="self_attn.k_proj")),
        "what the fit did",
        {"key": None},
    ),
    (
        "norms are taken to add one to their weights",
        "llama",
        planted("entry._offset", lambda _: 1.0),
        "smoothing what input_layernorm gives",
        {"feeds": ()},
    ),
]


@pytest.mark.parametrize(
    ("model_type", "plant", "test"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_a_wrong_place_is_refused_by_the_test_that_it_fails(
    model_type: str, plant: Plant, test: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(UnprovedError, match=f"fails the test that .*{test}"):
        asked(model_type)


@pytest.mark.parametrize(
    ("model_type", "plant", "test", "without"),
    [case[1:] for case in LEFT_OUT],
    ids=[case[0] for case in LEFT_OUT],
)
def test_a_wrong_link_is_left_out(
    model_type: str,
    plant: Plant,
    test: str,
    without: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    subject, _, left_out = with_proved_links(claimed(*model_of(model_type)))
    assert any(test in link for link in left_out), left_out
    assert {name: getattr(subject.family, name) for name in without} == without


def test_an_architecture_without_an_entry_is_proved() -> None:
    family, proof = asked("helium")
    assert family == Family(model_type="helium", epsilon=None)
    assert not proof.left_out
    assert all(check.holds for check in proof.checks)
    exact = {check.claim: check.moved for check in proof.checks}
    assert exact["the form key is exact"] < 1e-5
    assert sum(check.shows for check in proof.checks) > 8


def test_values_that_are_clipped_far_beyond_what_a_tiny_model_gives_are_noticed() -> None:
    with pytest.raises(UnprovedError, match="smoothing values is exact"):
        asked("olmo", clip_qkv=8.0)


def test_layers_of_two_kinds_are_refused() -> None:
    with pytest.raises(UnprovedError, match="not all made alike"):
        asked("glm4_moe", first_k_dense_replace=1)


def test_what_cannot_be_followed_is_refused_and_not_guessed() -> None:
    with pytest.raises(UnprovedError, match="fails the test that rescaling the stream"):
        asked("nanochat")  # a norm without a weight stands behind its embedding
