"""The choice of a tile: the default of the shape class and architecture, or the fastest of a few that were timed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import cases_refine
import pytest
import torch
from _triton import DEVICE, INTERPRETED, TRITON, implementation, to_device

pytest.importorskip("triton")
from rendseg.kernels import _common  # noqa: E402

pytestmark = TRITON
CPU = torch.device("cpu")
TILE = {"BLOCK": 64, "BLOCK_C": 4, "num_warps": 2}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_common, "_FASTEST", {})
    monkeypatch.delenv(_common.AUTOTUNE, raising=False)


def launched(monkeypatch: pytest.MonkeyPatch, best: dict[str, Any], key: tuple[Any, ...] = (1,)) -> list[dict]:
    """The tiles that a launch tries, where ``best`` is the fastest; the last is the one that counts."""
    tiles: list[dict] = []
    times = iter(range(10**6))

    def seconds(call: Any, device: torch.device) -> float:
        call()
        return -1.0 if tiles[-1] == best else float(next(times))

    monkeypatch.setattr(_common, "_seconds", seconds)
    _common.launch_tuned("kernel", key, TILE, ("BLOCK",), CPU, tiles.append)
    return tiles


def test_the_default_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(monkeypatch, {}) == [TILE]
    monkeypatch.setenv(_common.AUTOTUNE, "0")
    assert launched(monkeypatch, {}) == [TILE]


def test_the_fastest_is_kept_for_its_class_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_common.AUTOTUNE, "1")
    best = TILE | {"BLOCK": 128}
    tiles = launched(monkeypatch, best)
    assert tiles[0] == TILE and tiles[-1] == best and len(tiles) == 6
    assert launched(monkeypatch, TILE) == [best]
    assert len(launched(monkeypatch, TILE, key=(2,))) == 6


def test_tiles_beside() -> None:
    tiles = _common.tiles_beside(TILE, ("BLOCK",), "sm_90")
    assert tiles == [
        TILE,
        TILE | {"num_warps": 1},
        TILE | {"num_warps": 4},
        TILE | {"BLOCK": 32},
        TILE | {"BLOCK": 128},
    ]
    # 64 lanes to a warp: two warps of four elements each, at the most.
    tiles = _common.tiles_beside({"BLOCK": 32, "BLOCK_C": 4, "num_warps": 2}, ("BLOCK",), "gfx942")
    assert [(tile["BLOCK"], tile["num_warps"]) for tile in tiles] == [(32, 2), (32, 1), (64, 2)]
    assert all(
        tile["BLOCK_K"] >= 16 for tile in _common.tiles_beside({"BLOCK_K": 16, "num_warps": 1}, ("BLOCK_K",), "")
    )


def test_what_a_launch_adds_to_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_common.AUTOTUNE, "1")
    total = torch.tensor([3.0])
    _common.launch_tuned("kernel", (), TILE, ("BLOCK",), CPU, lambda tile: total.add_(1), changed=(total,))
    assert total.tolist() == [4.0]


def test_a_tile_that_does_not_fit_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    monkeypatch.setenv(_common.AUTOTUNE, "1")
    done = []

    def launch(tile: dict[str, Any]) -> None:
        if tile["BLOCK"] != 32:
            raise OutOfResources(300_000, 200_000, "shared memory")
        done.append(tile)

    _common.launch_tuned("kernel", (), TILE, ("BLOCK",), CPU, launch)
    assert done[-1] == TILE | {"BLOCK": 32}


@pytest.mark.parametrize(
    "arch, amd, tf32, early",
    [
        ("sm_75", 0, 0, 1),
        ("sm_86", 0, 1, 1),
        ("sm_90", 0, 1, 0),
        ("sm_120", 0, 1, 0),
        ("gfx942", 1, 0, 0),
        ("cpu", 0, 0, 0),
    ],
)
def test_architectures(arch: str, amd: int, tf32: int, early: int) -> None:
    assert (_common.is_amd(arch), _common.has_tf32(arch), _common.before_sm_90(arch)) == (amd, tf32, early)


def test_the_architecture_of_a_device() -> None:
    assert _common.arch_of(CPU) == "cpu"
    if DEVICE == "cuda":
        assert _common.arch_of(torch.device("cuda")).startswith(("sm_", "gfx"))


def calls() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Every launcher that is tuned, with shapes of several tiles and of sums that are added to."""
    logits = torch.randn(1, 3, 60, 50, generator=torch.Generator().manual_seed(0))
    maps, coords = [logits[..., :9, :9].clone(), logits[..., 9:20, :9].clone()], torch.rand(1, 90, 2)
    large = torch.randn(1, 1, 92, 92, generator=torch.Generator().manual_seed(1))
    x, codes, scale = torch.randn(1, 20, 130), torch.randn(3, 20), -torch.rand(3)
    coarse, features = cases_refine.inputs(n=1)
    head = cases_refine.Head(8, 5)
    weights, biases = [w.detach() for w in head.weights], [b.detach() for b in head.biases]
    rest = (1, 20, "original", 2, False, "zeros", True, False)
    yield "uncertain_points", "uncertain_points", (large, 500)
    yield "uncertain_points", "uncertainty", (logits,)
    yield "subdivide", "subdivide", (logits[..., :9, :9], 30)
    yield "subdivide", "_subdivide_backward", (logits[:, :1, :8, :8], 4, 4, False)
    yield "point_sample", "point_sample", (maps, coords)
    gradients = (torch.randn(1, 6, 90), maps, coords, "bilinear", "zeros", False, True, True)
    yield "point_sample", "_point_sample_backward", gradients
    yield "scatter_points", "scatter_points", (logits, torch.arange(300)[None], torch.randn(1, 3, 300))
    yield "scatter_points", "_scatter_points_backward", (logits, torch.arange(300)[None])
    yield "encode", "encode", (x, codes, scale)
    yield "encode", "_encode_backward", (torch.randn(1, 3, 20), x, codes, scale)
    for labels in (False, True):
        yield "refine", "_refine_mlp", (coarse.float(), [f.float() for f in features], weights, biases, *rest, labels)


@pytest.mark.skipif(not INTERPRETED, reason="compares bits and sums across tiles in the interpreter")
@pytest.mark.parametrize("file, op, inputs", [pytest.param(*c, id=f"{c[1]} {i}") for i, c in enumerate(calls())])
def test_every_tile_gives_the_same(
    file: str, op: str, inputs: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launchers take the tiles they are handed: the last of the space in place of the first."""
    module = importlib.import_module(f"rendseg.kernels.{file}")
    assert op in module.IMPLEMENTATIONS
    function = implementation(file, op)
    wanted = function(*to_device(inputs))
    tried: list[Any] = []

    def seconds(call: Any, device: torch.device) -> float:
        call()
        tried.append(call)
        return -float(len(tried))

    monkeypatch.setenv(_common.AUTOTUNE, "1")
    monkeypatch.setattr(_common, "_seconds", seconds)
    got = function(*to_device(inputs))
    assert len(tried) > 2 and _common._FASTEST
    for a, b in zip(flat(got), flat(wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)
