"""The tensors of a converted checkpoint → those of a stock architecture, layer by layer.

    sink           → sinks
    sink_key       → sinks and biases, by the fit that the plan keeps
    bias           → bias; where a projection of attention has none, zeros
    what writes the stream → as large as it was, the embedding among it
    input_scale    → gone, with that; what a fine-tune made of it moves into the weight of the norm

The last is exact only where a norm's scales are still those of the stream: the denominator of the
norm is then what it was.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from absorb.errors import AbsorbError
from absorb.fold.sinks.forms import LogitSink
from absorb.load.files import reading
from absorb.models.family import Family
from absorb.ship.export.targets import Route, head_dim_of
from absorb.ship.weights import Shards, name_shards

_SHARD = 2 * 10**9  # bytes; so much of the model is in memory at once
_SCALES = ("input_scale", "output_scale")
_KEYS = ("sink_key", "sink_value")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
Layer = dict[str, Tensor]  # by the names inside a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A converted checkpoint, and how it is to be told.

    stream (hidden,) is what the residual stream was divided by. fits has the logits for each layer
    that has keys.
    """

    config: PretrainedConfig
    family: Family
    route: Route
    stream: Tensor
    fits: Mapping[int, LogitSink]

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key and value heads, and the width of one."""
        config = self.config
        return config.num_attention_heads, config.num_key_value_heads, head_dim_of(config)


class Tensors(Mapping[str, Tensor]):
    """The tensors in safetensors files, by name. Each is read when it is asked for."""

    def __init__(self, files: list[Path], stack: ExitStack) -> None:
        self.places: dict[str, Any] = {}
        for file in files:
            with reading(file.name):
                content = stack.enter_context(safe_open(file, "pt"))
                self.places |= dict.fromkeys(content.keys(), content)

    def __getitem__(self, name: str) -> Tensor:
        # A copy, as what is read is a view of the file, and whoever writes there would change it.
        tensor: Tensor = self.places[name].get_tensor(name).clone()
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.places[name].get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def furthest_apart(tensors: Tensors, stream: Tensor) -> float:
    """By what factor the scale of a norm is at most off the stream's: 1 where all is exact."""
    scales = [tensors[name] for name in tensors if name.endswith(".input_scale")]
    return max((scale.double() / stream).log().abs().max().exp().item() for scale in scales)


