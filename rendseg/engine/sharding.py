"""Fully sharded data parallelism (FSDP2, ``torch.distributed.fsdp.fully_shard``) by configuration.

Parameters, gradients and optimizer state are split over the processes; checkpoints are not: what is saved is gathered
first, so that a file says nothing of how it was trained, and any number of processes, sharded or not, continues it.
Evaluation runs on an ordinary copy: processes have different numbers of images, so that gathering while predicting
would leave some waiting, and ``refine`` reads the weights of a point head without calling it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rendseg.engine.config import ConfigError, FSDPConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


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
