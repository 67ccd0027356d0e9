"""Pictures of predictions: colour maps, overlays, coarse and refined side by side, and a boundary enlarged.

Images are PIL images, or uint8 arrays or tensors ``[H, W, 3]`` or ``[H, W]``; :func:`to_uint8` undoes the
normalisation of a batch. Label maps are integer arrays or tensors ``[H, W]``; what lies outside the palette (255:
ignored) is left without colour. A palette is uint8 ``[C, 3]``. Points are coordinates ``(x, y)`` in [0, 1] as
everywhere in rendseg.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from rendseg.data.images import as_rgb

ImageLike = Image.Image | np.ndarray | torch.Tensor
LabelsLike = np.ndarray | torch.Tensor

_PAPER = (255, 255, 255)
_INK = (32, 32, 36)
_VOID = (0, 0, 0)
_BAND = 256  # rows that are mixed at a time
# Colours of the points of steps 1, 2, ...: told apart in print and by the colour-blind, and on a grey image.
_STEPS = ((255, 176, 0), (0, 200, 255), (255, 64, 160), (120, 255, 90), (180, 130, 255))


def to_uint8(
    image: torch.Tensor, mean: Sequence[float], std: Sequence[float], channel_order: str = "rgb"
) -> np.ndarray:
    """Normalised float ``[C, H, W]``, its channels in ``channel_order`` -> RGB uint8 ``[H, W, 3]``: of more channels
    the first three, of fewer the first one as grey."""
    values = image.detach().float().cpu()
    scale, shift = (torch.tensor(list(v), dtype=torch.float32)[:, None, None] for v in (std, mean))
    values = ((values * scale + shift) * 255).round_().clamp_(0, 255).to(torch.uint8)
    if channel_order == "bgr":
        values = values.flip(0)
    return np.ascontiguousarray(as_rgb(values.permute(1, 2, 0).numpy()))


def _pixels(image: ImageLike) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"image must be uint8 [H, W, 3] or a PIL image, got {array.dtype} {list(array.shape)}")
    return array


def _labels(labels: LabelsLike, name: str = "labels", shape: tuple[int, int] | None = None) -> np.ndarray:
    array = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers [H, W], got {array.dtype} {list(array.shape)}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} must have the size of the image, {list(shape)}, got {list(array.shape)}")
    return array


def _palette(palette: Any) -> np.ndarray:
    array = np.asarray(palette)
    if array.ndim != 2 or array.shape[1] != 3 or len(array) == 0:
        raise ValueError(f"palette must have shape [C, 3], got {list(array.shape)}")
    return array.astype(np.uint8)


def colorize(labels: LabelsLike, palette: Any, void: tuple[int, int, int] = _VOID) -> np.ndarray:
    """Labels ``[H, W]`` -> colours uint8 ``[H, W, 3]``; labels outside the palette become `void`."""
    array, colors = _labels(labels), _palette(palette)
    table = np.concatenate([colors, np.array([void], np.uint8)])
    outside = (array < 0) | (array >= len(colors))
    return table[np.where(outside, len(colors), array)]


def contours(labels: np.ndarray) -> np.ndarray:
    """bool ``[H, W]``: pixels whose right or lower neighbour has another label."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


def overlay(
    image: ImageLike, labels: LabelsLike, palette: Any, alpha: float = 0.55, contour: bool = False
) -> Image.Image:
    """The image tinted by class colours of opacity `alpha`; ignored pixels stay as they are.

    With `contour`, the outlines of the classes are drawn in their full colour on top.
    """
    pixels, colors = _pixels(image), _palette(palette)
    array = _labels(labels, shape=pixels.shape[:2])
    outlines = contours(array) if contour else None
    result = np.empty_like(pixels)
    for top in range(0, len(array), _BAND):  # so that the floats of a large image do not fill the memory
        band = slice(top, top + _BAND)
        tint = colorize(array[band], colors)
        known = ((array[band] >= 0) & (array[band] < len(colors)))[..., None]
        mixed = np.where(known, (1 - alpha) * pixels[band] + alpha * tint, pixels[band])
        if outlines is not None:
            mixed = np.where(outlines[band, :, None], np.where(known, tint, 255), mixed)
        result[band] = mixed + 0.5
    return Image.fromarray(result)


