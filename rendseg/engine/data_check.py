"""``rendseg data check``: reads a data set whole, counts it and names every file that cannot be used.

All counts are sums of integers over the images in their order, so that the result does not depend on the number of
processes. An image and its label map count only if both are sound and of one size.

Class weights for ``model.loss.class_weights`` are suggested by two rules; a class that never occurs gets 1:

* ``share``: (share of the labelled pixels)^-0.25, scaled to a mean of 1 per pixel;
* ``median_frequency``: the median of the classes' frequencies over a class's own, where its frequency is its share in
  the labelled pixels of those images in which it occurs (Eigen and Fergus, ICCV 2015).

Of objects the number of each class and size is counted instead.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from rendseg.data import DataError, SegmentationDataset, build_dataset, parse_options
from rendseg.data.base import ImageFiles, Split
from rendseg.data.images import IGNORE, class_map_line
from rendseg.data.instances import SIZES, InstanceDataset
from rendseg.engine.checkpoint import CheckpointError, write_json

PROBE = 32  # label maps of training that are looked at when it starts, if they hold two classes
SPLITS: tuple[Split, ...] = ("train", "val")
VALUES = 256  # of a byte
COLUMNS = ("small", "medium", "large", "crowds")


def check_labels(training: SegmentationDataset, validation: SegmentationDataset) -> list[str]:
    """What is to be told of label maps from which nothing, or not all, can be learnt or measured; a line each.

    Reads label maps spread over the splits, as few as show that there are two classes and a labelled pixel; all only
    where there are none.

    Raises:
        DataError: training would learn a single class, since values in the files are ignored.
    """
    if isinstance(training, InstanceDataset):  # which lists no image without an object
        if training.class_names != validation.class_names:
            raise DataError("train and val have different classes; correct data.annotations")
        return []
    count = training.num_classes
    pixels, read = np.zeros(count, np.int64), []
    for index, label in _labels(training):
        pixels += np.bincount(label.ravel(), minlength=count)[:count]
        read.append(index)
        if pixels.all() or (len(read) >= PROBE and np.count_nonzero(pixels) > 1):
            break
    present = pixels > 0
    notes = []
    if read and present.sum() < min(2, count):
        names = [name for name, occurs in zip(training.class_names, present, strict=True) if occurs]
        only = f"no class but {names[0]!r}" if names else "no class at all"
        problem = f"the {len(read)} label maps of the training set hold {only}, so that nothing can be learnt"
        line = ignored_line(training, present, read)
        if line or not names:
            raise DataError(f"{problem}; {line or 'correct data.class_map or the label maps'}")
        notes.append(f"{problem}; correct data.classes or the label maps")
    elif len(read) == len(training) and (line := ignored_line(training, present, read)):
        notes.append(f"the training set: {line}")
    if not any((label < validation.num_classes).any() for _, label in _labels(validation)):
        notes.append(
            "no label map of the validation set has a labelled pixel: its metrics stay empty and there will be no "
            "best.pt; correct data.val, data.class_map or the label maps"
        )
    return notes


def ignored_line(dataset: SegmentationDataset, present: np.ndarray, indices: Sequence[int]) -> str:
    """Where one value of the files is ignored without a key that says so, and a class never occurs: what to set."""
    absent = np.flatnonzero(~present)
    values: set[int] = set()
    for index in indices[:PROBE] if len(absent) else ():
        try:
            values.update(dataset.ignored_values(index))
        except DataError:  # told where the whole file is read
            continue
    if len(values) != 1:
        return ""
    (value,), label = values, int(absent[0])
    return (
        f"class {dataset.class_names[label]!r} never occurs, but {value} does, which is ignored; if it means that "
        f"class, set {class_map_line(dataset.num_classes, value, label)}; if not, "
        f"{class_map_line(dataset.num_classes, value, IGNORE)} says so"
    )


def _labels(dataset: SegmentationDataset) -> Iterator[tuple[int, np.ndarray]]:
    """Numbers and label maps of a split, without those that cannot be read, which is said elsewhere."""
    for index in _spread(len(dataset)):
        try:
            yield index, dataset.label(index)
        except DataError:
            continue


def _spread(count: int) -> list[int]:
    """The numbers below ``count``, those far from each other first."""
    if count < 2:
        return list(range(count))
    bits = (count - 1).bit_length()
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [i for i in reversed_bits if i < count]


@dataclass
class Record:
    """One image: size (height, width), pixels of each class and, last, ignored ones [C + 1], pixels of each red, green
    and blue value (of any number of channels) [256 C]; None: it has problems; whether an EXIF tag turns it; class,
    pixels and crowd of its objects [N, 3]."""

    problems: list[str]
    size: tuple[int, int] = (0, 0)
    pixels: np.ndarray | None = None
    colors: np.ndarray | None = None
    turned: bool = False
    objects: np.ndarray | None = None


class _Records(Dataset[Record]):
    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Record:
        found = self.dataset.examine(index)
        if found.problems or found.image is None or found.label is None:
            return Record(found.problems)
        height, width = found.label.shape
        pixels = np.bincount(found.label.ravel(), minlength=self.dataset.num_classes)[: self.dataset.num_classes]
        colors = np.concatenate([np.array(Image.fromarray(band).histogram(), np.int64) for band in _bands(found.image)])
        pixels = np.append(pixels, found.label.size - pixels.sum())
        return Record([], (height, width), pixels, colors, found.turned, found.objects)


def _bands(image: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(image[..., band]) for band in range(image.shape[2])]


def _itself(record: Any) -> Any:
    return record


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches the whole process group; the parent handles it and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _records(dataset: SegmentationDataset, workers: int) -> Iterator[Record]:
    loader = DataLoader(
        _Records(dataset),
        sampler=range(len(dataset)),
        batch_size=None,
        collate_fn=_itself,
        num_workers=workers,
        worker_init_fn=_ignore_interrupts if workers else None,
    )
    try:
        yield from loader
    except RuntimeError as error:  # a process that the system ended, say for memory
        if "worker" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"a process that reads images has ended ({reason}); use fewer --workers") from error


@dataclass
class SplitReport:
    """What was found in one split of C classes.

    Attributes:
        listed: images that the split consists of; `sound`: those that count below; `unlabelled`: those of which all
            pixels are ignored.
        problems: one line per file that cannot be used.
        sizes: (height, width) -> images.
        pixels, images: [C + 1], of each class and, last, of what is ignored: pixels, and images in which it occurs.
        reach: [C + 1], likewise: labelled pixels of the images in which it occurs.
        colors: pixels of each value of each channel [256 C_in]; 768 for red, green and blue.
        turned: images that their EXIF tag turns.
        objects: [C, 4], of each class those that are small, medium, large (COCO's bounds) and crowds; None: the data
            set has none. `most`: objects in one image; `bare`: images without one; `empty`: objects without a pixel.
    """

    split: Split
    class_names: list[str] = field(default_factory=list)
    listed: int = 0
    sound: int = 0
    unlabelled: int = 0
    problems: list[str] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: np.ndarray = field(init=False)
    images: np.ndarray = field(init=False)
    reach: np.ndarray = field(init=False)
    channels: int = 3
    colors: np.ndarray = field(init=False)
    turned: int = 0
    objects: np.ndarray | None = None
    most: int = 0
    bare: int = 0
    empty: int = 0

    def __post_init__(self) -> None:
        self.pixels, self.images, self.reach = np.zeros((3, len(self.class_names) + 1), np.int64)
        self.colors = np.zeros(self.channels * VALUES, np.int64)

    def add(self, record: Record) -> None:
        self.problems += record.problems
        if record.pixels is None or record.colors is None:
            return
        occurs, labelled = record.pixels > 0, int(record.pixels[:-1].sum())
        if record.objects is not None:  # also one of which smaller ones cover every pixel
            occurs[:-1] = np.isin(np.arange(len(occurs) - 1), record.objects[record.objects[:, 1] > 0, 0])
        self.sound += 1
        self.unlabelled += labelled == 0
        self.sizes[record.size] += 1
        self.pixels += record.pixels
        self.images += occurs
        self.reach += occurs * labelled
        self.colors += record.colors
        self.turned += record.turned
        if record.objects is not None:
            self._add_objects(*record.objects.T)

    def _add_objects(self, classes: np.ndarray, pixels: np.ndarray, crowd: np.ndarray) -> None:
        if self.objects is None:
            self.objects = np.zeros((len(self.class_names), 4), np.int64)
        column = np.where(crowd > 0, 3, np.digitize(pixels, SIZES))
        np.add.at(self.objects, (classes[pixels > 0], column[pixels > 0]), 1)
        self.empty += int((pixels == 0).sum())
        self.most = max(self.most, len(classes))
        self.bare += not len(classes)

    @property
    def ignored(self) -> int:
        """Ignored pixels."""
        return int(self.pixels[-1])

    @property
    def labelled(self) -> int:
        """Pixels of classes."""
        return int(self.pixels[:-1].sum())

    def shares(self) -> np.ndarray:
        """float64 [C]: share of each class in the labelled pixels."""
        return self.pixels[:-1] / max(1, self.labelled)

    def absent(self) -> list[str]:
        """Names of the classes that never occur."""
        return [name for name, count in zip(self.class_names, self.pixels, strict=False) if not count]

    def class_weights(self) -> dict[str, list[float]]:
        """The two rules of the module, rounded to four significant digits; empty without a labelled pixel."""
        shares = self.shares()
        present = shares > 0
        if not present.any():
            return {}
        fourth_root, median = np.ones_like(shares), np.ones_like(shares)
        fourth_root[present] = shares[present] ** -0.25
        fourth_root[present] /= (shares * fourth_root)[present].sum()
        frequency = (self.pixels / np.maximum(1, self.reach))[:-1][present]
        median[present] = np.median(frequency) / frequency
        return {"share": _rounded(fourth_root), "median_frequency": _rounded(median)}

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of every channel's values in [0, 1] over all pixels."""
        counts = self.colors.reshape(self.channels, VALUES)
        values = np.arange(VALUES, dtype=np.int64)
        total = np.maximum(1, counts.sum(1))
        mean = (counts * values).sum(1) / total
        square = (counts * values**2).sum(1) / total
        return _rounded(mean / 255), _rounded(np.sqrt(np.maximum(0, square - mean**2)) / 255)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        mean, std = self.mean_and_std()
        shares = self.shares()
        return {
            "listed": self.listed,
            "sound": self.sound,
            "unlabelled": self.unlabelled,
            "problems": self.problems,
            "turned_by_exif": self.turned,
            "sizes": [
                {"height": height, "width": width, "images": count}
                for (height, width), count in sorted(self.sizes.items(), key=lambda item: (-item[1], item[0]))
            ],
            "pixels": self.labelled + self.ignored,
            "labelled_pixels": self.labelled,
            "ignored_pixels": self.ignored,
            "ignored_share": self.ignored / max(1, self.labelled + self.ignored),
            "classes": [
                {"name": name, "pixels": int(p), "share": float(s), "images": int(i)}
                for name, p, s, i in zip(self.class_names, self.pixels, shares, self.images, strict=False)
            ],
            "absent": self.absent(),
            "class_weights": self.class_weights(),
            "objects": None
            if self.objects is None
            else {
                "classes": [
                    {"name": name, **dict(zip(COLUMNS, map(int, row), strict=True))}
                    for name, row in zip(self.class_names, self.objects, strict=True)
                ],
                "most_in_an_image": self.most,
                "images_without": self.bare,
                "without_a_pixel": self.empty,
            },
            "mean": mean if self.sound else None,
            "std": std if self.sound else None,
        }


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


@dataclass
class DataReport:
    """The splits, and what concerns several of them."""

    splits: list[SplitReport]
    notes: list[str]

    @property
    def problems(self) -> int:
        """Distinct problems: a missing root is one, although it spoils two splits."""
        return len({line for report in self.splits for line in report.problems})

    @property
    def exit_code(self) -> int:
        """0: every file is sound; 1: some are not, or nothing can be learnt from them; 2: none is."""
        if not any(report.sound for report in self.splits):
            return 2
        return 1 if self.problems else 0


def check_data(
    options: Any,
    splits: Sequence[Split] = SPLITS,
    workers: int = 0,
    tell: Callable[[str], object] = lambda line: None,
    progress: bool = False,
) -> DataReport:
    """Walk the splits of a ``data:`` section.

    Args:
        options: the section, as :func:`rendseg.data.build_dataset` takes it.
        workers: processes that read; 0: this one.
        tell: called with the line of each problem as soon as it is found, once.
        progress: show a bar on the standard error output while it is a terminal.

    Raises:
        DataError: options that cannot be used at all.
    """
    options = parse_options(options)
    reports, paths, told, datasets = [], [], set(), []

    def tell_once(lines: Iterable[str]) -> None:
        for line in lines:
            if line not in told:
                told.add(line)
                tell(line)

    for split in splits:
        problems: list[str] = []
        try:
            dataset = build_dataset(options, split, problems=problems)
        except DataError as error:
            dataset = None
            problems.append(str(error))
        tell_once(problems)
        names = [] if dataset is None else dataset.class_names
        report = SplitReport(split, names, problems=problems, channels=options.channels)
        reports.append(report)
        if dataset is None:
            continue
        datasets.append(dataset)
        report.listed = len(dataset)
        if isinstance(dataset, ImageFiles):
            report.listed += dataset.left_out
            paths.append({dataset.files(index)[0] for index in range(len(dataset))})
        bar: Iterable[Record] = tqdm(
            _records(dataset, workers), split, total=len(dataset), unit=" images", disable=None if progress else True
        )
        for record in bar:
            report.add(record)
            tell_once(record.problems)
    notes = []
    if len(paths) == 2 and (common := sorted(paths[0] & paths[1])):
        notes.append(f"{len(common)} images belong to train and to val, such as {common[0]}")
    with_objects = [dataset for dataset in datasets if isinstance(dataset, InstanceDataset)]
    if len(with_objects) == 2 and datasets[0].class_names != datasets[1].class_names:
        notes.append("train and val have different classes; correct data.annotations")
    if len(datasets) == 2 and not with_objects and all(report.sound for report in reports):
        try:
            notes += check_labels(datasets[0], datasets[1])
        except DataError as error:
            reports[0].problems.append(str(error))
            tell_once([str(error)])
    return DataReport(reports, notes)


# ------------------------------------------------------------------------------------------------------ printing


def format_report(report: SplitReport) -> str:
    """The table of one split: a line about the images, one per class, and the weights."""
    lines = [f"{report.split}: {_plural(report.listed, 'image')}, {report.sound} sound{_sizes(report)}"]
    if not report.sound:
        return lines[0]
    weights = report.class_weights() if report.objects is None else {}
    lines += _pixels(report, weights) if report.objects is None else _objects(report, report.objects)
    if report.turned:
        lines.append(
            f"  turned by their EXIF tag Orientation: {_plural(report.turned, 'image')} (labels must fit the turned "
            "image; data.exif_orientation=false takes images as they are stored)"
        )
    if report.unlabelled and report.objects is None:
        lines.append(f"  without a labelled pixel: {_plural(report.unlabelled, 'image')}")
    if absent := report.absent():
        lines.append(f"  never occurring: {', '.join(absent)}")
    mean, std = report.mean_and_std()
    channels = "of red, green and blue" if report.channels == 3 else f"of {_plural(report.channels, 'channel')}"
    lines.append(f"  data.mean={_listed(mean)} data.std={_listed(std)}  # {channels}")
    if report.split == "train" and weights:
        lines += [f"  model.loss.class_weights={_listed(values)}  # {rule}" for rule, values in weights.items()]
    return "\n".join(lines)


def _pixels(report: SplitReport, weights: dict[str, list[float]]) -> list[str]:
    """The table of label maps."""
    width = max(len("ignored"), *(len(name) for name in report.class_names))
    lines = [f"  {'class':<{width}}  {'pixels':>15}  {'share':>9}  {'images':>8}  {'share^-1/4':>10}  median freq."]
    for index, (name, share) in enumerate(zip(report.class_names, report.shares(), strict=True)):
        row = f"  {name:<{width}}  {report.pixels[index]:>15,}  {share:>9.4%}  {report.images[index]:>8,}"
        if report.pixels[index]:
            row += f"  {weights['share'][index]:>10.4g}  {weights['median_frequency'][index]:>12.4g}"
        lines.append(row)
    total = report.labelled + report.ignored
    of_all = f"  {'ignored':<{width}}  {report.ignored:>15,}  {report.ignored / total:>9.4%}"
    return [*lines, f"{of_all}  {report.images[-1]:>8,}  (share of all pixels)"]


def _objects(report: SplitReport, counts: np.ndarray) -> list[str]:
    """The table of objects."""
    width = max(len("class"), *(len(name) for name in report.class_names))
    lines = [f"  {'class':<{width}}  {'objects':>9}" + "".join(f"  {name:>9}" for name in COLUMNS) + f"  {'images':>8}"]
    for name, row, images in zip(report.class_names, counts, report.images[:-1], strict=True):
        cells = "".join(f"  {count:>9,}" for count in (row[:3].sum(), *row))
        lines.append(f"  {name:<{width}}{cells}  {images:>8,}")
    lines.append(
        f"  {_plural(int(counts[:, :3].sum()), 'object')}, at most {report.most} in an image; "
        f"{_plural(report.bare, 'image')} without any; small: below {SIZES[0]} pixels, large: from {SIZES[1]}"
    )
    if report.empty:
        lines.append(f"  without a pixel, and left out: {_plural(report.empty, 'object')}")
    return lines


def _sizes(report: SplitReport) -> str:
    """``", 480x360"``, or the smallest, largest and most frequent width x height."""
    sizes = sorted(report.sizes, key=lambda size: (size[0] * size[1], size))
    if not sizes:
        return ""
    if len(sizes) == 1:
        return f", {sizes[0][1]}x{sizes[0][0]}"
    (small, large), (common, count) = (sizes[0], sizes[-1]), report.sizes.most_common(1)[0]
    return (
        f", {len(sizes)} sizes from {small[1]}x{small[0]} to {large[1]}x{large[0]}, most often {common[1]}x{common[0]} "
        f"({_plural(count, 'image')})"
    )


def _listed(values: Iterable[float]) -> str:
    return f"[{','.join(f'{value:.4g}' for value in values)}]"


def _plural(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def default_workers() -> int:
    """Processes for the cores at hand, at most eight; none for one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores == 1 else min(8, cores)


def check_files(options: Any, split: str, json: Path | None, workers: int | None) -> int:
    """``rendseg data check``: prints the tables, the problems on the standard error output; returns the exit code."""
    splits = SPLITS if split == "all" else tuple(name for name in SPLITS if name == split)
    if not splits:
        raise DataError(f"--split must be train, val or all, got {split!r}")
    workers = default_workers() if workers is None else workers
    report = check_data(options, splits, workers, lambda line: tqdm.write(f"rendseg: {line}", sys.stderr), True)
    for part in report.splits:
        print(format_report(part))
    for note in report.notes:
        print(f"note: {note}")
    if report.problems:
        print(f"{_plural(report.problems, 'problem')}; each is one line above")
    elif report.exit_code == 0:
        print("every file is sound")
    if json is not None:
        content = {"problems": report.problems, "notes": report.notes}
        try:
            write_json(json, {**content, "splits": {part.split: part.to_dict() for part in report.splits}})
        except OSError as error:
            raise CheckpointError(f"could not write {json}: {error}") from error
    return report.exit_code
