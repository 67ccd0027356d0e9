"""Any folder of images and label maps.

``ROOT/images`` and ``ROOT/labels`` (other names: `images`, `labels`), searched recursively; the label of
``images/a/NAME.jpg`` is ``labels/a/NAME.png`` (other endings: `image_suffix`, `label_suffix`). The splits are

* ``split: folders``: ``images/train`` and ``images/val``, and the same within ``labels``;
* ``split: lists``: ``ROOT/train.txt`` and ``ROOT/val.txt``, one image per line: its path within ``images``, with or
  without extension, or within ROOT, or absolute; in a second column there may be its label map;
* ``split: fraction``: a random `val_fraction` of the images, drawn by `seed`.

`train` and `val` name the folder or list, or several: ``train: [train, extra]``.

A label map may also have the suffix in other case, or another lossless format's, if no other file has its name. Names
that begin with "." are skipped, symbolic links followed.

Label maps are one-channel images (grey or palette, 1 to 32 bits) whose stored values are classes, or are translated by
`class_map`, e.g. ``{0: 0, 255: 1}`` (or ``{-1: 255}``); or colour images translated by `color_map`, e.g.
``{"#000000": 0, "#804080": 1}``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from .._options import Field, Flag, Whole
from .base import ImageFiles, Split
from .images import EXTENSIONS, IGNORE, LARGEST_VALUE, SMALLEST_VALUE, LabelReader, find_images, read_list, read_values
from .options import DataError, DatasetOptions, SplitNames, names_of
from .registry import register_dataset


class FolderOptions(DatasetOptions):
    """Any folder of images and label maps; see :mod:`rendseg.data.folder`."""

    name: Literal["folder"] = "folder"
    root: str
    images: str = "images"  # folder names within root
    labels: str = "labels"
    image_suffix: str = ""  # what image names end in before the extension, e.g. "_leftImg8bit"
    label_suffix: str = ".png"  # what replaces it in the label's name, e.g. "_gtFine_labelIds.png"; see the module
    split: Literal["folders", "lists", "fraction"] = "folders"
    train: SplitNames = "train"  # sub-folder of images/ and labels/, or list file (with or without ".txt"), or several
    val: SplitNames = "val"
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2  # for split: fraction
    seed: Whole = 0  # of that division
    classes: int | list[str] | None = None  # number or names; null: as many as class_map or color_map has
    class_map: dict[int, int] | None = None  # value in the file -> class (or 255: ignored); null: as it is
    color_map: dict[str, int] | None = None  # "#rrggbb" -> class (or 255), for labels drawn in colours
    ignore_label: int | list[int] | None = 255  # values in the file that are ignored, -1 too; a key of class_map wins
    palette: list[tuple[int, int, int]] | None = None  # colours of the pictures, one per class
    cache: Flag = False  # decode every image once and keep it in memory


def distinct_colors(count: int) -> np.ndarray:
    """uint8 [count, 3]: the bits of the class number spread over r, g and b (Pascal VOC's colour map)."""
    index = np.arange(count)
    colors = np.zeros((count, 3), np.uint8)
    for level in range(3):
        for channel in range(3):
            colors[:, channel] |= (((index >> (3 * level + channel)) & 1) << (7 - level)).astype(np.uint8)
    return colors


def _parse_colors(color_map: dict[str, int]) -> dict[tuple[int, int, int], int]:
    colors: dict[tuple[int, int, int], int] = {}
    for text, label in color_map.items():
        digits = text.strip().removeprefix("#")
        try:
            if len(digits) != 6:
                raise ValueError
            value = int(digits, 16)
        except ValueError:
            raise DataError(f'data.color_map: key {text!r} is no colour; write it as "#rrggbb" in quotes') from None
        colors[(value >> 16, (value >> 8) & 255, value & 255)] = label
    return colors


@register_dataset(FolderOptions)
class Folder(ImageFiles):
    """See the module."""

    def __init__(
        self, options: FolderOptions, split: Split, augment_seed: int = 0, problems: list[str] | None = None
    ) -> None:
        if options.class_map is not None and options.color_map is not None:
            raise DataError("data.class_map and data.color_map exclude each other: give one of them")
        mapping = options.class_map if options.class_map is not None else options.color_map
        names = options.classes
        if names is None:
            if mapping is None:
                raise DataError("data.classes is missing: give the number of classes or their names")
            names = max((label for label in mapping.values() if label != IGNORE), default=-1) + 1
        if isinstance(names, int):
            names = [f"class {index}" for index in range(names)]
        if not 1 <= len(names) <= IGNORE:
            raise DataError(f"data.classes: wanted 1 to {IGNORE} classes, got {len(names)}")
        twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if twice is not None:
            raise DataError(f"data.classes: {twice!r} is given twice; every class needs a name of its own")
        for value, label in (mapping or {}).items():
            if label != IGNORE and not 0 <= label < len(names):
                key = "class_map" if options.class_map is not None else "color_map"
                raise DataError(f"data.{key}: {value!r} -> {label} is no class (0..{len(names) - 1}, or 255 to ignore)")
            if isinstance(value, int) and not SMALLEST_VALUE <= value <= LARGEST_VALUE:
                raise DataError(f"data.class_map: values must be {SMALLEST_VALUE}..{LARGEST_VALUE}, got {value}")
        palette = distinct_colors(len(names)) if options.palette is None else np.array(options.palette)
        if palette.shape != (len(names), 3) or palette.min() < 0 or palette.max() > 255:
            raise DataError(f"data.palette: wanted {len(names)} colours of three values 0..255, got {options.palette}")
        super().__init__(options, split, names, palette, augment_seed, problems)

        ignored = options.ignore_label
        ignore_values = () if ignored is None else (ignored,) if isinstance(ignored, int) else tuple(ignored)
        if any(not SMALLEST_VALUE <= value <= LARGEST_VALUE for value in ignore_values):
            raise DataError(f"data.ignore_label: values must be {SMALLEST_VALUE}..{LARGEST_VALUE}, got {ignored}")
        colors = _parse_colors(options.color_map) if options.color_map is not None else None
        self._reader = LabelReader(self.num_classes, options.class_map, colors, ignore_values)
        self._root = Path(options.root).expanduser()
        if not self._root.is_dir():
            raise DataError(f"{self._root}: no such folder; set data.root to the folder that holds {options.images}/")
        self._image_folder = self._root / options.images
        self._label_folder = self._root / options.labels
        self._label_names: dict[Path, dict[str, list[str]]] = {}
        for folder, key in ((self._image_folder, "images"), (self._label_folder, "labels")):
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder; create it or set data.{key} to its name in data.root")
        if options.split == "fraction":
            for path in self._fraction(options):
                self._add_image(path, options)
        else:
            for part in names_of(options.train if split == "train" else options.val):
                with self._part():
                    if options.split == "folders":
                        for path in self._folder(part, options):
                            self._add_image(path, options)
                    else:
                        self._add_list(part, options)
        self._label_names = {}  # served the listing alone
        self._listed(options.cache)

    @classmethod
    def file_values(cls, options: FolderOptions) -> np.ndarray | None:
        """Of several values with one class the first in the map."""
        colors = None if options.color_map is None else _parse_colors(options.color_map)
        mapping: Mapping[Any, int] | None = options.class_map if colors is None else colors
        if mapping is None:
            return None
        count = options.classes if isinstance(options.classes, int) else len(options.classes or ())
        count = count or max((label for label in mapping.values() if label != IGNORE), default=-1) + 1
        found: dict[int, Any] = {}
        for value, label in mapping.items():
            if colors is not None or value >= 0:
                found.setdefault(label, value)
        lacking = [label for label in range(count) if label not in found]
        if lacking:
            raise DataError(
                f"data.class_map or data.color_map has no value (of 0 or more) for class {lacking[0]}: add one, or "
                "write the numbers of the classes"
            )
        return np.array([found[label] for label in range(count)])

    def ignored_values(self, index: int) -> list[int]:
        options: Any = self.options
        if options.class_map is not None or options.color_map is not None:
            return []
        values = np.unique(read_values(self.files(index)[1], options.max_pixels))
        return [int(value) for value in values if value >= self.num_classes or value < 0]

    def _folder(self, part: str, options: FolderOptions) -> list[Path]:
        folder = self._image_folder / part
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; name it in data.{self.split}, or set data.split to lists or fraction"
            )
        return self._with_suffix(find_images(folder, recursive=True), folder, options)

    def _fraction(self, options: FolderOptions) -> list[Path]:
        paths = self._with_suffix(find_images(self._image_folder, recursive=True), self._image_folder, options)
        if len(paths) < 2:
            raise DataError(f"{self._image_folder}: holds one image, too few to divide; use data.split: lists")
        order = np.random.default_rng(options.seed).permutation(len(paths))
        count = min(max(1, round(len(paths) * options.val_fraction)), len(paths) - 1)
        chosen = order[:count] if self.split == "val" else order[count:]
        return [paths[index] for index in sorted(chosen)]

    def _add_list(self, part: str, options: FolderOptions) -> None:
        paths = self._with_suffix(find_images(self._image_folder, recursive=True), self._image_folder, options)
        listing = self._root / part
        if not listing.is_file() and listing.with_name(listing.name + ".txt").is_file():
            listing = listing.with_name(listing.name + ".txt")
        known: dict[str, Path] = {}
        for path in paths:
            relative = path.relative_to(self._image_folder)
            known[relative.as_posix()] = known[relative.with_suffix("").as_posix()] = path
        for line in read_list(listing, self.split):
            image, second = self._listed_image(line, known), ""
            for separator in ("\t", ",", ";", None):
                columns = [column.strip() for column in line.split(separator)]
                if image is None and len(columns) > 1:
                    image, second = self._listed_image(columns[0], known), columns[1]
            if image is None:
                self.left_out += 1
                self._report(f"{listing}: {line!r} is not in {self._image_folder}; correct the list")
            elif Path(second).suffix.lower() in EXTENSIONS:
                self._add(image, self._listed_label(second), self._name_of(image), f"correct the list {listing}")
            else:
                self._add_image(image, options)

    def _listed_image(self, name: str, known: dict[str, Path]) -> Path | None:
        """The image that a list means: by its path within the folder of images, within root, or absolute; written with
        either slash, and absolute paths even if the data set has been moved since."""
        for text in (name, name.replace("\\", "/")):
            text = os.path.normpath(text)
            if text in known:
                return known[text]
            within = _after(text, self._image_folder.name)
            if within in known:
                return known[within]
            if os.path.isabs(text):
                real = os.path.relpath(os.path.realpath(text), os.path.realpath(self._image_folder))
                if real in known:
                    return known[real]
        return None

    def _listed_label(self, name: str) -> Path:
        """The file of a list's second column, searched as the images are."""
        text = os.path.normpath(name.replace("\\", "/"))
        places = [
            self._root / text,
            self._label_folder / text,
            self._label_folder / _after(text, self._label_folder.name),
        ]
        return next((path for path in places if path.is_file()), places[0])

    @staticmethod
    def _with_suffix(paths: list[Path], folder: Path, options: FolderOptions) -> list[Path]:
        chosen = [path for path in paths if path.stem.endswith(options.image_suffix)]
        if not chosen:
            raise DataError(f"{folder}: no image name ends in data.image_suffix {options.image_suffix!r}; correct it")
        return chosen

    @staticmethod
    def _stem(relative: Path, options: FolderOptions) -> str:
        return relative.stem.removesuffix(options.image_suffix) if options.image_suffix else relative.stem

    def _name_of(self, image: Path) -> str:
        return "_".join(image.relative_to(self._image_folder).with_suffix("").parts)

    def _add_image(self, image: Path, options: FolderOptions) -> None:
        relative = image.relative_to(self._image_folder)
        label = self._label_folder / relative.with_name(self._stem(relative, options) + options.label_suffix)
        self._add(image, self._present(label), self._name_of(image))

    def _present(self, label: Path) -> Path:
        """`label`, or where it is missing the file that differs from it in the case of its suffix or in its format."""
        if label.is_file():
            return label
        if label.parent not in self._label_names:
            names: dict[str, list[str]] = {}
            for name in os.listdir(label.parent) if label.parent.is_dir() else ():
                names.setdefault(name.lower(), []).append(name)
            self._label_names[label.parent] = names
        for end in ([label.suffix], sorted(EXTENSIONS - {".jpg", ".jpeg"}), [".jpg", ".jpeg"]):
            found = [
                name
                for suffix in end
                for name in self._label_names[label.parent].get((label.stem + suffix).lower(), ())
                if name.startswith(label.stem)
            ]
            if len(found) == 1:
                return label.with_name(found[0])
        return label


def _after(path: str, folder: str) -> str:
    """What follows the last component `folder` of a path; the path itself without one."""
    return f"/{path}".rpartition(f"/{folder}/")[2].removeprefix("/") if folder else path
