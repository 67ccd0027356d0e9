"""Uncertainty and selection of points: PointRend (Kirillov et al. 2020), sections 3.1 and 3.2.

Shapes: N images (or masks), C classes, H W grid, P points. None of these functions has a gradient, since selection is
piecewise constant: the outputs do not require grad even if the logits do. Autocast does not change them: each computes
on the logits in the dtype they have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, library

from .. import reference
from ..reference import _checks as check
from ..reference._types import explained
from ..reference.point_sample import PADDING_MODES, of_masks
from ..reference.uncertain_points import check_draws, draw_counts
from . import _register as _registry


@explained
def uncertainty(logits: Tensor, class_index: Tensor | None = None) -> Tensor:
    """The negative margin between the two largest logits; larger means more uncertain.

    ``C >= 2``: second largest minus largest logit. ``C == 1``: ``-|logit|``. With ``class_index`` (instance masks):
    ``-|logits[n, class_index[n]]|``.

    Args:
        logits: ``[N, C, H, W]`` float32, float64, float16 or bfloat16; contiguous and channels_last are read in place.
        class_index: ``[N]`` int64 in ``[0, C)``, or ``None``.

    Returns:
        ``[N, H, W]`` float32, <= 0. A position is NaN if one of its logits is NaN, or if its two largest logits are the
        same infinity.

    Raises:
        ValueError: a wrong rank or shape, no channel, or no cell.
        TypeError: a wrong dtype.
        IndexError: a class outside ``[0, C)`` (checked on the CPU).
        RuntimeError: tensors on different devices.

    No gradient. Autocast does not change the dtype. Source: PointRend (Kirillov et al. 2020), section 3.1.
    """
    if _registry.use_reference("uncertainty", logits):
        return reference.uncertainty(logits, class_index)
    return torch.ops.rendseg.uncertainty(logits, class_index)


@explained
def uncertain_points(logits: Tensor, num_points: int, class_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The most uncertain cells of each image.

    Args:
        logits: ``[N, C, H, W]`` float32, float64, float16 or bfloat16; contiguous and channels_last are read in place.
        num_points: how many; at most ``H*W`` are returned.
        class_index: ``[N]`` int64 in ``[0, C)``, or ``None``; see ``uncertainty``.

    Returns:
        ``(indices [N, k] int64, coords [N, k, 2] float32)`` with ``k = min(num_points, H*W)``. Indices ascend,
        ties at the threshold go to the smallest indices, and NaN is the most uncertain. The result is the same bit for
        bit from run to run and for any number of threads. ``coords`` are the cell centres
        ``((col + 0.5) / W, (row + 0.5) / H)``.

    Raises:
        ValueError: ``num_points <= 0``, a wrong rank or shape, no channel, or no cell.
        TypeError: a wrong dtype.
        IndexError: a class outside ``[0, C)`` (checked on the CPU).
        RuntimeError: tensors on different devices.

    No gradient. Autocast does not change the dtype. Source: PointRend (Kirillov et al. 2020), section 3.1.
    """
    if _registry.use_reference("uncertain_points", logits):
        return reference.uncertain_points(logits, num_points, class_index)
    return torch.ops.rendseg.uncertain_points(logits, num_points, class_index)