def printable(text: str) -> str:
    """Text as it can be drawn and encoded: what is no character (bytes of a file's name) as an escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _factor(height: int, width: int, least: int) -> int:
    """Whole factor that enlarges an image's shorter side to about `least` pixels, its longer side to 4096 at most."""
    return max(1, min(round(least / min(height, width)), 4096 // max(height, width)))


def _enlarge(array: np.ndarray, factor: int) -> np.ndarray:
    return array.repeat(factor, 0).repeat(factor, 1) if factor > 1 else array


def _legend(names: Sequence[str], colors: np.ndarray, width: int, size: int) -> Image.Image:
    """Colour boxes with names, in as many lines as the width needs."""
    font, line, gap = _font(size), round(1.6 * size), round(1.1 * size)
    names = [printable(name) for name in names]
    spots, x, y = [], gap, 0
    for index, name in enumerate(names):
        length = round(1.4 * size + font.getlength(name))
        if x + length > width - gap and x > gap:
            x, y = gap, y + line
        spots.append((x, y, index))
        x += length + gap
    strip = Image.new("RGB", (width, y + line + size // 2), _PAPER)
    draw = ImageDraw.Draw(strip)
    for x, y, index in spots:
        draw.rectangle(
            [x, y + size * 0.3, x + size, y + size * 1.3], fill=tuple(int(v) for v in colors[index]), outline=_INK
        )
        draw.text((x + 1.4 * size, y + line / 2), names[index], _INK, font, anchor="lm")
    return strip


def panels(
    images: Sequence[ImageLike],
    captions: Sequence[str],
    columns: int | None = None,
    legend: Image.Image | None = None,
) -> Image.Image:
    """Images of one size in a grid, each under its caption."""
    arrays = [_pixels(image) for image in images]
    height, width = arrays[0].shape[:2]
    columns = columns or len(arrays)
    rows = -(-len(arrays) // columns)
    size = max(12, min(28, width // 18))
    bar, gap = round(1.9 * size), max(4, size // 2)
    total_width = columns * width + (columns + 1) * gap
    total_height = rows * (height + bar) + rows * gap
    sheet = Image.new("RGB", (total_width, total_height + (legend.height if legend else 0)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (array, caption) in enumerate(zip(arrays, captions, strict=True)):
        row, column = divmod(index, columns)
        left, top = gap + column * (width + gap), row * (height + bar + gap)
        caption, fitted = printable(caption), size
        while fitted > 8 and _font(fitted).getlength(caption) > width:
            fitted -= 1
        draw.text((left + width / 2, top + bar / 2), caption, _INK, _font(fitted), anchor="mm")
        sheet.paste(Image.fromarray(array), (left, top + bar))
    if legend:
        sheet.paste(legend, (0, total_height))
    return sheet


def draw_points(
    image: ImageLike, points: Sequence[Any] | LabelsLike, factor: int = 1, radius: float | None = None
) -> Image.Image:
    """The image in grey, enlarged by `factor`, with the points of each step in the step's colour.

    Args:
        image: [H, W, 3].
        points: coords [N, 2] of one step, or a sequence of such, one per step; earlier, coarser steps are drawn on top.
        radius: of a point, in pixels of the picture; the default covers a pixel of the image.
    """
    pixels = _pixels(image)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    canvas = _enlarge(np.repeat((40 + 0.45 * grey)[..., None], 3, 2).astype(np.uint8), factor)
    height, width = canvas.shape[:2]
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for step, coords in reversed(list(enumerate(_steps(points)))):
        color = _STEPS[step % len(_STEPS)]
        reach = radius if radius is not None else max(0.5, 0.42 * factor)
        for x, y in (coords * (width, height)).tolist():
            if reach <= 0.5:
                draw.point((int(min(x, width - 1)), int(min(y, height - 1))), fill=color)
            else:
                draw.ellipse([x - reach, y - reach, x + reach, y + reach], fill=color)
    return picture


def _steps(points: Any) -> list[np.ndarray]:
    if isinstance(points, torch.Tensor | np.ndarray) and points.ndim == 2:
        points = [points]
    steps = []
    for coords in points:
        array = coords.detach().float().cpu().numpy() if isinstance(coords, torch.Tensor) else np.asarray(coords, float)
        if array.ndim == 3 and array.shape[0] == 1:
            array = array[0]
        if array.ndim != 2 or array.shape[1] != 2:
            raise ValueError(f"points must have shape [N, 2] per step, got {list(array.shape)}")
        steps.append(array[np.isfinite(array).all(1)])
    return steps


def side_by_side(
    image: ImageLike,
    coarse_labels: LabelsLike,
    refined_labels: LabelsLike,
    points: Sequence[Any] | None = None,
    label: LabelsLike | None = None,
    palette: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    uncertainty: LabelsLike | None = None,
    alpha: float = 0.6,
    columns: int | None = None,
    min_size: int = 256,
) -> Image.Image:
    """Image, coarse and refined prediction, the points that were re-computed and the label, side by side.

    Args:
        image: [H, W, 3]; the label maps have its size.
        coarse_labels: integer [H, W], the coarse logits enlarged and arg-maxed. refined_labels: integer [H, W].
        points: coords per subdivision step, each [N, 2]; they are drawn on the image, or on `uncertainty`.
        label: integer [H, W] or None.
        palette: [C, 3].
        class_names: adds a legend of the classes that occur.
        uncertainty: float [H, W], a map to draw the points on; any range.
        columns: panels per row; None: all in one row.
        min_size: smaller images are enlarged by a whole factor to about this many pixels.
    """
    if palette is None:
        raise ValueError("palette is missing: give the colours [C, 3], e.g. dataset.palette")
    pixels, colors = _pixels(image), _palette(palette)
    shape = (pixels.shape[0], pixels.shape[1])
    maps = [_labels(coarse_labels, "coarse_labels", shape), _labels(refined_labels, "refined_labels", shape)]
    factor = _factor(shape[0], shape[1], min_size)
    big = _enlarge(pixels, factor)
    shown: list[ImageLike] = [
        big,
        *(overlay(big, _enlarge(labels, factor), colors, alpha, contour=factor > 1) for labels in maps),
    ]
    captions = ["image", "coarse", "refined"]
    if points is not None:
        steps = _steps(points)
        ground = pixels if uncertainty is None else heat(uncertainty)
        shown.append(draw_points(ground, steps, factor))
        captions.append(f"points chosen ({' + '.join(str(len(step)) for step in steps)})" if steps else "points chosen")
    if label is not None:
        truth = _labels(label, "label", shape)
        maps.append(truth)
        shown.append(overlay(big, _enlarge(truth, factor), colors, alpha, contour=factor > 1))
        captions.append("label")
    legend = None
    if class_names is not None:
        present = [c for c in np.unique(np.concatenate([m.ravel() for m in maps])).tolist() if 0 <= c < len(colors)]
        width = (columns or len(shown)) * big.shape[1]
        names = [class_names[c] if c < len(class_names) else f"class {c}" for c in present]
        legend = _legend(names, colors[present], width, max(12, min(22, big.shape[1] // 20)))
    return panels(shown, captions, columns, legend)


class Objects(NamedTuple):
    """Objects of an image, later ones on top."""

    classes: np.ndarray
    """int [N], from 0."""
    masks: np.ndarray
    """bool [N, H, W]."""
    scores: np.ndarray | None = None
    """[N]."""


def numbered(objects: Objects) -> np.ndarray:
    """int [H, W]: the number of the object on top at each pixel, -1 where there is none."""
    result = np.full(objects.masks.shape[1:], -1)
    for number, mask in enumerate(objects.masks):
        result[mask] = number
    return result


def objects_side_by_side(
    image: ImageLike,
    found: Mapping[str, Objects],
    palette: Any,
    class_names: Sequence[str],
    alpha: float = 0.35,
    min_size: int = 384,
) -> Image.Image:
    """The image, and beside it the objects of each entry of `found` with their contours and scores, in the colours of
    their classes; below it a legend of the classes that occur."""
    pixels, colors = _pixels(image), _palette(palette)
    factor = _factor(pixels.shape[0], pixels.shape[1], min_size)
    big = _enlarge(pixels, factor)
    shown: list[ImageLike] = [big]
    size = max(10, min(18, big.shape[0] // 28))
    for objects in found.values():
        own = colors[np.append(objects.classes, 0)]  # a palette has at least one colour
        panel = overlay(big, _enlarge(numbered(objects), factor), own, alpha, contour=True)
        draw = ImageDraw.Draw(panel)
        for mask, score in zip(objects.masks, () if objects.scores is None else objects.scores, strict=False):
            if mask.any():
                row, column = np.argwhere(mask)[0] * factor  # the topmost pixel
                text, wide = f"{score:.2f}", 1.3 * size
                row, column = np.clip([row, column], [size, wide], [big.shape[0] - size, big.shape[1] - wide])
                draw.text((column, row), text, _PAPER, _font(size), anchor="mm", stroke_width=2, stroke_fill=_INK)
        shown.append(panel)
    present = sorted({int(c) for objects in found.values() for c in objects.classes})
    names, width = [class_names[c] for c in present], len(shown) * big.shape[1]
    legend = _legend(names, colors[present], width, max(12, min(22, big.shape[1] // 20))) if present else None
    return panels(shown, ["image", *found], None, legend)


def heat(values: LabelsLike) -> np.ndarray:
    """Any map [H, W] -> uint8 [H, W, 3], dark to light between its 2nd and 98th percentile."""
    array = values.detach().float().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, float)
    finite = array[np.isfinite(array)]
    low, high = np.percentile(finite, [2, 98]) if finite.size else (0.0, 1.0)
    scaled = np.nan_to_num(np.clip((array - low) / max(high - low, 1e-12), 0, 1))
    return np.repeat((255 * scaled).astype(np.uint8)[..., None], 3, 2)


def best_window(
    coarse_labels: LabelsLike,
    refined_labels: LabelsLike,
    label: LabelsLike | None,
    window: int,
    ignore_index: int = 255,
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the square in which refinement changed most (for the better, given a label)."""
    coarse, refined = _labels(coarse_labels), _labels(refined_labels)
    if label is None:
        gain = (coarse != refined).astype(np.float64)
    else:
        truth = _labels(label)
        gain = ((refined == truth).astype(np.float64) - (coarse == truth)) * (truth != ignore_index)
    height, width = gain.shape
    side = min(window, height, width)
    total = np.pad(gain.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    top, left = divmod(int(sums.argmax()), sums.shape[1])
    return left, top, left + side, top + side


def boundary_zoom(
    image: ImageLike,
    coarse_labels: LabelsLike,
    refined_labels: LabelsLike,
    label: LabelsLike | None = None,
    palette: Any = None,
    *,
    points: Sequence[Any] | None = None,
    box: tuple[int, int, int, int] | None = None,
    window: int | None = None,
    size: int = 360,
    alpha: float = 0.55,
) -> Image.Image:
    """A boundary enlarged: the image with the place marked, and that place in the coarse and the refined prediction.

    Args:
        image: [H, W, 3]; the label maps have its size.
        label: integer [H, W]; adds a panel, and is used to choose the place.
        palette: [C, 3].
        points: coords per step, each [N, 2]; marked as dots in the refined panel.
        box: (left, top, right, bottom) in pixels of the image; None: :func:`best_window`.
        window: side of the square in that case; None: a quarter of the shorter side.
        size: side of the panels, about.
    """
    if palette is None:
        raise ValueError("palette is missing: give the colours [C, 3], e.g. dataset.palette")
    pixels, colors = _pixels(image), _palette(palette)
    shape = pixels.shape[:2]
    coarse, refined = _labels(coarse_labels, "coarse_labels", shape), _labels(refined_labels, "refined_labels", shape)
    truth = None if label is None else _labels(label, "label", shape)
    if box is None:
        box = best_window(coarse, refined, truth, window or max(24, min(shape) // 4))
    left, top, right, bottom = box
    if not (0 <= left < right <= shape[1] and 0 <= top < bottom <= shape[0]):
        raise ValueError(f"box must lie within the image {shape[1]}x{shape[0]}, got {box}")
    factor = max(1, round(size / (bottom - top)))
    height, width = (bottom - top) * factor, (right - left) * factor
    part = _enlarge(pixels[top:bottom, left:right], factor)

    whole = Image.fromarray(pixels)
    scale = min(width / shape[1], height / shape[0])
    whole = whole.resize((max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))), Image.Resampling.LANCZOS)
    first = Image.new("RGB", (width, height), _PAPER)
    x0, y0 = (width - whole.width) // 2, (height - whole.height) // 2
    first.paste(whole, (x0, y0))
    frame = [x0 + left * scale, y0 + top * scale, x0 + right * scale, y0 + bottom * scale]
    ImageDraw.Draw(first).rectangle(frame, outline=(255, 255, 255), width=5)
    ImageDraw.Draw(first).rectangle(frame, outline=(230, 30, 30), width=3)

    def zoomed(labels: np.ndarray) -> Image.Image:
        large = _enlarge(labels[top:bottom, left:right], factor)
        picture = np.array(overlay(part, large, colors, alpha))
        line = max(1, factor // 6)
        edge = contours(large)
        for axis in (0, 1):  # a line of `line` pixels: the contour moved and united with itself
            for step in range(1, line):
                edge |= np.roll(contours(large), -step, axis)
        picture[edge] = _PAPER
        return Image.fromarray(picture)

    last = zoomed(refined)
    shown: list[ImageLike] = [first, part, zoomed(coarse), last]
    captions = ["image", "enlarged", "coarse", "refined"]
    if points is not None:
        draw = ImageDraw.Draw(last)
        reach = max(1.0, factor / 7)
        for coords in _steps(points):
            for x, y in (coords * (shape[1], shape[0])).tolist():
                px, py = (x - left) * factor, (y - top) * factor
                if 0 <= px < width and 0 <= py < height:
                    draw.ellipse([px - reach, py - reach, px + reach, py + reach], fill=(20, 20, 20))
        captions[3] = "refined, points computed"
    if truth is not None:
        shown.append(zoomed(truth))
        captions.append("label")
    return panels(shown, captions)


@dataclass
class Comparison:
    """One image of :func:`comparison_grid`; the label maps have the size of the image."""

    title: str
    image: ImageLike
    coarse: LabelsLike
    refined: LabelsLike
    label: LabelsLike


# Where the coarse and the refined prediction are wrong.
_ERRORS = {
    "both right": (236, 236, 236),
    "put right by refinement": (60, 170, 90),
    "made wrong": (130, 60, 190),
    "both wrong": (225, 60, 45),
    "ignored": (90, 90, 90),
}


def error_map(coarse: LabelsLike, refined: LabelsLike, label: LabelsLike, ignore_index: int = 255) -> np.ndarray:
    """uint8 ``[H, W, 3]``: right in both, put right by refinement, made wrong, wrong in both, ignored."""
    truth = _labels(label, "label")
    shape = (truth.shape[0], truth.shape[1])
    before, after = _labels(coarse, "coarse", shape) == truth, _labels(refined, "refined", shape) == truth
    kind = np.where(before, np.where(after, 0, 2), np.where(after, 1, 3))
    kind[truth == ignore_index] = 4
    return np.array(list(_ERRORS.values()), np.uint8)[kind]


def comparison_grid(
    rows: Sequence[Comparison],
    palette: Any,
    class_names: Sequence[str] | None = None,
    ignore_index: int = 255,
    width: int = 360,
    alpha: float = 0.6,
) -> Image.Image:
    """Image, coarse, refined, errors and label, one row per image; panels are scaled to ``width``."""
    if not rows:
        raise ValueError("rows is empty: there is no image to show")
    colors = _palette(palette)
    captions = ["image", "coarse", "refined", "errors", "label"]
    size, gap, seen = 18, 8, set()
    total = len(captions) * width + (len(captions) + 1) * gap
    strips = []
    for row in rows:
        pixels = _pixels(row.image)
        shape = (pixels.shape[0], pixels.shape[1])
        maps = [
            _labels(m, n, shape) for m, n in ((row.coarse, "coarse"), (row.refined, "refined"), (row.label, "label"))
        ]
        seen |= {c for labels in maps for c in np.unique(labels).tolist() if 0 <= c < len(colors)}
        coarse, refined, truth = (np.asarray(overlay(pixels, labels, colors, alpha)) for labels in maps)
        height = max(1, round(shape[0] * width / shape[1]))
        strip = Image.new("RGB", (total, height + 2 * size), _PAPER)
        ImageDraw.Draw(strip).text((gap, size), printable(row.title), _INK, _font(size), anchor="lm")
        for column, panel in enumerate(
            (pixels, coarse, refined, error_map(maps[0], maps[1], maps[2], ignore_index), truth)
        ):
            # Enlarged pixels stay squares; what is reduced is filtered.
            how = Image.Resampling.NEAREST if width >= shape[1] else Image.Resampling.BOX
            strip.paste(Image.fromarray(panel).resize((width, height), how), (gap + column * (width + gap), 2 * size))
        strips.append(strip)
    head = Image.new("RGB", (total, 2 * size), _PAPER)
    for column, caption in enumerate(captions):
        middle = gap + column * (width + gap) + width / 2
        ImageDraw.Draw(head).text((middle, size), caption, _INK, _font(size), anchor="mm")
    strips = [head, *strips, _legend(list(_ERRORS), np.array(list(_ERRORS.values())), total, size)]
    if class_names is not None:
        present = sorted(seen)
        names = [class_names[c] if c < len(class_names) else f"class {c}" for c in present]
        strips.append(_legend(names, colors[present], total, size))
    sheet = Image.new("RGB", (total, sum(strip.height for strip in strips)), _PAPER)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def confusion_picture(confusion: np.ndarray, names: Sequence[str]) -> Image.Image:
    """A confusion matrix [C, C] (row: label, column: prediction) as shares of each row; with up to 30 classes also in
    numbers, in percent. Rows without pixels stay empty. ``ImportError`` without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrix = np.asarray(confusion)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) != len(names):
        raise ValueError(f"confusion must have shape [C, C] with C = {len(names)} names, got {list(matrix.shape)}")
    totals = matrix.sum(1, keepdims=True)
    shares = np.where(totals > 0, matrix / np.maximum(totals, 1), np.nan)
    count = len(names)
    side = max(4.0, min(24.0, 1.8 + 0.42 * count))
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    font = 8 if count <= 40 else max(3, round(320 / count))
    axes.set_xticks(range(count), names, rotation=90, fontsize=font)
    axes.set_yticks(range(count), names, fontsize=font)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    axes.set_title("share of the label's pixels")
    if count <= 30:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            value = 100 * shares[row, column]
            if value >= 0.5:
                color = "white" if value > 55 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(shown, ax=axes, shrink=0.8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer).convert("RGB")
