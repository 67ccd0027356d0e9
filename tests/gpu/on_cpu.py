"""A rehearsal of tests/gpu on a machine without a GPU: "cuda" means the CPU, with the emulated kernels.

What needs more of a GPU than its kernels (graphs, streams, the profiler, the allocator's counts) is skipped, and a
few cases of each test are taken, since emulated kernels are slow. This shows that the tests themselves are sound.
"""

from __future__ import annotations

import inspect
import os
import re
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

# In the text of a test, or of a function of its module that it calls.
NEEDS_A_GPU = re.compile(
    r"CUDAGraph|profile\(|Stream\(|memory_allocated|memory_stats|subprocess|Generator\(\"cuda|rng_state|cuda\.manual_seed|"
    r"get_device_properties|sync_debug_mode|autocast\(\"cuda"
)
# Mixed devices are an error there and none here; sizes for a GPU.
LEFT_OUT = (
    "another_device",
    "different_devices",
    "large",
    "65535",
    "hundred_thousand",
    "T2",
    "beyond shared",
    "masks",
    "of_the_paper",
    "few_and_many",
    "are_bit_equal",
    "close_to_calling",
    "cpu_is_refused",
)
CASES = int(os.environ.get("RENDSEG_CHECK_CASES", "2"))  # of each test


class OnCpu(TorchFunctionMode):
    """Calls that name a GPU go to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: plain(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            return args[0].clone()
        if func == torch.Tensor.is_cuda.__get__:  # another object at each look
            return True
        return func(*(plain(value) for value in args), **kwargs)


def plain(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


def install() -> None:
    """For the rest of this process."""
    from rendseg import _backends
    from tests.emulation import as_backend

    held = _backends.has_kernel

    def has_kernel(op: str, device_type: str) -> bool:
        return op in as_backend._TAKEN if device_type == "cuda" else held(op, device_type)

    _backends.has_kernel = has_kernel
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = lambda *args: None
    OnCpu().__enter__()


def source_of(item: pytest.Item) -> str:
    """The text of the test and of the functions of its module that it names."""
    function = getattr(item, "function", None)
    if function is None:
        return ""
    text = inspect.getsource(function)
    for name, other in vars(inspect.getmodule(function)).items():
        if inspect.isfunction(other) and re.search(rf"\b{name}\(", text) and other is not function:
            text += inspect.getsource(other)
    return text


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what needs a GPU, and leaves out all but a few cases of each test."""
    kept: list[pytest.Item] = []
    taken: dict[str, int] = {}
    for item in items:
        test = item.nodeid.partition("[")[0]
        found = NEEDS_A_GPU.search(source_of(item))
        if any(word in item.nodeid for word in LEFT_OUT):
            continue
        if taken.get(test, 0) >= CASES:
            continue
        taken[test] = taken.get(test, 0) + 1
        if found:
            item.add_marker(pytest.mark.skip(reason=f"a rehearsal has no GPU: {found[0].strip('(')}"))
        kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
