"""Augmentation in torchvision transforms v2 on tv_tensors: ``Image`` uint8 [3, H, W] and ``Mask`` uint8 [H, W], or
[N, H, W] of N objects."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from .images import IGNORE
from .options import AugmentOptions, PhotometricOptions


class RandomScaleCrop(v2.Transform):
    """Scales by a random factor and crops, limiting the area of one category.

    A scale ``s`` is drawn; the crop then is a window of ``crop / s`` pixels of the image (as far as it
    reaches) at a random place, resized by ``s``. That equals scaling and then cropping, but costs no more for a large
    ``s``; ``s`` is rounded so that the window is whole pixels. Up to ten windows are tried until no category covers
    more than `category_max_fraction` of the window's labelled pixels (DeepLab's rule, as in mmsegmentation and
    detectron2); the last one is taken otherwise. Images are resized bilinearly with anti-aliasing, labels to the
    nearest pixel centre. A result smaller than the crop is left to :func:`to_sample` to pad.
    """

    tries = 10

    def __init__(
        self,
        crop_size: tuple[int, int] | None,
        scale_range: tuple[float, float],
        category_max_fraction: float,
        *,
        scale_step: float | None = None,
        base_size: tuple[int, int] | None = None,
        short_edge: list[int] | None = None,
        short_edge_sampling: str = "choice",
        max_size: int | None = None,
    ) -> None:
        super().__init__()
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.category_max_fraction = category_max_fraction
        self.scale_step = scale_step
        self.base_size = base_size
        self.short_edge = short_edge
        self.short_edge_sampling = short_edge_sampling
        self.max_size = max_size

    def draw_scale(self, height: int, width: int) -> float:
        """The factor from an image to the size that is cropped, by the rules of ``AugmentOptions``."""
        if self.short_edge is not None:
            if self.short_edge_sampling == "range":
                low, high = self.short_edge
                edge = low + int(torch.randint(high - low + 1, ()))
            else:
                edge = self.short_edge[int(torch.randint(len(self.short_edge), ()))]
            scale = edge / min(height, width)
            return scale if self.max_size is None else min(scale, self.max_size / max(height, width))
        smallest, largest = self.scale_range
        if self.scale_step is not None:
            steps = math.floor((largest - smallest) / self.scale_step + 1e-6)
            scale = smallest + self.scale_step * int(torch.randint(steps + 1, ()))
        else:
            scale = smallest + (largest - smallest) * torch.rand(()).item() if largest > smallest else smallest
        return scale if self.base_size is None else scale * fit_factor(height, width, self.base_size)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(value for value in flat_inputs if isinstance(value, tv_tensors.Mask))
        height, width = mask.shape[-2:]
        crop = self.crop_size or (height, width)
        scale = self.draw_scale(height, width)
        window, size = [], []
        for side, wanted in zip((height, width), crop, strict=True):
            part = max(1, round(wanted / scale))
            window.append(min(side, part))
            size.append(wanted if part <= side else min(wanted, max(1, round(side * scale))))
        if self.crop_size is None and (self.short_edge or self.base_size):  # objects: the whole image
            window, size = [height, width], [max(1, round(side * scale)) for side in (height, width)]
        top = left = 0
        labels = mask.as_subclass(torch.Tensor).numpy()
        for _ in range(self.tries):
            top = int(torch.randint(height - window[0] + 1, ()))
            left = int(torch.randint(width - window[1] + 1, ()))
            if self.category_max_fraction >= 1 or window == [height, width]:
                break
            counts = np.bincount(labels[top : top + window[0], left : left + window[1]].ravel(), minlength=256)[:IGNORE]
            if 0 < counts.max() <= self.category_max_fraction * counts.sum():
                break
        return {"top": top, "left": left, "window": window, "size": size}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        (height, width), size = params["window"], params["size"]
        part = TF.crop(inpt, params["top"], params["left"], height, width)
        if [height, width] == size:
            return part
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.Mask(_resize_label(part, size))
        return TF.resize(part, size, antialias=True)


def _resize_label(label: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    # TF.resize takes the corner of each cell for a mask ("nearest"), which shifts it against the image by up to half a
    # pixel; boundaries need the centre.
    plain = label.as_subclass(torch.Tensor)
    maps = plain.reshape(1, -1, *plain.shape[-2:])
    if not maps.shape[1]:
        return plain.new_empty(0, *size)
    return F.interpolate(maps, size=tuple(size), mode="nearest-exact").reshape(*plain.shape[:-2], *size)


def resize_pair(image: torch.Tensor, label: torch.Tensor, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 image [3, H, W] and label [H, W], or masks [N, H, W], resized to [height, width], as in
    :class:`RandomScaleCrop`."""
    if tuple(label.shape[-2:]) == tuple(size):
        return image, label
    return TF.resize(image, list(size), antialias=True), _resize_label(label, size)


