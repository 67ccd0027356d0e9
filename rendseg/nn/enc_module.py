"""The Context Encoding Module: Context Encoding for Semantic Segmentation (Zhang et al. 2018), section 3.

N images, D channels, K codes, H W size of the map.
"""

from __future__ import annotations

from torch import Tensor, nn

from .conv import ConvNorm
from .encoding import Encoding

REDUCTIONS = ("mean", "sum")


class EncModule(nn.Module):
    """``x [N, D, H, W]`` -> the gated maps ``relu(x + x * gate) [N, D, H, W]`` and the encoding ``[N, D]``.

    The encoding comes from five steps: ``project`` (1x1 convolution, norm, ReLU); ``encoding`` (``Encoding`` with K
    codes, summed over positions); ``norm``, a batch norm over the K codes; ReLU; and the mean or sum over the codes
    (``reduction``: the paper writes a sum, every implementation takes the mean). The gate is the sigmoid of ``gate``, a
    linear layer of the encoding. It applies to ``x`` itself, not to its projection. ``project_bias`` keeps the bias of
    the 1x1 convolution, as PaddleSeg does.

    Dtypes: under autocast the convolution and the linear layer run in its dtype, the codes and their norm in float32.
    """

    def __init__(
        self,
        channels: int,
        num_codes: int = 32,
        *,
        norm: str = "bn",
        project_bias: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        self.reduction = reduction
        self.project = ConvNorm(channels, channels, 1, norm=norm, bias=True if project_bias else None)
        self.encoding = Encoding(channels, num_codes)
        self.norm = nn.SyncBatchNorm(num_codes) if norm == "syncbn" else nn.BatchNorm1d(num_codes)
        self.relu = nn.ReLU()
        self.gate = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.relu(self.norm(self.encoding(self.project(x))))
        encoding = codes.mean(1) if self.reduction == "mean" else codes.sum(1)
        gate = self.gate(encoding).sigmoid().to(x.dtype)[:, :, None, None]
        return (x + x * gate).relu(), encoding

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
