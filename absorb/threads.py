"""The threads that torch computes on. To be imported, and told, before torch is."""

import os

# Some 50 microseconds: as long as between two operations, and as it takes to wake a thread.
_SPINS = "2000"


def share_cores() -> None:
    """Let a thread that waits for the others sleep soon, unless the user has said what it is to do.

    libgomp lets it spin for milliseconds, and so keep the core from those that it waits for: with
    one more process on two cores everything took five times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
