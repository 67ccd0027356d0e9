"""Transforms of ``torch.func`` and forward-mode derivatives of the operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

import rendseg
from rendseg import _extension, nn, ops

torch.manual_seed(0)
CODEWORDS, SCALE = torch.randn(3, 4), -torch.rand(3)
COORDS, VALUES = torch.rand(2, 7, 2), torch.randn(2, 4, 7)
MASKS, PAIRS = torch.randn(3, 5, 8) > 0, torch.tensor([[1, 0], [3, 0], [2, 1]])
INDICES = torch.stack([torch.randperm(30)[:7] for _ in range(2)])
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "encode": lambda x: ops.encode(x, CODEWORDS, SCALE),
    "scaled_l2": lambda x: ops.scaled_l2(x.flatten(2).transpose(1, 2), CODEWORDS, SCALE),
    "aggregate": lambda x: ops.aggregate(
        x.flatten(2).transpose(1, 2)[:, :, :3], x.flatten(2).transpose(1, 2), CODEWORDS
    ),
    "point_sample": lambda x: ops.point_sample(x, COORDS),
    "mask_losses": lambda x: torch.stack(ops.mask_losses(x, [MASKS] * len(x), COORDS, *PAIRS)),
    "subdivide": lambda x: ops.subdivide(x, 5)[0],
    "scatter_points": lambda x: ops.scatter_points(x, INDICES, VALUES.to(x.dtype)),
}


def _grid_sample_has_tangents() -> bool:
    """Whether PyTorch's grid_sample has a forward-mode derivative; before 2.15 it says that it has none."""
    x, at = torch.rand(1, 1, 3, 3), torch.rand(1, 1, 2, 2)
    try:
        jvp(lambda y: F.grid_sample(y, at, align_corners=False), (x,), (x,))
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("name", OPERATORS)
def test_transforms(name: str) -> None:
    f, x = OPERATORS[name], torch.randn(2, 4, 6, 5)
    leaf = x.clone().requires_grad_()
    (f(leaf).square().sum() / 2).backward()
    assert leaf.grad is not None
    slopes = grad(lambda y: f(y).square().sum() / 2)(x)
    torch.testing.assert_close(slopes, leaf.grad, rtol=1e-4, atol=1e-4)
    both = torch.stack([x, 2 * x])
    torch.testing.assert_close(vmap(f)(both), torch.stack([f(x), f(2 * x)]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vmap(grad(lambda y: f(y).square().sum() / 2))(both)[0], slopes, rtol=1e-4, atol=1e-4)
    if name in ("point_sample", "mask_losses") and not _grid_sample_has_tangents():
        with pytest.raises(NotImplementedError, match="forward AD with grid_sampler_2d"):
            jvp(f, (x,), (x,))
        return
    value, tangent = jvp(f, (x,), (x,))  # against f(x + h x) with h = 1e-6 in float64
    wide = x.double()
    slope = (f(wide * (1 + 1e-6)) - f(wide * (1 - 1e-6))) / 2e-6
    torch.testing.assert_close(tangent.double(), slope.double(), rtol=1e-3, atol=1e-3)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x)))
        torch.testing.assert_close(dual.tangent, tangent)


def test_a_model_and_second_derivatives() -> None:
    layer = nn.Encoding(4, 3)
    x, values = torch.randn(1, 4, 6), dict(layer.named_parameters())
    slopes = grad(lambda p: functional_call(layer, p, (x,)).square().sum())(values)
    layer(x).square().sum().backward()
    torch.testing.assert_close(slopes["scale"], layer.scale.grad, rtol=1e-4, atol=1e-4)
    curvature = hessian(lambda s: ops.encode(x, CODEWORDS, s).square().sum())(SCALE)
    torch.testing.assert_close(curvature, curvature.T, rtol=1e-3, atol=1e-3)


@pytest.mark.bad_input
@pytest.mark.skipif(not _extension.LOADED, reason="asks for the compiled backend")
def test_a_backend_by_name_refuses() -> None:
    with rendseg.backend("cpp"), pytest.raises(RuntimeError, match=r"no transforms of torch.func.*set_backend"):
        grad(lambda y: ops.encode(y, CODEWORDS, SCALE).sum())(torch.randn(1, 4, 5))
