"""Models split over several processes by transformers' plan for their architecture."""

import os
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from transformers.distributed import DistributedConfig

from absorb.models.modeling_absorb import AbsorbLlamaForCausalLM
from tests.helpers.warm import warm
from tests.models.test_attention import EVERY, drift, sinked, stock, subject, texts

RANKS = 2
FORMS = ("logit", "key")


@EVERY
def test_the_plan_leaves_attention_whole(family: str) -> None:
    """Each rank has all sinks: given some of the heads, it would take the sinks of others."""
    ours, stocks = (set(model.tp_plan) for model in (subject(family, "key"), stock(family)))
    assert {name for name in stocks - ours if "self_attn" not in name} == set()
    assert {name for name in ours if "self_attn" in name} == set()
    assert any("mlp" in name for name in ours)


def one_rank(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    plan = DistributedConfig(tp_plan="auto")
    for form in FORMS:
        model = AbsorbLlamaForCausalLM.from_pretrained(folder / form, distributed_config=plan)
        assert distributed.tensor.DTensor is type(model.model.layers[0].mlp.down_proj.weight.data)
        with torch.no_grad():
            torch.save(model(texts()).logits, folder / form / f"logits-{rank}")
    distributed.destroy_process_group()


@pytest.mark.slow
@torch.no_grad()
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    models = {form: sinked("llama", form) for form in FORMS}
    for form, model in models.items():
        model.save_pretrained(tmp_path / form)
    method = warm.get_start_method()
    multiprocessing.start_processes(one_rank, (tmp_path,), RANKS, start_method=method)
    for form, model in models.items():
        expected = model(texts()).logits
        for rank in range(RANKS):
            assert drift(torch.load(tmp_path / form / f"logits-{rank}"), expected) < 2e-5
