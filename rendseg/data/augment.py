"""Augmentation in torchvision transforms v2 on tv_tensors: ``Image`` uint8 [3, H, W] and ``Mask`` uint8 [H, W]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from .images import IGNORE
from .options import AugmentOptions


class RandomScaleCrop(v2.Transform):
    """Scales by a random factor and crops, limiting the area of one category.

    A scale ``s`` is drawn uniformly; the crop then is a window of ``crop / s`` pixels of the image (as far as it
    reaches) at a random place, resized by ``s``. That equals scaling and then cropping, but costs no more for a large
    ``s``; ``s`` is rounded so that the window is whole pixels. Up to ten windows are tried until no category covers
    more than `category_max_fraction` of the window's labelled pixels (DeepLab's rule, as in mmsegmentation and
    detectron2); the last one is taken otherwise. Images are resized bilinearly with anti-aliasing, labels to the
    nearest pixel centre. A result smaller than the crop is left to :func:`to_sample` to pad.
    """

    tries = 10

    def __init__(
        self, crop_size: tuple[int, int] | None, scale_range: tuple[float, float], category_max_fraction: float
    ) -> None:
        super().__init__()
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.category_max_fraction = category_max_fraction

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(value for value in flat_inputs if isinstance(value, tv_tensors.Mask))
        height, width = mask.shape[-2:]
        crop = self.crop_size or (height, width)
        low, high = self.scale_range
        scale = low + (high - low) * torch.rand(()).item() if high > low else low
        window, size = [], []
        for side, wanted in zip((height, width), crop, strict=True):
            part = max(1, round(wanted / scale))
            window.append(min(side, part))
            size.append(wanted if part <= side else min(wanted, max(1, round(side * scale))))
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
            # TF.resize takes the corner of each cell for a mask ("nearest"), which shifts it against the image by up to
            # half a pixel; boundaries need the centre.
            plain = part.as_subclass(torch.Tensor)[None, None]
            return tv_tensors.Mask(F.interpolate(plain, size=tuple(size), mode="nearest-exact")[0, 0])
        return TF.resize(part, size, antialias=True)


def training_transform(options: AugmentOptions) -> v2.Compose:
    """Scale, crop, flip and colour jitter of the training split."""
    steps: list[v2.Transform] = [
        RandomScaleCrop(options.crop_size, options.scale_range, options.category_max_fraction),
        v2.RandomHorizontalFlip(options.flip),
        v2.RandomVerticalFlip(options.vertical_flip),
    ]
    jitter = options.color_jitter
    if jitter is not None and any((jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)):
        steps.append(
            v2.ColorJitter(
                brightness=jitter.brightness, contrast=jitter.contrast, saturation=jitter.saturation, hue=jitter.hue
            )
        )
    return v2.Compose(steps)


def to_sample(
    image: torch.Tensor,
    label: torch.Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    size: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised float32 [3, H, W] and int64 [H, W], padded at the right and the bottom to at least `size`.

    The padding is 0 in the image, which after normalisation is exactly the mean, and 255 in the label.
    """
    image = image.as_subclass(torch.Tensor)
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
