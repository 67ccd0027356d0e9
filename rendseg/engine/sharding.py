"""The network in training: alone, copied to all processes (DDP), or sharded over them.

Fully sharded data parallelism (FSDP2, ``torch.distributed.fsdp.fully_shard``) is chosen by configuration.

Parameters, gradients and optimizer state are split over the processes; checkpoints are not: what is saved is gathered
first, so that a file says nothing of how it was trained, and any number of processes, sharded or not, continues it.
Evaluation runs on an ordinary copy: processes have different numbers of images, so that gathering while predicting
would leave some waiting, and ``refine`` reads the weights of a point head without calling it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rendseg.engine.config import ConfigError, FSDPConfig

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class ParallelNetwork:
    """One network as training needs it."""

    model: nn.Module
    """What is called in training: the network, or DDP around it."""
    network: nn.Module
    """What holds the weights."""
    whole: nn.Module
    """What is evaluated: the network, or, where it is sharded, an ordinary copy."""
    sharded: bool
    own_statistics: bool
    """Whether processes have different batch statistics; those of the first process count."""

    @classmethod
    def prepare(
        cls,
        network: nn.Module,
        optimize: Callable[[nn.Module], torch.optim.Optimizer],
        options: FSDPConfig,
        accelerator: Accelerator,
    ) -> tuple[ParallelNetwork, torch.optim.Optimizer]:
        """``network`` on the device and over all processes, and the optimizer that ``optimize`` makes of it."""
        world, device = accelerator.num_processes, accelerator.device
        if world > 1 and device.type == "cuda":  # PyTorch has no synchronised batch norm on the CPU
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        sharded = options.enabled and world > 1
        if sharded:
            whole = copy.deepcopy(network)
            model = network = shard(network, options, device)
            optimizer = accelerator.prepare(optimize(network))
        else:
            model, optimizer = accelerator.prepare(network, optimize(network))
            whole = network = accelerator.unwrap_model(model)
        return cls(model, network, whole, sharded, world > 1 and has_own_statistics(network)), optimizer

    @property
    def draws(self) -> bool:
        """Whether the network draws points in training, for which it takes keys."""
        return getattr(self.network, "draws", False)

    def before_forward(self, last: bool) -> None:
        """What DDP does by itself; ``last``: the backward pass is followed by an optimizer step."""
        if self.sharded:
            if self.own_statistics:
                broadcast_buffers(self.network)
            reduce_gradients(self.network, last)

    def weights(self) -> dict[str, Tensor]:
        """The ordinary ``state_dict``; every process must ask."""
        if self.own_statistics:
            broadcast_buffers(self.network)
        return full_state(self.network) if self.sharded else self.network.state_dict()

    def trained(self, device: torch.device) -> nn.Module:
        """The network to evaluate, the same in every process; every process must ask."""
        weights = self.weights()
        if self.sharded:
            self.whole.load_state_dict(weights)
        return self.whole.to(device)

    def train_again(self) -> None:
        """After an evaluation: back to training mode, and no copy on the device."""
        self.network.train()
        if self.sharded:
            self.whole.cpu()


def shard(network: nn.Module, options: FSDPConfig, device: torch.device) -> nn.Module:
    """Shard ``network`` in place over all processes and return it; its parameters become ``DTensor``.

    One group for every block of the backbone (what is left when sequences and lists are taken apart) and for the
    decoder, of at least ``min_parameters``; the rest, the point head and auxiliary heads among it, stays whole from the
    forward to the backward pass. ``ConfigError`` for what cannot be sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    scalars = [name for name, p in network.named_parameters() if p.dim() == 0]
    if scalars:
        raise ConfigError(f"train.fsdp cannot shard the scalar parameter {scalars[0]}; set train.fsdp.enabled=false")
    network.to(device)
    for parameter in network.parameters():  # channels_last weights cannot be sharded
        parameter.data = parameter.data.contiguous()
    mesh: DeviceMesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if options.gather_dtype == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for group in groups(network, options.min_parameters):
        # What a decoder's extra losses read must still be whole after its forward pass.
        keep = group is getattr(network, "decoder", None)
        fully_shard(
            group, mesh=mesh, reshard_after_forward=options.reshard_after_forward and not keep, mp_policy=policy
        )
    fully_shard(network, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    return network


def groups(network: nn.Module, min_parameters: int) -> list[nn.Module]:
    """The modules that :func:`shard` makes groups of their own."""
    backbone, decoder = getattr(network, "backbone", None), getattr(network, "decoder", None)
    children = list(getattr(backbone, "net", nn.Identity()).children())
    while len(children) == 1:  # a network inside a wrapper that does not call it
        children = list(children[0].children())
    found = list(_blocks(children)) + ([] if decoder is None else [decoder])
    return [module for module in found if sum(p.numel() for p in module.parameters()) >= max(1, min_parameters)]


def _blocks(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Containers taken apart: not all of them are called."""
    for module in modules:
        if isinstance(module, _CONTAINERS):
            yield from _blocks(module.children())
        else:
            yield module


def reduce_gradients(network: Any, now: bool) -> None:
    """Whether the next backward pass of a sharded network reduces gradients, or only adds them up."""
    network.set_requires_gradient_sync(now)


def full_state(network: nn.Module) -> dict[str, Tensor]:
    """The ordinary ``state_dict``; every process must ask."""
    return {name: _whole(value) for name, value in network.state_dict().items()}


def full_optimizer_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with whole tensors; every process must ask."""
    whole = {i: {k: _whole(v) for k, v in entry.items()} for i, entry in state["state"].items()}
    return {"state": whole, "param_groups": state["param_groups"]}


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`full_optimizer_state` for an optimizer of sharded parameters."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def part(parameter: Tensor, value: Any) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    entries = {i: {k: part(parameters[i], v) for k, v in entry.items()} for i, entry in state["state"].items()}
    return {"state": entries, "param_groups": state["param_groups"]}


def _whole(value: Any) -> Any:
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def has_own_statistics(network: nn.Module) -> bool:
    """Whether processes would keep different buffers: batch norm that is not synchronised."""
    norms = nn.modules.batchnorm._BatchNorm
    return any(isinstance(m, norms) and not isinstance(m, nn.SyncBatchNorm) for m in network.modules())


@torch.no_grad()
def broadcast_buffers(network: nn.Module) -> None:
    """Give every process the buffers of the first; DDP does so before every forward pass."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in network.buffers():
        kinds.setdefault(buffer.dtype, []).append(buffer)
    for buffers in kinds.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.broadcast(flat, 0)
        for buffer, value in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(value.view_as(buffer))