def exported(tensors: Tensors, conversion: Conversion) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the exported model under its name there."""
    stem = f"{conversion.family.layers}."
    groups: dict[str, list[str]] = {}
    for name in tensors:
        inside = name.startswith(stem)
        number = name.removeprefix(stem).partition(".")[0] if inside else ""
        groups.setdefault(f"{stem}{number}." if inside else "", []).append(name)
    for group in sorted(groups, key=lambda group: (len(group), group)):
        layer = {name.removeprefix(group): tensors[name] for name in groups[group]}
        with reading(f"{group}*"):
            for step in _LAYER if group else _OUTSIDE:
                layer = step(layer, conversion, group)
        for name, tensor in layer.items():
            yield group + name, _finite(group + name, tensor)


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise AbsorbError(
            f"{name} overflows {str(tensor.dtype).removeprefix('torch.')} where the stream is as "
            "large as the original's; convert the model in bfloat16 or float32, then export that"
        )
    return tensor.contiguous()


def _times(tensor: Tensor, factor: Tensor) -> Tensor:
    """The product in the type of the tensor: exact for powers of two."""
    return (tensor.double() * factor).to(tensor.dtype)


def _split(layer: Layer, conversion: Conversion, group: str) -> Layer:
    """Fused projections as their parts."""
    heads, kv_heads, dim = conversion.heads
    rows = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
    parted = dict(layer)
    for fused, parts in conversion.route.fused:
        stem = fused.rpartition(".")[0]
        for last in ("weight", "bias"):
            if (whole := parted.pop(f"{fused}.{last}", None)) is not None:
                sizes = [rows.get(part, conversion.config.intermediate_size) for part in parts]
                pieces = zip(parts, whole.split(sizes), strict=True)
                parted |= {f"{stem}.{part}.{last}": piece for part, piece in pieces}
    return parted


def _with_biases(layer: Layer, conversion: Conversion, group: str) -> Layer:
    """A bias at every projection of attention, as the target has all of them or none."""
    stem = f"{conversion.family.attention}."
    missing = [name for name in _PROJECTIONS if f"{stem}{name}.bias" not in layer]
    weights = {name: layer[f"{stem}{name}.weight"] for name in missing}
    return layer | {f"{stem}{n}.bias": w.new_zeros(len(w)) for n, w in weights.items()}


def _fitted(layer: Layer, conversion: Conversion, group: str) -> Layer:
    """Logits in place of keys, with the biases that go with them: as `place_logits` writes them."""
    stem = f"{conversion.family.attention}."
    if f"{stem}sink_key" not in layer:
        return layer
    fit = conversion.fits[int(group.split(".")[-2])]
    heads, kv_heads, _ = conversion.heads
    value = fit.value.double()
    read = value.repeat_interleave(heads // kv_heads, 0).flatten()
    more = {
        "v_proj.bias": -value.flatten(),
        "o_proj.bias": layer[f"{stem}o_proj.weight"].double() @ read,
    }
    if conversion.family.key is not None:
        more["k_proj.bias"] = fit.key_bias.double().flatten()
    new = {n: (layer[stem + n].double() + by).to(layer[stem + n]) for n, by in more.items()}
    kept = {name: t for name, t in layer.items() if name.removeprefix(stem) not in _KEYS}
    return kept | {f"{stem}{n}": t for n, t in new.items()} | {f"{stem}sink": fit.logits}


def _unscaled(layer: Layer, conversion: Conversion, group: str) -> Layer:
    """All that is added to the stream times what this was divided by."""
    rows = {f"{name}.{last}" for name in conversion.family.writes for last in ("weight", "bias")}
    scale = conversion.stream
    return {
        name: _times(tensor, scale.view(-1, *[1] * (tensor.ndim - 1))) if name in rows else tensor
        for name, tensor in layer.items()
    }


def _norms(layer: Layer, conversion: Conversion, group: str) -> Layer:
    """Norms without scales: what these are beside the stream's is in the weight."""
    kept = {n: t for n, t in layer.items() if n.rpartition(".")[2] not in _SCALES}
    for name, scale in layer.items():
        stem, _, last = name.rpartition(".")
        if last == "input_scale":
            kept[f"{stem}.weight"] = _times(kept[f"{stem}.weight"], scale / conversion.stream)
    return kept


def _renamed(layer: Layer, conversion: Conversion, group: str) -> Layer:
    ours = f"{conversion.family.attention}.sink"
    return {f"{name}s" if name == ours else name: tensor for name, tensor in layer.items()}


def _ends(layer: Layer, conversion: Conversion, group: str) -> Layer:
    """The embedding as large as it was; a final norm made up for a tied head."""
    family, scale = conversion.family, conversion.stream
    table, last = f"{family.embedding}.weight", f"{family.final_norm}.weight"
    ends = {table: _times(layer[table], scale)}
    if conversion.config.tie_word_embeddings:
        ends[last] = _times(layer[last], 1 / scale)
    return layer | ends


_LAYER = (_split, _with_biases, _fitted, _unscaled, _norms, _renamed)
_OUTSIDE = (_ends, _norms)


def write(folder: Path, config: PretrainedConfig, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Fill a folder with the configuration and the weights of a stock model.

    An AbsorbError names what does not fit the architecture.
    """
    config.save_pretrained(folder)
    expected = _shapes(config)
    with Shards(folder, _SHARD) as shards:
        for name, tensor in tensors:
            if expected.pop(name, None) != tuple(tensor.shape):
                raise _misfit(config, f"{name} of the shape {tuple(tensor.shape)}")
            shards.add({name: tensor})
        if expected:
            raise _misfit(config, f"no {min(expected)}")
        name_shards(folder, shards.written())


def _misfit(config: PretrainedConfig, what: str) -> AbsorbError:
    return AbsorbError(
        f"the conversion holds {what}, which does not fit {config.model_type}, so it is damaged; "
        "convert again"
    )


def _shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a stock model of this configuration is stored as."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = kind(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes
