"""What became of an export: plain data, the source of its absorb.json and its card."""

from dataclasses import dataclass

from absorb.schema.report import Probe
from absorb.schema.settings import Target


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
