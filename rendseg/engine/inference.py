"""Prediction of an image from several views: sliding windows, scales and mirror images. B images, C classes.

``rendseg eval`` and ``rendseg predict`` both come here; the options are those of ``EvalConfig``, and
``eval_presets.py`` says which framework does what. For every view (scale, flip) the image is resized and flipped,
predicted whole or window by window (overlapping windows are averaged), flipped back, resized bilinearly to the size
that is asked for, and added to the sum, whose argmax is the label. PointRend refines within each window and scale.

One set of scores is kept per kind of prediction (``coarse``, ``refined``), for any number of views; with a single
view of the image as it is, there are no full-size scores at all (``network.predict(output="labels")``). Windows of an
image at its own size are worked off in strips: only the scores of one row of windows are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rendseg._float64 import WITHOUT
from rendseg.engine.config import ConfigError, EvalConfig

KINDS = ("coarse", "refined")
Scores = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------------ geometry


def scaled_size(height: int, width: int, scale: float, options: EvalConfig) -> tuple[int, int]:
    """(height, width) at a scale, by ``options.rounding``, ``base_size``, ``max_size`` and ``scale_divisor``."""
    base, short, long = options.base_size, min(height, width), max(height, width)
    if options.rounding == "mmcv":  # mmcv: Resize, rescale_size
        box: Sequence[int]
        if isinstance(base, list):
            box = [int(side * scale) for side in base]
        else:
            box = [_half_up(side * scale) for side in (height, width)]
        factor = min(max(box) / long, min(box) / short)
        size = [_half_up(side * factor) for side in (height, width)]
    elif options.rounding == "long_side":  # PyTorch-Encoding: MultiEvalModule
        target = math.ceil((base if isinstance(base, int) else long) * scale)
        size = [target if side == long else _half_up(side * target / long) for side in (height, width)]
    elif options.rounding == "short_side":  # detectron2: ResizeShortestEdge
        target = _half_up((base if isinstance(base, int) else short) * scale)
        sides = [float(target) if side == short else target / short * side for side in (height, width)]
        if options.max_size is not None and max(sides) > options.max_size:
            factor = options.max_size / max(sides)
            sides = [side * factor for side in sides]
        size = [_half_up(side) for side in sides]
    else:
        size = [_half_up(side * scale) for side in (height, width)]
    divisor = options.scale_divisor or 1
    high, wide = (-(-max(1, side) // divisor) * divisor for side in size)
    return high, wide


def _half_up(value: float) -> int:
    return int(value + 0.5)


def window_spans(length: int, window: int, stride: int, border: str = "shift") -> list[tuple[int, int]]:
    """``(start, end)`` of the windows along one side; together they cover ``length``.

    ``border="shift"``: the last one is moved back into the image, and is all of a side that is shorter than it.
    ``border="pad"``: all start on the grid, the last one is cut off at the end.
    """
    count = max(0, -(-(length - window) // stride)) + 1
    if border == "pad":
        return [(i * stride, min(i * stride + window, length)) for i in range(count)]
    ends = [min(i * stride + window, length) for i in range(count)]
    return [(max(0, end - window), end) for end in ends]


def is_plain(height: int, width: int, size: Sequence[int], options: EvalConfig) -> bool:
    """Whether the only view is the image itself, predicted whole and wanted at its own size."""
    if len(options.scales) > 1 or options.flip or options.flip_vertical or tuple(size) != (height, width):
        return False
    if scaled_size(height, width, options.scales[0], options) != (height, width):
        return False
    if options.window is None:
        return True
    if options.window_border == "pad":
        return options.window == [height, width]
    return options.window[0] >= height and options.window[1] >= width


def black(mean: Sequence[float], std: Sequence[float]) -> list[float]:
    """What a black pixel is after normalisation: the filling of ``window_border: pad``."""
    return [-m / s for m, s in zip(mean, std, strict=True)]


# ---------------------------------------------------------------------------------------------------- prediction


@torch.no_grad()
def predict_labels(
    network: Any, images: Tensor, size: Sequence[int], options: EvalConfig, padding: Sequence[float] = ()
) -> dict[str, Tensor]:
    """Label maps ``[B, *size]`` of the coarse logits, upsampled bilinearly, and of the refined prediction.

    Args:
        network: in evaluation mode, with the ``predict`` and ``upsample`` of ``rendseg.models.Segmenter``.
        images: ``[B, C_in, H, W]``, normalised.
        size: (height, width) of the label maps.
        padding: the value of each channel where windows reach over the image (see :func:`black`); none: zeros.
    """
    height, width = images.shape[-2:]
    if is_plain(height, width, size, options):
        output = network.predict(images, output="labels")
        coarse = network.upsample(output.coarse, images.shape[-2:]).argmax(1)
        return {"coarse": coarse, "refined": output.labels}
    if _fits_strips(height, width, size, options):
        return _strips(network, images, options, padding)
    return {kind: _labels(scores) for kind, scores in predict_scores(network, images, size, options, padding).items()}


def _fits_strips(height: int, width: int, size: Sequence[int], options: EvalConfig) -> bool:
    """Whether rows of labels are final once the windows above them are done: one scale, no resizing, and no views
    upside down, whose windows come in another order."""
    if options.window is None or options.flip_vertical or len(options.scales) > 1 or tuple(size) != (height, width):
        return False
    return scaled_size(height, width, options.scales[0], options) == (height, width)


def _strips(network: Any, images: Tensor, options: EvalConfig, padding: Sequence[float]) -> dict[str, Tensor]:
    """The labels that :func:`predict_scores` gives, with scores of the rows of one row of windows at a time."""
    assert options.window is not None and options.stride is not None
    outer, inner, softmax = _views(options)
    (batch, height, width), labels = (images.shape[0], *images.shape[-2:]), {}
    rows, columns = _grid(height, width, options)
    nothing: Scores = {}
    # The last of each view: sums of scores by kind, from row `start` on.
    views = [(flip, images.flip(flip) if flip else images, dict(nothing)) for flip in outer]
    counts, start = images.new_zeros(1, 1, 0, width), 0
    for (top, bottom), (following, _) in zip(rows, [*rows[1:], (height, height)], strict=True):
        counts = _lengthened(counts, bottom - start)
        for left, right in columns:
            counts[:, :, top - start :, left:right] += 1
        for _, view, sums in views:
            for left, right in columns:
                for kind, scores in _window(network, view, (top, bottom, left, right), inner, options, padding).items():
                    if kind not in sums:
                        sums[kind] = scores.new_zeros(*scores.shape[:2], 0, width)
                    sums[kind] = _lengthened(sums[kind], bottom - start)
                    sums[kind][:, :, top - start :, left:right] += scores
        done = following - start  # rows that no further window reaches
        for kind in views[0][2]:
            total = None
            for flip, _, sums in views:
                part = sums[kind][:, :, :done].div_(counts[:, :, :done])
                part = part.flip(flip) if flip else part
                part = part.softmax(1) if softmax else part
                total = part if total is None else total.add_(part)
            found = _labels(total)  # type: ignore[arg-type]
            if kind not in labels:
                labels[kind] = found.new_empty(batch, height, width)
            labels[kind][:, start:following] = found
            for _, _, sums in views:
                sums[kind] = sums[kind][:, :, done:].clone()
        counts, start = counts[:, :, done:], following
    return labels if "coarse" in labels else {kind: labels["refined"] for kind in KINDS}


def _lengthened(values: Tensor, rows: int) -> Tensor:
    """``[B, C, rows, W]``: the values and zeros below them."""
    return values if values.shape[2] == rows else F.pad(values, (0, 0, 0, rows - values.shape[2]))


@torch.no_grad()
def predict_scores(
    network: Any, images: Tensor, size: Sequence[int], options: EvalConfig, padding: Sequence[float] = ()
) -> Scores:
    """The scores ``[B, C, *size]`` whose argmax :func:`predict_labels` takes, as sums over the views (no mean: the
    argmax is the same); of a single view the logits, unless ``merge`` is ``exp``. Arguments as there."""
    aligned = getattr(network, "align_corners", False) if options.align_corners == "model" else options.align_corners
    outer, inner, softmax = _views(options)
    totals: Scores = {}
    source, (height, width) = images, images.shape[-2:]
    for scale in options.scales:
        view = _resized(source, scaled_size(height, width, scale, options), options)
        if options.chain_scales:
            source = view
        for flip in outer:
            for kind, scores in _slide(network, view.flip(flip), inner, options, padding).items():
                scores = scores.flip(flip)
                if tuple(scores.shape[-2:]) != tuple(size):
                    scores = F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=aligned)
                if softmax:
                    scores = scores.softmax(1)
                totals[kind] = totals[kind].add_(scores) if kind in totals else scores
    return totals if "coarse" in totals else {kind: totals["refined"] for kind in KINDS}


Flips = list[tuple[int, ...]]


def _views(options: EvalConfig) -> tuple[Flips, Flips, bool]:
    """The dimensions that are flipped, of each view of the image and of each view of a window, and whether
    probabilities are added up."""
    columns: Flips = [(), (3,)] if options.flip else [()]
    rows: Flips = [(), (2,)] if options.flip_vertical else [()]
    flips = [column + row for row, column in product(rows, columns)]
    softmax = options.merge == "softmax" and len(options.scales) * len(flips) > 1
    # PyTorch-Encoding adds mirror images in each window, the others whole images.
    return ([()], flips, softmax) if options.merge == "exp" else (flips, [()], softmax)


def _resized(images: Tensor, size: tuple[int, int], options: EvalConfig) -> Tensor:
    if tuple(images.shape[-2:]) == size:
        return images
    aligned, antialias = options.image_resize == "aligned", options.image_resize == "antialias"
    return F.interpolate(images, size=size, mode="bilinear", align_corners=aligned, antialias=antialias)


def _slide(
    network: Any,
    view: Tensor,
    flips: Sequence[tuple[int, ...]],
    options: EvalConfig,
    padding: Sequence[float],
) -> Scores:
    """Scores of a view, at its size; overlapping windows are averaged."""
    if options.window is None:
        return _scores(network, view, flips, options)
    height, width = view.shape[-2:]
    totals: Scores = {}
    counts = view.new_zeros(1, 1, height, width)
    for (top, bottom), (left, right) in product(*_grid(height, width, options)):
        for kind, scores in _window(network, view, (top, bottom, left, right), flips, options, padding).items():
            if kind not in totals:
                totals[kind] = scores.new_zeros(*scores.shape[:2], height, width)
            totals[kind][:, :, top:bottom, left:right] += scores
        counts[:, :, top:bottom, left:right] += 1
    return {kind: scores.div_(counts) for kind, scores in totals.items()}


def _window(
    network: Any,
    view: Tensor,
    box: tuple[int, int, int, int],
    flips: Sequence[tuple[int, ...]],
    options: EvalConfig,
    padding: Sequence[float],
) -> Scores:
    """Scores of the window (top, bottom, left, right)."""
    top, bottom, left, right = box
    crop = view[:, :, top:bottom, left:right]
    if options.window_border == "pad":
        assert options.window is not None
        crop = _padded(crop, options.window, padding)
    found = _scores(network, crop, flips, options)
    return {kind: scores[:, :, : bottom - top, : right - left] for kind, scores in found.items()}


def _grid(height: int, width: int, options: EvalConfig) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(top, bottom) and (left, right) of the rows and columns of windows."""
    assert options.window is not None and options.stride is not None
    rows, columns = (
        window_spans(length, window, stride, options.window_border)
        for length, window, stride in zip((height, width), options.window, options.stride, strict=True)
    )
    return rows, columns


