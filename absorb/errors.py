"""The errors that absorb shows to its users."""


class AbsorbError(ValueError):
    """One sentence for people: what was refused, which one it was, and what to do."""
