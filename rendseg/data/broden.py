"""Images labelled for several tasks, in the manner of Broden (Bau et al. 2017) and Broden+ (Xiao et al. 2018).

::

    ROOT/index.csv        image,split,ih,iw,sh,sw,object,part,material,texture,scene
    ROOT/images/...       images and label maps; the paths of index.csv start here
    ROOT/object.csv       number,name         and so part.csv, material.csv, texture.csv, scene.csv
    ROOT/object_part.csv  object,part         one line for every part that an object can have

``index.csv`` has one line per image. ``image`` and ``split`` must be there; ``ih, iw`` (height and width of the image)
and ``sh, sw`` (of its label maps, where these are smaller) may be. A column of a task is empty where the image has no
such label, and otherwise holds

* for ``object``, ``part`` and ``material`` the path of a label map, or several joined by ``;``, of which each fills
  what the earlier ones left unlabelled;
* for ``texture`` the number (or name) of the whole image's texture, or the path of a label map;
* for ``scene`` a number (or name). Of several numbers joined by ``;`` the first, the principal one, counts.

Label maps are images of the numbers of the task's list: one channel (8 or 16 bits), or red + 256 green; 0 is
unlabelled. The lists of names (``object.csv``, or Broden's own ``c_object.csv``) have the columns ``number`` (or
``label``) and ``name``, more are ignored; classes are counted from 0 in the order of the list, without a number 0.
``object_part.csv`` names objects and parts by number or name; the columns ``object_label`` and ``part_labels`` (joined
by ``;``) of Broden+'s ``object_part_hierarchy.csv`` are understood too.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F
from torchvision import tv_tensors

from .._options import Flag
from .augment import seeded, to_sample
from .base import SegmentationDataset, Split, check_pair
from .folder import distinct_colors
from .images import IGNORE, open_label, read_image, stored_values
from .options import DataError, DatasetOptions
from .registry import register_dataset

Task = Literal["object", "part", "material", "texture", "scene"]


class BrodenOptions(DatasetOptions):
    """Images with labels of several tasks; see :mod:`rendseg.data.broden`."""

    name: Literal["broden"] = "broden"
    root: str
    index: str = "index.csv"  # table of images and labels within root
    images: str = "images"  # folder within root from which the table's paths start; "": root itself
    train: str = "train"  # value of the column "split" of each split
    val: str = "val"
    tasks: list[Task] | None = None  # null: every task with a list of names (object.csv, part.csv, ...) in root
    # The tasks whose labels a training batch holds; batches of a source are as frequent as its images.
    sources: list[list[Task]] = dataclasses.field(
        default_factory=lambda: [["object", "part", "scene"], ["material"], ["texture"]]  # type: ignore[list-item]
    )
    cache: Flag = False  # decode every image once and keep it in memory


TASKS = ("object", "part", "material", "texture", "scene")
NONE = 65535  # unlabelled, in the label maps that are read

Labels = dict[str, Any]  # task -> uint16 [H, W], of scene a number; NONE where there is no label


@dataclasses.dataclass(frozen=True)
class ClassList:
    """Names of a task's classes, and the class of every number in a label map."""

    path: Path
    names: list[str]
    table: np.ndarray  # int32 [65536]: number -> class, NONE, or -1

    def find(self, text: str) -> int:
        """The class of a number or a name; -1 if there is none."""
        if text.isdecimal():
            return int(self.table[int(text)]) if int(text) < len(self.table) else -1
        return self.names.index(text) if text in self.names else -1


def _table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and lines of a CSV file, the line number under the key ``""``."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            lines = []
            for line in reader:
                if None in line or None in line.values():
                    raise DataError(
                        f"{path}: line {reader.line_num} has not {len(columns)} columns like the first; correct it"
                    )
                lines.append({"": str(reader.line_num), **{key: value.strip() for key, value in line.items()}})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error}); replace the file") from error
    return columns, lines


def read_classes(path: Path) -> ClassList:
    """The classes of a list of names."""
    columns, lines = _table(path)
    key = "number" if "number" in columns else "label"
    for column in (key, "name"):
        if column not in columns:
            raise DataError(f"{path}: has no column {column!r} (columns: {', '.join(columns)}); add it")
    table = np.full(65536, -1, np.int32)
    table[0] = NONE
    names: list[str] = []
    for line in lines:
        if not line[key].isdecimal() or int(line[key]) >= len(table):
            raise DataError(f"{path}: line {line['']}: {key} must be 0..65535, got {line[key]!r}; correct it")
        number = int(line[key])
        if number == 0:
            continue
        if table[number] >= 0:
            raise DataError(f"{path}: line {line['']}: {key} {number} occurs twice; remove one of them")
        table[number] = len(names)
        names.append(line["name"])
    if not names:
        raise DataError(f"{path}: lists no class (0 is unlabelled); add lines of {key},name")
    return ClassList(path, names, table)


