"""The coarse mask head: detectron2's names, and the layers written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rendseg.nn import CoarseMaskHead, roi_point_sample


@pytest.mark.parametrize("channels", [6, 11])
def test_layers(channels: int) -> None:
    torch.manual_seed(0)
    head = CoarseMaskHead(channels, 3, conv_channels=8, hidden_channels=10)
    state, x = head.state_dict(), torch.randn(2, channels, 14, 14)
    names = [*["reduce_channel_dim_conv"] * (channels > 8), "reduce_spatial_dim_conv", "fc1", "fc2", "prediction"]
    assert list(state) == [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    y = x
    if channels > 8:
        y = F.conv2d(y, state["reduce_channel_dim_conv.weight"]).relu()
    y = F.conv2d(y, state["reduce_spatial_dim_conv.weight"], stride=2).relu().flatten(1)
    for name in ("fc1", "fc2"):
        y = (y @ state[f"{name}.weight"].t()).relu()
    wanted = (y @ state["prediction.weight"].t()).view(2, 3, 7, 7)
    torch.testing.assert_close(head(x), wanted)
    assert head(x[:0]).shape == (0, 3, 7, 7)


def test_points_of_boxes() -> None:
    """A list of maps, image by image; gradients reach the maps."""
    torch.manual_seed(1)
    maps = [torch.randn(2, 3, 8, 10, requires_grad=True), torch.randn(2, 2, 4, 5)]
    boxes, coords = [torch.rand(1, 4), torch.rand(2, 4)], torch.rand(3, 6, 2)
    got = roi_point_sample(maps, boxes, coords)
    for n, (image, box) in enumerate([(0, boxes[0][0]), (1, boxes[1][0]), (1, boxes[1][1])]):
        at = 2 * (box[:2] + coords[n] * (box[2:] - box[:2])) - 1
        parts = [F.grid_sample(m[image : image + 1], at[None, :, None], align_corners=False)[0, ..., 0] for m in maps]
        torch.testing.assert_close(got[n], torch.cat(parts))
    got.sum().backward()
    assert maps[0].grad is not None


@pytest.mark.bad_input
def test_bad_input() -> None:
    with pytest.raises(ValueError, match="input_size must be even, since a convolution halves it, got 7"):
        CoarseMaskHead(4, 2, input_size=7)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        CoarseMaskHead(4, 2, num_layers=0)
    with pytest.raises(ValueError, match=r"x must have shape \[N, 4, 14, 14\], got \[1, 4, 7, 7\]"):
        CoarseMaskHead(4, 2)(torch.zeros(1, 4, 7, 7))
    with pytest.raises(ValueError, match=r"coords must have shape \[N, P, 2\] with N = 1 boxes, got \[2, 3, 2\]"):
        roi_point_sample(torch.zeros(1, 2, 4, 4), [torch.rand(1, 4)], torch.rand(2, 3, 2))
