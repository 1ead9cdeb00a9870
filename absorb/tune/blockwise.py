"""Block-wise distillation: layer after layer learns to give what the teacher's gives.

Student and teacher walk through the layers side by side on the same rows. A student's layer reads
what the student's layers before it give, and learns by the squared error of its stream, in the
teacher's units and by channel in multiples of the teacher's root mean square. It needs the memory
of one layer, whatever the size of the model.
"""

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from absorb.errors import AbsorbError
from absorb.fold.plan import STREAM, Plan
from absorb.measure.divergence import divergence
from absorb.models.decoder import Decoder
from absorb.models.resting.at_hand import AtHand
from absorb.models.resting.streaming import Streaming
from absorb.quantize.formats import Format
from absorb.quantize.simulate import quantized, quantized_inputs
from absorb.quantize.training import weights_on_grid
from absorb.runtime import ranks
from absorb.runtime.precision import autocast_bf16, free_memory
from absorb.runtime.reading import led
from absorb.runtime.walk import Walk
from absorb.schema.training import Losses, Recipe
from absorb.text.gather import Texts
from absorb.tune.kept import KeptLayer
from absorb.tune.optimizer import choose, optimizer_of, rate_at

_SHARE = 0.25  # of the free memory, for what one layer computes with its gradients


def distill_layers(
    teacher: Decoder,
    student: Decoder,
    plan: Plan,
    texts: Texts,
    fine_tune: Recipe,
    form: Format | None,
    scratch: Path,
) -> Losses:
    """Train the layers of a student, which are kept in the folder `scratch`.

    Layers that an earlier run has kept there are taken as they are.
    With a format the student computes as if quantised. The layers stay untrained where all of them
    together come no closer to the teacher on validation text. Raises an AbsorbError where the loss
    is not a number any more.
    """
    resting = student.streaming or AtHand(student.layers)
    prefix = torch.tensor(plan.prefix)
    ranges = {} if form is None or form.ranges is None else form.ranges(student, texts.scaling)

    def judged() -> float:
        with quantized(student, form, ranges) if form else nullcontext():
            return divergence(teacher, student, prefix, texts.validation)

    before = judged()
    with quantized_inputs(student, form, ranges) if form else nullcontext():
        trained = _Layers(teacher, student, plan, texts, fine_tune, form)
        errors = tuple(trained.errors(resting, scratch))
    after = judged()
    if after >= before:
        resting.unsettle()
    steps = fine_tune.steps or 0
    return Losses(
        training=(),
        held_out=((0, before), (steps, after)),
        kept=steps if after < before else 0,
        layers=errors,
    )


