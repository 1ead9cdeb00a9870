r"""What each choice of a conversion costs and brings, all measured on one text: ratios and JSON.

python -m scripts.trials.ablate --text wikitext2_test.txt --json ablation.json \
    --calibration c4.jsonl --calibration prose.txt

A row that is in the JSON already is not run again, so an interrupted run goes on where it was.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch

from absorb.fold.graft import graft
from absorb.load.opening.tokenizer import lead_of
from absorb.load.source import load
from absorb.measure.score import evaluate, perplexity
from absorb.measure.tasks import tasks_of
from absorb.models.decoder import Decoder
from absorb.pipelines.compare import asked, metrics_of
from absorb.pipelines.convert import fine_tuned
from absorb.pipelines.prepare import Prepared, completed, prepare
from absorb.runtime.precision import as_stored
from absorb.runtime.reading import Subject
from absorb.schema.scores import Score, TaskResults
from absorb.schema.settings import (
    Calibration,
    Distillation,
    FormatName,
    Job,
    ModelRef,
    Purpose,
    Sink,
    Thresholds,
)
from absorb.show.tables import Row, table
from absorb.tune.distill import train
from absorb.tune.recipe import recipe
from scripts import bench
from scripts.bench import SEEN, windows
from scripts.trials.choices import CHOICES, FOUR_BITS, USUAL, Choice
from scripts.trials.gates import apart, gates_for, outliers_of, penalised, tie_channels

_QUESTIONS = 1000  # of each task
_AS_A_GPU = torch.device("cuda")  # text is gathered for the longest fine-tune, wherever it runs


class Bench:
    """Converts a model as it is told to, and measures what comes out on one text."""

    def __init__(
        self,
        model: str,
        text: Path,
        given: tuple[Path, ...],
        count: int,
        device: str,
        tasks: tuple[str, ...],
    ) -> None:
        self.model, self.given, self.device, self.tasks = model, given, device, tasks_of(tasks)
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
        found = (choice.sink, choice.seed, choice.given, bool(choice.steps), scales)
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
        tasks = self.asked(draft, Subject(decoder=student), choice)
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
            "tasks": tasks,
        }

    def original(self, draft: Prepared) -> Score:
        """The untouched model, in every format that any row is measured in."""
        prefix = draft.plan.prefix
        if prefix not in self.originals:
            subject = Subject(decoder=draft.source.decoder, lead=lead_of(draft.source.tokenizer))
            self.originals[prefix] = self.score(draft, subject, (*USUAL, *FOUR_BITS))
        return self.originals[prefix]

    def score(self, draft: Prepared, subject: Subject, formats: tuple[FormatName, ...]) -> Score:
        teacher = Subject(decoder=draft.source.decoder, lead=torch.tensor(draft.plan.prefix))
        return evaluate([subject], teacher, self.rows, self.seen, Thresholds(), formats)[0]

    def asked(self, draft: Prepared, subject: Subject, choice: Choice) -> TaskResults:
        """Accuracy in each task, in float and in the formats that the choice names."""
        if choice.asked is None:
            return {}
        given = (draft.source.tokenizer, choice.asked, self.seen, self.tasks, _QUESTIONS)
        return metrics_of(asked(subject, *given))


def trained(draft: Prepared, student: Decoder, choice: Choice) -> int:
    """Fine-tune the student in place: the step that was kept."""
    wish = Distillation(steps=choice.steps, train=choice.train, purpose=choice.purpose)
    fine_tune = recipe(wish, student.device)
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
    return fine_tuned(student, replace(draft, texts=texts), fine_tune, choice.seed, Path()).kept


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
@click.option("--tasks", default="", help="Also ask these, as `absorb eval` does: comma-separated.")
@bench.kept_figures
def main(
    model: str,
    text: Path,
    count: int,
    calibration: tuple[Path, ...],
    device: str,
    names: tuple[str, ...],
    tasks: str,
    out: Path,
) -> None:
    """Convert MODEL once for every row, and compare what comes out on the same text."""
    done = bench.read(out)
    known = [name for name, choice in CHOICES.items() if (choice.given or 0) < len(calibration)]
    if unknown := set(names).difference(known):
        raise click.UsageError(f"the row {min(unknown)!r} needs one more --calibration")
    questions = tuple(filter(None, tasks.split(",")))
    wanted = [name for name in names or known if name not in done]
    made = Bench(model, text, calibration, count, device, questions) if wanted else None
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
