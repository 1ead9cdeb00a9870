r"""What each choice of a conversion costs and brings, all measured on one text: ratios and JSON.

python -m scripts.trials.ablate --text wikitext2_test.txt --json ablation.json \
    --calibration c4.jsonl --calibration prose.txt

A row that is in the JSON already is not run again, so an interrupted run goes on where it was.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch

from absorb.fold.gates import RANK
from absorb.fold.graft import graft
from absorb.load.opening.tokenizer import lead_of
from absorb.load.source import load
from absorb.measure.score import evaluate, perplexity
from absorb.models.decoder import Decoder
from absorb.pipelines.convert import fine_tuned
from absorb.pipelines.prepare import Prepared, completed, prepare
from absorb.runtime.precision import as_stored
from absorb.runtime.reading import Subject
from absorb.schema.scores import Score
from absorb.schema.settings import (
    Calibration,
    Distillation,
    FormatName,
    Job,
    ModelRef,
    Purpose,
    Sink,
    Thresholds,
    Train,
)
from absorb.show.tables import Row, table
from absorb.tune.distill import train
from absorb.tune.recipe import recipe
from scripts import bench
from scripts.bench import SEEN, windows
from scripts.trials.gates import apart, gates_for, outliers_of, penalised, tie_channels

TRAINING_ROWS = 1024
_AS_A_GPU = torch.device("cuda")  # text is gathered for the longest fine-tune, wherever it runs
USUAL: tuple[FormatName, ...] = ("w8a8-static", "w8a8-clipped", "w8a8-token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A conversion: how it is planned, and how it is trained."""

    steps: int = 0
    train: Train = "all"
    purpose: Purpose = "none"
    scales: Purpose | None = None  # what these and orders are made for, where it is not `purpose`
    orders: bool = True  # where the purpose brings any
    rate: float | None = None  # of weights, in place of what the purpose has
    sink: Sink = "auto"
    seed: int = 0
    given: int | None = None  # which of the texts, in place of the model's own samples
    rows: int = TRAINING_ROWS  # of text to train on
    gates: int = 0  # their rank
    scalar: bool = False  # they are one number for all channels
    penalty: float = 0.0  # on peaks in what Linears read
    by_layers: int = 0  # steps of each, before all are trained at once
    layer_rate: float = 2e-4
    tf32: bool = False
    apart: bool = False  # outlier channels stay in float where norms feed Linears
    formats: tuple[FormatName, ...] = USUAL


