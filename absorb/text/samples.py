"""Text that a model samples: rows that are loops are left out, and others drawn for them."""

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.errors import AbsorbError
from absorb.load.opening.tokenizer import lead_of
from absorb.load.source import Source
from absorb.models.modeling_absorb import NEUTRAL, sink_attention
from absorb.runtime.hooks import replacing_attention
from absorb.runtime.memory import release_freed_memory
from absorb.runtime.reading import new_cache

_AT_ONCE = {"cpu": 64, "cuda": 512}
# Without it a small model soon rambles, and top-p costs a sort of the vocabulary at every step.
_TOP_K = 100
# Rows start up to this many tokens into a text, as windows of a file do: sinks fitted to beginnings
# alone do badly in the middle of a sentence.
LATEST_START = 32
# Where a text starts that nothing else begins: words that many texts start with.
_FIRST_WORDS = ("The", "In", "I", "A", "This", "It", "We", "When", "For", "If", "As", "There")
# What a chat template makes an opening of, before an answer that starts with one of these words.
_REQUEST = ({"role": "user", "content": "Write a long text."},)
_LONGEST_OPENING = 128  # a token takes as long as one of text, and some system prompts are pages
# A loop: so many tokens, nine of ten of them the same as the one up to _PERIOD places before. In
# 9,500 rows of prose and Python code the most alike stretch has 86 in 100.
_STRETCH, _PERIOD, _SAME = 64, 16, 0.9
# Or a row with fewer different tokens than one in so many: 256 tokens of English have over 40, of
# Python over 20, and such loops as `: : :, : :` have 16 or fewer. No more than a quarter of the
# vocabulary is asked for.
_REPEATED, _QUARTER = 12, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Rows of tokens (count, length), and of how many that were drawn loops were left out."""

    rows: Tensor
    drawn: int
    loops: int


@torch.no_grad()
def sampled(source: Source, count: int, length: int, seed: int) -> Samples:
    """The model's own text, what it thinks language looks like: the first rows that are no loops.

    What is drawn for a row follows from the seed and its number. Refuses a model whose rows are
    loops for the most part, as soon as that shows.
    """
    steps, at_once = length + LATEST_START, _AT_ONCE[source.decoder.device.type]
    generator = torch.Generator().manual_seed(seed)
    opening, known = opening_of(source), source.model.config.vocab_size
    rows, drawn, needed = torch.empty(0, length, dtype=torch.long), 0, count
    with tqdm(desc="sampling text", unit="token", unit_scale=True) as bar:
        while needed > 0:
            numbers = torch.arange(drawn, drawn + min(needed, at_once))
            draws = torch.rand(len(numbers), steps, generator=generator)
            bar.total = bar.n + needed * steps
            new = _sample(source, opening, draws, numbers % at_once, bar)
            rows, drawn = torch.cat([rows, new[~loops(new, known)]]), drawn + len(new)
            _refuse_loops(source, drawn - len(rows), drawn)
            # As many as will do if no greater share of them are loops than so far.
            needed = -(-(count - len(rows)) * drawn // len(rows))
    return Samples(rows=rows[:count], drawn=drawn, loops=drawn - len(rows))


def _refuse_loops(source: Source, looped: int, drawn: int) -> None:
    if 2 * looped > drawn:
        raise AbsorbError(
            f"{looped} of {drawn} rows that {source.name} sampled repeat themselves, and what is "
            "fitted to loops is worth nothing on other text; name a file of text with --text FILE"
        )


def loops(rows: Tensor, vocabulary: int) -> Tensor:
    """Which rows of tokens (rows, length) are loops: (rows,) of bool.

    Sinks are fitted to what tokens attend to, and in a loop that is the loop. Massive activations
    would not tell: of 16 rows of a 0.5B coder the 7 loops had one or two each, as the others did.
    """
    length = rows.shape[1]
    different = rows.sort(1).values.diff(dim=1).ne(0).sum(1) + 1
    alike = [
        (rows[:, period:] == rows[:, :-period]).float().unfold(1, _STRETCH, 1).mean(-1).amax(1)
        for period in range(1, _PERIOD + 1)
    ]
    few = different < min(length // _REPEATED, vocabulary // _QUARTER)
    return few | (torch.stack(alike).amax(0) >= _SAME)


def opening_of(source: Source) -> list[int]:
    """The tokens, none of them text, that the model was made to read before a text.

    What the tokenizer puts first. Where that is nothing it is BOS, or the opening of an answer by a
    chat template that does not begin with it: files name a BOS that was never trained to begin a
    text. None if there is neither.
    """
    lead: list[int] = lead_of(source.tokenizer).tolist()
    if lead:
        return lead
    bos, chat = source.tokenizer.bos_token_id, _chat_opening(source)
    return [bos] if bos is not None and (not chat or chat[0] == bos) else chat


def _chat_opening(source: Source) -> list[int]:
    """What the chat template puts before an answer: nothing where there is no template of use."""
    template = source.tokenizer.chat_template
    # Text must not change from day to day, and a table of positions may end soon.
    if not template or "strftime_now" in str(template) or source.family.positions is not None:
        return []
    try:
        text = source.tokenizer.apply_chat_template(
            list(_REQUEST), tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template is a program, and raises whatever its author thought of
        return []
    ids: list[int] = source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    known = max(ids, default=0) < source.model.config.vocab_size
    return ids if known and len(ids) <= _LONGEST_OPENING else []


def _sample(source: Source, opening: list[int], draws: Tensor, places: Tensor, bar: tqdm) -> Tensor:
    """Sampled windows (rows, length), each from another place of a text.

    draws is (rows, length + LATEST_START): where, from 0 to 1, each token lies among the likely
    ones; `places` (rows,) decides with which word a text starts and where in it its window does.
    """
    model, device = source.model, source.decoder.device
    start = _starts(source, opening, places)
    draws = draws.to(device)
    _, remember = new_cache(model, room=start.shape[1] - 1 + draws.shape[1])
    text = list(start.to(device).split(1, 1))
    with (
        nullcontext()
        if source.converted or source.family.inferred
        else replacing_attention(model, attend_plainly)
    ):
        for token in text[:-1]:
            model(token, **remember)
        for draw in draws.split(1, 1):
            logits = model(text[-1], **remember).logits[:, -1].float()
            logits[:, _ends(model)] = -torch.inf
            # Among few: a draw from the whole vocabulary takes longer than the model does.
            likely, tokens = logits.topk(min(_TOP_K, logits.shape[-1]))
            below = likely.softmax(-1).cumsum(-1)
            choice = torch.searchsorted(below, draw * below[:, -1:], right=True)
            text.append(tokens.gather(1, choice.clamp_max(tokens.shape[1] - 1)))
            release_freed_memory()  # a millisecond or two, and over a gigabyte in the end
            bar.update(len(draws))
    first = len(opening) + places % (LATEST_START + 1)
    length = draws.shape[1] - LATEST_START
    return torch.cat(text, 1).cpu().gather(1, first[:, None] + torch.arange(length))


def _starts(source: Source, opening: list[int], places: Tensor) -> Tensor:
    """The tokens to sample from: the opening, and a first word where a chat's is it. (rows, n)"""
    start = torch.tensor(opening, dtype=torch.long).expand(len(places), -1)
    if opening in ([source.tokenizer.bos_token_id], lead_of(source.tokenizer).tolist() or None):
        return start
    tokens = [source.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in _FIRST_WORDS]
    return torch.cat([start, torch.tensor(tokens)[places % len(tokens), None]], 1)


def attend_plainly(
    _: nn.Module, query: Tensor, *inputs: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Stock attention in half the time: ours, with sinks that take nothing.

    For a single query the stock one reads keys and values once for every query head.
    """
    sink = torch.full((query.shape[1],), NEUTRAL["sink"], device=query.device)
    layer = SimpleNamespace(sink=sink, is_causal=True, training=False)
    attended: tuple[Tensor, Tensor | None] = sink_attention(layer, query, *inputs, **options)
    return attended


def _ends(model: PreTrainedModel) -> list[int]:
    """The tokens that end a text."""
    assert model.generation_config is not None
    given = model.generation_config.eos_token_id
    ends = given if isinstance(given, list) else [given]
    return [end for end in ends if end in range(model.config.vocab_size)]