def read_parts(path: Path, objects: ClassList, parts: ClassList) -> list[list[int]]:
    """``[object, part, part, ...]`` of every object with parts, in the order of the file."""
    columns, lines = _table(path)
    pairs = ("object", "part") if "object" in columns else ("object_label", "part_labels")
    for column in pairs:
        if column not in columns:
            raise DataError(f"{path}: has no column {column!r} (columns: {', '.join(columns)}); add object,part")
    groups: dict[int, list[int]] = {}
    for line in lines:
        owner = objects.find(line[pairs[0]])
        if not 0 <= owner < NONE:
            raise DataError(
                f"{path}: line {line['']}: {line[pairs[0]]!r} is no object of {objects.path.name}; correct it"
            )
        for text in line[pairs[1]].split(";"):
            part = parts.find(text.strip())
            if part < 0:
                raise DataError(
                    f"{path}: line {line['']}: {text.strip()!r} is no part of {parts.path.name}; correct it"
                )
            if part != NONE and part not in groups.setdefault(owner, []):
                groups[owner].append(part)
    groups = {owner: found for owner, found in groups.items() if found}
    if not groups:
        raise DataError(f"{path}: lists no part of any object; add lines of object,part")
    return [[owner, *found] for owner, found in groups.items()]


def read_label(path: Path, classes: ClassList, max_pixels: int) -> np.ndarray:
    """Classes as uint16 ``[H, W]`` with ``NONE``; DataError names file, number and pixel of what is no class."""
    image = open_label(path, max_pixels)
    if image.mode in ("RGB", "RGBA"):
        channels = np.asarray(image)
        numbers = channels[..., 0].astype(np.int64) + 256 * channels[..., 1].astype(np.int64)
    elif image.mode in ("L", "P", "1", "I") or image.mode.startswith("I;16"):
        numbers = stored_values(image, path).astype(np.int64)
    else:
        raise DataError(
            f"{path}: label map has mode {image.mode}, wanted one channel of integers or red + 256 green; save it so"
        )
    inside = (numbers >= 0) & (numbers < len(classes.table))
    found = np.where(inside, classes.table[np.where(inside, numbers, 0)], -1)
    if found.min() < 0:
        row, column = (int(v) for v in np.argwhere(found < 0)[0])
        raise DataError(
            f"{path}: number {int(numbers[row, column])} at row {row}, column {column} is not in {classes.path}; "
            "add it there or correct the file (0 is unlabelled)"
        )
    return found.astype(np.uint16)