def _padded(crop: Tensor, window: Sequence[int], padding: Sequence[float]) -> Tensor:
    """The crop at the top left of a full window of ``padding``."""
    height, width = crop.shape[-2:]
    if [height, width] == list(window):
        return crop
    full = crop.new_zeros(*crop.shape[:2], *window)
    if padding:
        full += crop.new_tensor(padding)[:, None, None]
    full[:, :, :height, :width] = crop
    return full


def _scores(network: Any, images: Tensor, flips: Sequence[tuple[int, ...]], options: EvalConfig) -> Scores:
    """Logits ``[B, C, H, W]`` of images or windows; with ``merge: exp`` their sum over ``flips``, exponentiated."""
    if options.merge != "exp":
        return _logits(network, images)
    if images.device.type in WITHOUT:
        raise ConfigError(
            f"eval.merge: exp needs float64, which {images.device.type} has not: set eval.merge=softmax or device=cpu"
        )
    totals: Scores = {}
    for flip in flips:
        for kind, logits in _logits(network, images.flip(flip)).items():
            logits = logits.flip(flip)
            totals[kind] = totals[kind].add_(logits) if kind in totals else logits
    # float32 would be infinite from 88 on, and so the class that comes first rather than the best one.
    return {kind: logits.double().exp_() for kind, logits in totals.items()}


def _logits(network: Any, images: Tensor) -> Scores:
    """``refined``, and ``coarse`` too if that is another prediction."""
    output = network.predict(images, output="logits")
    if not getattr(network, "refines", True):
        return {"refined": output.refined}
    return {"coarse": network.upsample(output.coarse, images.shape[-2:]), "refined": output.refined}


def _labels(scores: Tensor) -> Tensor:
    return scores.argmax(1).to(torch.uint8 if scores.shape[1] <= 256 else torch.int16)
