"""Text that a model samples: what it starts from, and that loops are left out of it."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from absorb.errors import AbsorbError
from absorb.load.source import Source
from absorb.models.families import FAMILIES
from absorb.schema.settings import Calibration
from absorb.text.gather import CALIBRATION_ROWS, VALIDATION_ROWS, gather
from absorb.text.samples import LATEST_START, loops, opening_of, sampled
from tests.helpers.sources import source_of
from tests.helpers.tiny import VOCABULARY, tiny
from tests.helpers.tiny_tokenizer import TEMPLATE, tiny_tokenizer

LENGTH = 128
BOS, EOS = 1, 2
# The planted model goes round in these, and gets there from BOS alone.
LOOP = (61, 62, 63)
# A template that puts no BOS first; the planted model never says `z`.
CHAT = "{{ 'zzz' }}"


def planted(share: float) -> Source:
    """A tiny model that goes into a loop in so large a share of its texts.

    Its one layer writes nothing, so what comes next depends on the last token alone. The
    embedding is the unit matrix, which its norm makes eight times as large.
    """
    settings = {"num_hidden_layers": 1, "hidden_size": VOCABULARY, "max_position_embeddings": 512}
    model = tiny("llama", torch.float32, **settings)
    base: PreTrainedModel = model.model
    noise = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits = 0.1 * noise  # (next, last); no two are the same, so that their order is known
    text = [t for t in range(VOCABULARY) if t not in (BOS, EOS, *LOOP)]
    logits[[BOS, EOS, tiny_tokenizer()("z")["input_ids"][0]]] = -40
    logits[list(LOOP)] = -40
    for last, following in zip(LOOP, (*LOOP[1:], LOOP[0]), strict=True):
        logits[:, last] = -40
        logits[following, last] = 0
    both = logits[:, BOS]
    both[LOOP[0]] = both[text].exp().sum().log() + torch.tensor(share / (1 - share)).log()
    with torch.no_grad():
        for layer in base.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        base.norm.weight.fill_(1)
        base.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
        model.lm_head.weight.copy_(logits / 8)
    return source_of(model, "planted")


@torch.no_grad()
def walked(source: Source, count: int, seed: int) -> Tensor:
    """The same rows, loops among them, by the next-token logits of each token: (count, LENGTH)."""
    logits = source.model(torch.arange(VOCABULARY)[:, None]).logits[:, 0]
    logits[:, EOS] = -torch.inf
    likely, tokens = logits.sort(descending=True)
    below = likely.softmax(-1).cumsum(-1)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, LENGTH + LATEST_START, generator=generator).tolist()
    rows = []
    for number, row in enumerate(draws):
        text = [BOS]
        for draw in row:
            lower = below[text[-1]]
            text.append(int(tokens[text[-1], int((lower <= draw * lower[-1]).sum())]))
        first = 1 + number % (LATEST_START + 1)
        rows.append(text[first : first + LENGTH])
    return torch.tensor(rows)


def noise(rows: int, of: int) -> Tensor:
    return torch.randint(of, (rows, 256), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("period", [1, 2, 3, 16])
def test_a_stretch_that_repeats_itself_makes_a_row_a_loop(period: int) -> None:
    rows = noise(3, of=1000)
    rows[1, 100:180] = rows[1, :period].repeat(80)[:80]
    rows[1, 140] = 0  # a slip does not end it
    assert loops(rows, 1000).tolist() == [False, True, False]


def test_a_row_of_few_tokens_is_a_loop_unless_the_model_has_no_more() -> None:
    assert loops(noise(3, of=12), 1000).all()
    assert not loops(noise(3, of=12), 24).any()


def test_a_short_repeat_such_as_a_table_is_no_loop() -> None:
    rows = noise(1, of=1000)
    rows[0, 40:80] = 7
    rows[0, 120:160] = torch.tensor([8, 9]).repeat(20)
    assert not loops(rows, 1000).any()


def test_the_rows_that_are_no_loops_are_what_they_were() -> None:
    source = planted(share=0.3)
    made = sampled(source, 20, LENGTH, seed=3)
    rows = walked(source, made.drawn, seed=3)
    looped = torch.isin(rows, torch.tensor(LOOP)).any(1)
    assert 0 < made.loops == looped.sum()
    assert torch.equal(made.rows, rows[~looped][:20])


def test_a_model_without_loops_is_sampled_once() -> None:
    source = planted(share=1e-9)
    made = sampled(source, 20, LENGTH, seed=0)
    assert (made.drawn, made.loops) == (20, 0)
    assert torch.equal(made.rows, walked(source, 20, seed=0))


@pytest.mark.slow
def test_more_rows_begin_with_the_fewer() -> None:
    source = planted(share=0.2)
    few, many = (sampled(source, count, LENGTH, seed=0) for count in (12, 70))
    assert few.loops
    assert torch.equal(few.rows, many.rows[:12])
    assert len(many.rows) == 70


def test_a_model_whose_rows_mostly_loop_is_refused_after_the_first_of_them() -> None:
    with pytest.raises(AbsorbError, match=r"of 64 rows that planted sampled repeat .*--text FILE"):
        sampled(planted(share=0.7), 1000, LENGTH, seed=0)


def test_how_many_were_left_out_is_said_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "absorb"):
        origin = gather(planted(share=0.3), Calibration(), None).origin
    found = re.search(r"loops left out: (\d+) of (\d+) rows", origin)
    assert found
    assert 0 < int(found[1]) <= int(found[2]) - CALIBRATION_ROWS - VALIDATION_ROWS["cpu"]
    assert [record.message for record in caplog.records if origin in record.message]


def with_tokenizer(**changes: str | None) -> Source:
    """The planted model with another BOS or chat template."""
    source = planted(share=1e-9)
    for name, value in changes.items():
        setattr(source.tokenizer, name, value)
    return source


@pytest.mark.parametrize(
    "template", [TEMPLATE, None, "{{ raise_exception('no') }}", "{{ nothing.x }}"]
)
def test_text_starts_from_bos_where_no_template_puts_another_first(template: str | None) -> None:
    assert opening_of(with_tokenizer(chat_template=template)) == [BOS]


@pytest.mark.parametrize("bos", ["<s>", None])
def test_text_starts_as_an_answer_where_bos_opens_none(bos: str | None) -> None:
    source = with_tokenizer(bos_token=bos, chat_template=CHAT)
    chat = source.tokenizer("zzz")["input_ids"]
    assert opening_of(source) == chat
    rows = sampled(source, 5, LENGTH, seed=0).rows
    assert not torch.isin(rows, torch.tensor(chat)).any()
    assert len({tuple(row) for row in rows.tolist()}) == 5


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ strftime_now('%d %B') }}",  # another text on every day
        "{{ raise_exception('no') }}",
        "{{ messages[7].role }}",
        "{% if %}",
        "{{ 'z' * 500 }}",
    ],
)
def test_text_starts_with_words_where_there_is_neither(template: str | None) -> None:
    source = with_tokenizer(bos_token=None, chat_template=template)
    assert opening_of(source) == []


def test_a_text_that_nothing_opens_has_its_first_word() -> None:
    source = with_tokenizer(bos_token=None, chat_template=None)
    source.tokenizer.add_tokens(["The", "In"])
    rows = sampled(source, 3, LENGTH, seed=0).rows
    assert rows[0, 0] == source.tokenizer("The")["input_ids"][0]


def test_a_token_that_the_model_lacks_opens_nothing() -> None:
    source = with_tokenizer(bos_token=None, chat_template=CHAT)
    source.tokenizer.add_tokens([f"[{i}]" for i in range(20)])
    source.tokenizer.chat_template = "{{ '[19]' }}"
    assert opening_of(source) == []


def test_a_model_with_learned_positions_has_none_to_spare_for_a_template() -> None:
    source = with_tokenizer(bos_token=None, chat_template=CHAT)
    assert opening_of(replace(source, family=FAMILIES["gpt2"])) == []
