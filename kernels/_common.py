"""What several Triton kernels share: rounding, taps, the running two largest, sort keys; and how to launch.

The arithmetic is that of ``csrc/math/``: every operation is rounded, so kernels that use these functions are launched
with ``**EXACT``, which keeps the compiler from fusing a product with a sum.

Every launcher takes its tile from one function of the shape class and the architecture, so that nothing needs tuning.
With ``RENDSEG_TRITON_AUTOTUNE=1`` in the environment the first launch of a shape class times the tiles beside the
default and the process keeps the fastest; see :func:`launch_tuned`.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Here rather than in an __init__.py: without one, this folder gives way to the package on PyPI of the same name, and
# those who look for that (transformers does) take the folder for what it is, no package.
if not __name__.startswith("rendseg."):
    raise ImportError("import these files as rendseg.kernels, the package that they are part of")

INT32_LIMIT = 2**31
# Most cells or points of an image that 32-bit indices hold, with room for the tail of a tile.
INDEX_LIMIT = INT32_LIMIT - 2**16

# Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1).
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def _mend_interpreter() -> None:
    """Bounds of loops are arrays of one element, of which NumPy 2.4 makes no ``int`` any more, as older Triton asks."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, *scope: Any) -> None:  # older Triton keeps no scope
        patch(tensor, *scope)
        set_attr = scope[0].set_attr if scope else setattr
        set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])
if INTERPRETED.value and VERSION < (3, 9):
    _mend_interpreter()


# Host side


def plane_span(tensor: Tensor) -> int:
    """One more than the largest offset inside one plane of ``tensor[N, C, H, W]``, in elements."""
    return (tensor.shape[2] - 1) * tensor.stride(2) + (tensor.shape[3] - 1) * tensor.stride(3) + 1


def channels_inside(tensor: Tensor) -> bool:
    """Whether the channels of ``tensor[N, C, H, W]`` are its fastest dimension, as in ``channels_last``."""
    return tensor.shape[1] > 1 and tensor.stride(1) == 1 and tensor.stride(3) != 1


def check_grid(programs: int) -> int:
    """``programs`` if a one-dimensional grid can hold them."""
    if programs >= INT32_LIMIT:
        raise ValueError(f"the Triton kernels launch fewer than 2**31 programs, this size needs {programs}")
    return programs


def check_indices(count: int, what: str) -> None:
    """Refuses sizes that the 32-bit indices of the kernels cannot hold."""
    if count > INDEX_LIMIT:
        raise ValueError(f"the Triton kernels hold at most {INDEX_LIMIT} {what} of an image, got {count}")


def strides(tensor: Tensor) -> Sequence[int]:
    """The strides of ``tensor[N, C, H, W]``; those of dimensions of size one are 0, since nothing is read there."""
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def on_device(tensor: Tensor) -> Any:
    """Context that makes the GPU of ``tensor`` the current one; does nothing for a CPU tensor (the interpreter)."""
    return torch.cuda.device_of(tensor)


META_ARCH = "cpu"  # what launches on meta tensors are configured for; set by _compile.py


def arch_of(device: torch.device) -> str:
    """What a launch is configured for: ``"sm_90"`` or ``"gfx942"`` as in ``_compile.py``; ``"cpu"`` if interpreted."""
    return _arch_of_gpu(device) if device.type == "cuda" else META_ARCH if device.type == "meta" else "cpu"


@functools.lru_cache
def _arch_of_gpu(device: torch.device) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def is_amd(arch: str) -> bool:
    """Whether ``arch`` has 64 lanes to a warp, and registers for half as many values to a lane."""
    return arch.startswith("gfx")


def before_sm_90(arch: str) -> bool:
    """Whether ``arch`` is an NVIDIA GPU whose tensor cores read both operands from registers."""
    return arch.startswith("sm_") and int(arch[3:]) < 90


def has_tf32(arch: str) -> bool:
    """Whether tensor cores of ``arch`` multiply in TF32, once or three times."""
    return arch.startswith("sm_") and int(arch[3:]) >= 80


# Tuning

AUTOTUNE = "RENDSEG_TRITON_AUTOTUNE"
_FASTEST: dict[tuple[Any, ...], dict[str, Any]] = {}


def shape_class(*sizes: int) -> tuple[int, ...]:
    """Sizes up to the next power of two: shapes that share their tuned tile."""
    return tuple(triton.next_power_of_2(size) for size in sizes)


