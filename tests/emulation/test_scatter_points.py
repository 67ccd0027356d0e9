"""The CUDA kernels of scatter_points, compiled by g++ and run on the CPU: indexing for every layout, width and grid."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rendseg import reference

HERE = Path(__file__).resolve().parent
CXX = os.environ.get("CXX") or "c++"

pytestmark = pytest.mark.skipif(shutil.which(CXX.split()[0]) is None, reason="needs a C++ compiler")


def compile_library(folder: Path, *flags: str) -> Path:
    out = folder / "scatter_points.so"
    source = str(HERE / "scatter_points.cpp")
    command = [*CXX.split(), "-std=c++20", "-O1", "-Wall", "-shared", "-fPIC", *flags, source, "-o", str(out)]
    subprocess.run(command, check=True)
    return out


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_library(tmp_path_factory.mktemp("emulation"))))


def layout(t: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 7)(*t.shape[1:], *t.stride())


def pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def channels_last(t: Tensor) -> ctypes.c_bool:
    return ctypes.c_bool(t.shape[1] > 1 and t.stride(1) == 1)


def as_laid_out(t: Tensor, how: str) -> Tensor:
    if how == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if how == "strided":  # every second column of a wider, poisoned map
        wide = torch.full((*t.shape[:3], 2 * t.shape[3]), float("nan"), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    return t.contiguous()


CASES = [(1, 1, 1, 1, 1), (2, 3, 5, 7, 11), (3, 19, 4, 6, 24), (1, 2, 9, 1, 0)]


def inputs(n: int, c: int, h: int, w: int, p: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + p)
    logits = torch.randn(n, c, h, w, generator=generator).to(dtype)
    indices = torch.stack([torch.randperm(h * w, generator=generator)[:p].sort().values for _ in range(n)])
    return logits, indices, torch.randn(n, c, p, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("grid", [(1, 1), (2, 32), (7, 256)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(library, case, grid, how, dtype) -> None:
    logits, indices, values = inputs(*case, dtype)
    expected = reference.scatter_points(logits, indices, values)
    ours = as_laid_out(logits, how)
    width, points, total = ctypes.c_int(ours.element_size()), ctypes.c_int64(case[4]), ctypes.c_int64(values.numel())
    blocks, threads = (ctypes.c_uint(g) for g in grid)
    library.scatter(
        *(width, pointer(ours), layout(ours), pointer(indices), pointer(values), points, total, channels_last(ours)),
        *(blocks, threads),
    )
    assert torch.equal(ours, expected)

    grad = as_laid_out(logits, how)
    grad_logits = grad.clone()
    grad_values = torch.full_like(values, float("nan"))
    library.scatter_backward(
        *(width, pointer(grad), layout(grad), pointer(grad_logits), layout(grad_logits), pointer(indices)),
        *(pointer(grad_values), points, total, channels_last(grad), blocks, threads),
    )
    flat = logits.flatten(2)
    at_points = indices.unsqueeze(1).expand(-1, case[1], -1)
    assert torch.equal(grad_values, flat.gather(2, at_points))
    assert torch.equal(grad_logits, flat.scatter(2, at_points, 0.0).view_as(logits))


@pytest.mark.bad_input
@pytest.mark.parametrize("index", [-1, 35, 2**40])
def test_an_index_outside_the_map_stops_the_program(tmp_path: Path, index: int) -> None:
    """By its assert, before anything is written."""
    path = compile_library(tmp_path)
    program = (
        "import ctypes\n"
        f"lib = ctypes.CDLL({str(path)!r})\n"
        "logits = (ctypes.c_float * 35)()\n"
        "layout = (ctypes.c_int64 * 7)(1, 5, 7, 35, 35, 7, 1)\n"
        f"indices = (ctypes.c_int64 * 1)({index})\n"
        "values = (ctypes.c_float * 1)(1.0)\n"
        "one = ctypes.c_int64(1)\n"
        "lib.scatter(4, logits, layout, indices, values, one, one, False, 1, 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "indices must lie in [0, H*W)" in done.stderr
