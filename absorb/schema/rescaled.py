"""What became of a model that was only rescaled: plain data, the source of absorb.json and card."""

from dataclasses import dataclass

from absorb.schema.report import Probe
from absorb.schema.settings import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """The largest magnitudes of one kind of intermediate on text, and where the last one was."""

    kind: str
    before: float
    after: float
    place: str
    bound: bool  # whether it must fit float16: norms sum squares in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescaled:
    """A model of the original's own architecture whose intermediates fit float16, complete."""

    architecture: str
    family: str
    model: str  # the original
    commit: str | None
    license: str | None
    stream: float  # what the residual stream is divided by
    channels: dict[str, int]  # how many channels are divided, by what gives them
    reaches: tuple[Reach, ...]
    rounding: float  # the KL from the original in float32, in nats per token: weights are float16
    divergence: float  # the same where all is computed in float16
    text_origin: str
    versions: dict[str, str]
    job: Job
    files: dict[str, str]  # the SHA-256 of every other file
    probe: Probe
