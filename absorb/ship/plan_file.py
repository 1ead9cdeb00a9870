"""A plan as a file, plan.safetensors: enough to convert the same model again without any text.

In a checkpoint it has a folder of its own: engines may take every .safetensors file that lies
beside config.json for weights. The tensors are those of the Plan, the sinks layer by layer. The
inspection that came with them is the only entry of the metadata, because safetensors writes several
in random order.
"""

from collections.abc import Container
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from absorb.errors import AbsorbError
from absorb.fold.gates import RANK, gated_norms
from absorb.fold.plan import STREAM, Plan
from absorb.fold.sinks.forms import KeySink, LayerSink, LogitSink
from absorb.load.files import reading
from absorb.load.source import Source
from absorb.models.decoder import Decoder
from absorb.models.families import family_of
from absorb.schema.codec import from_json, to_json
from absorb.schema.report import Inspection

PLAN = "plan/plan.safetensors"  # in a checkpoint
_INSPECTION = "absorb_inspection"
_ORDER, _GATE = "order.", "gate."
_FIT = "fit."  # before the names of what logits make of keys


def write_plan(file: Path, plan: Plan, inspection: Inspection) -> None:
    """Write a plan, and with it what was found out about its model."""
    tensors = {"residual": plan.residual}
    for layer, sink in enumerate(plan.sinks):
        parts = _parts(sink) if sink else {}
        tensors |= {_name(layer, name): tensor for name, tensor in parts.items()}
    tensors |= {f"smoothing.{name}": scales for name, scales in plan.smoothing.items()}
    tensors |= {f"{_ORDER}{name}": order for name, order in plan.orders.items()}
    tensors |= {f"{_GATE}{name}": rows for name, rows in plan.gates.items()}
    file.parent.mkdir(exist_ok=True)
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        file,
        metadata={_INSPECTION: to_json(inspection)},
    )


def read_plan(path: Path, source: Source) -> tuple[Plan, Inspection]:
    """The plan in a file, or in the folder of a checkpoint, and the inspection that it came with.

    An AbsorbError says why it is no plan for the model of `source`. Nothing is unpickled.
    """
    file = plan_in(path) if path.is_dir() else path
    tensors, inspection = _read(file)
    _refuse_another_model(file, inspection, source)
    _refuse_damage(file, tensors, inspection, source)
    decoder = source.decoder
    attending = decoder.having(source.family.attention)
    plan = Plan(
        prefix=inspection.prefix,
        sinks=tuple(
            _sink(layer, inspection, tensors) if layer in attending else None
            for layer in range(len(decoder.layers))
        ),
        removals=inspection.removals,
        residual=tensors["residual"],
        smoothing={name: tensors[f"smoothing.{name}"] for name in source.family.links},
        orders={order.channels: tensors[_ORDER + order.channels] for order in inspection.orders},
        gates={name: tensors[_GATE + name] for name in _gated(inspection, decoder)},
    )
    return plan, inspection


def fits_in(folder: Path) -> dict[int, LogitSink]:
    """What logits make of the keys in a checkpoint, for each layer that has a fit.

    Values are smoothed and in order, as those of the checkpoint are.
    """
    file = plan_in(folder)
    tensors, inspection = _read(file)
    family = family_of(inspection.family)
    smoothed, ordered = f"smoothing.{family.value}", f"{_ORDER}{family.output}"
    fits: dict[int, LogitSink] = {}
    with reading(str(file)):
        for layer in inspection.keyed_layers:
            sink = _sink(layer, inspection, tensors)
            fit = sink.fit if isinstance(sink, KeySink) else None
            if fit is not None:
                divisors = tensors[smoothed][layer].view_as(fit.value)
                value = fit.value / divisors
                if ordered in tensors:
                    value = value.flatten()[tensors[ordered][layer]].view_as(value)
                fits[layer] = replace(fit, value=value)
    return fits


def _gated(inspection: Inspection, decoder: Decoder) -> list[str]:
    return [] if inspection.job.gates == "none" else gated_norms(decoder)


def plan_in(folder: Path) -> Path:
    """Where the plan of a checkpoint is: beside the weights, if it was written when plans were."""
    beside = folder / Path(PLAN).name
    return beside if beside.is_file() else folder / PLAN


def _name(layer: int, field: str) -> str:
    return f"sinks.{layer}.{field}"


def _parts(sink: LayerSink) -> dict[str, Tensor]:
    """The tensors of a sink by name, those of its fit under `fit.`."""
    parts: dict[str, Any] = {field.name: getattr(sink, field.name) for field in fields(sink)}
    fit = parts.pop("fit", None)
    return parts | ({f"{_FIT}{n}": t for n, t in _parts(fit).items()} if fit else {})


def _sink(layer: int, inspection: Inspection, tensors: dict[str, Tensor]) -> LayerSink:
    def logits(stem: str) -> LogitSink:
        names = [field.name for field in fields(LogitSink)]
        return LogitSink(**{name: tensors[_name(layer, stem + name)] for name in names})

    if layer not in inspection.keyed_layers:
        return logits("")
    names = ("keys", "values", "error")
    fit = logits(_FIT) if _name(layer, f"{_FIT}logits") in tensors else None
    return KeySink(**{name: tensors[_name(layer, name)] for name in names}, fit=fit)


