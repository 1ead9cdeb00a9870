"""Gates begin as nothing, stand for the denominator of a norm, and go along with all folds."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from absorb.errors import AbsorbError
from absorb.fold.gates import RANK, direction, gated_norms, gates_of, refuse_ungated, share_of
from absorb.fold.graft import graft, twin
from absorb.fold.plan import STREAM
from absorb.fold.sinks.forms import KeySink
from absorb.fold.smoothing import searched_scales
from absorb.models.decoder import Decoder
from absorb.models.families import FAMILIES
from absorb.models.family import Family
from absorb.runtime import ranks
from absorb.runtime.precision import as_stored
from absorb.schema.training import Recipe
from absorb.text.gather import Texts
from absorb.tune.distill import distill
from tests.helpers import warm
from tests.helpers.plans import neutral_plan
from tests.helpers.tiny import HEAD_DIM, HIDDEN, LAYERS, VOCABULARY, kv_heads, tiny
from tests.pipelines.test_ranks import told

OUTLIERS = [7, 30]
# Norms of every kind: RMSNorm, the same with 1 + w, LayerNorm, and one without a weight.
KINDS = ["llama", "gemma2", "gpt_neox", "opt", "olmo"]


def random(*shape: int, seed: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def read_by(family: Family) -> dict[str, Tensor]:
    """What gates of random rows read, for every norm that a family gates."""
    names = gated_norms(Decoder(tiny(family.model_type), family))
    return {n: random(LAYERS, RANK, HIDDEN, seed=i) / 6 for i, n in enumerate(names)}


def folded(family: Family, tokens: Tensor) -> dict[str, object]:
    """Folds that change every channel, and the order of those of the stream where it may change."""
    draw = torch.Generator().manual_seed(1)
    residual = 2.0 ** torch.randint(-3, 6, (HIDDEN,), generator=draw)
    student = twin(Decoder(tiny(family.model_type), family))
    folds: dict[str, object] = {"residual": residual}
    folds["smoothing"] = searched_scales(student, tokens)
    if family.feeds:
        folds["orders"] = {STREAM: torch.randperm(HIDDEN, generator=draw)}
    return folds


def open_gates(
    student: Decoder, given: Mapping[str, Tensor], order: Tensor | None = None, size: float = 1.0
) -> None:
    """Let gates give random numbers for every channel, which may stand in another order."""
    order = torch.arange(HIDDEN) if order is None else order
    for name, rows in given.items():
        for layer in range(LAYERS):
            gate = size * random(*rows.shape[1:], seed=layer)[:, order]
            student.site(layer, name).module.gate_out.data.copy_(gate)


@pytest.mark.parametrize("model_type", KINDS)
@torch.no_grad()
def test_gates_that_nobody_has_trained_change_no_bit(model_type: str, tokens: Tensor) -> None:
    family = FAMILIES[model_type]
    decoder, folds = Decoder(tiny(model_type), family), folded(family, tokens)
    plain = graft(decoder, neutral_plan(family, **folds)).model
    gated = graft(decoder, neutral_plan(family, gates=read_by(family), **folds)).model
    assert any(float(p.abs().max()) > 0 for n, p in gated.named_parameters() if "gate_in" in n)
    assert torch.equal(gated(tokens).logits, plain(tokens).logits)


@torch.no_grad()
def test_gates_stand_beside_keys(tokens: Tensor) -> None:
    family, kv = FAMILIES["llama"], kv_heads("llama")
    sinks = (
        KeySink(keys=random(kv, 2, HEAD_DIM), values=random(kv, 2, HEAD_DIM, seed=4)),
    ) * LAYERS
    decoder, gates = Decoder(tiny("llama"), family), read_by(family)
    plain = graft(decoder, neutral_plan(family, sinks=sinks)).model(tokens).logits
    gated = graft(decoder, neutral_plan(family, sinks=sinks, gates=gates))
    assert torch.equal(gated.model(tokens).logits, plain)
    open_gates(gated, gates)
    assert (gated.model(tokens).logits - plain).abs().max() > 0.01 * plain.abs().max()


@pytest.mark.parametrize("model_type", KINDS)
@torch.no_grad()
def test_open_gates_go_along_with_every_fold(model_type: str, tokens: Tensor) -> None:
    """Stock norms compute in float32, and a mistake would move logits by a hundredth and more."""
    family, gates = FAMILIES[model_type], read_by(FAMILIES[model_type])
    decoder, folds = Decoder(tiny(model_type), family), folded(family, tokens)
    alone = graft(decoder, neutral_plan(family, gates=gates))
    shut = alone.model(tokens).logits
    open_gates(alone, gates)
    together = graft(decoder, neutral_plan(family, gates=gates, **folds))
    orders = folds.get("orders", {})
    assert isinstance(orders, dict)
    open_gates(together, gates, orders.get(STREAM))
    wanted = alone.model(tokens).logits
    assert (shut - wanted).abs().max() > 0.01 * wanted.abs().max()
    assert (together.model(tokens).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_gates_stay_in_float32(tokens: Tensor) -> None:
    family = FAMILIES["llama"]
    student = graft(
        Decoder(tiny("llama", torch.float32), family),
        neutral_plan(family, gates=read_by(family)),
    )
    as_stored(student, torch.bfloat16)
    kinds = {
        n: p.dtype
        for n, p in student.model.named_parameters()
        if n.endswith((".gate_in", ".gate_out"))
    }
    assert len(kinds) == 2 * 2 * LAYERS
    assert {*kinds.values()} == {torch.float32}


def test_a_family_whose_stream_no_norm_reads_is_refused() -> None:
    with pytest.raises(AbsorbError, match=r"olmo2 models .* nothing to gate; drop --gates"):
        refuse_ungated(Decoder(tiny("olmo2"), FAMILIES["olmo2"]))


class Norm(nn.Module):
    """RMSNorm, without a weight."""

    def forward(self, values: Tensor) -> Tensor:
        return values * values.square().mean(-1, keepdim=True).rsqrt()


def test_two_ranks_stand_for_the_denominator_that_outliers_made() -> None:
    """Planted: two channels are constant, and other channels say how large all others are."""
    tokens, hidden = 2000, 64
    sizes = (0.5 * random(tokens, 1)).exp()
    stream = sizes * random(tokens, hidden, seed=4)
    stream[:, 9:25] += 2 * sizes * sizes.log()
    with_outliers = stream.clone()
    with_outliers[:, OUTLIERS] = torch.tensor([9.0, -6.0], dtype=torch.float64)
    stream[:, OUTLIERS] = 0
    alone = Norm()(stream)
    normed = Norm()(with_outliers)
    shares = share_of(normed, alone)
    exact = stream.square().sum(-1).sqrt() / with_outliers.square().sum(-1).sqrt()
    torch.testing.assert_close(shares, exact)

    linear = direction(alone[::2], shares[::2])
    read = alone[1::2] @ linear
    # What the first two ranks of a gate make of it, with 1 and -1 in gate_out.
    gate = 2 * torch.sigmoid(nn.functional.silu(read) - nn.functional.silu(-read))
    logs = (shares[1::2] / gate).log()
    assert logs.std() < 0.5 * shares[1::2].log().std()  # a constant leaves all of it


@torch.no_grad()
def test_gates_read_no_outlier_channel_and_begin_with_what_these_do(tokens: Tensor) -> None:
    family = FAMILIES["llama"]
    model = tiny("llama", torch.float32)
    model.get_input_embeddings().weight[:, OUTLIERS] = 4.0
    student = graft(Decoder(model, family), neutral_plan(family))
    gates = gates_of(student, tokens, OUTLIERS)
    assert gates.keys() == {"input_layernorm", "post_attention_layernorm"}
    for rows in gates.values():
        assert rows.shape == (LAYERS, RANK, HIDDEN)
        assert not rows[..., OUTLIERS].any()
        assert torch.equal(rows[:, 0], -rows[:, 1])
        assert rows.isfinite().all()
    again = gates_of(student, tokens, OUTLIERS)
    assert all(torch.equal(again[name], rows) for name, rows in gates.items())
    without = gates_of(student, tokens, [])
    assert not any(torch.equal(rows[:, 0], -rows[:, 1]) for rows in without.values())


def test_gates_learn_what_nothing_else_that_is_trained_can() -> None:
    """Planted: the teacher is a student whose gates are open, and weights are not trained."""
    family = FAMILIES["llama"]
    decoder, gates = Decoder(tiny("llama", torch.float32), family), read_by(family)
    teacher = graft(decoder, neutral_plan(family, gates=gates))
    open_gates(teacher, gates, size=0.1)
    part = torch.randint(3, VOCABULARY, (4, 16, 12), generator=torch.Generator().manual_seed(3))
    texts = Texts(
        calibration=part[0], validation=part[1], held_out=part[2], training=part[3], origin="made"
    )
    recipe = Recipe(steps=16, train="sinks", rows=8)
    left = []
    for planned in (neutral_plan(family), neutral_plan(family, gates=gates)):
        student = graft(decoder, planned)
        prefix = torch.tensor([], dtype=torch.long)
        losses = distill(teacher, student, prefix, texts, recipe, seed=0)
        left.append(min(value for _, value in losses.held_out))
    assert left[1] < 0.8 * left[0]


def write_gates(file: Path) -> None:
    """What gates read of seven rows that processes share, of whom one reads more than others."""
    family, draw = FAMILIES["llama"], torch.Generator().manual_seed(0)
    model = tiny("llama", torch.float32)
    model.get_input_embeddings().weight.data[:, OUTLIERS] = 4.0
    rows = torch.randint(3, VOCABULARY, (7, 12), generator=draw)
    with ranks.joined("cpu"):
        gates = gates_of(graft(Decoder(model, family), neutral_plan(family)), rows, OUTLIERS)
        if ranks.is_first():
            save_file(gates, file)


@pytest.mark.slow
def test_three_processes_set_gates_as_one_does(tmp_path: Path) -> None:
    """To the rounding of float32: a direction solves equations of products of 64 channels."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    write_gates(alone)
    with ThreadPoolExecutor() as pool:
        envs = [os.environ | place for place in told(3)]
        done = [*pool.map(lambda env: warm.call(write_gates, together, env=env), envs)]
    assert [one.returncode for one in done] == [0] * 3, done
    found = load_file(together)
    for name, rows in load_file(alone).items():
        torch.testing.assert_close(found[name], rows, rtol=1e-4, atol=1e-5, msg=name)
