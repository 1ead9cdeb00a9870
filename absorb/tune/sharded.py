"""End-to-end distillation of all weights of a model that no card holds, by FSDP2.

Each of the processes of torchrun holds its part of every matrix, of its gradient and of what AdamW
remembers; a layer is whole while it computes. Small parameters are whole everywhere. Rows of text
are shared out. The layers come there one after the other, and leave one after the other.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import PreTrainedModel

from absorb.models.decoder import Decoder
from absorb.runtime import ranks
from absorb.runtime.precision import free_memory, product_type
from absorb.schema.training import Losses, Recipe
from absorb.text.gather import Texts
from absorb.tune.distill import train
from absorb.tune.end_to_end import (
    Targets,
    again,
    bytes_with_logits,
    loss_of,
    matrices,
    numbered,
    rows_in,
)
from absorb.tune.kept import KeptLayer
from absorb.tune.sharded_state import ShardedState

_TO_COME = 4  # times the weights: gradients, what AdamW remembers, the best step


def distill_sharded(
    teacher: Decoder,
    student: Decoder,
    prefix: Tensor,
    texts: Texts,
    fine_tune: Recipe,
    seed: int,
    progress: Path | None,
    scratch: Path,
) -> Losses:
    """Train all weights of a student whose weights stream, as `train` says.

    Its layers rest in the folder `scratch` afterwards, which all processes share. Where there is a
    folder `progress`, a later run goes on from what is kept there.
    """
    rows = torch.cat([texts.training, texts.validation])
    targets = Targets(teacher, prefix, rows)
    twin = _Twin(student)
    keeper = None if progress is None else ShardedState(progress, twin.model)
    with targets.at_hand():
        loss = partial(loss_of, twin, targets, rows)
        at_once = rows_in(twin.room(), fine_tune, bytes_with_logits(student))
        losses = train(twin.model, loss, numbered(texts), fine_tune, seed, keeper, at_once)
    if losses.kept:
        twin.settle(scratch)
    return losses


class _Twin:
    """A student as it is, whose matrices are shared out among the processes."""

    def __init__(self, student: Decoder):
        self.student, self.device = student, student.device
        assert student.streaming is not None
        self.streaming = student.streaming
        with torch.device("meta"):
            self.model: PreTrainedModel = type(student.model)(student.config)
        nn.Module.eval(self.model)
        self._small = set(student.model.parameters()) - matrices(student)
        self._names = {module: name for name, module in student.model.named_modules()}
        self._take_buffers()
        mesh = init_device_mesh(self.device.type, (ranks.count(),))
        for layer in student.layers:
            own: nn.Module = self.model.get_submodule(self._names[layer])
            own.forward = partial(again, own.forward)
            self._share_out(own, [layer], mesh)
        self._share_out(self.model, self.streaming.ends, mesh)
        # The stream is float32 from its beginning on.
        embedding: nn.Module = self.model.get_input_embeddings()
        embedding.register_forward_hook(lambda _, __, found: found.float())

    def room(self) -> float:
        """Bytes left once there are gradients, what AdamW remembers and a best step."""
        own = sum(ranks.part(parameter).nbytes for parameter in self.model.parameters())
        return ranks.for_each(free_memory(self.device), self.device) - _TO_COME * own

    def stream(self, tokens: Tensor) -> Tensor:
        """The logits (rows, length, vocabulary) of text: all of them, as FSDP has it."""
        found: Tensor = self.model(tokens.to(self.device), use_cache=False).logits
        return found

    def logits(self, stream: Tensor) -> Tensor:
        return stream

    def _take_buffers(self) -> None:
        for name, module in self.student.model.named_modules():
            self.model.get_submodule(name)._buffers.update(module._buffers)

    def _share_out(self, module: nn.Module, units: list[nn.Module], mesh: DeviceMesh) -> None:
        """Give a module what units of the student hold while they are at work, and share it out.

        What is whole is gone when this returns.
        """
        made: dict[nn.Parameter, nn.Parameter] = {}
        for unit in units:
            self._fill(unit, made)
        policy = MixedPrecisionPolicy(
            param_dtype=product_type(self.device),
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the stream stays float32
        )
        small = {made[parameter] for parameter in self._small & made.keys()}
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=small)

    def _fill(self, unit: nn.Module, made: dict[nn.Parameter, nn.Parameter]) -> None:
        with self.streaming.fetched(unit):
            for name, parameter in unit.named_parameters(remove_duplicate=False):
                if parameter not in made:
                    made[parameter] = nn.Parameter(parameter.detach().clone())
                owner, _, last = f"{self._names[unit]}.{name}".rpartition(".")
                self.model.get_submodule(owner)._parameters[last] = made[parameter]

    def settle(self, scratch: Path) -> None:
        """Let the student have what was learned: its layers rest in `scratch`."""
        for index, layer in enumerate(tqdm(self.student.layers, desc="gathering", unit="layer")):
            whole = self._gathered(layer)
            kept = KeptLayer(scratch / f"whole-{index}.safetensors")
            kept.write(whole, (1.0, 0.0))
            self.streaming.settle(index, kept.file)
        for unit in self.streaming.ends:
            named = dict(unit.named_parameters())
            for name, tensor in self._gathered(unit).items():
                self.streaming.learned[named[name]] = tensor

    @torch.no_grad()
    def _gathered(self, unit: nn.Module) -> dict[str, Tensor]:
        """What a unit has learned, in the types it rests in, by the names in it."""
        own = dict(self.model.get_submodule(self._names[unit]).named_parameters())
        return {
            name: ranks.whole(own[name]).to("cpu", parameter.dtype).contiguous()
            for name, parameter in unit.named_parameters()
        }