class _Layers:
    """The training of one layer after another."""

    def __init__(
        self,
        teacher: Decoder,
        student: Decoder,
        plan: Plan,
        texts: Texts,
        fine_tune: Recipe,
        form: Format | None,
    ):
        self.student, self.fine_tune, self.form = student, fine_tune, form
        self.prefix = len(plan.prefix)
        order = plan.orders.get(STREAM)
        self.order = slice(None) if order is None else order.to(student.device)
        self.scale = plan.residual.to(student.device)[self.order]
        rows = _rows_at_once(student, fine_tune, texts)
        even = len(texts.training) // ranks.count() * ranks.count()
        training = texts.training[: even or None]  # fewer than processes are read by all
        parts = [part for part in ranks.share(training).split(rows) if len(part) == rows]
        judges = texts.validation.split(rows)
        self.parts, self.group = len(parts), max(1, fine_tune.rows // ranks.count() // rows)
        lead = torch.tensor(plan.prefix)
        # As much of the stream as the layers' products keep: half the room and half the way.
        dtype = torch.bfloat16 if student.device.type == "cuda" else torch.float32
        self.inputs = Walk(student, [*parts, *judges], dtype)
        self.targets = Walk(teacher, [led(part, lead) for part in (*parts, *judges)], dtype)

    def errors(self, resting: Streaming | AtHand, scratch: Path) -> Iterator[tuple[float, float]]:
        """Train every layer: the error on validation text before and after, as shares."""
        layers = range(len(self.student.layers))
        for layer in tqdm(layers, desc="fine-tuning layer by layer", unit="layer"):
            self._pass_on(self.targets, layer)
            kept = KeptLayer(scratch / f"{layer}.safetensors")
            if not kept.is_there:
                with resting.fetched(self.student.layers[layer]):
                    errors = self._trained(layer)
                    better = errors[1] < errors[0]
                    kept.write(resting.at_hand(layer) if better else {}, errors)
            before, after = kept.errors
            if after < before:
                resting.settle(layer, kept.file)
            self._pass_on(self.inputs, layer)
            yield before, min(before, after)

    def _pass_on(self, walk: Walk, layer: int) -> None:
        with autocast_bf16(self.student.device):
            walk.pass_on(layer)

    def _trained(self, layer: int) -> tuple[float, float]:
        module: nn.Module = self.student.layers[layer]
        judges = range(self.parts, len(self.inputs.streams))
        spread = self._spread()
        with ExitStack() as stack:
            if self.form is not None:
                stack.enter_context(weights_on_grid(self.student, self.form, layer))
            before = self._error(layer, judges, spread)
            left_out = [] if self.fine_tune.experts else self.student.expert_weights(layer)
            parameters = choose(module, self.fine_tune, left_out)
            self._steps(layer, parameters, spread)
            module.requires_grad_(False)
            return before, self._error(layer, judges, spread)

    def _steps(self, layer: int, parameters: list[nn.Parameter], spread: Tensor) -> None:
        optimizer = optimizer_of(self.student.layers[layer], parameters, self.fine_tune.rate)
        steps = self.fine_tune.steps or 0
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
        order = _orders(self.parts, self.group, steps, layer)
        for group in order:
            for part in group:
                loss = self._loss(layer, part, spread) / len(group)
                (loss / ranks.count()).backward()
            ranks.add_gradients(parameters)
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            if not isfinite(norm.item()):
                raise AbsorbError(
                    f"the fine-tune of layer {layer} diverged (its loss is not a number any more); "
                    "convert with --steps 0, or with --train sinks"
                )
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def _loss(self, layer: int, part: int, spread: Tensor) -> Tensor:
        with autocast_bf16(self.student.device):
            given = self.inputs.given(layer, part) * self.scale
        return ((given - self._target(part)) / spread).square().mean()

    @torch.no_grad()
    def _error(self, layer: int, parts: range, spread: Tensor) -> float:
        errors = [self._loss(layer, part, spread) for part in parts]
        return ranks.mean(float(torch.stack(errors).mean()))

    def _spread(self) -> Tensor:
        """The root mean square of each channel of the teacher's stream: (hidden,)."""
        squares = [self._target(part).square().mean((0, 1)) for part in range(self.parts)]
        of_all = ranks.summed(torch.stack(squares).mean(0)) / ranks.count()
        return of_all.sqrt().clamp_min(1e-6)

    def _target(self, part: int) -> Tensor:
        return self.targets.waiting(part)[:, self.prefix :, self.order]


def _rows_at_once(student: Decoder, fine_tune: Recipe, texts: Texts) -> int:
    """Rows that a layer computes, with what their gradients need, in a share of the memory."""
    config = student.config
    width = 12 * config.hidden_size + 6 * getattr(config, "intermediate_size", config.hidden_size)
    row = 4 * width * texts.training.shape[1]
    room = ranks.for_each(free_memory(student.device), student.device)
    fit = max(1, int(_SHARE * room // row))
    step = fine_tune.rows // ranks.count()
    most = min(fit, step, len(texts.training) // ranks.count())
    return max((rows for rows in range(1, most + 1) if step % rows == 0), default=1)


def _orders(parts: int, group: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Which parts each step reads: every part once before any comes again."""
    draw = torch.Generator().manual_seed(seed)
    left: list[int] = []
    for _ in range(steps):
        while len(left) < group:
            left += torch.randperm(parts, generator=draw).tolist()
        now, left = left[:group], left[group:]
        yield now
