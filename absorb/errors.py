"""The errors that absorb shows to its users."""


class AbsorbError(ValueError):
    """What was refused, which one it was, and what to do: the message is one sentence for people."""
