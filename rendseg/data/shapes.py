"""Synthetic scenes with thin and curved boundaries, generated on demand: no files.

A scene is a list of objects over a textured, shaded and noisy background, drawn back to front so that they occlude
each other. It is a function of (seed, split, index) alone and is described in units of the shorter side, so that
another size shows the same scene (with other grain). Every outline is a signed distance in pixels: the label is
exact and hard (``distance < 0``), while the image blends over one pixel, as a camera does.

The colour of an object only hints at its class: the hues of neighbouring classes overlap, one object in eight has any
hue, and backgrounds have all hues.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from .._options import Count, Positive, Whole
from .base import SegmentationDataset, Split
from .options import ColorJitterOptions, DatasetOptions
from .registry import register_dataset


class ShapesOptions(DatasetOptions):
    """Synthetic scenes; see :mod:`rendseg.data.shapes`. No scaling and jitter by default, as every scene differs."""

    name: Literal["shapes"] = "shapes"
    size: tuple[Count, Count] = (128, 128)  # [height, width]
    num_images: Count = 4096
    num_val_images: Count = 128
    seed: Whole = 0  # of the scenes
    scale_range: tuple[Positive, Positive] = (1.0, 1.0)
    color_jitter: ColorJitterOptions | None = None


CLASSES = {
    "background": (40, 40, 48),
    "blob": (230, 92, 60),
    "ring": (245, 190, 50),
    "star": (120, 200, 80),
    "crescent": (60, 190, 190),
    "arc": (70, 120, 240),
    "wire": (170, 90, 230),
    "glyph": (240, 120, 190),
}

# Strokes of the glyphs on a grid of 2 x 4 half units, x from -1 to 1 and y from -2 to 2 (down): (x0, y0, x1, y1).
_GLYPHS = (
    ((-1, 2, 0, -2), (0, -2, 1, 2), (-0.5, 0.5, 0.5, 0.5)),  # A
    ((1, -2, -1, -2), (-1, -2, -1, 2), (-1, 2, 1, 2), (-1, 0, 0.6, 0)),  # E
    ((1, -2, -1, -2), (-1, -2, -1, 2), (-1, 0, 0.6, 0)),  # F
    ((-1, -2, -1, 2), (1, -2, 1, 2), (-1, 0, 1, 0)),  # H
    ((-1, -2, -1, 2), (1, -2, -1, 0), (-0.5, -0.5, 1, 2)),  # K
    ((-1, 2, -1, -2), (-1, -2, 0, 0), (0, 0, 1, -2), (1, -2, 1, 2)),  # M
    ((-1, 2, -1, -2), (-1, -2, 1, 2), (1, 2, 1, -2)),  # N
    ((-1, -2, 1, -2), (0, -2, 0, 2)),  # T
    ((-1, -2, 0, 0), (1, -2, 0, 0), (0, 0, 0, 2)),  # Y
    ((-1, -2, 1, -2), (1, -2, -1, 2), (-1, 2, 1, 2)),  # Z
    ((-1, -2, 1, 2), (1, -2, -1, 2)),  # X
    ((0, -1.5, 0, 1.5), (-1.5, 0, 1.5, 0)),  # plus
)

_Distance = Callable[
    [np.ndarray, np.ndarray], np.ndarray
]  # (u, v) in units of the scene -> signed distance in these units


def _blob(rng: np.random.Generator) -> tuple[_Distance, float]:
    radius = rng.uniform(0.08, 0.19)
    order = (2, 3, 4, 5)
    size = [0.32 * radius / k * rng.uniform(0.3, 1.0) for k in order]  # Python floats keep the arrays in float32
    phase = [rng.uniform(0, 2 * math.pi) for _ in order]

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        angle = np.arctan2(v, u)
        rim = radius + sum(s * np.cos(k * angle + p) for k, s, p in zip(order, size, phase, strict=True))
        return np.hypot(u, v) - rim

    return distance, radius + sum(size)


def _ring(rng: np.random.Generator) -> tuple[_Distance, float]:
    radius = rng.uniform(0.08, 0.17)
    half = rng.uniform(0.09, 0.2) * radius + 0.006
    squeeze = rng.uniform(0.65, 1.0)

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        # First-order distance to an ellipse: value of the quadric over the length of its gradient.
        w = v / squeeze
        level = np.hypot(u, w)
        slope = np.hypot(u, w / squeeze) / np.maximum(level, 1e-6)
        return np.abs((level - radius) / np.maximum(slope, 1e-3)) - half

    return distance, radius + half


def _star(rng: np.random.Generator) -> tuple[_Distance, float]:
    radius = rng.uniform(0.1, 0.21)
    points = int(rng.integers(4, 8))
    inner = rng.uniform(0.3, 0.5)
    sharpness = rng.uniform(0.9, 1.6)

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        turn = np.arctan2(v, u) * (points / (2 * math.pi))
        tip = 2 * np.abs(turn - np.floor(turn + 0.5))  # 0 at a tip, 1 between two
        rim = radius * (inner + (1 - inner) * (1 - tip) ** sharpness)
        return (np.hypot(u, v) - rim) * 0.6

    return distance, radius


def _crescent(rng: np.random.Generator) -> tuple[_Distance, float]:
    radius = rng.uniform(0.09, 0.18)
    bite = rng.uniform(0.75, 1.0) * radius
    shift = radius - bite + rng.uniform(0.3, 0.6) * radius

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.maximum(np.hypot(u, v) - radius, bite - np.hypot(u - shift, v))

    return distance, radius


def _arc(rng: np.random.Generator) -> tuple[_Distance, float]:
    radius = rng.uniform(0.1, 0.26)
    half = rng.uniform(0.008, 0.014)
    reach = rng.uniform(0.7, 2.0)  # half of the opening angle

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        v = np.abs(v)
        within = np.arctan2(v, u) < reach
        end = np.hypot(u - radius * math.cos(reach), v - radius * math.sin(reach))
        return np.where(within, np.abs(np.hypot(u, v) - radius), end) - half

    return distance, radius + half


def _wire(rng: np.random.Generator) -> tuple[_Distance, float]:
    half = rng.uniform(0.007, 0.012)
    height = [most * rng.uniform(0.2, 1.0) for most in (0.12, 0.05, 0.02)]
    rate = [middle * rng.uniform(0.7, 1.3) for middle in (4.0, 9.0, 19.0)]
    phase = [rng.uniform(0, 2 * math.pi) for _ in rate]

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        curve, slope = np.zeros_like(u), np.zeros_like(u)
        for h, r, p in zip(height, rate, phase, strict=True):
            curve += h * np.sin(r * u + p)
            slope += h * r * np.cos(r * u + p)
        return np.abs(v - curve) / np.sqrt(1 + slope * slope) - half

    return distance, math.inf


def _glyph(rng: np.random.Generator) -> tuple[_Distance, float]:
    unit = rng.uniform(0.04, 0.085)
    half = rng.uniform(0.16, 0.26) * unit + 0.003
    strokes = [tuple(unit * x for x in stroke) for stroke in _GLYPHS[int(rng.integers(len(_GLYPHS)))]]

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        nearest = np.full(np.broadcast(u, v).shape, np.inf, np.float32)
        for x0, y0, x1, y1 in strokes:
            dx, dy = x1 - x0, y1 - y0
            along = np.clip(((u - x0) * dx + (v - y0) * dy) / (dx * dx + dy * dy), 0, 1)
            squared = (u - x0 - along * dx) ** 2 + (v - y0 - along * dy) ** 2
            nearest = np.minimum(nearest, squared)
        return np.sqrt(nearest) - half

    return distance, unit * math.sqrt(5) + half


_MAKERS = (_blob, _ring, _star, _crescent, _arc, _wire, _glyph)  # of classes 1 to 7
_LIKELY = np.array([0.15, 0.14, 0.15, 0.14, 0.15, 0.12, 0.15])


def _color(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB of HSV, all in [0, 1]."""
    sector = (hue * 6 + np.array([5.0, 3.0, 1.0])) % 6
    return (value - value * saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1)).astype(np.float32)


