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

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass


class DataError(ValueError):
    """A data set, an image, a label map or an option that cannot be used. One line: what, where and the remedy."""


_CONFIG = ConfigDict(extra="forbid", validate_default=True)
_Probability = Annotated[float, Field(ge=0, le=1)]
_Side = Annotated[int, Field(ge=1)]
_Jitter = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]


@dataclass(config=_CONFIG, kw_only=True)
class ColorJitterOptions:
    """Ranges of ``torchvision.transforms.v2.ColorJitter``; 0 leaves the property alone."""

    brightness: _Jitter = 0.25
    contrast: _Jitter = 0.25
    saturation: _Jitter = 0.25
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # dear on a CPU: the image goes to HSV and back


@dataclass(config=_CONFIG, kw_only=True)
class AugmentOptions:
    """Keys common to all data sets. Only ``mean`` and ``std`` are used by the split ``val``."""

    crop_size: tuple[_Side, _Side] | None = None  # [height, width]; null: the size of each image
    scale_range: tuple[_Positive, _Positive] = (0.5, 2.0)  # the scale is drawn uniformly from it
    category_max_fraction: Annotated[float, Field(gt=0, le=1)] = 0.75  # of the crop; 1 switches the limit off
    flip: _Probability = 0.5  # left-right
    vertical_flip: _Probability = 0.0
    color_jitter: ColorJitterOptions | None = field(default_factory=ColorJitterOptions)  # null: none
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in [0, 1]; the customary ImageNet values
    std: tuple[_Positive, _Positive, _Positive] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _ordered(self) -> AugmentOptions:
        if self.scale_range[0] > self.scale_range[1]:
            raise ValueError(f"scale_range must be [smallest, largest], got {list(self.scale_range)}")
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
    train: str = "train"  # folder of the images of each split; NAMEannot holds the labels
    val: str = "val"
    cache: bool = False  # decode every image once and keep it in memory (train: 250 MB)


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
    train: str = "train"  # sub-folder of images/ and labels/, or list file (with or without ".txt")
    val: str = "val"
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


DatasetOptions = ShapesOptions | CamVidOptions | FolderOptions | BrodenOptions
_OPTIONS: dict[str, type[ShapesOptions] | type[CamVidOptions] | type[FolderOptions] | type[BrodenOptions]] = {
    "shapes": ShapesOptions,
    "camvid": CamVidOptions,
    "folder": FolderOptions,
    "broden": BrodenOptions,
}


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
    if isinstance(options.get("color_jitter"), Mapping):
        _check_keys(ColorJitterOptions, options["color_jitter"], "data.color_jitter")
    try:
        return TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["data", *(str(part) for part in first["loc"])])
        message = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r}"
        raise DataError(f"{where}: {message}{got}") from None
