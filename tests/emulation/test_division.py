"""The reference must say the same on a GPU, where ATen divides by a number in its own way.

``div_true_kernel_cuda`` multiplies by the reciprocal of a divisor that is a number (or a tensor without dimensions on
the CPU), rounded to the type of the arithmetic; ``x / 14`` is then up to one ulp off. ``CudaDivision`` does that here.
Under it the reference is held to the emulated kernels, in the cases that ``tests/gpu`` compares with the reference on
the GPU (fewer images, and fewer channels, where those only make more of the same).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rendseg import reference
from rendseg.reference.uncertain_points import cell_centres
from tests.emulation.test_refine import CASES, F64, Call, tolerance
from tests.gpu.test_uncertain_points import MAPS


class CudaDivision(TorchDispatchMode):
    """True division by a number as ATen does it on CUDA; ``folded`` counts how often."""

    DIVISIONS = (
        torch.ops.aten.div.Tensor,
        torch.ops.aten.div.Scalar,
        torch.ops.aten.div_.Tensor,
        torch.ops.aten.div_.Scalar,
        torch.ops.aten.true_divide.Tensor,
        torch.ops.aten.true_divide.Scalar,
    )

    def __init__(self) -> None:
        super().__init__()
        self.folded = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.DIVISIONS and isinstance(args[0], Tensor):
            by = args[1]
            if not isinstance(by, Tensor) or by.dim() == 0:
                self.folded += 1
                dtype = torch.result_type(args[0], by)
                dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
                arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
                # Both tensors have a dimension, so this is a division of tensors.
                inverse = torch.ones(1, dtype=arithmetic).div_(torch.full((1,), float(by), dtype=arithmetic))
                result = (args[0].to(arithmetic) * inverse).to(dtype).view(args[0].shape)
                return args[0].copy_(result) if func.__name__.startswith("div_") else result
        return func(*args, **(kwargs or {}))


def on_a_gpu(function: Callable[..., Any], *args: Any) -> Any:
    with CudaDivision():
        return function(*args)


def test_the_stand_in_divides_as_aten_on_cuda() -> None:
    x = torch.arange(14) + 0.5
    with CudaDivision() as mode:
        folded, exact = x / 14, x / torch.full_like(x, 14)
        halves = x.half() / 14
    assert mode.folded == 2
    assert torch.equal(exact, x.div(torch.full_like(x, 14)))
    # 1/14 in float32, then a product in float32; worked in float64 and rounded after each step.
    inverse = torch.full((14,), 1 / 14, dtype=torch.float64).float().double()
    assert torch.equal(folded, (x.double() * inverse).float())
    assert not torch.equal(folded, exact), "14 is one of the sizes at which the two differ"
    assert halves.dtype == torch.float16 and torch.equal(halves, (x.half().double() * inverse).float().half())


def test_no_division_of_the_reference_depends_on_the_device() -> None:
    """Sizes up to 300, and the largest; the centre is the quotient of two exact numbers, rounded once."""
    for size in (*range(1, 301), 1023, 2047, 4095, 65_535):
        indices = torch.arange(size)
        wanted = ((indices.double() + 0.5) / torch.full((size,), size, dtype=torch.float64)).float()
        got = on_a_gpu(cell_centres, indices, 1, size)
        assert torch.equal(got[:, 0], wanted), size
        got = on_a_gpu(cell_centres, indices, size, 1)
        assert torch.equal(got[:, 1], wanted), size


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("size", [(1, 14, 14), (3, 28, 28), (1, 224, 224)], ids=str)
def test_selection(emulated: Any, name: str, size: tuple[int, int, int]) -> None:
    images, height, width = size
    x = MAPS[name](images * height * width).view(images, 1, height, width)
    for seed, k in enumerate({1, height * width // 250 + 1, height * width // 2, height * width}):
        emulated.seed(seed)
        got, wanted = emulated.ops.uncertain_points(x, k), on_a_gpu(reference.uncertain_points, x, k)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 129, 131), (3, 40, 20, 30)], ids=str)
def test_large_maps(emulated: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(7))).to(dtype, memory_format=layout)
    x[0, 0, ::17, ::5] = float("nan")
    got, wanted = emulated.ops.uncertain_points(x, 8192), on_a_gpu(reference.uncertain_points, x, 8192)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("size", [(28, 28), (224, 224)], ids=str)
def test_several_channels(emulated: Any, size: tuple[int, int]) -> None:
    x = torch.randn(3, 5, *size, generator=torch.Generator().manual_seed(0))
    got, wanted = emulated.ops.uncertain_points(x, 300), on_a_gpu(reference.uncertain_points, x, 300)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("name, made, layers, kwargs", CASES, ids=[case[0] for case in CASES])
def test_refine_in_float64(emulated: Any, name: str, made: dict, layers: dict, kwargs: dict) -> None:
    """Cases in which every cell is refined meet the reference's centres."""
    on_a_gpu(Call(emulated.ops, made, layers, kwargs, [F64] * 3).check, tolerance([F64] * 3))
