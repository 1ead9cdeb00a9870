"""What a fine-tune is to do, and what became of it."""

from dataclasses import dataclass, replace

from absorb.schema.settings import Purpose, Train

LENGTH = 256  # tokens of a row of text, wherever nobody says otherwise
# Of weights, which have a longer way to go where four bits are left of them.
WEIGHT_RATES: dict[Purpose, float] = {
    "none": 5e-5,
    "int8": 5e-5,
    "w4a4": 1e-4,
    "nvfp4": 1e-4,
    "mxfp4": 1e-4,
}
_TRAINING_ROWS: dict[Train, int] = {"sinks": 32, "scales": 32, "all": 1024}
_LEAST_TRAINING_ROWS = 32  # for the smoothing scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the fine-tune will do, in a number of steps or until so many minutes are over."""

    steps: int | None
    minutes: float | None = None
    train: Train
    rows: int  # of text in a step
    purpose: Purpose = "none"
    rate: float = WEIGHT_RATES["none"]  # at which weights learn
    by_layers: bool = False  # each layer in so many steps, one after the other
    experts: bool = True  # trained as well: not where a layer with them needs more memory
    norms: bool = False  # trained beside the scales
    # Where layers are trained one by one: steps that follow, on few parameters of all layers at
    # once. None where the memory does not allow it.
    end_steps: int | None = 0
    sharded: int = 0  # processes that have a part of every weight each, which none could hold
    tied: bool = False  # the scales of norms stay what the stream was divided by

    @property
    def trains(self) -> bool:
        return bool(self.steps or self.minutes)

    @property
    def training_rows(self) -> int:
        """How much text to sample: after a few rounds over the same text, more helps little.

        The smoothing scales need some even where nothing is trained.
        """
        enough = _TRAINING_ROWS[self.train]
        if self.steps is None:
            return enough
        return min(max(self.steps * self.rows, _LEAST_TRAINING_ROWS), enough)

    @property
    def at_the_end(self) -> "Recipe":
        """What is trained in all layers at once, after they were trained one by one."""
        few: Train = "sinks" if self.train == "sinks" else "scales"
        return replace(
            self, steps=self.end_steps, train=few, norms=few == "scales", by_layers=False
        )

    @property
    def _end(self) -> str:
        if self.end_steps is None:
            return ", and not end to end, for which there is too little memory"
        trained = "sinks and biases" if self.train == "sinks" else "sinks, biases, scales and norms"
        return f", then {self.end_steps} end to end on {trained}" if self.end_steps else ""

    def __str__(self) -> str:
        length = "" if self.steps is None else f"{self.steps} "
        limit = "" if self.minutes is None else f"{self.minutes:g} minutes of "
        rounding = "" if self.purpose == "none" else f", for {self.purpose.upper()}"
        size = f"{self.rows} x {LENGTH} tokens"
        order = f", layer by layer{self._end}" if self.by_layers and self.trains else ""
        if self.sharded:
            order = f", end to end, with weights shared out among {self.sharded} processes"
        less = "" if self.experts else " but experts"
        return f"{limit}{length}steps of {size}, training {self.train}{less}{rounding}{order}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Divergence from the teacher in nats per token: (step, value), and the step that was kept.

    Where nothing was trained, nothing was looked at.
    """

    training: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    kept: int
    # Where layers were trained one by one: the error of each one's stream on validation text, as a
    # share of its variance, before and after.
    layers: tuple[tuple[float, float], ...] = ()
    # What nudging weights left, on other text, of the squared error of each layer's matrices in the
    # format that is meant. Empty where it means nothing for that.
    nudged: tuple[float, ...] = ()
