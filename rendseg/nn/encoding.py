"""The Encoding layer as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops


class Encoding(nn.Module):
    """Residual encoding of a feature map with learned codewords.

    ``[B, D, H, W]`` or ``[B, D, M]`` -> ``[B, K, D]``.

    Each position gets the weights ``softmax_k(scale_k * ||x - c_k||^2)`` over the codewords, and its residuals are
    summed with those weights. The sign of ``scale`` is used as it is; it starts negative, so that near codewords get
    the larger weights.

    The parameters are ``codewords [K, D]``, at first uniform in ``+-1 / sqrt(K * D)``, and ``scale [K]``, at first
    uniform in ``(-1, 0)``. Source: Zhang et al., "Context Encoding for Semantic Segmentation", 2018, section 3.1.

    Args:
        channels: ``D``, the channels of the feature map.
        num_codes: ``K``, the number of codewords.

    Raises:
        ValueError: an argument below 1.
    """

    def __init__(self, channels: int, num_codes: int) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        if num_codes < 1:
            raise ValueError(f"num_codes must be at least 1, got {num_codes}")
        self.channels, self.num_codes = channels, num_codes
        self.codewords = nn.Parameter(torch.empty(num_codes, channels))
        self.scale = nn.Parameter(torch.empty(num_codes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = (self.num_codes * self.channels) ** -0.5
        nn.init.uniform_(self.codewords, -bound, bound)
        nn.init.uniform_(self.scale, -1, 0)

    def forward(self, x: Tensor) -> Tensor:
        return ops.encode(x, self.codewords, self.scale)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, num_codes={self.num_codes}"
