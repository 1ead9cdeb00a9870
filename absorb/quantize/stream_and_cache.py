"""What a model keeps between computations, its residual stream and its cache, on a grid."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from absorb.models.decoder import Decoder
from absorb.quantize.grids import Grid, rounded
from absorb.runtime.reading import new_cache


@contextmanager
def rounding_stream_and_cache(
    decoder: Decoder, stream: Grid | None, cache: Grid | None
) -> Iterator[None]:
    """What every decoder layer gives is rounded for a while, and what its attention caches.

    A row of the stream is a token, a row of the cache the key or value of a token in one head. The
    keys and values of the text being read are rounded before they are used, as later text would
    find them. None leaves things as they are.
    """
    with ExitStack() as stack:
        if stream is not None:
            for layer in decoder.layers:
                stack.callback(layer.register_forward_hook(_rounding(stream)).remove)
        if cache is not None:
            module: nn.Module = decoder.model
            hook = module.register_forward_pre_hook(_with_cache(cache), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _rounding(grid: Grid) -> Any:
    """A hook on a decoder layer, whose stream comes alone or first in a tuple."""

    def after(_: object, __: object, out: Any) -> Any:
        if torch.is_tensor(out):
            return rounded(out, grid)
        return (rounded(out[0], grid), *out[1:])

    return after


def _with_cache(grid: Grid) -> Any:
    """A hook that gives a model an empty cache whose keys and values are on a grid."""

    def before(model: Any, args: Any, options: dict[str, Any]) -> Any:
        cache, remember = new_cache(model)
        _round_updates(cache, grid)
        return args, {**options, **remember}

    return before


def _round_updates(cache: Any, grid: Grid) -> None:
    update = cache.update

    def rounding(keys: Tensor, values: Tensor, *where: Any, **more: Any) -> Any:
        return update(rounded(keys, grid), rounded(values, grid), *where, **more)

    cache.update = rounding
