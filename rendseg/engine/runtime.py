"""What a process runs on: devices and precision, random state, signals, and what the processes tell each other."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from rendseg.engine.config import Config, ConfigError

# ------------------------------------------------------------------------------------------- devices, signals


def make_accelerator(config: Config) -> Accelerator:
    """Devices, processes and precision. ``ConfigError`` if the precision cannot be had on the device.

    ``precision: auto`` is bf16 on a GPU that has it, else fp32; training on a CPU measures (``automatic.py``).
    """
    # accelerate keeps one state per process; a second run in it may differ
    AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    GradientState._reset_state()
    on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    if on_cpu and config.train.precision == "fp16":
        raise ConfigError("train.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
    precision = config.train.precision
    if precision == "auto":
        precision = "fp32" if on_cpu or not _has_bf16() else "bf16"
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_steps=config.train.gradient_accumulation,
    )
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"accelerate is configured for {kind.value}, which rendseg does not use; launch with a configuration of "
            "plain data parallelism (accelerate launch --multi_gpu) and set train.fsdp.enabled=true to shard"
        )
    return accelerator


def _has_bf16() -> bool:
    """Whether the GPU computes in bfloat16 by itself, without emulation."""
    supported = getattr(torch.get_device_module(), "is_bf16_supported", None)
    if supported is None:
        return False
    return bool(supported(including_emulation=False))


class StopRequested(BaseException):
    """A signal arrived in :func:`interruptible`."""


class StopSignals:
    """While active, SIGINT and SIGTERM set ``received`` instead of ending the process; a second SIGINT ends it.

    A process that is ``alone`` also stops waiting for data (:func:`interruptible`). One of several goes on to the next
    moment at which all agree; while it waits for data, a second signal of either kind ends it.
    """

    active: StopSignals | None = None

    def __init__(self, alone: bool = True) -> None:
        self.received, self.alone, self.waiting = 0, alone, False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        again, self.received = bool(self.received), number
        if self.waiting and self.alone:
            raise StopRequested
        if again and (number == signal.SIGINT or self.waiting):
            raise KeyboardInterrupt

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: signals are someone else's business
                break
        StopSignals.active = self
        return self

    def __exit__(self, *_: object) -> None:
        StopSignals.active = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, a signal that :class:`StopSignals` would only note raises ``StopRequested``."""
    signals = StopSignals.active
    if signals is None:
        yield
        return
    signals.waiting = True
    try:
        if signals.received and signals.alone:
            raise StopRequested
        yield
    finally:
        signals.waiting = False


def move(batch: Any, device: torch.device) -> Any:
    """A tensor, or all of a tuple, list or dictionary, on the device; the copy overlaps with computation where memory
    is pinned."""
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(move(value, device) for value in batch)
    return batch.to(device, non_blocking=True)


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


# --------------------------------------------------------------------------------------------- random numbers


def rng_state() -> dict[str, Any]:
    """The state of every global generator of this process, as plain values and tensors."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": [version, torch.tensor(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what ``rng_state`` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and Torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def unchanged_rng() -> Iterator[None]:
    """The generators are afterwards as they were before."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


# ------------------------------------------------------------------------------------------------ between processes


def earliest(accelerator: Accelerator, bad_iteration: int, stop: int) -> tuple[int, int]:
    """Let all processes agree: the earliest iteration with a bad loss (or -1), and a signal any of them received."""
    if accelerator.num_processes == 1:
        return bad_iteration, stop
    never = 2**62
    values = torch.tensor([never if bad_iteration < 0 else bad_iteration, -stop], device=accelerator.device)
    dist.all_reduce(values, dist.ReduceOp.MIN)
    bad, minus_stop = values.tolist()
    return (-1 if bad == never else bad), -minus_stop


def agree(accelerator: Accelerator, flag: bool) -> bool:
    """True everywhere if true in any process."""
    if accelerator.num_processes == 1:
        return flag
    value = torch.tensor(int(flag), device=accelerator.device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


def mean_over_processes(accelerator: Accelerator, sums: Mapping[str, Tensor], count: int) -> dict[str, float]:
    """Each of ``sums`` over ``count``, as the mean of all processes."""
    values = torch.stack([*sums.values()]) / count
    values = accelerator.reduce(values, "mean")
    return dict(zip(sums, values.tolist(), strict=True))


def gather(values: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other."""
    return gather_object(values)