def _smooth(grid: np.ndarray, size: int) -> np.ndarray:
    """Weights [size, n] that interpolate n values linearly over size cells."""
    at = np.linspace(0, grid.shape[0] - 1, size, dtype=np.float32)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(grid.shape[0], dtype=np.float32)))


def _background(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float32 [H, W, 3]: two colours mixed by smooth noise and gratings, under a light that falls off."""
    height, width = len(y), len(x)
    aspect = float(x[-1] + x[0]), float(y[-1] + y[0])
    field = np.zeros((height, width), np.float32)
    for cells, weight in ((3, 0.5), (9, 0.25)):
        grid = rng.standard_normal((math.ceil(cells * aspect[1]) + 1, math.ceil(cells * aspect[0]) + 1)).astype(
            np.float32
        )
        field += weight * (_smooth(grid, height) @ grid @ _smooth(grid.T, width).T)
    for _ in range(2):
        angle, rate, phase = rng.uniform(0, math.pi), rng.uniform(6, 45), rng.uniform(0, 2 * math.pi)
        across = (math.cos(angle) * rate) * x + phase
        down = (math.sin(angle) * rate) * y
        # sin(a + b), separated so that only products are full size
        field += rng.uniform(0.05, 0.3) * (
            np.cos(down)[:, None] * np.sin(across)[None, :] + np.sin(down)[:, None] * np.cos(across)[None, :]
        )
    mix = 1 / (1 + np.exp(-2 * field))
    first = _color(rng.uniform(), rng.uniform(0.05, 0.5), rng.uniform(0.2, 0.85))
    second = _color(rng.uniform(), rng.uniform(0.05, 0.5), rng.uniform(0.2, 0.85))
    light = 1 + rng.uniform(-0.3, 0.3) * (x - 0.5)[None, :] + rng.uniform(-0.3, 0.3) * (y - 0.5)[:, None]
    return (first + (second - first) * mix[..., None]) * light.astype(np.float32)[..., None]


def scene(height: int, width: int, *key: int, numbers: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The scene of `key`: image uint8 [height, width, 3] and label uint8 [height, width]. Into `numbers`, zeros of the
    label's form, goes the number of the object at each pixel, from 1."""
    plan, grain = (np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(key).spawn(2))
    unit = min(height, width)
    x = (np.arange(width, dtype=np.float32) + 0.5) / unit
    y = (np.arange(height, dtype=np.float32) + 0.5) / unit
    image = _background(plan, x, y)
    label = np.zeros((height, width), np.uint8)
    area = (width / unit) * (height / unit)
    for number in range(1, 1 + min(64, round(area * plan.uniform(6, 10)))):
        kind = int(plan.choice(7, p=_LIKELY))
        distance, reach = _MAKERS[kind](plan)
        cx, cy = plan.uniform(0, width / unit), plan.uniform(0, height / unit)
        turn = plan.normal(0, 0.3) if kind == 6 else plan.uniform(0, 2 * math.pi)
        hue = plan.uniform() if plan.uniform() < 0.125 else kind / 7 + plan.normal(0, 0.045)
        color = _color(hue % 1, plan.uniform(0.45, 0.95), plan.uniform(0.5, 1.0))
        shade, shade_turn = plan.uniform(0, 0.35), plan.uniform(0, 2 * math.pi)
        stripes, stripe_rate, stripe_turn = plan.uniform(0, 0.15), plan.uniform(40, 120), plan.uniform(0, math.pi)
        shadow, shadow_x, shadow_y = plan.uniform(0, 0.35), *plan.uniform(-0.02, 0.02, 2)

        margin = reach + 2 / unit
        left, right = (
            (0, width)
            if math.isinf(reach)
            else (max(0, int((cx - margin) * unit)), min(width, int((cx + margin) * unit) + 1))
        )
        top, bottom = (
            (0, height)
            if math.isinf(reach)
            else (max(0, int((cy - margin) * unit)), min(height, int((cy + margin) * unit) + 1))
        )
        if left >= right or top >= bottom:
            continue
        px, py = (x[left:right] - np.float32(cx))[None, :], (y[top:bottom] - np.float32(cy))[:, None]
        cos, sin = math.cos(turn), math.sin(turn)
        d = distance(cos * px + sin * py, cos * py - sin * px) * np.float32(unit)
        inside = d < 0
        if not inside.any():
            continue
        texture = 1 + (shade / 0.2) * np.clip(math.cos(shade_turn) * px + math.sin(shade_turn) * py, -0.2, 0.2)
        across = (math.cos(stripe_turn) * stripe_rate) * px
        down = (math.sin(stripe_turn) * stripe_rate) * py
        texture = texture + stripes * (np.cos(down) * np.sin(across) + np.sin(down) * np.cos(across))
        window = image[top:bottom, left:right]
        dx, dy = round(shadow_x * unit), round(shadow_y * unit)
        if dx or dy:  # a soft shadow beside the object: darker, but not the object
            fall = np.zeros_like(d)
            h, w = d.shape
            cover = np.clip(1 - d / (0.02 * unit), 0, 1)
            fall[max(0, dy) : h + min(0, dy), max(0, dx) : w + min(0, dx)] = cover[
                max(0, -dy) : h + min(0, -dy), max(0, -dx) : w + min(0, -dx)
            ]
            window *= (1 - np.float32(shadow) * fall)[..., None]
        alpha = np.clip(0.5 - d, 0, 1)[..., None]
        window += alpha * (color * texture[..., None] - window)
        label[top:bottom, left:right][inside] = kind + 1
        if numbers is not None:
            numbers[top:bottom, left:right][inside] = number
    image += np.float32(plan.uniform(0.01, 0.06)) * grain.standard_normal(image.shape, np.float32)
    image *= 255
    np.clip(image, 0, 255, out=image)
    return image.astype(np.uint8), label


@register_dataset(ShapesOptions)
class Shapes(SegmentationDataset):
    """Seven classes of shapes and the background; see the module."""

    def __init__(self, options: ShapesOptions, split: Split, augment_seed: int = 0) -> None:
        super().__init__(options, split, list(CLASSES), np.array(list(CLASSES.values()), np.uint8), augment_seed)
        self._size = options.size
        self._seed = options.seed
        self._count = options.num_images if split == "train" else options.num_val_images

    def __len__(self) -> int:
        return self._count

    def sample_name(self, index: int) -> str:
        return f"{self.split}_{index:06d}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return scene(*self._size, self._seed, 0 if self.split == "train" else 1, index)
