from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rendseg.nn import FPN, ConvNorm, make_norm
from rendseg.nn.fpn import upsample_to


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 2)])
def test_nearest_enlargement_keeps_every_cell_in_its_place(size):
    x = torch.arange(12.0).view(1, 1, 3, 4)[:, :, : -(-size[0] // 2), : -(-size[1] // 2)]
    out = upsample_to(x, 2, size, "nearest")
    assert out.shape[2:] == size
    for row in range(size[0]):
        for col in range(size[1]):
            assert out[0, 0, row, col] == x[0, 0, row // 2, col // 2]


def test_bilinear_enlargement_is_not_stretched():
    x = torch.rand(1, 2, 3, 4)
    assert torch.equal(
        upsample_to(x, 2, (5, 7)), F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)[:, :, :5, :7]
    )
    aligned = upsample_to(x, 2, (5, 7), "bilinear_aligned")
    assert torch.equal(aligned[:, :, 0, 0], x[:, :, 0, 0]) and torch.equal(aligned[:, :, -1, -1], x[:, :, -1, -1])


def test_too_small_a_map_is_refused():
    with pytest.raises(ValueError, match=r"enlarged 2 times gives \(4, 4\), smaller than the finer map \(5, 4\)"):
        upsample_to(torch.zeros(1, 1, 2, 2), 2, (5, 4), "nearest")


def test_pyramid_equals_the_definition():
    torch.manual_seed(0)
    fpn = FPN([3, 4, 5], [4, 8, 8], 6, names=["2", "3", "4"]).double()
    maps = [torch.randn(2, c, h, w, dtype=torch.float64) for c, h, w in ((3, 6, 10), (4, 3, 5), (5, 3, 5))]

    def conv(kind, name, x):
        module = getattr(fpn, f"fpn_{kind}{name}")
        return F.conv2d(x, module.weight, module.bias, padding=0 if kind == "lateral" else 1)

    top = conv("lateral", "4", maps[2])
    middle = conv("lateral", "3", maps[1]) + top
    bottom = conv("lateral", "2", maps[0]) + middle.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for got, name, x in zip(fpn(maps), "234", (bottom, middle, top), strict=True):
        torch.testing.assert_close(got, conv("output", name, x), rtol=1e-12, atol=1e-12)


def test_pyramid_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="every stride must divide the next"):
        FPN([3, 4], [4, 6], 8, names=["2", "3"])
    with pytest.raises(ValueError, match="top_down must be one of"):
        FPN([3], [4], 8, names=["2"], top_down="cubic")
    with pytest.raises(ValueError, match="features must hold 2 maps, got 1"):
        FPN([3, 4], [4, 8], 8, names=["2", "3"])([torch.zeros(1, 3, 2, 2)])


@pytest.mark.parametrize(
    ("name", "kind"), [("bn", nn.BatchNorm2d), ("syncbn", nn.SyncBatchNorm), ("gn", nn.GroupNorm), ("none", type(None))]
)
def test_norm_by_name(name, kind):
    assert type(make_norm(name, 48)) is kind
    conv = ConvNorm(3, 48, 3, norm=name)
    assert (conv.bias is None) == (name != "none")
    assert conv(torch.randn(2, 3, 5, 5)).min() >= 0  # ReLU; syncbn computes without a process group
    assert {k.split(".")[0] for k in conv.state_dict()} == (
        {"weight", "norm"} if name != "none" else {"weight", "bias"}
    )


def test_group_norm_takes_a_group_count_that_divides():
    assert make_norm("gn", 48).num_groups == 16 and make_norm("gn", 256).num_groups == 32
    with pytest.raises(ValueError, match="norm must be one of bn, syncbn, gn, none, got 'ln'"):
        make_norm("ln", 8)
