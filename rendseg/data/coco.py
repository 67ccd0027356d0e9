"""COCO instances (Lin et al. 2014), and any data set in its format: one JSON file per split.

``ROOT/train2017/000000000009.jpg``, ``ROOT/annotations/instances_train2017.json``, and the same for ``val2017``. Masks
are polygons or run lengths, text or numbers; regions with ``iscrowd`` are kept apart. Classes are the categories in the
order of their ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .base import Split
from .folder import distinct_colors
from .images import dataset_root
from .instances import InstanceFiles, InstanceOptions, Instances
from .options import DataError, SplitNames, names_of
from .registry import register_dataset
from .rle import decode, polygons_to_mask

_NAMES = (
    "person;bicycle;car;motorcycle;airplane;bus;train;truck;boat;traffic light;fire hydrant;stop sign;"
    "parking meter;bench;bird;cat;dog;horse;sheep;cow;elephant;bear;zebra;giraffe;backpack;umbrella;"
    "handbag;tie;suitcase;frisbee;skis;snowboard;sports ball;kite;baseball bat;baseball glove;skateboard;"
    "surfboard;tennis racket;bottle;wine glass;cup;fork;knife;spoon;bowl;banana;apple;sandwich;orange;"
    "broccoli;carrot;hot dog;pizza;donut;cake;chair;couch;potted plant;bed;dining table;toilet;tv;"
    "laptop;mouse;remote;keyboard;cell phone;microwave;oven;toaster;sink;refrigerator;book;clock;vase;"
    "scissors;teddy bear;hair drier;toothbrush"
)
# COCO's own categories by their numbers, which have gaps.
CATEGORIES = dict(
    zip((n for n in range(1, 91) if n not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)), _NAMES.split(";"), strict=True)
)


class CocoOptions(InstanceOptions):
    """COCO, or a data set in its format; see :mod:`rendseg.data.coco`."""

    name: Literal["coco"] = "coco"
    root: str | None = None  # null: $RENDSEG_DATA/coco
    train: SplitNames = "train2017"  # what stands for {split} below, or several
    val: SplitNames = "val2017"
    images: str = "{split}"  # folder of the images
    annotations: str = "annotations/instances_{split}.json"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("images", "annotations"):
            try:
                getattr(self, key).format(split="x")
            except (KeyError, IndexError, ValueError):
                raise ValueError(f"{key} may hold {{split}} and no other braces, got {getattr(self, key)!r}") from None


@register_dataset(CocoOptions)
class Coco(InstanceFiles):
    """The categories of the annotation files; see the module."""

    def __init__(
        self, options: CocoOptions, split: Split, augment_seed: int = 0, problems: list[str] | None = None
    ) -> None:
        root = dataset_root(options.root, "coco", "COCO (train2017, val2017 and annotations)")
        parts = names_of(options.train if split == "train" else options.val)
        paths = [root / options.annotations.format(split=part) for part in parts]
        contents = [_load(path) for path in paths]
        categories = _categories(contents[0], paths[0])
        for path, content in zip(paths[1:], contents[1:], strict=True):
            if _categories(content, path) != categories:
                raise DataError(f"{path}: its categories differ from those of {paths[0]}; join files of one data set")
        self._ids = sorted(categories)
        self._class_of = {number: index for index, number in enumerate(self._ids)}
        names = [categories[number] for number in self._ids]
        super().__init__(options, split, names, distinct_colors(len(names) + 1)[1:], augment_seed, problems)
        self._image_ids: list[int] = []
        self._sizes: list[tuple[int, int]] = []
        self._objects: list[list[dict[str, Any]]] = []
        for part, path, content in zip(parts, paths, contents, strict=True):
            self._add_part(root / options.images.format(split=part), path, content)
        if not self._files and not self.left_out:
            raise DataError(f"{paths[0]}: no image has an object; set data.keep_empty=true to learn from such images")
        self._listed(False)

    def _add_part(self, folder: Path, path: Path, content: dict[str, Any]) -> None:
        objects: dict[int, list[dict[str, Any]]] = {}
        for image in content["images"]:
            if image["id"] in objects:
                raise DataError(f"{path}: two images have the id {image['id']}; give each an id of its own")
            objects[image["id"]] = []
        for entry in content["annotations"]:
            if entry["image_id"] not in objects:
                self._report(f"{path}: annotation {entry['id']} is of image {entry['image_id']}, which is not listed")
            elif entry["category_id"] not in self._class_of:
                self._report(
                    f"{path}: annotation {entry['id']} is of category {entry['category_id']}, which has no name"
                )
            else:
                objects[entry["image_id"]].append(entry)
        for image in content["images"]:
            own = objects[image["id"]]
            if self.split == "train" and not self.options.keep_empty and all(e.get("iscrowd") for e in own):  # type: ignore[attr-defined]
                continue
            before = len(self._files)
            name = Path(image["file_name"])
            self._add(folder / name, path, "_".join(name.with_suffix("").parts))
            if len(self._files) > before:
                self._image_ids.append(image["id"])
                self._sizes.append((image["height"], image["width"]))
                self._objects.append(own)

    def image_id(self, index: int) -> int:
        return self._image_ids[index]

    def category_id(self, label: int) -> int:
        return self._ids[label]

    def image_size(self, index: int) -> tuple[int, int]:
        return self._sizes[index]

    def annotations(self, index: int) -> list[dict[str, Any]]:
        own = self._objects[index]
        if any("area" not in entry or "bbox" not in entry for entry in own):
            return super().annotations(index)
        return [{**entry, "iscrowd": int(bool(entry.get("iscrowd")))} for entry in own]

    def instances(self, index: int) -> Instances:
        height, width = self._sizes[index]
        if height * width > self.options.max_pixels:
            raise DataError(
                f"{self.files(index)[1]}: {self.files(index)[0].name} has {height * width} pixels, more than "
                f"data.max_pixels ({self.options.max_pixels}); raise it if the file is yours"
            )
        masks = np.zeros((len(self._objects[index]), height, width), np.uint8)
        for mask, entry in zip(masks, self._objects[index], strict=True):
            try:
                mask[:] = _mask(entry["segmentation"], height, width)
            except (ValueError, TypeError, KeyError) as error:
                reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                raise DataError(
                    f"{self.files(index)[1]}: annotation {entry['id']} of {self.files(index)[0].name} has no mask that "
                    f"can be read ({reason}); correct or remove it"
                ) from None
        labels = [self._class_of[entry["category_id"]] for entry in self._objects[index]]
        crowd = [bool(entry.get("iscrowd")) for entry in self._objects[index]]
        return Instances(np.array(labels, np.int64), masks, np.array(crowd, bool))


def _mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"its size is {segmentation['size']}, the image has [{height}, {width}]")
        return decode(segmentation["counts"], height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"segmentation is {str(segmentation)[:40]}, wanted polygons or run lengths")
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon must be a list of at least three corners: x, y, x, y, ...")
    return polygons_to_mask(segmentation, height, width)


# What every entry of a list must have, with the types that it may have.
_KEYS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {"id": int, "image_id": int, "category_id": int, "segmentation": object},
    "categories": {"id": int, "name": str},
}


def _load(path: Path) -> dict[str, Any]:
    """The content of an annotation file, whose entries have all that is read here."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; put COCO's annotations there, or set data.annotations")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())}); fetch the file again") from None
    for key, wanted in _KEYS.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DataError(f"{path}: has no list {key!r}; it must be in COCO's format (instances_*.json)")
        for number, entry in enumerate(entries):
            for name, kind in wanted.items():
                if not isinstance(entry, dict) or not isinstance(entry.get(name, wanted), kind) or name not in entry:
                    what = "any value" if kind is object else f"a value of type {kind.__name__}"
                    raise DataError(f"{path}: {key}[{number}] needs {what} for {name!r}; correct it")
            if key == "images" and min(entry["height"], entry["width"]) < 1:
                raise DataError(f"{path}: images[{number}] has size {entry['width']}x{entry['height']}; correct it")
    return content


def _categories(content: dict[str, Any], path: Path) -> dict[int, str]:
    found = {entry["id"]: entry["name"] for entry in content["categories"]}
    if not 0 < len(found) < 256 or len(found) < len(content["categories"]):
        raise DataError(
            f"{path}: has {len(content['categories'])} categories with {len(found)} ids, wanted 1 to 255, each with an "
            "id of its own; correct the list"
        )
    return found
