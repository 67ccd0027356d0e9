"""What ``auto`` means: the precision that is faster on this machine, and a length that fits the time given.

A run chooses once. Its configuration, and with it every checkpoint, has the value chosen, so that it resumes alike.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rendseg.engine.config import Config
from rendseg.engine.runtime import clock, gather, unchanged_rng

_CHOSEN = ("precision", "iterations")


def with_choice(config: Config, **chosen: Any) -> Config:
    """``config`` with these keys of ``train``."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **chosen))  # type: ignore[type-var]


def adopt(config: Config, kept: Config) -> Config:
    """``config`` with what the run of the configuration ``kept`` chose in place of ``auto``."""
    auto = [key for key in _CHOSEN if getattr(config.train, key) == "auto"]
    return with_choice(config, **{key: getattr(kept.train, key) for key in auto})


# ---------------------------------------------------------------------------------------------------- precision


class _TooLate(Exception):
    pass


class _Deadline(TorchDispatchMode):
    """Ends what is computed inside at the first operator after ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._end = time.perf_counter() + seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.perf_counter() > self._end:
            raise _TooLate
        return func(*args, **(kwargs or {}))


def _has_instructions() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor. Without it one convolution can take a minute."""
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # None: a build without oneDNN
    return known is None or bool(known())


def faster_precision(network: nn.Module, images: Tensor, labels: Any, *keys: Tensor) -> tuple[str, str]:
    """fp32 or bf16, whichever makes a forward and backward pass on the CPU faster in the mean of all processes, and a
    sentence about it. The network and the random state stay as they are.

    Where the processor has no instructions for bfloat16 nothing is measured. A pass in it is ended when it has taken
    twice the time of float32.
    """
    if not all(gather([_has_instructions()])):
        return "fp32", "the processor has no instructions for bfloat16"
    trial = copy.deepcopy(network).train()

    def one_pass(dtype: torch.dtype) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            terms = trial(images, labels, *keys)
        torch.stack([term.float() for term in terms.values()]).sum().backward()
        return time.perf_counter() - start

    wide, narrow, over = 0.0, 0.0, True
    with unchanged_rng():
        try:
            first = one_pass(torch.float32)
            wide = _fastest(lambda: one_pass(torch.float32), first)
            narrow = 2 * first + 0.5
            with _Deadline(narrow):
                first = one_pass(torch.bfloat16)
            narrow, over = _fastest(lambda: one_pass(torch.bfloat16), first), False
        except (_TooLate, ValueError, RuntimeError):  # an error in float32 comes again in training, which explains it
            pass
    measured = gather([(wide, narrow, over)])
    wide, narrow = (sum(values[i] for values in measured) / len(measured) for i in (0, 1))
    over = any(values[2] for values in measured)
    chosen = "bf16" if narrow < wide and not over else "fp32"
    return chosen, f"a pass takes {wide:.2f} s in float32, {'over ' * over}{narrow:.2f} s in bfloat16"


def _fastest(one_pass: Callable[[], float], first: float) -> float:
    """The least of up to three passes after ``first``, which warms up; of a slow network ``first`` must do."""
    times = [first]
    while len(times) < 4 and sum(times) < 2:
        times.append(one_pass())
    return min(times)


# ------------------------------------------------------------------------------------------------------- length


class Pace:
    """The seconds of an iteration, from the first ones of this process: 15 after 5 that warm up."""

    warm_up, measured = 5, 15

    def __init__(self, device: torch.device) -> None:
        self._device, self._count, self._start = device, 0, 0.0

    def step(self) -> float | None:
        """To be called after each iteration; the mean of all processes once it is known."""
        self._count += 1
        if self._count == self.warm_up:
            self._start = clock(self._device)
        if self._count < self.warm_up + self.measured:
            return None
        seconds = gather([(clock(self._device) - self._start) / self.measured])
        return sum(seconds) / len(seconds)
