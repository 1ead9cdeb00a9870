"""Text as models are compared on it: windows of the length that `absorb eval` has by default."""

from functools import partial

from absorb.compare import LENGTH
from absorb.windows import windows as cut

windows = partial(cut, length=LENGTH)
