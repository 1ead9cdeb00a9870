"""Turn the outliers of a pretrained language model into explicit parameters.

The Python interface is `convert`, `inspect`, `evaluate` and `export`; they do what the commands do.
Importing absorb also lets transformers load converted models without trust_remote_code.
"""

from typing import TYPE_CHECKING, Any

from absorb.__version__ import __version__
from absorb.errors import AbsorbError
from absorb.models.registration import register_with_transformers

if TYPE_CHECKING:
    from absorb.api import convert, evaluate, export, inspect

__all__ = ["AbsorbError", "__version__", "convert", "evaluate", "export", "inspect"]

register_with_transformers()


def __getattr__(name: str) -> Any:
    """The interface, which imports torch, when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from absorb import api

    return getattr(api, name)