@explained
def sample_uncertain_points(
    logits: Tensor,
    num_points: int,
    oversample_ratio: float = 3.0,
    importance_ratio: float = 0.75,
    *,
    class_index: Tensor | None = None,
    image_index: Tensor | None = None,
    padding_mode: str = "zeros",
    align_corners: bool = False,
    generator: Generator | None = None,
    random_coords: Tensor | None = None,
) -> Tensor:
    """Selection for training: the most uncertain of many random points, and some more at random.

    It draws ``int(oversample_ratio * num_points)`` uniform points, samples the logits there (bilinear, rounded to the
    dtype of ``logits``), and takes the uncertainty of the sampled values. It keeps the
    ``int(importance_ratio * num_points)`` most uncertain points in the order of drawing, and appends uniform points up
    to ``num_points``.

    Args:
        logits: ``[N, C, H, W]`` float32, float64, float16 or bfloat16; contiguous and channels_last are read in place.
            Masks, bool or uint8, are copied to float32.
        num_points: points returned for each image.
        oversample_ratio: at least 1 and finite.
        importance_ratio: in ``[0, 1]``.
        class_index: ``[N]`` int64 in ``[0, C)``, or ``None``; see ``uncertainty``.
        image_index: ``[N]`` int64 in ``[0, B)`` for logits ``[B, C, H, W]``: mask n is
            ``logits[image_index[n], class_index[n]]``, read where it lies. ``None``: mask n is in image n.
        padding_mode: ``"zeros"`` or ``"border"``, as in ``F.grid_sample``.
        align_corners: as in ``F.grid_sample``.
        generator: source of the draws, on the device of ``logits``; ``None`` means the default one.
            ``torch.manual_seed`` reproduces the draws, which are those of Philox, not of ``torch.rand``. On the CPU
            the generator gives one key, and the draws are the same for any number of threads, for every instruction
            set and for the reference. On a GPU they are those at the state of the generator, which then moves on by
            one counter.
        random_coords: ``[N, Q, 2]`` float32 instead of the draws: first the candidates, then the uniform points. A
            coordinate that is not finite is outside the map. With ``"zeros"`` its value is zero; with ``"border"`` it
            is that of the nearest edge, and NaN takes the lower edge.

    Returns:
        ``coords [N, num_points, 2]`` float32.

    Raises:
        ValueError: ``num_points <= 0``, a ratio or an option out of range, a wrong rank or shape, no channel, or no
            cell.
        TypeError: a wrong dtype.
        IndexError: a class outside ``[0, C)``, or an image outside ``[0, B)`` (checked on the CPU).
        RuntimeError: tensors or generator on different devices.

    No gradient. Autocast does not change the dtype. Source: PointRend (Kirillov et al. 2020), section 3.2.
    """
    logits = of_masks(logits)
    function = (
        reference.sample_uncertain_points
        if _registry.use_reference("sample_uncertain_points", logits)
        else torch.ops.rendseg.sample_uncertain_points
    )
    return function(
        logits,
        num_points,
        oversample_ratio,
        importance_ratio,
        class_index=class_index,
        image_index=image_index,
        padding_mode=padding_mode,
        align_corners=align_corners,
        generator=generator,
        random_coords=random_coords,
    )


def _uncertainty_fake(logits: Tensor, class_index: Tensor | None) -> Tensor:
    check.logits(logits)
    check.class_index(class_index, logits)
    n, _, height, width = logits.shape
    return logits.new_empty((n, height, width), dtype=torch.float32)


def _uncertain_points_fake(logits: Tensor, num_points: int, class_index: Tensor | None) -> tuple[Tensor, Tensor]:
    check.logits(logits)
    check.num_points(num_points)
    check.class_index(class_index, logits)
    n, _, height, width = logits.shape
    k = torch.sym_min(num_points, height * width)
    return logits.new_empty((n, k), dtype=torch.int64), logits.new_empty((n, k, 2), dtype=torch.float32)


def _sample_uncertain_points_fake(
    logits: Tensor,
    num_points: int,
    oversample_ratio: float,
    importance_ratio: float,
    *,
    class_index: Tensor | None,
    image_index: Tensor | None,
    padding_mode: str,
    random_coords: Tensor | None,
    **rest: Any,
) -> Tensor:
    check.logits(logits)
    check.class_index(class_index, logits, image_index)
    candidates, _, uniform = draw_counts(num_points, oversample_ratio, importance_ratio)
    check.option(padding_mode, "padding_mode", PADDING_MODES)
    masks = (logits if image_index is None else image_index).shape[0]
    check_draws(random_coords, logits, masks, candidates + uniform)
    return logits.new_empty((masks, num_points, 2), dtype=torch.float32)


for _name, _reference, _fake in (
    ("uncertainty", reference.uncertainty, _uncertainty_fake),
    ("uncertain_points", reference.uncertain_points, _uncertain_points_fake),
    ("sample_uncertain_points", reference.sample_uncertain_points, _sample_uncertain_points_fake),
):
    _registry.register(_name, reference=_reference, fake=_fake)
    # Nothing here is differentiable: autograd is passed by, so that outputs never require grad.
    _registry.impl(_name, library.fallthrough_kernel, "Autograd")
