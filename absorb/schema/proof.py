"""What was shown of an entry that was derived for one model."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One claim about an entry, and how far something moved: relative to the largest number."""

    claim: str
    moved: float
    bound: float  # that it may not reach; or must exceed, where the claim is that it shows
    shows: bool = False

    @property
    def holds(self) -> bool:
        return self.moved > self.bound if self.shows else self.moved < self.bound

    def __str__(self) -> str:
        side = "more" if self.shows else "less"
        return f"{self.claim}: {self.moved:.1e} ({side} than {self.bound:.0e} is asked for)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """An entry as it would stand in FAMILIES, what it passed, and which links were not proved."""

    entry: str
    learned_positions: bool
    checks: tuple[Check, ...]
    left_out: tuple[str, ...]


def sentence(proof: Proof) -> str:
    """What was found and shown, for who reads along."""
    left = "".join(f"; left out {link}" for link in proof.left_out)
    return (
        f"this architecture has no entry: one was derived and proved by {len(proof.checks)} tests "
        f"of tiny random models{left}\n{proof.entry}"
    )
