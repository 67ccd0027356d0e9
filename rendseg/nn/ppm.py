"""Pyramid pooling: Pyramid Scene Parsing Network (Zhao et al. 2017), section 3.2. N images, D channels, H W the map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import ConvNorm

POOLS = ("avg", "max", "prroi")
ORDERS = ("input_first", "input_last")


def _axis_weights(size: int, bins: int, like: Tensor) -> Tensor:
    """``[bins, size]``: share of every cell in the mean, over ``bins`` equal parts of ``[0, size]``, of the piecewise
    linear function that is the cell's value at its index and falls to 0 beyond the last one."""
    edge = torch.arange(bins + 1, device=like.device, dtype=torch.float32) * (size / bins)
    t = (edge[:, None] - torch.arange(size, device=like.device, dtype=torch.float32)).clamp(-1, 1)
    integral = 0.5 + t - 0.5 * t * t.abs()  # of the hat function, from its left end
    return ((integral[1:] - integral[:-1]) * (bins / size)).to(like.dtype)


def precise_pool(x: Tensor, bins: int) -> Tensor:
    """``[N, D, H, W]`` -> ``[N, D, bins, bins]``: Precise RoI pooling (Jiang et al. 2018, section 3.3) of the whole
    map. The region is ``(0, 0, W, H)``, and the value of cell ``i`` is at coordinate ``i``. Any floating dtype."""
    rows, columns = _axis_weights(x.shape[2], bins, x), _axis_weights(x.shape[3], bins, x)
    return rows @ (x @ columns.t())


class PPM(nn.Module):
    """``[N, in_channels, H, W]`` -> ``[N, out_channels, H, W]``: the map and its pooled forms, concatenated and fused.

    Each ``b`` of ``bins`` has a branch (``branches.0`` ..): the map is pooled to ``b x b`` cells, goes through a 1x1
    convolution to ``channels`` with ``norm`` and ReLU, and is upsampled bilinearly to the map's size. The convolution
    ``fuse`` of ``fuse_kernel``, with ``norm`` and ReLU, then reads the concatenation. Implementations differ in these
    switches:

    * ``pool``: ``avg``, ``max`` (adaptive), or ``prroi`` (Precise RoI pooling of the whole map);
    * ``conv_before_upsample=False``: the convolution and its norm's statistics see the upsampled map;
    * ``branch_norm_relu=False``: branches are plain convolutions with a bias;
    * ``order``: the input before (``input_first``) or after the branches; ``bins_descending`` reverses the branches;
    * ``fuse_kernel`` 1 or 3, and ``align_corners`` of the upsampling.

    Modules are numbered as in ``bins``, in every order of concatenation. Under autocast the convolutions run in its
    dtype. Errors: ``ValueError`` for unknown switches, and in training for one image with batch normalisation if a
    branch has a single cell.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        *,
        bins: Sequence[int] = (1, 2, 3, 6),
        pool: str = "avg",
        conv_before_upsample: bool = True,
        branch_norm_relu: bool = True,
        order: str = "input_first",
        bins_descending: bool = False,
        fuse_kernel: int = 3,
        align_corners: bool = False,
        norm: str = "bn",
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("channels", channels), ("out_channels", out_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not bins or any(b < 1 for b in bins):
            raise ValueError(f"bins must be numbers of at least 1, got {list(bins)}")
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        if fuse_kernel not in (1, 3):
            raise ValueError(f"fuse_kernel must be 1 or 3, got {fuse_kernel}")
        self.bins = tuple(bins)
        self.pool = pool
        self.conv_before_upsample = conv_before_upsample
        self.order = order
        self.bins_descending = bins_descending
        self.align_corners = align_corners
        self.branches = nn.ModuleList(
            ConvNorm(in_channels, channels, 1, norm=norm if branch_norm_relu else "none", relu=branch_norm_relu)
            for _ in bins
        )
        self.fuse = ConvNorm(in_channels + len(bins) * channels, out_channels, fuse_kernel, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        parts = []
        for bins, branch in zip(self.bins, self.branches, strict=True):
            y = self._pooled(x, bins)
            if self.conv_before_upsample:
                if self.training and bins == 1 and x.shape[0] == 1 and isinstance(branch.norm, nn.BatchNorm2d):
                    raise ValueError(
                        "pyramid pooling to 1 cell needs at least 2 images per process for batch normalisation: raise "
                        "train.batch_size, or set the decoder's norm to gn or syncbn (several processes)"
                    )
                y = branch(y)
            y = F.interpolate(y, size=size, mode="bilinear", align_corners=self.align_corners)
            parts.append(y if self.conv_before_upsample else branch(y))
        if self.bins_descending:
            parts.reverse()
        parts = [x, *parts] if self.order == "input_first" else [*parts, x]
        return self.fuse(torch.cat(parts, 1))

    def _pooled(self, x: Tensor, bins: int) -> Tensor:
        if self.pool == "prroi":
            return precise_pool(x, bins)
        return F.adaptive_avg_pool2d(x, bins) if self.pool == "avg" else F.adaptive_max_pool2d(x, bins)