def tiles_beside(tile: Mapping[str, Any], sizes: Sequence[str], arch: str) -> list[dict[str, Any]]:
    """``tile``, and it with its warps, or one of the named ``sizes``, halved and doubled.

    No tile has fewer elements than threads, which the histograms count on, and no size of a product is below 16.
    """
    tiles = [dict(tile)]
    for name in ("num_warps", *sizes):
        for value in (tile[name] // 2, tile[name] * 2):
            other = dict(tile) | {name: value}
            threads = other["num_warps"] * (64 if is_amd(arch) else 32)
            elements = math.prod(other[key] for key in other if key.startswith("BLOCK"))
            if 1 <= other["num_warps"] <= (8 if is_amd(arch) else 16) and elements >= threads:
                if name == "num_warps" or value >= 16:
                    tiles.append(other)
    return tiles


def launch_tuned(
    kernel: str,
    key: tuple[Any, ...],
    tile: Mapping[str, Any],
    sizes: Sequence[str],
    device: torch.device,
    launch: Callable[[dict[str, Any]], None],
    changed: Sequence[Tensor] = (),
) -> None:
    """``launch(tile)``; with ``RENDSEG_TRITON_AUTOTUNE=1`` the fastest of :func:`tiles_beside` for this ``key``.

    ``launch`` may run many times: it overwrites what it writes, but for ``changed``, which is put back each time. While
    a CUDA graph is captured nothing is timed. Tiles differ in the last digits of sums, no more.
    """
    if os.environ.get(AUTOTUNE, "0") == "0":
        return launch(dict(tile))
    arch = arch_of(device)
    chosen = _FASTEST.get((kernel, arch, *key))
    if chosen is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return launch(dict(tile))
        before = [tensor.clone() for tensor in changed]

        def again(candidate: dict[str, Any]) -> None:
            for tensor, copy in zip(changed, before, strict=True):
                tensor.copy_(copy)
            launch(candidate)

        tiles = tiles_beside(tile, sizes, arch)
        times = [_seconds(functools.partial(again, candidate), device) for candidate in tiles]
        chosen = _FASTEST[(kernel, arch, *key)] = tiles[times.index(min(times))]
        for tensor, copy in zip(changed, before, strict=True):
            tensor.copy_(copy)
    launch(dict(chosen))


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    """What ``call`` takes; infinite if the GPU has not the registers or shared memory for it."""
    try:
        if device.type == "cuda":
            return triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median")
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    except triton.runtime.errors.OutOfResources:
        return math.inf


# Rounding


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """``value`` rounded to nearest even to ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's own conversion does not round to even, and may carry
        bits = value.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, even.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def divide(a, b):
    """``a / b`` rounded as IEEE says, which ``/`` is not in float32."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


# The two largest of a set of values, and which is the largest


@triton.jit
def larger(a, b):
    """The larger of the two; NaN if either is."""
    if a.dtype == tl.float64:  # no machine instruction
        return tl.where((a > b) | (a != a), a, b)
    else:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def wins(value, first):
    """Whether ``value``, of a later class, takes the argmax: a larger number does, and so does the first NaN."""
    return (value > first) | ((value != value) & (first == first))


@triton.jit
def push_top2(first, second, value):
    """The two largest after one more value; ``first`` is NaN as soon as one value is. They start as -infinity."""
    return larger(first, value), tl.maximum(second, tl.minimum(first, value))


@triton.jit
def merge_top2(first, second, label):
    """Brings the two largest of each lane together along axis 1; ``label`` is distinct in every lane.

    The label is that of the first NaN, else the lowest among the equal largest. (Not one tl.reduce with a function of
    its own, which the interpreter runs an element at a time.)
    """
    unknown = first != first
    any_unknown = tl.max(unknown.to(tl.int32), 1) > 0
    known = tl.where(unknown, float("-inf"), first)
    top = tl.max(known, 1)
    wins_argmax = tl.where(any_unknown[:, None], unknown, known == top[:, None])
    winner = tl.min(tl.where(wins_argmax, label, 0x7FFFFFFF), 1)
    runner_up = tl.max(tl.where(label == winner[:, None], second, known), 1)
    return tl.where(any_unknown, float("nan"), top), runner_up, winner


@triton.jit
def known_class(margin, chosen, channels):
    """``margin``, or NaN everywhere if the class ``chosen`` of the image does not exist."""
    return tl.where((chosen >= 0) & (chosen < channels), margin, float("nan"))


# Sort keys: csrc/math/radix_key.h


@triton.jit
def margin_key(margin):
    """31 bits that grow with certainty: NaN is 0, a margin ``m >= 0`` is its bits + 1, whatever the sign of zero."""
    bits = margin.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(margin == margin, bits + 1, 0)


# Bilinear taps


@triton.jit
def upsample_taps(position, in_size, SCALE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ACC: tl.constexpr):
    """Taps of output cell ``position`` along one axis (csrc/math/upsample.h): ``lower, upper`` and their weights.

    Integers of the type of ``position``, which must hold ``SCALE * in_size**2`` with aligned corners.
    """
    if ALIGN_CORNERS:
        numerator = position * (in_size - 1)
        denominator = tl.maximum(in_size * SCALE - 1 + tl.zeros_like(position), 1)
    else:
        numerator = tl.maximum(2 * position + (1 - SCALE), 0)
        denominator = 2 * SCALE + tl.zeros_like(position)
    if ALIGN_CORNERS:
        lower = numerator // denominator
    else:
        lower = numerator // (2 * SCALE)
    upper_weight = divide((numerator - lower * denominator).to(ACC), denominator.to(ACC))
    # At a factor of one a cell has no other neighbour than itself: 0 * inf is NaN.
    upper = tl.minimum(lower + 1, in_size - 1) if SCALE > 1 else lower
    return lower, upper, 1.0 - upper_weight, upper_weight
