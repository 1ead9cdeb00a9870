"""Exports, and models that were only rescaled: plain data, for absorb.json and card."""

from dataclasses import dataclass

from absorb.schema.report import Probe
from absorb.schema.settings import Job, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An export, complete."""

    target: Target
    architecture: str
    family: str  # of the original
    model: str  # the original, as the report of the conversion names it
    commit: str | None
    license: str | None
    dtype: str  # of matrices
    mlx: bool = False  # whether code for MLX lies beside it
    fingerprint: str  # the SHA-256 of the absorb.json of the conversion
    fitted_layers: tuple[int, ...]  # that had keys
    apart: float  # by what factor a norm's scale was at most off the stream's
    stream: float  # the largest factor that the stream is written larger by
    divergence: float  # from the converted model, in nats per token
    text_origin: str
    versions: dict[str, str]
    files: dict[str, str]  # the SHA-256 of every other file of the export
    probe: Probe

    @property
    def lost(self) -> tuple[str, ...]:
        """What the architecture could not hold: a sentence each, none where all is exact."""
        lost = []
        if self.fitted_layers:
            layers = ", ".join(map(str, self.fitted_layers))
            lost.append(
                f"the keys of the prefix in layers {layers} became logits, as {self.architecture} "
                "has no place for keys"
            )
        if self.apart != 1:
            lost.append(
                f"the scales of norms, which a fine-tune had moved by up to {self.apart - 1:.2%}, "
                "are in the weights of the norms and not in their denominators"
            )
        return tuple(lost)


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
