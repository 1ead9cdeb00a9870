r"""A sink logit is a gate on the output of its head. Is one with weights of its own any better?

python -m scripts.trials.gated_attention --text wikitext2_test.txt --calibration c4.jsonl \
    --json gated_attention.json

With a prefix a head gives (1 - p) o + p v, and v is a bias. What is left is a gate 1 - p on o: by
a sink logit s it is sigmoid(lse - s), by weights sigmoid(w x + b), where x is what the head reads.
The weights are fitted to the teacher's p, token by token. Nothing else is trained.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from absorb.fold.decide import sinks_for
from absorb.fold.graft import graft
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.measure.divergence import divergence
from absorb.models.decoder import Decoder
from absorb.models.modeling_absorb import NEUTRAL
from absorb.pipelines.prepare import Prepared, prepare
from absorb.runtime.hooks import watching, watching_attention
from absorb.runtime.inputs import ROWS
from absorb.runtime.reading import Subject
from absorb.schema.settings import Calibration, Distillation, Job, ModelRef
from absorb.show.tables import table
from absorb.tune.recipe import recipe
from scripts import bench
from scripts.bench import windows

Gate = tuple[Tensor, Tensor]  # w (hidden, heads) and b (heads,)
_READ = 48  # rows of text that gates are fitted to
_STEPS, _RATE, _DECAY = 200, 2e-2, 1e-3


@torch.no_grad()
def taught(draft: Prepared) -> list[tuple[Tensor, Tensor]]:
    """What the heads of each layer read (tokens, hidden), and what they give the prefix (tokens,
    heads): of the teacher, on text.
    """
    decoder, prefix = draft.source.decoder, torch.tensor(draft.plan.prefix)
    teacher = Subject(decoder=decoder, lead=prefix)
    inputs: list[list[Tensor]] = [[] for _ in decoder.layers]
    given: list[list[Tensor]] = [[] for _ in decoder.layers]

    def read(layer: int, values: Tensor) -> None:
        inputs[layer].append(values[:, len(prefix) :].flatten(0, 1).float())

    def attended(layer: int, weights: Tensor) -> None:
        share = weights[:, :, len(prefix) :, : len(prefix)].sum(-1)
        given[layer].append(share.transpose(1, 2).flatten(0, 1).float())

    with (
        watching(decoder.each(decoder.family.value), read, inputs=True),
        watching_attention(decoder, attended),
    ):
        for part in draft.texts.scaling[:_READ].split(ROWS):
            decoder.model.base_model(teacher.led(part), use_cache=False)
    return [(torch.cat(x), torch.cat(p)) for x, p in zip(inputs, given, strict=True)]


@torch.enable_grad()  # type: ignore[untyped-decorator]
def fitted(inputs: Tensor, shares: Tensor) -> Gate:
    """The gates of a layer's heads with the least cross-entropy: 1 - p by sigmoid(w x + b)."""
    mean, size = inputs.mean(0), inputs.std(0).clamp_min(1e-6)
    known, wanted = (inputs - mean) / size, (1 - shares).clamp(0, 1)
    weight = inputs.new_zeros(known.shape[1], shares.shape[1]).requires_grad_()
    bias = torch.logit(wanted.mean(0), 1e-4).detach().requires_grad_()
    optimizer = torch.optim.AdamW([weight, bias], lr=_RATE, weight_decay=_DECAY)
    for _ in range(_STEPS):
        logits = known @ weight + bias
        loss = nn.functional.binary_cross_entropy_with_logits(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = weight.detach() / size[:, None]
    return weight, bias.detach() - mean @ weight


@contextmanager
def gated(student: Decoder, gates: list[Gate]) -> Iterator[None]:
    """Let gates stand in place of sink logits for a while."""
    family = student.family
    sinks = [attention.sink for attention in student.each(family.attention)]
    kept = [sink.detach().clone() for sink in sinks]
    with ExitStack() as stack:
        for layer, gate in enumerate(gates):
            value = student.site(layer, family.value).module
            output = student.site(layer, family.output).module
            note, multiply = _around(gate)
            stack.callback(value.register_forward_pre_hook(note).remove)
            stack.callback(output.register_forward_pre_hook(multiply).remove)
            sinks[layer].data.fill_(NEUTRAL["sink"])
        yield
    for sink, before in zip(sinks, kept, strict=True):
        sink.data.copy_(before)


def _around(gate: Gate) -> tuple[Callable[..., None], Callable[..., Any]]:
    weight, bias = gate
    last: list[Tensor] = []

    def note(_: Any, args: tuple[Tensor, ...]) -> None:
        last[:] = [torch.sigmoid(args[0].float() @ weight + bias)]

    def multiply(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = args[0].unflatten(-1, (len(bias), -1))
        return ((heads * last.pop()[..., None]).flatten(-2),)

    return note, multiply


@torch.no_grad()
def found(draft: Prepared, rows: Tensor) -> dict[str, float]:
    """The KL from the teacher on text (rows, length), in nats per token."""
    decoder, prefix = draft.source.decoder, torch.tensor(draft.plan.prefix)
    # A bias on keys belongs to sinks alone, so here neither has one.
    plain = Decoder(decoder.model, replace(decoder.family, key=None))
    known = prefix_of(plain, prefix)
    text = draft.texts.calibration
    sinks = sinks_for(plain, known, draft.plan.removals, text, "logit", inf)
    student = graft(decoder, replace(draft.plan, sinks=sinks))
    gates = [fitted(*both) for both in taught(draft)]
    converted = graft(decoder, draft.plan)
    found = {
        "sinks as they are converted": divergence(decoder, converted, prefix, rows),
        "sinks without key biases": divergence(decoder, student, prefix, rows),
    }
    with gated(student, gates):
        found["gates with weights"] = divergence(decoder, student, prefix, rows)
    return found


@click.command()
@click.option("--model", default="demo", show_default=True)
@bench.texts(8)
@bench.device
@bench.figures
def main(
    model: str, text: Path, count: int, calibration: Path, device: str, out: Path | None
) -> None:
    """Compare both kinds of gate in MODEL, untrained, all layers by logits."""
    job = Job(
        model=ModelRef(name=model),
        out=Path(),
        sink="logit",
        calibration=Calibration(text=calibration),
        device=device,
    )
    wish = recipe(Distillation(steps=100, train="all"), torch.device("cpu"))
    draft = prepare(job, lambda sentence: click.echo(sentence, err=True), wish)
    kl = found(draft, windows(draft.source, text, count))
    parameters = draft.source.model.config.hidden_size + 1
    bench.write(out, {"kl": kl, "numbers of a gate": parameters, "windows": count})
    print(table([("", "KL"), *((name, f"{value:.4f}") for name, value in kl.items())]))


if __name__ == "__main__":
    main()
