"""Gates on what the norms give that read the stream: experimental, and nothing until trained.

A norm divides by the size of all channels, so an outlier channel decides how large the others come
out (outlier-driven rescaling, arXiv 2601.22966). GatedNorm may do that in its place: channel by
channel, y * 2 sigmoid(W_out silu(W_in y)). With W_out = 0 it multiplies by one.

What a gate must learn for a norm to do without the outlier channels O is one number a token: the
share a = ρ_I / ρ that the size of the other channels I has in that of all. Of ŷ, what the norm
gives without O, log a is nearly a linear function, and two ranks give any such function u exactly,
as silu(u) - silu(-u) = u. So these two read it from the start, and all others read at random.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from absorb.errors import AbsorbError
from absorb.fold.plan import Plan
from absorb.models.decoder import Decoder
from absorb.runtime import ranks
from absorb.runtime.inputs import ROWS
from absorb.runtime.precision import autocast_bf16
from absorb.runtime.walk import Walk

RANK = 16
_MOST = 32  # rows of text
_DAMPING = 1e-2  # of the mean square of channels, for those that text says little of
_ROUNDS = 20  # of Newton's method
_EDGE = 0.01  # how near to 0 and 2 a gate is opened, as a share of 2
_ENDS = 0.01  # of tokens at either end, whose shares count as no farther off than the next


def gated_norms(decoder: Decoder) -> list[str]:
    """The norms of a layer that read the stream, by their names in it."""
    return [name for name in decoder.family.reads if decoder.sites(name)[0].is_norm]


def refuse_ungated(decoder: Decoder) -> None:
    """Refuse a family whose stream no norm reads."""
    if not gated_norms(decoder):
        raise AbsorbError(
            f"in {decoder.family.model_type} models matrices read the stream and no norm does, so "
            "there is nothing to gate; drop --gates"
        )


@torch.no_grad()
def gates_of(
    student: Decoder, tokens: Tensor, outliers: Sequence[int], rank: int = RANK
) -> dict[str, Tensor]:
    """What the gates of a student that has none are to read, as a plan has it.

    It is found on text `tokens` (rows, length). No gate reads the channels `outliers`.
    """
    rows = tokens[:_MOST]
    walk = Walk(student, ranks.share(rows).split(ROWS))
    found: dict[str, list[Tensor]] = {name: [] for name in gated_norms(student)}
    for layer in tqdm(range(len(student.layers)), desc="setting gates", unit="layer"):
        with _watching(student, layer, outliers) as seen, autocast_bf16(student.device):
            walk.pass_on(layer)
        for name, pairs in seen.items():
            alone, own = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            shares = ranks.of_all(own, len(rows))
            found[name].append(_rows(alone, shares, outliers, rank, layer).cpu())
    return {name: torch.stack(read) for name, read in found.items()}


@contextmanager
def _watching(
    student: Decoder, layer: int, outliers: Sequence[int]
) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """What the norms of a layer give meanwhile: ŷ (tokens, hidden) and a (rows, length)."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in gated_norms(student)}

    def after(name: str) -> Callable[..., None]:
        def look(norm: Any, args: tuple[Any, ...], out: Tensor) -> None:
            others = args[0].clone()
            others[..., outliers] = 0
            alone = norm.forward(others).flatten(0, -2).float()
            alone[:, outliers] = 0
            shares = share_of(out.flatten(0, -2).float(), alone)
            seen[name].append((alone, shares.view(out.shape[:-1])))

        return look

    handles = [student.site(layer, name).module.register_forward_hook(after(name)) for name in seen]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def share_of(normed: Tensor, alone: Tensor) -> Tensor:
    """By how much outlier channels make the others smaller: (tokens,).

    From what a norm gives with them, and without them, both (tokens, hidden).
    """
    tiny = torch.finfo(alone.dtype).tiny
    share: Tensor = (normed * alone).sum(-1) / alone.square().sum(-1).clamp_min(tiny)
    return share.clamp(1e-4, 1.0)


def direction(alone: Tensor, shares: Tensor) -> Tensor:
    """v (hidden,), of which 2 sigmoid(ŷ v) is nearly a, but for a factor that is the same always.

    v = (ŶᵀŶ + κ I)⁻¹ Ŷᵀ z with z = logit(a / 2c), of the mean zero. (On the demo, 2 (log a - b) in
    its place is far off for the few tokens whose a is small.) `alone` is of the tokens that this
    process has read, and `shares` (rows, length) of all.
    """
    logs = shares.log()
    ends = logs.float().quantile(torch.tensor([_ENDS, 1 - _ENDS], device=logs.device))
    wanted = ranks.share(_centered(logs.clamp(*ends))).flatten().double()
    squares = ranks.summed(alone.T.double() @ alone.double())
    squares.diagonal().add_(_DAMPING * squares.diagonal().mean().clamp_min(1e-12))
    found: Tensor = torch.linalg.solve(squares, ranks.summed(alone.T.double() @ wanted))
    return found


def _centered(logs: Tensor) -> Tensor:
    """logit(a / 2c) for log a, with c such that the mean is zero: by Newton's method."""
    middle = float(logs.mean())
    for _ in range(_ROUNDS):
        found = torch.logit((logs - middle).exp() / 2, _EDGE)
        middle += float(found.mean()) / 2  # the slope is two where a is c
    return found


def _rows(alone: Tensor, shares: Tensor, outliers: Sequence[int], rank: int, seed: int) -> Tensor:
    """What one gate reads, (rank, hidden): of ŷ each row makes numbers of the mean square one.

    `alone` and `shares` are as `direction` takes them.
    """
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, alone.shape[-1], generator=draw, dtype=torch.float64)
    rows = rows.to(alone.device)
    rows[:, outliers] = 0
    if outliers:
        rows[0] = direction(alone, shares)
        rows[1] = -rows[0]
    squares = ranks.summed((alone.double() @ rows.T).square().sum(0))
    squares /= shares.numel() * ranks.readers(len(shares))
    return (rows / squares.sqrt().clamp_min(1e-6)[:, None]).float()


def write(student: Decoder, plan: Plan, layer: int) -> None:
    """Let the gates of a layer read what they are to read. Nothing is gated until it is trained."""
    for name, rows in plan.gates.items():
        student.site(layer, name).module.gate_in.copy_(rows[layer])
