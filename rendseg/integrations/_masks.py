"""The pieces that several code bases share: sampling at points, selection of points, losses of matched pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..nn.mask_criterion import Assignment, Pairs, to_pairs

# What grid_sample and these functions have in common; anything else goes to the original.
_MODES = ("bilinear", "nearest")
_PADDINGS = ("zeros", "border")


def sampler(
    original: Callable[..., Any], padding_mode: str = "zeros", align_corners: bool = False
) -> Callable[..., Any]:
    """``point_sample(input, coords, mode=, padding_mode=, align_corners=)`` with the given defaults."""

    def point_sample(input: Tensor, point_coords: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = {"mode": "bilinear", "padding_mode": padding_mode, "align_corners": align_corners, **kwargs}
        usual = (
            not args
            and set(options) == {"mode", "padding_mode", "align_corners"}
            and options["mode"] in _MODES
            and options["padding_mode"] in _PADDINGS
            and input.dim() == 4
            and input.is_floating_point()
            and point_coords.dim() in (3, 4)
            and input.shape[0] == point_coords.shape[0]
            and input.shape[1:].numel() > 0
        )
        if not usual:
            return original(input, point_coords, *args, **kwargs)
        if torch.is_autocast_enabled(input.device.type):
            input = input.float()  # as autocast does for grid_sample
        coords = point_coords if point_coords.dtype == torch.float64 else point_coords.float()
        return ops.point_sample(input, coords, **options)

    return point_sample


def index_pairs(indices: Sequence[Sequence[Any]], device: torch.device) -> Pairs:
    """The pairs of one layer, from a list of ``(queries, targets)`` for each image, tensors or arrays."""
    host: Assignment = [[(_array(query), _array(target)) for query, target in indices]]
    return to_pairs(host, device)[0]


def _array(index: Any) -> np.ndarray:
    return np.asarray(index.cpu() if isinstance(index, Tensor) else index, dtype=np.int64)


def index_tensors(layer: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[Tensor, Tensor]]:
    """What the matchers of DETR's family return: a pair of int64 tensors on the host for each image."""
    return [
        (torch.as_tensor(query, dtype=torch.int64), torch.as_tensor(target, dtype=torch.int64))
        for query, target in layer
    ]


def where_logits_are(tensors: Sequence[Tensor], logits: Tensor) -> list[Tensor]:
    return [tensor.to(logits.device) for tensor in tensors]
