"""float64 on devices that have none: Apple's GPUs (MPS), and those of Intel that leave it out (XPU)."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT = {"mps", "xpu"}


def widest(device: torch.device) -> torch.dtype:
    """The dtype of sums on ``device``: float64, or float32 where there is none."""
    return torch.float32 if device.type in WITHOUT else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """``tensor`` in float64: on its device, or on the CPU where its device has none."""
    return (tensor.cpu() if tensor.device.type in WITHOUT else tensor).double()
