"""What is converted to compare: how each conversion is planned, trained and measured."""

from dataclasses import dataclass
from typing import Any

from absorb.fold.gates import RANK
from absorb.quantize.training import FORMAT_FOR
from absorb.schema.settings import FormatName, Purpose, Sink, Train

TRAINING_ROWS = 1024
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
    apart: bool = False  # outlier channels stay in float where norms feed Linears
    formats: tuple[FormatName, ...] = USUAL
    asked: tuple[FormatName, ...] | None = None  # formats to ask tasks in, besides float


FOUR_BITS: tuple[FormatName, ...] = ("w4a4-hadamard", "nvfp4", "mxfp4")
# What each part of the search for a format brings, and more of the fine-tune.
_UNTRAINED: dict[str, dict[str, Any]] = {
    "": {},
    ", no orders": {"orders": False},
    ", scales for INT8": {"scales": "int8"},
}
_TRAINED: dict[str, dict[str, Any]] = {
    **_UNTRAINED,
    ", rate 2e-4": {"rate": 2e-4},
    ", rate 4e-4": {"rate": 4e-4},
}
_PURPOSES: tuple[Purpose, ...] = ("nvfp4", "mxfp4", "w4a4")
_GATES: dict[str, dict[str, Any]] = {
    "no gates": {},
    "scalar gates": {"gates": 2, "scalar": True},  # two ranks make a linear one
    "gates of rank 16": {"gates": RANK},
}
CHOICES: dict[str, Choice] = {
    "untrained": Choice(formats=(*USUAL, *FOUR_BITS)),
    "12 steps of sinks": Choice(steps=12, train="sinks"),
    "100 steps of sinks": Choice(steps=100, train="sinks"),
    "100 steps of sinks and scales": Choice(steps=100, train="scales"),
    "100 steps of all": Choice(steps=100),
    "100 steps of all, rate 2e-4": Choice(steps=100, rate=2e-4),
    "100 steps of all, rate 2e-5": Choice(steps=100, rate=2e-5),
    "100 steps of all, rate 1e-5": Choice(steps=100, rate=1e-5),
    "100 steps of all, on 16 rows": Choice(steps=100, rows=16),
    "400 steps of all": Choice(steps=400, formats=(*USUAL, *FOUR_BITS)),
    "100 steps of all, for INT8": Choice(steps=100, purpose="int8"),
    "400 steps of all, for INT8": Choice(steps=400, purpose="int8"),
    "100 steps of all, given text, for INT8": Choice(steps=100, purpose="int8", given=0),
    "untrained, given text": Choice(given=0, formats=(*USUAL, *FOUR_BITS)),
    "100 steps of all, given text": Choice(steps=100, given=0),
    **{
        f"100 steps of all, given text, for INT8, rate {rate}": Choice(
            steps=100, given=0, purpose="int8", rate=float(rate)
        )
        for rate in ("2e-5", "1e-4", "2e-4")
    },
    "400 steps of all, given text, for INT8": Choice(steps=400, given=0, purpose="int8"),
    **{
        f"{name}, given text, for {purpose.upper()}{arm}": Choice(
            steps=steps, given=0, purpose=purpose, formats=(FORMAT_FOR[purpose],), **changes
        )
        for purpose in _PURPOSES
        for name, steps, arms in (
            ("untrained", 0, _UNTRAINED),
            ("100 steps of all", 100, _TRAINED),
            ("400 steps of all", 400, _TRAINED),
        )
        for arm, changes in arms.items()
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
            steps=100,
            given=0,
            penalty=penalty,
            formats=("w8a8-static", *FOUR_BITS),
            asked=("w8a8-static", "nvfp4"),
            **changes,
        )
        for more, penalty in (("", 0.0), (", peaks penalised", 1e-2))
        for name, changes in _GATES.items()
    },
    # The most that gates can win.
    "100 steps of all, given text, outliers in float": Choice(
        steps=100, given=0, apart=True, formats=("w8a8-static", *FOUR_BITS)
    ),
}
