"""Where the stream of a model begins and ends: embedding, table of positions, final norm."""

from itertools import combinations
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from absorb.prove.derived.layer import UnderivedError, is_norm, spans
from absorb.prove.derived.trace import Call, Trace, same


def derived(model: PreTrainedModel, trace: Trace, stack: str, length: int) -> dict[str, Any]:
    """What an entry says of both ends, from a trace of a text of this length."""
    count = model.config.num_hidden_layers
    first, last = trace.call(f"{stack}.0"), trace.call(f"{stack}.{count - 1}")
    assert first is not None
    assert last is not None
    calls = [c for c in trace.calls if not c.name.startswith(f"{stack}.")]
    norms = [c for c in calls if same(c.given, last.gave) and is_norm(c.module)]
    if len(norms) != 1:
        raise UnderivedError("no norm reads what its last layer gives, or more than one do")
    return {"final_norm": norms[0].name, **_beginning(model, calls, first.given, length)}


def _beginning(
    model: PreTrainedModel, calls: list[Call], stream: Tensor, length: int
) -> dict[str, Any]:
    """The embedding, and the table of positions that is added to it, if one is."""
    words: Any = model.get_input_embeddings()
    tables = [call for call in calls if isinstance(call.module, nn.Embedding)]
    given = {call.name: _rows(call, len(stream), length) for call in tables}
    names = {call.module: call.name for call in tables}
    others = [call for call in tables if call.module is not words]
    for some in ((), *((other,) for other in others), *combinations(others, 2)):
        parts = [given[names[words]], *(given[call.name] for call in some)]
        if all(part.shape == stream.shape for part in parts) and spans(stream, parts):
            return {"embedding": names[words], **_positions(some, length)}
    raise UnderivedError("something stands between its embedding and its first layer")


def _rows(call: Call, tokens: int, length: int) -> Tensor:
    """What a table gave to every token, where it gave the same to every text."""
    return call.gave.repeat(tokens // length, 1) if len(call.gave) == length else call.gave


def _positions(tables: tuple[Call, ...], length: int) -> dict[str, Any]:
    if not tables:
        return {}
    if len(tables) > 1:
        raise UnderivedError("more than one table is added to its embedding")
    rows = tables[0].module.weight
    found = [
        i for i in range(len(rows) - length) if same(tables[0].gave[:length], rows[i : i + length])
    ]
    if not found:
        raise UnderivedError("it adds a table to its embedding that is not one of positions")
    return {"positions": tables[0].name, "position_offset": found[0]}
