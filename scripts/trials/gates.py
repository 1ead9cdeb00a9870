"""What the trial of gates needs and no conversion does.

scalar     one number gates all channels of a norm
penalised  a loss that also asks for inputs of Linears without peaks
apart      the most that gates can win: outlier channels stay in float where norms feed Linears
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from absorb.fold.gates import gates_of
from absorb.fold.graft import graft
from absorb.fold.plan import STREAM, Plan
from absorb.measure.divergence import Loss, gap
from absorb.models.decoder import Decoder
from absorb.pipelines.prepare import Prepared
from absorb.runtime.reading import Subject


def outliers_of(draft: Prepared) -> list[int]:
    """The outlier channels of the original, counted as there."""
    return [found.channel for found in draft.inspection.findings.outlier_channels]


def gates_for(draft: Prepared, rank: int) -> dict[str, Tensor]:
    """The gates of a plan, of any rank; 0 for none."""
    if not rank:
        return {}
    student = graft(draft.source.decoder, draft.plan)
    return gates_of(student, draft.texts.scaling, outliers_of(draft), rank)


def tie_channels(student: Decoder) -> None:
    """Let a gate learn one number for all channels: they begin equal and get the same gradient."""
    for name, parameter in student.model.named_parameters():
        if name.endswith("gate_out"):
            parameter.requires_grad_(True)
            parameter.register_hook(lambda slope: slope.mean(-1, keepdim=True).expand_as(slope))


def penalised(teacher: Subject, student: Subject, weight: float) -> Loss:
    """KL from the teacher, and `weight` times the mean log of peak to root mean square.

    That is of what Linears read of a token: queries, keys and values alike, the output, gate and
    up, and down.
    """

    def loss(tokens: Tensor) -> Tensor:
        with _watching_peaks(student.decoder) as peaks:
            found = gap(teacher, student, tokens)
        return found + weight * torch.stack(peaks).mean()

    return loss


@contextmanager
def _watching_peaks(decoder: Decoder) -> Iterator[list[Tensor]]:
    """log(max |x| / rms), its mean over tokens, of all that Linears read meanwhile: with gradients.

    Linears that read the same one after another count once.
    """
    peaks: list[Tensor] = []
    last: list[Tensor] = []

    def see(_: Any, args: tuple[Tensor, ...]) -> None:
        if last and last[0] is args[0]:
            return
        last[:] = [args[0]]
        values = args[0].float()
        size = values.square().mean(-1).clamp_min(1e-12)
        peaks.append((values.abs().amax(-1).clamp_min(1e-6).log() - size.log() / 2).mean())

    handles = [linear.register_forward_pre_hook(see) for linear in decoder.linears.values()]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def apart(student: Decoder, plan: Plan, channels: Sequence[int]) -> Iterator[None]:
    """Let channels of what norms feed to Linears take a way of their own for a while.

    So whoever rounds the Linears and what they read leaves these channels in float, and their
    weights too. The function is the same.
    """
    order = plan.orders.get(STREAM)
    places = [*channels] if order is None else [order.tolist().index(one) for one in channels]
    names = [reader for _, readers in student.family.feeds for reader in readers]
    sites = [site for name in names for site in student.sites(name)]
    kept = [site.weight.detach()[:, places].clone() for site in sites]
    handles = []
    for site, columns in zip(sites, kept, strict=True):
        site.weight.data[:, places] = 0
        before, after = _around(places, columns)
        handles.append(site.module.register_forward_pre_hook(before))
        handles.append(site.module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for site, columns in zip(sites, kept, strict=True):
            site.weight.data[:, places] = columns


def _around(places: list[int], columns: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What takes channels from the input of a Linear, and what adds their part to its output."""
    taken: list[Tensor] = []

    def before(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken[:] = [args[0][..., places]]
        others = args[0].clone()
        others[..., places] = 0
        return (others, *args[1:])

    def after(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + taken.pop() @ columns.to(out).T

    return before, after
