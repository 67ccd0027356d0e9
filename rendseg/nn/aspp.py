"""Atrous spatial pyramid pooling: DeepLabV3 (Chen et al. 2017), section 3.3. N images, H W size of the map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .conv import ConvNorm, SeparableConvNorm


def default_rates(stride: int) -> tuple[int, ...]:
    """The atrous rates for a map of ``stride``: 6, 12, 18 at stride 16, twice that at 8, in proportion at others."""
    return tuple(max(1, rate * 16 // stride) for rate in (6, 12, 18))


class ASPP(nn.Module):
    """``[N, in_channels, H, W]`` -> ``[N, channels, H, W]``: parallel branches, concatenated, then ``project``.

    Each branch has ``channels`` channels, ``norm`` and ReLU. ``branches.0`` is a 1x1 convolution. ``branches.1`` .. are
    3x3 convolutions of the given ``rates``, depthwise separable with ``separable``. ``pool`` (with ``image_pool``) is a
    1x1 convolution of the mean over the map, expanded to the map's size. ``project`` is a convolution with ``norm`` and
    ReLU. Its ``project_kernel`` is 3 in mmsegmentation and 1 in the paper, TensorFlow, torchvision and PaddleSeg.
    ``dropout`` comes last; it drops single elements, as in torchvision and PaddleSeg.

    Errors: ``ValueError`` for sizes below 1, and in training for a single image whose pooled vector a batch norm could
    not normalise.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 256,
        rates: Sequence[int] = (6, 12, 18),
        *,
        norm: str = "bn",
        separable: bool = False,
        depthwise_relu: bool = True,
        image_pool: bool = True,
        project_kernel: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if in_channels < 1 or channels < 1:
            raise ValueError(f"in_channels and channels must be at least 1, got {in_channels} and {channels}")
        if any(rate < 1 for rate in rates):
            raise ValueError(f"rates must be at least 1, got {list(rates)}")
        if project_kernel not in (1, 3):
            raise ValueError(f"project_kernel must be 1 or 3, got {project_kernel}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.rates = tuple(rates)
        branches: list[nn.Module] = [ConvNorm(in_channels, channels, 1, norm=norm)]
        for rate in rates:
            if separable:
                branches.append(
                    SeparableConvNorm(in_channels, channels, 3, norm=norm, dilation=rate, depthwise_relu=depthwise_relu)
                )
            else:
                branches.append(ConvNorm(in_channels, channels, 3, norm=norm, dilation=rate))
        self.branches = nn.ModuleList(branches)
        self.pool = ConvNorm(in_channels, channels, 1, norm=norm) if image_pool else None
        width = channels * (len(branches) + int(image_pool))
        self.project = ConvNorm(width, channels, project_kernel, norm=norm)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [branch(x) for branch in self.branches]
        if self.pool is not None:
            if x.shape[0] == 1 and _needs_batch(self.pool.norm):
                raise ValueError(
                    "the batch norm after image pooling cannot train on 1 image per step: raise train.batch_size, or "
                    "set model.decoder.norm to gn or model.decoder.image_pool to false"
                )
            pooled = self.pool(x.mean((2, 3), keepdim=True))
            outputs.append(pooled.expand(-1, -1, x.shape[2], x.shape[3]))
        return self.dropout(self.project(torch.cat(outputs, 1)))


def _needs_batch(norm: nn.Module | None) -> bool:
    """Whether ``norm`` computes statistics over the images of this process alone."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not norm.training:
        return False
    if not isinstance(norm, nn.SyncBatchNorm):
        return True
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