def _read(file: Path) -> tuple[dict[str, Tensor], Inspection]:
    what_to_do = f"name a folder that `absorb convert` wrote, or the {PLAN} in it"
    if not file.is_file():
        raise AbsorbError(f"{file} does not exist; {what_to_do}")
    try:
        with safe_open(file, "pt") as content:
            text = (content.metadata() or {}).get(_INSPECTION)
            if text is None:
                raise AbsorbError(f"{file} is not a plan; {what_to_do}")
            # Clones, as a tensor is a view of the file, and whoever writes there would change it.
            tensors = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise AbsorbError(f"{file} cannot be read as a plan ({reason}); {what_to_do}") from error
    try:
        return tensors, from_json(Inspection, text)
    except ValueError as error:
        raise AbsorbError(
            f"{file} was written by another version of absorb; convert without --plan"
        ) from error


def _refuse_another_model(file: Path, inspection: Inspection, source: Source) -> None:
    theirs, ours = inspection.family, source.family.model_type
    if theirs != ours:
        raise AbsorbError(
            f"{file} is the plan of {inspection.model}, a {theirs} model, and {source.name} is a "
            f"{ours} model; convert the model that the plan was made for"
        )
    if inspection.fingerprint != source.fingerprint:
        raise AbsorbError(
            f"{file} is the plan of {inspection.model}, and {source.name} has other weights; "
            "convert the model that the plan was made for"
        )


def _refuse_damage(
    file: Path, tensors: dict[str, Tensor], inspection: Inspection, source: Source
) -> None:
    expected = _shapes(inspection, source, tensors)
    strange = _out_of_range(inspection, source)
    strange += [f"lacks {name}" for name in sorted(expected.keys() - tensors.keys())]
    strange += [f"holds {name}, unknown" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        tensor, shape = tensors[name], expected[name]
        divides = name == "residual" or name.startswith("smoothing.")
        if tuple(tensor.shape) != shape:
            strange.append(f"holds {name} of the shape {tuple(tensor.shape)} and not {shape}")
        elif not tensor.isfinite().all():
            strange.append(f"has NaN or infinity in {name}")
        elif divides and not (tensor > 0).all():
            strange.append(f"has a divisor in {name} that is not above zero")
        elif name.startswith(_ORDER) and not _is_order(tensor):
            strange.append(f"has an order in {name} that leaves out a channel")
    if strange:
        raise AbsorbError(
            f"{file} {strange[0]}, so it is damaged; fetch it again or convert without --plan"
        )


def _is_order(tensor: Tensor) -> bool:
    """Whether every row is a permutation."""
    every = torch.arange(tensor.shape[-1]).expand_as(tensor)
    return not tensor.is_floating_point() and torch.equal(tensor.sort(-1).values.long(), every)


def _out_of_range(inspection: Inspection, source: Source) -> list[str]:
    """What an inspection names that the model does not have: tokens, layers or neurons."""
    decoder = source.decoder
    downs = [decoder.down(layer).weight for layer in range(len(decoder.layers))]
    removed = [removal.spike for removal in inspection.removals]
    neurons = {layer: down.numel() // down.shape[-2] for layer, down in enumerate(downs)}
    channels = inspection.residual_scales
    named = {
        "token": (inspection.prefix, decoder.config.vocab_size),
        "layer": (
            [*inspection.keyed_layers, *(spike.layer for spike in removed)],
            len(decoder.layers),
        ),
        "channel": ([*channels], decoder.config.hidden_size),
    }
    strange = [
        f"names {kind} {number}, which {source.name} does not have"
        for kind, (numbers, count) in named.items()
        for number in numbers
        if not 0 <= number < count
    ]
    strange += [
        f"names neuron {spike.neuron}, which {source.name} does not have"
        for spike in removed
        if not 0 <= spike.neuron < neurons.get(spike.layer, 0)
    ]
    return strange if inspection.prefix else ["names no prefix", *strange]


def _shapes(
    inspection: Inspection, source: Source, held: Container[str]
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a plan of this model holds, by name.

    Keys come with a fit where one was made: where any of it is among the names that are `held`.
    """
    decoder, family = source.decoder, source.family
    layers, hidden = decoder.layers, decoder.config.hidden_size
    heads, kv_heads = decoder.heads
    attending = decoder.having(family.attention)
    head_dim = decoder.site(attending[0], family.output).weight.shape[-1] // heads
    tokens, vectors = (kv_heads, len(inspection.prefix), head_dim), (kv_heads, head_dim)
    fitted = {"logits": (heads,), "value": vectors, "key_bias": vectors, "error": ()}
    keyed = {"keys": tokens, "values": tokens, "error": ()}
    both = keyed | {f"{_FIT}{name}": shape for name, shape in fitted.items()}
    shapes: dict[str, tuple[int, ...]] = {"residual": (hidden,)}
    for layer in attending:
        inside = fitted
        if layer in inspection.keyed_layers:
            with_fit = any(_name(layer, name) in held for name in both.keys() - keyed.keys())
            inside = both if with_fit else keyed
        shapes |= {_name(layer, field): shape for field, shape in inside.items()}
    divided: dict[str, tuple[int, ...]] = {family.value: (kv_heads * head_dim,)}
    for up, down in family.neurons.items():
        *experts, _, neurons = decoder.sites(down)[0].weight.shape
        divided[up] = (*experts, neurons)
    for name in family.links:
        shapes[f"smoothing.{name}"] = (len(layers), *divided.get(name, (hidden,)))
    ordered = {STREAM: (hidden,), family.output: (len(layers), *divided[family.value])}
    ordered |= {down: (len(layers), *divided[up]) for up, down in family.neurons.items()}
    shapes |= {_ORDER + o.channels: ordered.get(o.channels, ()) for o in inspection.orders}
    read = (len(layers), RANK, hidden)
    shapes |= {_GATE + name: read for name in _gated(inspection, decoder)}
    return shapes
