"""Options of the configuration section ``data:``: every key, its default and its meaning.

``name`` chooses the data set; the other keys are those of its class below. An unknown key is an error that names the
nearest known one, and every error is one :class:`DataError` line.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass


class DataError(ValueError):
    """A data set, an image, a label map or an option that cannot be used. One line: what, where and the remedy."""


_CONFIG = ConfigDict(extra="forbid", validate_default=True)
_Probability = Annotated[float, Field(ge=0, le=1)]
_Side = Annotated[int, Field(ge=1)]
_Jitter = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_NonNegative = Annotated[float, Field(ge=0)]


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


@dataclass(config=_CONFIG, kw_only=True)
class ColorJitterOptions:
    """Ranges of ``torchvision.transforms.v2.ColorJitter``; 0 leaves the property alone."""

    brightness: _Jitter = 0.25
    contrast: _Jitter = 0.25
    saturation: _Jitter = 0.25
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # dear on a CPU: the image goes to HSV and back


@dataclass(config=_CONFIG, kw_only=True)
class PhotometricOptions:
    """The distortion of SSD (Liu et al. 2016, section 2.2) with the values of mmsegmentation and detectron2: each of
    the four steps is taken with `probability`, contrast before saturation and hue or after them."""

    brightness_delta: Annotated[float, Field(ge=0, le=255)] = 32.0  # added to all values 0..255, at most so much
    contrast_range: tuple[_NonNegative, _NonNegative] = (0.5, 1.5)  # factor of all values
    saturation_range: tuple[_NonNegative, _NonNegative] = (0.5, 1.5)  # factor of the S of HSV
    hue_delta: Annotated[float, Field(ge=0, le=90)] = 18.0  # turn of the H of HSV; 180 is the full circle, as in OpenCV
    probability: _Probability = 0.5  # of each step

    @model_validator(mode="after")
    def _ordered(self) -> PhotometricOptions:
        for name in ("contrast_range", "saturation_range"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be [smallest, largest], got {[low, high]}")
        return self


@dataclass(config=_CONFIG, kw_only=True)
class AugmentOptions:
    """Keys common to all data sets. The split ``val`` heeds only those from ``mean`` on.

    Size of the training images, one of three rules; the crop follows:

    * ``scale_range`` alone: a factor, uniform or in steps of ``scale_step`` (PaddleSeg's ``ResizeStepScaling``);
    * ``base_size``: the image is fitted into it, keeping its shape, times that factor (mmsegmentation's
      ``RandomResize`` with ``keep_ratio``);
    * ``short_edge``: the shorter side becomes one of these (detectron2's ``ResizeShortestEdge``), whatever
      ``scale_range`` is.
    """

    crop_size: tuple[_Side, _Side] | None = None  # [height, width]; null: the size of each image
    scale_range: tuple[_Positive, _Positive] = (0.5, 2.0)  # the factor is drawn uniformly from it
    scale_step: _Positive | None = None  # null: any factor; else smallest, smallest + step, ... up to the largest
    base_size: tuple[_Side, _Side] | None = None  # [height, width], or turned, as the image is; null: each image's own
    short_edge: list[_Side] | None = None  # choices of the shorter side; null: no such rule
    short_edge_sampling: Literal["choice", "range"] = "choice"  # range: any integer from the first to the second
    max_size: _Side | None = None  # with short_edge: the longer side is at most so long; null: no limit
    category_max_fraction: Annotated[float, Field(gt=0, le=1)] = 0.75  # of the crop; 1 switches the limit off
    flip: _Probability = 0.5  # left-right
    vertical_flip: _Probability = 0.0
    color_jitter: ColorJitterOptions | None = field(default_factory=ColorJitterOptions)  # null: none
    photometric_distortion: PhotometricOptions | None = None  # {}: SSD's, instead of color_jitter
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of the channels in [0, 1]; the customary ImageNet values
    std: tuple[_Positive, _Positive, _Positive] = (0.229, 0.224, 0.225)
    pixel_max: Literal[1, 255] = 1  # 255: mean and std are given for 0..255; they are divided by it at once
    channel_order: Literal["rgb", "bgr"] = "rgb"  # of the network's input, and so of mean and std; bgr: Caffe's weights
    val_size: tuple[_Side, _Side] | None = None  # [height, width] of val images and labels; null: as in the files
    val_keep_ratio: bool = True  # false: val images are stretched to val_size; true: fitted into it

    @model_validator(mode="after")
    def _ordered(self) -> AugmentOptions:
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
            if getattr(self, name) is not None and self.crop_size is None:
                raise ValueError(f"{name} needs crop_size: the images of a batch must have one size")
        largest = max(abs(value) for value in self.mean)
        if self.pixel_max == 1 and largest > 1:
            raise ValueError(f"mean {list(self.mean)} is of values 0..255: set pixel_max: 255, or divide mean and std")
        if self.pixel_max == 255:
            if 0 < largest <= 1:
                raise ValueError(f"mean {list(self.mean)} is of values 0..1: leave pixel_max at 1")
            self.mean = tuple(value / 255 for value in self.mean)  # type: ignore[assignment]
            self.std = tuple(value / 255 for value in self.std)  # type: ignore[assignment]
            self.pixel_max = 1  # so that the options can be parsed again
        return self


@dataclass(config=_CONFIG, kw_only=True)
class ShapesOptions(AugmentOptions):
    """Synthetic scenes; see :mod:`rendseg.data.shapes`. No scaling and jitter by default, as every scene differs."""

    name: Literal["shapes"] = "shapes"
    size: tuple[_Side, _Side] = (128, 128)  # [height, width]
    num_images: Annotated[int, Field(ge=1)] = 4096
    num_val_images: Annotated[int, Field(ge=1)] = 128
    seed: Annotated[int, Field(ge=0)] = 0  # of the scenes
    scale_range: tuple[_Positive, _Positive] = (1.0, 1.0)
    color_jitter: ColorJitterOptions | None = None


@dataclass(config=_CONFIG, kw_only=True)
class CamVidOptions(AugmentOptions):
    """CamVid in the SegNet layout; see :mod:`rendseg.data.camvid`."""

    name: Literal["camvid"] = "camvid"
    root: str | None = None  # null: $RENDSEG_DATA/camvid, else ../shared/data/camvid beside the checkout
    train: SplitNames = "train"  # folder of the images of each split, or several; NAMEannot holds the labels
    val: SplitNames = "val"
    cache: bool = False  # decode every image once and keep it in memory (train: 250 MB)


@dataclass(config=_CONFIG, kw_only=True)
class CityscapesOptions(AugmentOptions):
    """Cityscapes as it is distributed; see :mod:`rendseg.data.cityscapes`."""

    name: Literal["cityscapes"] = "cityscapes"
    root: str | None = None  # holds leftImg8bit and gtFine; null: $RENDSEG_DATA/cityscapes
    train: SplitNames = "train"  # train, val, test or train_extra, or several: [train, val]
    val: SplitNames = "val"
    labels: Literal["auto", "labelIds", "labelTrainIds"] = "auto"  # auto: *_labelTrainIds.png where present
    annotations: Literal["gtFine", "gtCoarse"] = "gtFine"  # of train; train_extra has gtCoarse alone, val keeps gtFine
    cache: bool = False  # decode every image once and keep it in memory (train: 25 GB)


@dataclass(config=_CONFIG, kw_only=True)
class Ade20kOptions(AugmentOptions):
    """ADE20K, scene parsing of 150 classes; see :mod:`rendseg.data.ade20k`."""

    name: Literal["ade20k"] = "ade20k"
    root: str | None = None  # ADEChallengeData2016 or the folder that holds it; null: $RENDSEG_DATA/ade20k
    train: SplitNames = "training"  # folder within images/ and annotations/, or several
    val: SplitNames = "validation"
    cache: bool = False  # decode every image once and keep it in memory


@dataclass(config=_CONFIG, kw_only=True)
class VocOptions(AugmentOptions):
    """Pascal VOC 2012, with the labels of SBD on request; see :mod:`rendseg.data.voc`."""

    name: Literal["voc"] = "voc"
    root: str | None = None  # VOC2012, VOCdevkit or the folder that holds it; null: $RENDSEG_DATA/voc
    sbd: str | None = None  # benchmark_RELEASE of SBD; null: SegmentationClassAug, else benchmark_RELEASE beside VOC
    train: SplitNames = "train"  # a list in ImageSets/Segmentation, or several; trainaug and aug take in SBD's labels
    val: SplitNames = "val"
    cache: bool = False  # decode every image once and keep it in memory (trainaug: 8 GB)


@dataclass(config=_CONFIG, kw_only=True)
class FolderOptions(AugmentOptions):
    """Any folder of images and label maps; see :mod:`rendseg.data.folder`."""

    name: Literal["folder"] = "folder"
    root: str
    images: str = "images"  # folder names within root
    labels: str = "labels"
    image_suffix: str = ""  # what image names end in before the extension, e.g. "_leftImg8bit"
    label_suffix: str = ".png"  # what replaces it in the label's name, e.g. "_gtFine_labelIds.png"
    split: Literal["folders", "lists", "fraction"] = "folders"
    train: SplitNames = "train"  # sub-folder of images/ and labels/, or list file (with or without ".txt"), or several
    val: SplitNames = "val"
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2  # for split: fraction
    seed: Annotated[int, Field(ge=0)] = 0  # of that division
    classes: int | list[str] | None = None  # number or names; null: as many as class_map or color_map has
    class_map: dict[int, int] | None = None  # value in the file -> class (or 255: ignored); null: as it is
    color_map: dict[str, int] | None = None  # "#rrggbb" -> class (or 255), for labels drawn in colours
    ignore_label: int | list[int] | None = 255  # values in the file that are ignored; a key of class_map wins
    palette: list[tuple[int, int, int]] | None = None  # colours of the pictures, one per class
    cache: bool = False  # decode every image once and keep it in memory


Task = Literal["object", "part", "material", "texture", "scene"]


@dataclass(config=_CONFIG, kw_only=True)
class BrodenOptions(AugmentOptions):
    """Images with labels of several tasks; see :mod:`rendseg.data.broden`."""

    name: Literal["broden"] = "broden"
    root: str
    index: str = "index.csv"  # table of images and labels within root
    images: str = "images"  # folder within root from which the table's paths start; "": root itself
    train: str = "train"  # value of the column "split" of each split
    val: str = "val"
    tasks: list[Task] | None = None  # null: every task with a list of names (object.csv, part.csv, ...) in root
    # The tasks whose labels a training batch holds; batches of a source are as frequent as its images.
    sources: list[list[Task]] = field(
        default_factory=lambda: [["object", "part", "scene"], ["material"], ["texture"]]  # type: ignore[list-item]
    )
    cache: bool = False  # decode every image once and keep it in memory


DatasetOptions = (
    ShapesOptions | CamVidOptions | CityscapesOptions | Ade20kOptions | VocOptions | FolderOptions | BrodenOptions
)
_OPTIONS: dict[str, Any] = {
    "shapes": ShapesOptions,
    "camvid": CamVidOptions,
    "cityscapes": CityscapesOptions,
    "ade20k": Ade20kOptions,
    "voc": VocOptions,
    "folder": FolderOptions,
    "broden": BrodenOptions,
}
# Sections within a section.
_INNER = {"color_jitter": ColorJitterOptions, "photometric_distortion": PhotometricOptions}


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _check_keys(cls: type, given: Mapping[str, Any], section: str) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            raise DataError(f"unknown key {section}.{key}{_nearest(str(key), known)}")


def parse_options(options: Mapping[str, Any]) -> DatasetOptions:
    """The typed options of a ``data:`` section.

    Raises:
        DataError: unknown data set, unknown key (names the nearest) or unusable value (names key, wish and value).
    """
    if dataclasses.is_dataclass(options):
        options = dataclasses.asdict(options)  # type: ignore[arg-type]
    if not isinstance(options, Mapping):
        raise DataError(f"data must be a mapping with a key 'name', got {options!r}")
    name = options.get("name", "shapes")
    if name not in _OPTIONS:
        raise DataError(f"data.name {name!r} is no data set{_nearest(str(name), list(_OPTIONS))}")
    cls = _OPTIONS[name]
    _check_keys(cls, options, "data")
    for key, inner in _INNER.items():
        if isinstance(options.get(key), Mapping):
            _check_keys(inner, options[key], f"data.{key}")
    try:
        return TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["data", *(str(part) for part in first["loc"])])
        message = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r}"
        raise DataError(f"{where}: {message}{got}") from None
