from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rendseg.nn import PPM
from rendseg.nn.ppm import precise_pool


def pooled(x, bins, pool):
    """Cell i covers positions floor(i H / b) to ceil((i + 1) H / b)."""
    height, width = x.shape[2:]
    out = x.new_empty(*x.shape[:2], bins, bins)
    for i, j in itertools.product(range(bins), repeat=2):
        rows = slice(i * height // bins, -(-(i + 1) * height // bins))
        columns = slice(j * width // bins, -(-(j + 1) * width // bins))
        part = x[:, :, rows, columns]
        out[:, :, i, j] = part.mean((2, 3)) if pool == "avg" else part.amax((2, 3))
    return out


def conv(x, module, norm, relu):
    y = F.conv2d(x, module.weight, module.bias, padding=module.weight.shape[-1] // 2)
    if norm:
        y = F.batch_norm(y, None, None, module.norm.weight, module.norm.bias, training=True)
    return F.relu(y) if relu else y


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("plain,order,descending", [(False, "input_first", True), (True, "input_last", False)])
@pytest.mark.parametrize("kernel,align", [(1, True), (3, False)])
def test_equals_the_definition(pool, first, plain, order, descending, kernel, align):
    torch.manual_seed(0)
    ppm = PPM(
        5, 3, 4, bins=(1, 2, 6), pool=pool, conv_before_upsample=first, branch_norm_relu=not plain, order=order,
        bins_descending=descending, fuse_kernel=kernel, align_corners=align,
    ).double()  # fmt: skip
    x = torch.randn(2, 5, 7, 9, dtype=torch.float64)
    parts = []
    for bins, branch in zip((1, 2, 6), ppm.branches, strict=True):
        y = pooled(x, bins, pool)
        y = conv(y, branch, not plain, not plain) if first else y
        y = F.interpolate(y, size=(7, 9), mode="bilinear", align_corners=align)
        parts.append(y if first else conv(y, branch, not plain, not plain))
    parts = parts[::-1] if descending else parts
    parts = [x, *parts] if order == "input_first" else [*parts, x]
    expected = conv(torch.cat(parts, 1), ppm.fuse, True, True)
    torch.testing.assert_close(ppm(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_precise_pooling_is_the_mean_of_the_interpolated_map(bins):
    """Against the midpoint rule on the function that is linear between cells and falls to 0 after the last."""
    torch.manual_seed(1)
    x = torch.randn(1, 2, 4, 7, dtype=torch.float64)
    fine = 840  # midpoints per axis; a multiple of all sizes and bins, so that the rule is exact
    axes = []
    for size in (4, 7):
        at = (np.arange(fine) + 0.5) * size / fine
        axes.append(torch.from_numpy(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size)))))
    values = axes[0] @ x @ axes[1].T
    expected = values.unflatten(3, (bins, -1)).mean(4).unflatten(2, (bins, -1)).mean(3)
    torch.testing.assert_close(precise_pool(x, bins), expected, rtol=1e-6, atol=1e-6)


def test_shapes_names_and_gradients():
    ppm = PPM(6, 3, 8, pool="prroi", norm="gn")
    x = torch.randn(1, 6, 2, 3, requires_grad=True)  # smaller than the largest number of bins
    out = ppm(x)
    assert out.shape == (1, 8, 2, 3)
    out.square().sum().backward()
    assert x.grad is not None and all(p.grad is not None and p.grad.isfinite().all() for p in ppm.parameters())
    assert [p.weight.shape[1] for p in ppm.branches] == [6] * 4 and ppm.fuse.weight.shape == (8, 6 + 4 * 3, 3, 3)


def test_one_image_without_batch_statistics():
    x = torch.randn(1, 4, 5, 5)
    for ppm in (PPM(4, 3, 4, norm="gn"), PPM(4, 2, 4, conv_before_upsample=False), PPM(4, 2, 4).eval()):
        assert ppm(x).shape == (1, 4, 5, 5)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change,message",
    [
        ({"bins": ()}, r"bins must be numbers of at least 1, got \[\]"),
        ({"bins": (1, 0)}, r"bins must be numbers of at least 1, got \[1, 0\]"),
        ({"pool": "mean"}, "pool must be one of avg, max, prroi, got 'mean'"),
        ({"order": "first"}, "order must be one of input_first, input_last, got 'first'"),
        ({"fuse_kernel": 5}, "fuse_kernel must be 1 or 3, got 5"),
        ({"norm": "batch"}, "norm must be one of bn, syncbn, gn, none, got 'batch'"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        PPM(**{"in_channels": 4, "channels": 2, "out_channels": 3, **change})


@pytest.mark.bad_input
def test_one_image_with_batch_statistics():
    with pytest.raises(ValueError, match="pyramid pooling to 1 cell needs at least 2 images .* raise train.batch_size"):
        PPM(4, 2, 4)(torch.randn(1, 4, 5, 5))


def test_export_with_dynamic_size():
    """The pooling decomposes, and nothing fixes the size of the map."""
    ppm = PPM(3, 2, 4, bins=(1, 2)).eval()
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(ppm, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n", min=1)}})
    other = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(program.module()(other), ppm(other))
    assert math.isfinite(program.module()(other).sum().item())
