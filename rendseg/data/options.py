"""Options of the configuration section ``data:`` that all data sets have, each with its default and its meaning.

``name`` chooses the data set; its own keys stand beside it, in a class derived from :class:`DatasetOptions`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from .._options import Count, Field, Flag, NonNegative, Options, Positive, Share


class DataError(ValueError):
    """A data set, an image, a label map or an option that cannot be used. One line: what, where and the remedy."""


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _check_names(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise ValueError(f"wanted a name or a list of names, got {value!r}")
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is given twice")
    return value


# What a split is made of: the name of a folder or list, or several, whose images follow one another.
SplitNames = Annotated[str | list[str], BeforeValidator(_check_names)]


def names_of(value: str | list[str]) -> list[str]:
    """The names of a ``train:`` or ``val:`` key, which may be one string."""
    return [value] if isinstance(value, str) else list(value)


class ColorJitterOptions(Options):
    """Ranges of ``torchvision.transforms.v2.ColorJitter``; 0 leaves the property alone."""

    brightness: NonNegative = 0.25
    contrast: NonNegative = 0.25
    saturation: NonNegative = 0.25
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # expensive on a CPU: the image goes to HSV and back


class PhotometricOptions(Options):
    """The distortion of SSD (Liu et al. 2016, section 2.2) with the values of mmsegmentation and detectron2: each of
    the four steps is taken with `probability`, contrast before saturation and hue or after them."""

    brightness_delta: Annotated[float, Field(ge=0, le=255)] = 32.0  # added to all values 0..255, at most so much
    contrast_range: tuple[NonNegative, NonNegative] = (0.5, 1.5)  # factor of all values
    saturation_range: tuple[NonNegative, NonNegative] = (0.5, 1.5)  # factor of the S of HSV
    hue_delta: Annotated[float, Field(ge=0, le=90)] = 18.0  # shift of the H of HSV; 180: the full circle (OpenCV)
    probability: Share = 0.5  # of each step

    def __post_init__(self) -> None:
        for name in ("contrast_range", "saturation_range"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be [smallest, largest], got {[low, high]}")


class AugmentOptions(Options):
    """Keys common to all data sets. The split ``val`` uses only those from ``mean`` on.

    Size of the training images, one of three rules; the crop follows:

    * ``scale_range`` alone: a factor, uniform or in steps of ``scale_step`` (PaddleSeg's ``ResizeStepScaling``);
    * ``base_size``: the image is fitted into it, keeping its shape, times that factor (mmsegmentation's
      ``RandomResize`` with ``keep_ratio``);
    * ``short_edge``: the shorter side becomes one of these (detectron2's ``ResizeShortestEdge``);
      ``scale_range`` is not used.
    """

    one_size: ClassVar[bool] = True  # the images of a batch must have one size
    crop_size: tuple[Count, Count] | None = None  # [height, width]; null: the size of each image
    scale_range: tuple[Positive, Positive] = (0.5, 2.0)  # the factor is drawn uniformly from it
    scale_step: Positive | None = None  # null: any factor; else smallest, smallest + step, ... up to the largest
    base_size: tuple[Count, Count] | None = None  # [height, width], or swapped, as the image is; null: each image's own
    short_edge: list[Count] | None = None  # choices of the shorter side; null: no such rule
    short_edge_sampling: Literal["choice", "range"] = "choice"  # range: any integer from the first to the second
    max_size: Count | None = None  # with short_edge: the longer side is at most so long; null: no limit
    category_max_fraction: Annotated[float, Field(gt=0, le=1)] = 0.75  # of the crop; 1 switches the limit off
    flip: Share = 0.5  # left-right
    vertical_flip: Share = 0.0
    color_jitter: ColorJitterOptions | None = field(default_factory=ColorJitterOptions)  # null: none
    photometric_distortion: PhotometricOptions | None = None  # {}: SSD's, instead of color_jitter
    channels: Count = 3  # of the images; model.backbone.in_chans sets it. 1: grey; more: the bands or pages of TIFFs
    image_max: Positive | None = None  # value of 16-bit or float images that is white (12 bits: 4095); null: 65535
    exif_orientation: Flag = True  # turn images as their EXIF tag says; false: if labels were drawn on them as stored
    max_pixels: Count = 178_956_970  # of a file (PIL's limit): a guard against files made to fill the memory
    mean: tuple[float, ...] = IMAGENET_MEAN  # of the channels in [0, 1]; other than 3 channels: made from these
    std: tuple[Positive, ...] = IMAGENET_STD
    pixel_max: Literal[1, 255] = 1  # 255: mean and std are given for 0..255; they are divided by it at once
    channel_order: Literal["rgb", "bgr"] = "rgb"  # of the network's input, and so of mean and std; bgr: Caffe's weights
    val_size: tuple[Count, Count] | None = None  # [height, width] of val images and labels; null: as in the files
    val_keep_ratio: Flag = True  # false: val images are stretched to val_size; true: fitted into it

    def __post_init__(self) -> None:
        if self.scale_range[0] > self.scale_range[1]:
            raise ValueError(f"scale_range must be [smallest, largest], got {list(self.scale_range)}")
        if self.short_edge is not None:
            if self.base_size is not None:
                raise ValueError("short_edge and base_size exclude each other: give one of them")
            if not self.short_edge:
                raise ValueError("short_edge must hold at least one length, got []")
            if self.short_edge_sampling == "range" and (
                len(self.short_edge) != 2 or self.short_edge[0] > self.short_edge[1]
            ):
                raise ValueError(
                    f"short_edge must be [smallest, largest] with short_edge_sampling: range, got {self.short_edge}"
                )
        elif self.max_size is not None:
            raise ValueError("max_size needs short_edge: give the choices of the shorter side, or leave max_size out")
        for name in ("short_edge", "base_size"):
            if getattr(self, name) is not None and self.crop_size is None and self.one_size:
                raise ValueError(f"{name} needs crop_size: the images of a batch must have one size")
        self._fit_channels()
        largest = max(abs(value) for value in self.mean)
        if self.pixel_max == 1 and largest > 1:
            raise ValueError(f"mean {list(self.mean)} is of values 0..255: set pixel_max: 255, or divide mean and std")
        if self.pixel_max == 255:
            if 0 < largest <= 1:
                raise ValueError(f"mean {list(self.mean)} is of values 0..1: leave pixel_max at 1")
            divided = {name: tuple(value / 255 for value in getattr(self, name)) for name in ("mean", "std")}
            for name, value in {**divided, "pixel_max": 1}.items():  # 1, so that the options can be parsed again
                object.__setattr__(self, name, value)

    def _fit_channels(self) -> None:
        """Mean and std for every channel: the mean of the three where there is no colour, and for what is beyond it."""
        count = self.channels
        for name, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            if len(getattr(self, name)) == count:
                continue
            if getattr(self, name) != usual:
                raise ValueError(
                    f"{name} must have one value for each of the {count} channels of model.backbone.in_chans"
                )
            grey = round(sum(usual) / 3, 3)
            values = (*usual, *[grey] * (count - 3)) if count > 3 else (grey,) * count
            object.__setattr__(self, name, values)  # which frozen options allow too
        if count == 3:
            return
        if self.channel_order == "bgr":
            raise ValueError(f"channel_order: bgr needs 3 channels, the images have {count}")
        if self.photometric_distortion is not None:
            raise ValueError(f"photometric_distortion needs 3 channels, the images have {count}: leave it out")
        if count != 1 and self.color_jitter is not None:
            if self.color_jitter != ColorJitterOptions():
                raise ValueError(f"color_jitter needs 1 or 3 channels, the images have {count}: set it to null")
            object.__setattr__(self, "color_jitter", None)


class DatasetOptions(AugmentOptions):
    """Base of the options of a data set; ``name`` is the one under which it is registered."""

    name: str = ""