def fit_factor(height: int, width: int, size: tuple[int, int]) -> float:
    """The largest factor with which an image fits into `size` or into `size` with its sides swapped: the longer side
    into the longer one, the shorter side into the shorter one (mmcv's ``imrescale``)."""
    return min(max(size) / max(height, width), min(size) / min(height, width))


def fit_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """[height, width] of an image that is resized by :func:`fit_factor`, each side rounded half up."""
    factor = fit_factor(height, width, size)
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


class PhotometricDistortion(v2.Transform):
    """SSD's distortion, see :class:`PhotometricOptions`; on images as values 0..255, cut off at both ends after each
    step and rounded once, at the end. Label maps are left alone."""

    def __init__(self, options: PhotometricOptions) -> None:
        super().__init__()
        self.options = options

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        o = self.options

        def drawn(low: float, high: float) -> float | None:
            if torch.rand(()).item() >= o.probability:
                return None
            return low + (high - low) * torch.rand(()).item()

        return {
            "contrast_last": torch.rand(()).item() < 0.5,
            "brightness": drawn(-o.brightness_delta, o.brightness_delta),
            "contrast": drawn(*o.contrast_range),
            "saturation": drawn(*o.saturation_range),
            "hue": drawn(-o.hue_delta / 180, o.hue_delta / 180),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        values = inpt.as_subclass(torch.Tensor).float() / 255
        if params["brightness"] is not None:
            values = (values + params["brightness"] / 255).clamp_(0, 1)
        contrast = params["contrast"]
        if contrast is not None and not params["contrast_last"]:
            values = (values * contrast).clamp_(0, 1)
        if params["saturation"] is not None:
            values = _saturate(values, params["saturation"])
        if params["hue"] is not None:
            values = TF.adjust_hue(values, params["hue"])
        if contrast is not None and params["contrast_last"]:
            values = (values * contrast).clamp_(0, 1)
        return tv_tensors.Image((values * 255).round_().clamp_(0, 255).to(torch.uint8))


def _saturate(values: torch.Tensor, factor: float) -> torch.Tensor:
    """The S of HSV times `factor`, at most 1: the distance of each channel of [3, H, W] from the largest one scales."""
    top, bottom = values.amax(0), values.amin(0)
    most = top / (top - bottom).clamp_min(1e-6)  # with this factor the smallest channel becomes 0
    return top - (top - values) * most.clamp_max(factor)


def training_transform(options: AugmentOptions) -> v2.Compose:
    """Scale, crop, flip and change of colours of the training split."""
    steps: list[v2.Transform] = [
        RandomScaleCrop(
            options.crop_size,
            options.scale_range,
            options.category_max_fraction,
            scale_step=options.scale_step,
            base_size=options.base_size,
            short_edge=options.short_edge,
            short_edge_sampling=options.short_edge_sampling,
            max_size=options.max_size,
        ),
        v2.RandomHorizontalFlip(options.flip),
        v2.RandomVerticalFlip(options.vertical_flip),
    ]
    jitter = options.color_jitter
    if options.photometric_distortion is not None:
        steps.append(PhotometricDistortion(options.photometric_distortion))
    elif jitter is not None and any((jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)):
        steps.append(
            v2.ColorJitter(
                brightness=jitter.brightness, contrast=jitter.contrast, saturation=jitter.saturation, hue=jitter.hue
            )
        )
    return v2.Compose(steps)


def to_sample(
    image: torch.Tensor,
    label: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    size: tuple[int, int] | None = None,
    channel_order: str = "rgb",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised float32 [C, H, W] and int64 [H, W] of RGB uint8 [C, H, W] and [H, W], padded at the right and the
    bottom to at least `size`.

    With `channel_order` "bgr" the channels are reversed; `mean` and `std` are in the order of the result. The
    padding is 0 in the image, which after normalisation is exactly the mean, and 255 in the label.
    """
    image = image.as_subclass(torch.Tensor)
    if channel_order == "bgr":
        image = image.flip(0)
    label = label.as_subclass(torch.Tensor)
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float32))
    shift = -torch.tensor(mean, dtype=torch.float32) / torch.tensor(std, dtype=torch.float32)
    values = torch.addcmul(shift[:, None, None], image.float(), scale[:, None, None])
    if size is not None:
        right, bottom = max(0, size[1] - label.shape[1]), max(0, size[0] - label.shape[0])
        if right or bottom:
            values = F.pad(values, (0, right, 0, bottom), value=0.0)
            label = F.pad(label, (0, right, 0, bottom), value=IGNORE)
    return values.contiguous(), label.long()


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Runs the block with the CPU generator seeded by `key` and restores it; no other device's is touched."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0]))
    try:
        yield
    finally:
        generator.set_state(state)