def _enlarge(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``label`` at the nearest cell centre of every pixel of ``size``."""
    rows, columns = (
        np.minimum(((np.arange(full) + 0.5) * part / full).astype(np.int64), part - 1)
        for full, part in zip(size, label.shape, strict=True)
    )
    return label[rows[:, None], columns[None, :]]


@dataclasses.dataclass(frozen=True)
class _Record:
    line: str
    image: Path
    image_size: tuple[int, int] | None
    label_size: tuple[int, int] | None
    cells: dict[str, str]  # task -> non-empty cell


@register_dataset(BrodenOptions)
class Broden(SegmentationDataset):
    """See the module. ``label`` of a sample is the object map; ``labels`` holds the tasks: int64 maps ``[H, W]`` and,
    of ``scene``, a scalar, with ``ignore_index`` where there is no label.

    The split ``train`` holds an image once for each of ``data.sources`` that it has a label of, with the labels of that
    source alone; ``source_sizes`` counts them, and the samples of a source follow each other, so that the trainer can
    draw batches of one source. The split ``val`` holds every image once, with the labels that it has.

    ``ignore_index`` is 255, or 65535 where a task has more than 255 classes.
    """

    def __init__(self, options: BrodenOptions, split: Split, augment_seed: int = 0) -> None:
        self._root = Path(options.root).expanduser()
        if not self._root.is_dir():
            raise DataError(f"{self._root}: no such folder; set data.root to the folder that holds {options.index}")
        self._classes = self._find_classes(options)
        self.tasks = [task for task in TASKS if task in self._classes]
        super().__init__(
            options,
            split,
            self._classes["object"].names,
            distinct_colors(len(self._classes["object"].names)),
            augment_seed,
        )
        self.task_classes = {task: self._classes[task].names for task in self.tasks}
        if any(len(names) > IGNORE for names in self.task_classes.values()):
            self.ignore_index = NONE
        self.object_parts = self._find_parts() if "part" in self.tasks else []
        self._base = self._root / options.images
        self._records = self._find_records(options, split)
        self.sources = [[task for task in source if task in self.tasks] for source in options.sources]
        self.source_sizes: list[int] = []
        self._items: list[tuple[int, int]] = []  # (record, source), source -1: all tasks
        if split == "train":
            for number, source in enumerate(self.sources):
                chosen = [i for i, record in enumerate(self._records) if any(task in record.cells for task in source)]
                self.source_sizes.append(len(chosen))
                self._items += [(i, number) for i in chosen]
            if not self._items:
                raise DataError(f"{self._root / options.index}: no image of {split!r} has a label of data.sources")
        else:
            self._items = [(i, -1) for i in range(len(self._records))]
        self._kept: list[tuple[np.ndarray, Labels]] | None = None
        if options.cache:
            self.keep_in_memory()

    def _find_classes(self, options: BrodenOptions) -> dict[str, ClassList]:
        found = {}
        for task in TASKS if options.tasks is None else options.tasks:
            paths = [self._root / f"{prefix}{task}.csv" for prefix in ("", "c_")]
            path = next((p for p in paths if p.is_file()), None)
            if path is not None:
                found[task] = read_classes(path)
            elif options.tasks is not None or task == "object":
                raise DataError(
                    f"{paths[0]}: list of names is missing; add it (columns number,name)"
                    + (f" or take {task!r} out of data.tasks" if task != "object" else "")
                )
        if "object" not in found:
            raise DataError(f"data.tasks must hold 'object', got {options.tasks}")
        for source in options.sources:
            twice = [task for task in source if sum(task in other for other in options.sources) > 1]
            if twice or not source:
                raise DataError(f"data.sources must divide the tasks between them, got {options.sources}")
        return found

    def _find_parts(self) -> list[list[int]]:
        paths = [self._root / name for name in ("object_part.csv", "object_part_hierarchy.csv")]
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            raise DataError(
                f"{paths[0]}: list of the parts of objects is missing; add it (columns object,part) or take 'part' out "
                "of data.tasks"
            )
        return read_parts(path, self._classes["object"], self._classes["part"])

    def _find_records(self, options: BrodenOptions, split: Split) -> list[_Record]:
        path = self._root / options.index
        if not path.is_file():
            raise DataError(f"{path}: no such file; set data.index to the table of images and labels")
        columns, lines = _table(path)
        for column in ("image", "split"):
            if column not in columns:
                raise DataError(f"{path}: has no column {column!r} (columns: {', '.join(columns)}); add it")
        if "object" not in columns:
            raise DataError(f"{path}: has no column 'object' (columns: {', '.join(columns)}); add it")
        part = options.train if split == "train" else options.val
        chosen = [line for line in lines if line["split"] == part]
        if not chosen:
            known = ", ".join(sorted({line["split"] for line in lines})) or "none"
            raise DataError(f"{path}: no line has split {part!r} (splits: {known}); correct data.{split}")
        return [self._record(path, line) for line in chosen]

    def _record(self, index: Path, line: dict[str, str]) -> _Record:
        where = f"{index}: line {line['']}"

        def size(height: str, width: str) -> tuple[int, int] | None:
            texts = [line.get(height, ""), line.get(width, "")]
            if texts == ["", ""]:
                return None
            if not all(text.isdecimal() and int(text) > 0 for text in texts):
                raise DataError(f"{where}: {height},{width} must be two positive numbers, got {texts}; correct them")
            return int(texts[0]), int(texts[1])

        image = self._base / line["image"]
        if not line["image"] or not image.is_file():
            raise DataError(f"{where}: image {image} is missing; add the file or remove the line")
        cells = {task: line[task] for task in self.tasks if line.get(task)}
        for task, cell in cells.items():
            for text in self._paths(task, cell):
                if not (self._base / text).is_file():
                    what = "is no class of " + str(self._classes[task].path) if task == "scene" else "is missing"
                    shown = repr(text) if task == "scene" else f"label map {self._base / text}"
                    raise DataError(f"{where}: {task} {shown} {what}; correct the line")
                if task == "scene":
                    raise DataError(
                        f"{where}: scene must be a number or a name, got the file {text!r}; correct the line"
                    )
        return _Record(line[""], image, size("ih", "iw"), size("sh", "sw"), cells)

    def _paths(self, task: str, cell: str) -> list[str]:
        """The files that a cell names; none where it is the class of the whole image."""
        texts = [text.strip() for text in cell.split(";")]
        if task in ("texture", "scene"):
            return [] if self._classes[task].find(texts[0]) >= 0 else [text for text in texts if text]
        return [text for text in texts if text]

    # ---- reading

    def __len__(self) -> int:
        return len(self._items)

    def sample_name(self, index: int) -> str:
        path = self._records[self._items[index][0]].image.relative_to(self._base)
        return "_".join(path.with_suffix("").parts)

    def keep_in_memory(self) -> None:
        self._kept = [self._read_record(record) for record in self._records]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 image [H, W, 3] and object map [H, W] with ``ignore_index``: uint8, or uint16 beyond 255 classes."""
        image, labels = self.read_tasks(index)
        label = labels.get("object", np.full(image.shape[:2], NONE, np.uint16))
        if self.ignore_index == NONE:
            return image, label
        return image, np.where(label == NONE, IGNORE, label).astype(np.uint8)

    def read_tasks(self, index: int) -> tuple[np.ndarray, Labels]:
        """uint8 image [H, W, 3] and the labels that the sample has, see ``Labels``."""
        record, source = self._items[index]
        image, labels = self._kept[record] if self._kept is not None else self._read_record(self._records[record])
        if source < 0:
            return image, labels
        return image, {task: labels[task] for task in self.sources[source] if task in labels}

    def _read_record(self, record: _Record) -> tuple[np.ndarray, Labels]:
        image = read_image(record.image, self.options)
        height, width = image.shape[:2]
        if record.image_size not in (None, (height, width)):
            raise DataError(
                f"{record.image}: image has size {width}x{height}, line {record.line} of the index says "
                f"{record.image_size[1]}x{record.image_size[0]}; correct ih,iw"  # type: ignore[index]
            )
        labels: Labels = {}
        for task, cell in record.cells.items():
            classes, paths = self._classes[task], self._paths(task, cell)
            if not paths:
                number = classes.find(cell.split(";")[0].strip())
                labels[task] = number if task == "scene" else np.full((height, width), number, np.uint16)
                continue
            total = np.full((height, width), NONE, np.uint16)
            for text in paths:
                path = self._base / text
                label = read_label(path, classes, self.options.max_pixels)
                if label.shape != (height, width) and label.shape == record.label_size:
                    label = _enlarge(label, (height, width))
                if label.shape != (height, width) and record.label_size is not None:
                    raise DataError(
                        f"{path}: label map has size {label.shape[1]}x{label.shape[0]}, line {record.line} of the "
                        f"index says {record.label_size[1]}x{record.label_size[0]}; correct sh,sw"
                    )
                check_pair(image.shape, label.shape, record.image, path)
                total = np.where(total == NONE, label, total)
            labels[task] = total
        return image, labels

    # ---- samples

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} images")
        index %= size
        pixels, labels = self.read_tasks(index)
        source = self._items[index][1]
        wanted: Sequence[str] = list(labels) if source < 0 else self.sources[source]
        maps = [task for task in wanted if task != "scene"]
        # Masks are bytes, so that every transform knows them: each holds places in a table of the classes that occur.
        tables, masks = {}, {}
        for task in maps:
            label = labels.get(task)
            if label is None:
                continue
            classes, places = np.unique(label[label != NONE], return_inverse=True)
            if len(classes) > IGNORE:
                raise DataError(
                    f"{self._records[self._items[index][0]].image}: {len(classes)} classes of {task} in one image; at "
                    f"most {IGNORE} are supported"
                )
            mask = np.full(label.shape, IGNORE, np.uint8)
            mask[label != NONE] = places.reshape(-1)
            tables[task] = torch.tensor([*classes.tolist(), *[self.ignore_index] * (256 - len(classes))])
            masks[task] = tv_tensors.Mask(torch.from_numpy(mask))
        if not masks:  # a scene without maps: something has to tell the transforms where the image is
            masks[""] = tv_tensors.Mask(torch.full(pixels.shape[:2], IGNORE, dtype=torch.uint8))
        both: dict[str, Any] = {
            "image": tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)),
            "masks": masks,
        }
        padded = None
        if self._transform is not None:
            padded = self.options.crop_size or (pixels.shape[0], pixels.shape[1])
            with seeded(self.augment_seed, epoch, index):
                both = self._transform(both)
        first = next(iter(both["masks"].values())).as_subclass(torch.Tensor)
        values, _ = to_sample(both["image"], first, self.mean, self.std, padded, self.channel_order)
        height, width = values.shape[1:]

        def finish(task: str) -> torch.Tensor:
            if task not in both["masks"]:
                return torch.full((height, width), self.ignore_index, dtype=torch.int64)
            mask = both["masks"][task].as_subclass(torch.Tensor).long()
            mask = F.pad(mask, (0, width - mask.shape[1], 0, height - mask.shape[0]), value=IGNORE)
            return tables[task][mask]

        targets = {task: finish(task) for task in maps}
        if "scene" in wanted:
            scene = labels.get("scene", NONE)
            targets["scene"] = torch.tensor(self.ignore_index if scene == NONE else scene)
        sample = {"image": values, "label": targets.get("object", finish("")), "name": self.sample_name(index)}
        if len(self.tasks) > 1:
            sample["labels"] = targets
        return sample
