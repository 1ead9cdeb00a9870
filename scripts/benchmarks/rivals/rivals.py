"""What one would do about outliers instead of absorbing them, each as its paper does it.

Every rival is a function of a Bench that gives the model it makes, ready to be measured, and what
it chose on the way.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.errors import AbsorbError
from absorb.fold.decide import sinks_for
from absorb.fold.graft import graft, twin
from absorb.fold.plan import Plan
from absorb.fold.sinks.prefix_cache import prefix_of
from absorb.fold.smoothing import smooth, smoothing_scales
from absorb.load.opening.tokenizer import lead_of
from absorb.load.source import Source, load
from absorb.measure.score import quantized_losses
from absorb.models.decoder import Decoder
from absorb.quantize.formats import FORMATS
from absorb.runtime.hooks import watching
from absorb.runtime.precision import as_stored, device_of, in_bf16
from absorb.runtime.reading import Subject, led
from absorb.schema.codec import from_json
from absorb.schema.report import Report
from absorb.schema.settings import Calibration, ModelRef
from absorb.schema.training import Losses, Recipe
from absorb.ship.plan_file import read_plan
from absorb.ship.staging import REPORT
from absorb.text.gather import Texts, gather
from absorb.tune.distill import train
from scripts.bench import SEEN, windows
from scripts.benchmarks.rivals.prefixquant import prefix_tokens
from scripts.benchmarks.rivals.quarot import turn, turn_inputs

SEARCHED = 64  # windows that outlier tokens are looked for in, as many as PrefixQuant has
ALPHAS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
SHARES = [0.99, 0.999, 0.9999, 0.99999]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The original, its conversion, and the text that all have in common."""

    source: Source
    converted: Source
    plan: Plan
    report: Report  # of the conversion
    texts: Texts  # what the conversion was fitted to and trained on
    known: Tensor  # (rows, length)

    @property
    def seen(self) -> Tensor:
        """What fixed ranges are taken from, and settings chosen by: (rows, length)."""
        return self.known[:SEEN]

    @property
    def model(self) -> PreTrainedModel:
        return self.source.model

    @property
    def decoder(self) -> Decoder:
        return self.source.decoder

    @property
    def recipe(self) -> Recipe:
        """As the conversion was trained, in as many steps as it took, but all weights."""
        steps = len(self.report.losses.training)
        return replace(self.report.recipe, steps=steps, minutes=None, train="all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """A model to be measured, and what was chosen for it."""

    subject: Subject
    turned: bool = False  # all that its Linears read is rotated already
    chosen: dict[str, Any] = field(default_factory=dict)


def bench_of(original: str, folder: Path, calibration: Path, device: str) -> Bench:
    """Load both models, and gather again the text that the conversion had."""
    source = load(ModelRef(name=original))
    converted = load(ModelRef(name=str(folder)), measured=True)
    plan, _ = read_plan(folder, source)
    if source.decoder.experts:
        raise AbsorbError(f"{original} is a mixture of experts; rivals are made of dense models")
    for model in (source.model, converted.model):
        nn.Module.to(model, device_of(device))
    report = from_json(Report, (folder / REPORT).read_text())
    settings = report.inspection.job.calibration
    wish = Calibration(text=calibration if settings.text else None, seed=settings.seed)
    with in_bf16(source.decoder) as model:
        sketch = replace(source, model=model)
        texts = gather(sketch, wish, report.recipe.training_rows)
    return Bench(
        source=source,
        converted=converted,
        plan=plan,
        report=report,
        texts=texts,
        known=windows(source, calibration, SEARCHED),
    )


def untouched(bench: Bench) -> Rival:
    return Rival(subject=original(bench))


def original(bench: Bench) -> Subject:
    return Subject(decoder=bench.decoder, lead=lead_of(bench.source.tokenizer))


def fine_tuned(bench: Bench) -> Rival:
    """The original, all weights trained on the next token of the text that absorb trains on."""
    subject = replace(original(bench), decoder=copied(bench.decoder))
    losses = train_on_text(subject, bench.texts, bench.recipe)
    as_if_saved(subject.decoder, bench)
    chosen = {"steps": bench.recipe.steps, "kept": losses.kept, "loss": losses.held_out[-1][1]}
    return Rival(subject=subject, chosen=chosen)


def copied(decoder: Decoder) -> Decoder:
    return Decoder(copy.deepcopy(decoder.model), decoder.family)


def as_if_saved(decoder: Decoder, bench: Bench) -> None:
    """Round the weights to the type that the original's were stored in, and compute in float32."""
    as_stored(decoder, bench.source.dtype)
    nn.Module.to(decoder.model, torch.float32)


def train_on_text(subject: Subject, texts: Texts, recipe: Recipe) -> Losses:
    """Train the subject's model in place by the cross-entropy of its next tokens."""

    def loss(tokens: Tensor) -> Tensor:
        text = tokens.to(subject.decoder.device)
        predicted = subject.logits(text)[:, :-1].float().mT
        return nn.functional.cross_entropy(predicted, text[:, 1:])

    return train(subject.decoder.model, loss, texts, recipe, seed=0)


def smoothed(bench: Bench) -> Rival:
    """SmoothQuant (arXiv 2211.10438): behind norms, with the α that does best in W8A8."""
    links = bench.decoder.family.links
    norms = [name for name in links if bench.decoder.site(0, name).is_norm]
    rough = twin(bench.decoder)
    text = led(bench.texts.scaling, lead_of(bench.source.tokenizer))

    def with_alpha(alpha: float) -> Subject:
        student = copied(rough)
        scales = smoothing_scales(bench.decoder, text, alpha)
        smooth(student, {name: scales[name] for name in norms})
        return replace(original(bench), decoder=student)

    subject, alpha = best(bench, with_alpha, ALPHAS)
    return Rival(subject=subject, chosen={"alpha": alpha})


def with_prefix(bench: Bench) -> Rival:
    """PrefixQuant's cache (arXiv 2410.05265): the prefix's keys and values, computed in float.

    A sink in the form of a key is that cache.
    """
    tokens = prefix_tokens(bench.source, bench.known)
    prefix = prefix_of(bench.decoder, torch.tensor(tokens))
    nothing = torch.empty(0, 0, dtype=torch.long)
    cache = Plan(
        prefix=tokens,
        sinks=sinks_for(bench.decoder, prefix, (), nothing, "key", 0.0),
        removals=(),
        residual=torch.ones_like(bench.plan.residual),
        smoothing={},
    )
    student = graft(bench.decoder, cache)
    return Rival(subject=Subject(decoder=student), chosen={"prefix": tokens})


def with_prefix_and_turned(bench: Bench) -> Rival:
    """All of PrefixQuant but its training: it rotates as QuaRot does."""
    rival = with_prefix(bench)
    turn(rival.subject.decoder)
    return replace(rival, turned=True)


def turned(bench: Bench) -> Rival:
    """QuaRot (arXiv 2404.00456): random Hadamard matrices before every Linear."""
    student = turn(twin(bench.decoder))
    return Rival(subject=replace(original(bench), decoder=student), turned=True)


def clipped(bench: Bench) -> Rival:
    """The stream of every layer clipped at the share of its entries that does best in W8A8."""
    sizes: dict[int, list[Tensor]] = {}

    def see(layer: int, stream: Tensor) -> None:
        sizes.setdefault(layer, []).append(stream.abs().flatten())

    with torch.no_grad(), watching(bench.decoder.layers, see):
        for row in tqdm(bench.texts.scaling.split(1), desc="measuring the stream", unit="row"):
            text = led(row.to(bench.model.device), lead_of(bench.source.tokenizer))
            bench.model.base_model(text, use_cache=False)
    ordered = [torch.cat(seen).sort().values for seen in sizes.values()]

    def with_share(share: float) -> Subject:
        decoder = copied(bench.decoder)
        limits = [float(values[int(share * (len(values) - 1))]) for values in ordered]
        for layer, limit in zip(decoder.layers, limits, strict=True):
            layer.register_forward_hook(clipping(limit))
        return replace(original(bench), decoder=decoder)

    subject, share = best(bench, with_share, SHARES)
    return Rival(subject=subject, chosen={"share": share})


def clipping(limit: float) -> Callable[..., Any]:
    """A hook that keeps what a decoder layer gives between -limit and limit."""

    def clip(_: object, __: object, out: Any) -> Any:
        if torch.is_tensor(out):
            return out.clamp(-limit, limit)
        return (out[0].clamp(-limit, limit), *out[1:])

    return clip


def untrained(bench: Bench) -> Rival:
    """absorb right after its graft."""
    student = graft(bench.decoder, bench.plan)
    as_if_saved(student, bench)
    return Rival(subject=Subject(decoder=student))


def absorbed(bench: Bench) -> Rival:
    return Rival(subject=Subject(decoder=bench.converted.decoder))


def absorbed_and_turned(bench: Bench) -> Rival:
    # Residual scales, which no rotation of the stream passes, would multiply what rounding rotated
    # outputs leaves on other channels: the stream stays as it is.
    student = turn_inputs(copied(bench.converted.decoder))
    return Rival(subject=Subject(decoder=student), turned=True)


def best(bench: Bench, make: Callable[[float], Subject], settings: list[float]) -> Any:
    """The subject, and its setting, with the least loss in W8A8 on what all have seen."""

    def loss(subject: Subject) -> float:
        form, seen = FORMATS["w8a8-static"], bench.seen
        return float(quantized_losses(subject, form, seen, seen).mean())

    setting = min(settings, key=lambda setting: loss(make(setting)))
    return make(setting), setting


RIVALS: dict[str, Callable[[Bench], Rival]] = {
    "untouched": untouched,
    "fine-tuned on the same tokens": fine_tuned,
    "SmoothQuant": smoothed,
    "prefix in the cache": with_prefix,
    "prefix in the cache, then rotated": with_prefix_and_turned,
    "random Hadamard rotation": turned,
    "stream clipped": clipped,
    "absorb, untrained": untrained,
    "absorb": absorbed,
    "absorb, then rotated": absorbed_and_turned,
}