FOUR_BITS: tuple[FormatName, ...] = ("w4a4-hadamard", "nvfp4", "mxfp4")
# What each part of the search for a format brings.
_ARMS: dict[str, dict[str, Any]] = {
    "": {},
    ", no orders": {"orders": False},
    ", scales for INT8": {"scales": "int8"},
}
_GATES: dict[str, dict[str, Any]] = {
    "no gates": {},
    "scalar gates": {"gates": 2, "scalar": True},  # two ranks make a linear one
    "gates of rank 16": {"gates": RANK},
}
CHOICES = {
    "untrained": Choice(formats=(*USUAL, *FOUR_BITS)),
    "12 steps of sinks": Choice(steps=12, train="sinks"),
    "100 steps of sinks": Choice(steps=100, train="sinks"),
    "100 steps of sinks and scales": Choice(steps=100, train="scales"),
    "100 steps of all": Choice(steps=100),
    "100 steps of all, rate 2e-4": Choice(steps=100, rate=2e-4),
    "100 steps of all, on 16 rows": Choice(steps=100, rows=16),
    "400 steps of all": Choice(steps=400, formats=(*USUAL, *FOUR_BITS)),
    "1600 steps of all": Choice(steps=1600),
    "100 steps of all, for INT8": Choice(steps=100, purpose="int8"),
    "400 steps of all, for INT8": Choice(steps=400, purpose="int8"),
    "100 steps of all, given text, for INT8": Choice(steps=100, purpose="int8", given=0),
    "100 steps of all, for NVFP4": Choice(steps=100, purpose="nvfp4", formats=("nvfp4",)),
    "100 steps of all, for NVFP4, rate 3e-4": Choice(
        steps=100, purpose="nvfp4", rate=3e-4, formats=("nvfp4",)
    ),
    "100 steps of all, for W4A4": Choice(steps=100, purpose="w4a4", formats=("w4a4-hadamard",)),
    "100 steps of all, for W4A4, rate 3e-4": Choice(
        steps=100, purpose="w4a4", rate=3e-4, formats=("w4a4-hadamard",)
    ),
    "100 steps of all, for MXFP4": Choice(steps=100, purpose="mxfp4", formats=("mxfp4",)),
    "untrained, given text": Choice(given=0, formats=(*USUAL, *FOUR_BITS)),
    "100 steps of all, given text": Choice(steps=100, given=0),
    **{
        f"{name}, given text, for {purpose.upper()}{arm}": Choice(
            steps=steps, given=0, purpose=purpose, formats=(form,), **changes
        )
        for purpose, form in (("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("w4a4", "w4a4-hadamard"))
        for name, steps in (("untrained", 0), ("100 steps of all", 100))
        for arm, changes in _ARMS.items()
    },
    "untrained, given a second text": Choice(given=1),
    "untrained, seed 1": Choice(seed=1),
    "untrained, seed 2": Choice(seed=2),
    "untrained, logits": Choice(sink="logit"),
    "untrained, logits, given text": Choice(sink="logit", given=0),
    "100 steps of all, logits": Choice(sink="logit", steps=100),
    "100 steps of all, logits, given text, for INT8": Choice(
        sink="logit", steps=100, purpose="int8", given=0
    ),
    "untrained, keys": Choice(sink="key"),
    **{
        f"100 steps of all, given text, {name}{more}": Choice(
            steps=100, given=0, penalty=penalty, formats=("w8a8-static", *FOUR_BITS), **changes
        )
        for more, penalty in (("", 0.0), (", peaks penalised", 1e-2))
        for name, changes in _GATES.items()
    },
    **{
        f"X {text} {purpose} {form} L{layers} r{lr} E{end}{' tf32' if tf32 else ''}": Choice(
            steps=end, given=given, purpose=purpose, formats=("w8a8-static", "w8a8-clipped", *( [form] if form else [])), by_layers=layers, layer_rate=lr, tf32=tf32
        )
        for text, given in (("own", None), ("c4", 0))
        for purpose, form in (("none", ""), ("int8", ""), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("w4a4", "w4a4-hadamard"))
        for layers in (0, 32, 64, 192)
        for lr in ((2e-4, 5e-4) if layers else (2e-4,))
        for end in (0, 50, 100, 300)
        for tf32 in (False, True)
    },
    # The most that gates can win.
    "100 steps of all, given text, outliers in float": Choice(
        steps=100, given=0, apart=True, formats=("w8a8-static", *FOUR_BITS)
    ),
}


class Bench:
    """Converts a model as it is told to, and measures what comes out on one text."""

    def __init__(
        self, model: str, text: Path, given: tuple[Path, ...], count: int, device: str
    ) -> None:
        self.model, self.given, self.device = model, given, device
        source = load(ModelRef(name=model))
        self.rows, self.seen = windows(source, text, count), windows(source, given[0], SEEN)
        self.originals: dict[tuple[int, ...], Score] = {}

    @cache  # noqa: B019 - one bench a run
    def draft(self, sink: Sink, seed: int, given: int | None, trains: bool) -> Prepared:
        text = None if given is None else self.given[given]
        job = Job(
            model=ModelRef(name=self.model),
            out=Path(),
            sink=sink,
            calibration=Calibration(seed=seed, text=text),
            device=self.device,
        )
        fine_tune = recipe(Distillation(steps=None if trains else 0), _AS_A_GPU)
        return prepare(job, lambda sentence: click.echo(sentence, err=True), fine_tune)

    @cache  # noqa: B019 - one bench a run
    def searched(
        self, sink: Sink, seed: int, given: int | None, trains: bool, scales: Purpose
    ) -> Prepared:
        return completed(self.draft(sink, seed, given, trains), scales)

    def planned(self, choice: Choice) -> Prepared:
        """A conversion before its fine-tune."""
        scales = choice.scales or choice.purpose
        found = (choice.sink, choice.seed, choice.given, bool(choice.steps or choice.by_layers), scales)
        draft = self.searched(*found)
        plan = replace(draft.plan, gates=gates_for(draft, choice.gates))
        return replace(draft, plan=plan if choice.orders else replace(plan, orders={}))

    def measured(self, choice: Choice) -> dict[str, Any]:
        """Figures of the original and of the converted model, and what the fine-tune took."""
        draft = self.planned(choice)
        student = graft(draft.source.decoder, draft.plan)
        start = time.perf_counter()
        kept = trained(draft, student, choice)
        seconds = time.perf_counter() - start
        as_stored(student, draft.source.dtype)
        with apart(student, draft.plan, outliers_of(draft)) if choice.apart else nullcontext():
            converted = self.score(draft, Subject(decoder=student), choice.formats)
        again = Subject(decoder=student, lead=lead_of(draft.source.tokenizer))
        original = self.original(draft)
        ratios = {
            "perplexity": converted.perplexity,
            "perplexity after a BOS": perplexity(again, self.rows, "after a BOS"),
            **converted.quantized,
        }
        return {
            "seconds": seconds,
            "kept": kept,
            "prefix": draft.plan.prefix,
            "ratios": {name: value / original.perplexity for name, value in ratios.items()},
            "original": asdict(original),
            "converted": asdict(converted),
        }

    def original(self, draft: Prepared) -> Score:
        """The untouched model, in every format that any row is measured in."""
        prefix = draft.plan.prefix
        if prefix not in self.originals:
            subject = Subject(decoder=draft.source.decoder, lead=lead_of(draft.source.tokenizer))
            self.originals[prefix] = self.score(draft, subject, ("w8a8-static",))
        return self.originals[prefix]

    def score(self, draft: Prepared, subject: Subject, formats: tuple[FormatName, ...]) -> Score:
        teacher = Subject(decoder=draft.source.decoder, lead=torch.tensor(draft.plan.prefix))
        return evaluate([subject], teacher, self.rows, self.seen, Thresholds(), formats)[0]


def trained(draft: Prepared, student: Decoder, choice: Choice) -> int:
    """Fine-tune the student in place: the step that was kept."""
    wish = Distillation(steps=choice.steps, train=choice.train, purpose=choice.purpose)
    fine_tune = recipe(wish, student.device)
    if choice.by_layers:
        fine_tune = replace(fine_tune, by_layers=True, steps=choice.by_layers, end_steps=choice.steps, rate=choice.layer_rate)
    if choice.rate is not None:
        fine_tune = replace(fine_tune, rate=choice.rate)
    texts = replace(draft.texts, training=draft.texts.training[: choice.rows])
    if choice.scalar:
        tie_channels(student)
    if choice.penalty:
        prefix = torch.tensor(draft.plan.prefix)
        teacher = Subject(decoder=draft.source.decoder, lead=prefix)
        loss = penalised(teacher, Subject(decoder=student), choice.penalty)
        return train(student.model, loss, texts, fine_tune, choice.seed).kept
    if choice.tf32:
        from absorb.runtime import precision
        import absorb.tune.distill as d
        torch.backends.cuda.matmul.allow_tf32 = True
        off = lambda device: torch.autocast(device.type, torch.bfloat16, enabled=False)
        was = d.autocast_bf16
        d.autocast_bf16 = off
    import tempfile
    with tempfile.TemporaryDirectory() as place:
        losses = fine_tuned(student, replace(draft, texts=texts), fine_tune, choice.seed, Path(place))
    print("LOSSES", losses.held_out, [tuple(round(x, 5) for x in l) for l in losses.layers], file=sys.stderr)
    if choice.tf32:
        torch.backends.cuda.matmul.allow_tf32 = False
        d.autocast_bf16 = was
    return losses.kept


def line(name: str, run: Any) -> Row:
    ratios, converted = run["ratios"], run["converted"]
    columns = ("perplexity", *USUAL, "nvfp4", "mxfp4", "w4a4-hadamard")
    return (
        name,
        f"{run['seconds']:.0f}",
        f"{converted['divergence']:.4f}",
        f"{converted['stream_ratio']:.0f}",
        *(f"{ratios[column]:.4f}" if column in ratios else "" for column in columns),
    )


@click.command()
@click.option("--model", default="demo", show_default=True)
@bench.texts(32, several=True)
@bench.device
@click.option("--row", "names", type=click.Choice(list(CHOICES)), multiple=True, help="Only these.")
@bench.kept_figures
def main(
    model: str,
    text: Path,
    count: int,
    calibration: tuple[Path, ...],
    device: str,
    names: tuple[str, ...],
    out: Path,
) -> None:
    """Convert MODEL once for every row, and compare what comes out on the same text."""
    done = bench.read(out)
    known = [name for name, choice in CHOICES.items() if (choice.given or 0) < len(calibration)]
    if unknown := set(names).difference(known):
        raise click.UsageError(f"the row {min(unknown)!r} needs one more --calibration")
    wanted = [name for name in names or known if name not in done]
    made = Bench(model, text, calibration, count, device) if wanted else None
    for name in wanted:
        click.echo(f"=== {name}", err=True)
        assert made is not None
        done[name] = made.measured(CHOICES[name])
        bench.write(out, done)
        print(table([line(name, done[name])]), file=sys.stderr)
    head = (
        "",
        "seconds",
        "KL",
        "|x| / median",
        "perplexity x",
        *USUAL,
        "nvfp4",
        "mxfp4",
        "w4a4, rotated",
    )
    print(table([head, *(line(name, run) for name, run in done.items())]))


if __name__ == "__main__":
    main()
