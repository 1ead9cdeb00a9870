"""Positions of calibration text: some rows skip a part of a text, up to the context of the model.

RoPE turns a key bias with its key, so a bias that was fitted to short rows does anything where
keys are far away: of the demo, fitted to rows of 256 tokens, perplexity grew by a third on a text
of 8,192. Longer rows would cost more memory and time. Rows that skip positions (PoSE, arXiv
2309.10400) cost none: their queries see the prefix and the beginning of the row from afar.
"""

from torch import Tensor

from absorb.fold.sinks.prefix_cache import Prefix
from absorb.models.decoder import Decoder
from absorb.models.positions.rope import rope_changes_at

SHARE = 0.25  # of the rows
# Where a row skips, as shares of its length, in turn.
_SKIPS_AT = (0.25, 0.5)


def spread_positions(decoder: Decoder, prefix: Prefix, tokens: Tensor) -> Tensor:
    """Positions of text (rows, length) after a prefix; those of the first rows are as ever.

    What the others skip grows by a constant factor from row to row, up to the longest text. Where
    none skips, there is one row for all.
    """
    rows, length = tokens.shape
    near = prefix.positions(length)
    longest, count = _longest(decoder) - int(near[0, 0]), int(rows * SHARE)
    if longest <= length or count == 0:
        return near
    positions = near.repeat(rows, 1)
    for one in range(count):
        skipped = int(length * (longest / length) ** ((one + 1) / count)) - length
        start = int(length * _SKIPS_AT[one % len(_SKIPS_AT)])
        positions[rows - count + one, start:] += skipped
    return positions


def _longest(decoder: Decoder) -> int:
    """The tokens that a model is made to see at once by one rotation; 0 where none rotates."""
    config = decoder.config
    limits = [
        getattr(config, "max_position_embeddings", None),
        # Masks count tokens, so what is skipped must not be more than a window.
        getattr(config, "sliding_window", None),
        rope_changes_at(config),
    ]
    return min((limit for limit in limits if limit), default=0) if decoder.rotating else 0
