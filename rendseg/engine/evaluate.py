"""Evaluation of the coarse prediction (bilinearly upsampled) and the refined one side by side.

How images are predicted (windows, scales, flips) is in ``inference.py``, what is counted in ``metrics.py``, and the
conventions of other frameworks in ``eval_presets.py``.
"""

from __future__ import annotations

import csv
import io
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rendseg._version import __version__
from rendseg.data import DataError, InstanceDataset
from rendseg.engine.assemble import build_data, load_trained
from rendseg.engine.checkpoint import CheckpointError, write_atomically, write_json
from rendseg.engine.config import ConfigError, EvalConfig
from rendseg.engine.inference import KINDS, black, predict_labels
from rendseg.engine.loader import Sample, evaluation_samples
from rendseg.engine.metrics import SegmentationMetrics, mean_iou
from rendseg.engine.objects import ObjectMeter, object_summary, object_table, percent
from rendseg.engine.predict import file_stem, label_values, predict_image, save_labels, save_pictures, save_png
from rendseg.engine.runtime import clock, gather, make_accelerator, move
from rendseg.engine.tasks import task_lines, task_metrics
from rendseg.engine.visualize import Comparison, comparison_grid, confusion_picture, to_uint8

if TYPE_CHECKING:
    from accelerate import Accelerator

WARM_UP = 3  # batches whose time is not counted, where there are more


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    """Up to ``size`` consecutive samples of one image size."""
    for _, group in groupby(samples, key=lambda sample: sample["image"].shape):
        while batch := list(islice(group, size)):
            yield batch


class _Tolerant:
    """A data set whose samples have their number, and only a ``problem`` where they cannot be read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def sample(self, index: int, epoch: int) -> Sample:
        try:
            return {**self.dataset.sample(index, epoch), "index": index}
        except DataError as error:
            return {"problem": str(error)}


def _readable(samples: Iterator[Sample], left_out: list[str]) -> Iterator[Sample]:
    """Those without a ``problem``; the problems are appended to ``left_out``."""
    for sample in samples:
        if "problem" in sample:
            left_out.append(sample["problem"])
        else:
            yield sample


@dataclass
class Details:
    """What :func:`evaluate` leaves besides its result; the same in every process."""

    confusion: dict[str, np.ndarray] = field(default_factory=dict)
    """int64 [C, C] of the coarse and the refined prediction; row: label, column: prediction."""
    images: list[dict[str, Any]] = field(default_factory=list)
    """``index``, ``name``, ``pixels`` (valid ones), ``coarse`` and ``refined`` (mIoU, None without a valid pixel) of
    each image, in order."""
    detections: list[dict[str, Any]] = field(default_factory=list)
    """Of objects: the refined ones in COCO's form of results."""
    left_out: list[str] = field(default_factory=list)
    """A line for each image that could not be read."""
    save: Callable[[str, np.ndarray], object] | None = None
    """Called with the name and the refined label map [H, W] of each image."""


def evaluate(
    network: nn.Module,
    dataset: Any,
    options: EvalConfig,
    accelerator: Accelerator,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int], object] | None = None,
    details: Details | None = None,
) -> dict[str, Any] | None:
    """Metrics over a data set, the same in every process; None if ``stop()`` became true on the way.

    An image that cannot be read is a ``DataError``; given ``details``, it is noted there and left out.

    Each process takes every W-th image and the counts are added up, so no image counts twice. The counts are integers:
    they depend neither on the number of processes nor on the batch size as far as the network gives an image the same
    logits, bit for bit, for any neighbours in the batch (libraries may choose another algorithm for another batch
    size; ``batch_size: 1``, the default, leaves them no choice).

    ``ms_per_image`` is the median time from images on the device to label maps, over the batches after the first few.
    """
    count = min(len(dataset), options.limit or len(dataset))
    if count == 0:
        raise DataError("the validation split holds no images")
    meter: Any
    if isinstance(dataset, InstanceDataset):
        meter = ObjectMeter(network, dataset, accelerator)
    else:
        meter = _LabelMeter(network, dataset, options, accelerator, details)
    network.eval()
    started = time.perf_counter()
    times: list[float] = []
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    left_out: list[str] = []
    samples = evaluation_samples(dataset if details is None else _Tolerant(dataset), options.num_workers, mine)
    for batch in _batches(_readable(samples, left_out), options.batch_size):
        if stop is not None and stop():
            return None
        times.append(meter.add(batch) / len(batch))
        if progress is not None:
            progress(len(batch))
    left_out = gather(left_out)
    if len(left_out) == count:
        raise DataError(left_out[0])
    result: dict[str, Any] = {"images": count - len(left_out), "seconds": round(time.perf_counter() - started, 3)}
    times = gather(times[min(WARM_UP, len(times) - 1) :] if times else [])
    result["ms_per_image"] = round(1000 * statistics.median(times), 3)
    result |= meter.result(details)
    if details is not None:
        details.left_out = left_out
    return result


class _LabelMeter:
    """Predicts batches of images as ``options`` say and counts their pixels, for ``details`` image by image."""

    def __init__(
        self, network: nn.Module, dataset: Any, options: EvalConfig, accelerator: Accelerator, details: Details | None
    ) -> None:
        self.network, self.dataset, self.options, self.accelerator = network, dataset, options, accelerator
        self.details = details
        self.metrics = {
            kind: SegmentationMetrics(
                dataset.num_classes,
                ignore_index=dataset.ignore_index,
                boundary_ratio=options.boundary_ratio,
                absent=options.absent,
            ).to(accelerator.device)
            for kind in KINDS
        }
        self.tasks = task_metrics(network, dataset, accelerator.device)
        self.padding = black(dataset.mean, dataset.std) if options.window_border == "pad" else ()
        self.rows: list[dict[str, Any]] = []

    def add(self, batch: Sequence[Sample]) -> float:
        """The seconds from images on the device to label maps."""
        network, accelerator, details = self.network, self.accelerator, self.details
        images, labels = move(
            (torch.stack([s["image"] for s in batch]), torch.stack([s["label"] for s in batch])), accelerator.device
        )
        begun = clock(accelerator.device)
        with accelerator.autocast():
            predictions = predict_labels(network, images, labels.shape[-2:], self.options, self.padding)
        seconds = clock(accelerator.device) - begun
        if self.tasks is not None:
            with accelerator.autocast():
                self.tasks.update(network, images, batch)
        if details is None:
            for kind, prediction in predictions.items():
                self.metrics[kind].update(prediction, labels)
        else:
            for sample, *image in zip(batch, labels, *(predictions[kind] for kind in KINDS), strict=True):
                row = {"index": sample["index"], "name": sample["name"], **_count(self.metrics, *image)}
                self.rows.append(row)
                if details.save is not None:
                    details.save(sample["name"], image[-1].cpu().numpy())
        return seconds

    def result(self, details: Details | None) -> dict[str, Any]:
        """The metrics of each kind over all processes."""
        metrics, result = self.metrics, {}
        for kind in KINDS:
            result[kind] = _plain(metrics[kind].reduce(self.accelerator).compute(), self.dataset.class_names)
        if self.tasks is not None:
            result["tasks"] = self.tasks.reduce(self.accelerator).compute()
        if details is not None:
            details.confusion = {kind: metrics[kind].confusion.cpu().numpy() for kind in KINDS}
            details.images = sorted(gather(self.rows), key=lambda row: row["index"])
        return result


def _count(metrics: Mapping[str, SegmentationMetrics], label: Tensor, *predictions: Tensor) -> dict[str, Any]:
    """Count one image; its valid pixels and the mIoU of each kind."""
    row: dict[str, Any] = {}
    for kind, prediction in zip(KINDS, predictions, strict=True):
        before = metrics[kind].confusion.clone()
        metrics[kind].update(prediction, label)
        counts = metrics[kind].confusion - before
        row["pixels"] = int(counts.sum())
        row[kind] = mean_iou(counts) if row["pixels"] else None
    return row


def _plain(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The metrics with class names as keys and None for what is not defined."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            result[key] = dict(zip(names, value, strict=True))
        else:
            result[key] = None if isinstance(value, float) and math.isnan(value) else value
    return result


# ------------------------------------------------------------------------------------------------------ printing


def summary(result: Mapping[str, Any]) -> str:
    """One line: mIoU, boundary IoU and pixel accuracy (of objects: mask AP and boundary AP), coarse -> refined, in
    percent."""
    if "objects" in result:
        return object_summary(result)
    titles = (("mIoU", "miou"), ("boundary IoU", "boundary_iou"), ("pixel accuracy", "pixel_accuracy"))
    return ", ".join(
        f"{title} {percent(result['coarse'][key])} -> {percent(result['refined'][key])}" for title, key in titles
    )


_COLUMNS = (
    ("IoU", "miou", "per_class_iou"),
    ("accuracy", "mean_accuracy", "per_class_accuracy"),
    ("boundary IoU", "boundary_iou", "per_class_boundary_iou"),
)


def format_table(result: Mapping[str, Any]) -> str:
    """The table that is printed, in percent: IoU, accuracy (recall) and boundary IoU of the coarse and the refined
    prediction and the gain, as the mean over classes and for each class, and the accuracy over all pixels; of objects
    average precision."""
    if "objects" in result:
        return object_table(result)
    parts = result["coarse"], result["refined"]
    means, columns = zip(*((mean, each) for _, mean, each in _COLUMNS), strict=True)
    none: list[float | None] = [None, None]
    rows = [
        ("mean", [part[key] for key in means for part in parts]),
        ("pixel accuracy", [*none, *(part["pixel_accuracy"] for part in parts), *none]),
    ]
    classes = [
        (name, [part[key][name] for key in columns for part in parts]) for name in result["coarse"]["per_class_iou"]
    ]
    title = f"{result['images']} images, %"
    width = max(len(name) for name in [title, *(name for name, _ in [*rows, *classes])])
    head = f"{'coarse':>9}{'refined':>9}{'gain':>8}"
    rule = "-" * (width + len(_COLUMNS) * (len(head) + 3) - 3)
    lines = [
        f"{'':<{width}}" + "   ".join(f"{name:>{len(head)}}" for name, _, _ in _COLUMNS),
        f"{title:<{width}}" + "   ".join([head] * len(_COLUMNS)),
    ]
    for block in (rows, classes):
        lines.append(rule)
        for name, values in block:
            pairs = zip(values[::2], values[1::2], strict=True)
            lines.append(f"{name:<{width}}" + "   ".join(_pair(a, b) for a, b in pairs))
    return "\n".join([*lines, *task_lines(result)])


def _pair(coarse: float | None, refined: float | None) -> str:
    gain = "-" if coarse is None or refined is None else f"{100 * (refined - coarse):+.2f}"
    return f"{percent(coarse):>9}{percent(refined):>9}{gain:>8}"


# ------------------------------------------------------------------------------------------------------- command


def evaluate_checkpoint(
    path: str | Path, overrides: Sequence[str] = (), out: Path | None = None, labels: str | None = None
) -> dict[str, Any]:
    """``rendseg eval``: evaluate a checkpoint on its validation data, print the table and write the results.

    They go to ``out``, by default ``<checkpoint without extension>_eval`` beside the checkpoint: ``metrics.json`` (with
    the conventions and the environment), ``images.csv`` (mIoU of each image), the confusion matrices of the refined and
    the coarse prediction (``confusion.npy``, ``confusion_coarse.npy``: int64 [C, C], row: label, column: prediction;
    ``.csv`` with class names; ``confusion.png``), and ``worst.png``, the ``eval.pictures`` images of lowest mIoU. With
    ``labels`` the predicted label map of every image goes to ``labels/NAME.png``: the numbers of the classes
    ("classes"), or the values that the data set's own label maps have for them ("dataset").

    Of objects: ``metrics.json``, ``detections.json`` (COCO's form of results, which ``rendseg data score`` and servers
    read) and ``pictures``, of ``eval.pictures`` images.

    Images that cannot be read are named, left out, and listed in ``metrics.json`` under ``left_out``.
    """
    config, classes, network, contents = load_trained(path, overrides)
    accelerator = make_accelerator(config)
    dataset = build_data(config, "val")
    if dataset.num_classes != len(classes["names"]):
        raise ConfigError(
            f"{path} was trained on {len(classes['names'])} classes, the data at hand has {dataset.num_classes}"
        )
    network.to(accelerator.device)
    total = min(len(dataset), config.eval.limit or len(dataset))
    out = out or Path(path).parent / f"{Path(path).stem}_eval"
    details = Details()
    if labels is not None:
        if config.learns_objects:
            raise ConfigError("--labels is for label maps: leave it out with model.name pointrend_rcnn")
        values = label_values(config, dataset.num_classes, labels == "dataset")
        details.save = lambda name, found: save_labels(out / "labels" / f"{file_stem(name)}.png", found, values)
    with tqdm(total=total, desc="eval", unit="image", disable=not accelerator.is_main_process) as bar:
        step = accelerator.num_processes
        result = evaluate(
            network, dataset, config.eval, accelerator, progress=lambda n: bar.update(n * step), details=details
        )
    assert result is not None
    if accelerator.is_main_process:
        print(format_table(result))
        print(f"{result['ms_per_image']:.1f} ms per image ({_device_name(accelerator.device)})")
        for line in details.left_out:
            print(f"rendseg: {line}", file=sys.stderr)
        if not config.learns_objects and not any(row["pixels"] for row in details.images):
            print("note: no image has a labelled pixel, so that nothing could be measured", file=sys.stderr)
        report = {
            "checkpoint": str(path),
            "iteration": contents["training"]["progress"]["iteration"],
            **result,
            "left_out": details.left_out,
            "confusion_sum": {kind: int(matrix.sum()) for kind, matrix in details.confusion.items()},
            "class_names": list(dataset.class_names),
            "conventions": {**config.to_dict()["eval"], "window_stride": config.eval.stride},
            "environment": {
                "rendseg": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": _device_name(accelerator.device),
                "processes": accelerator.num_processes,
                "threads": torch.get_num_threads(),
                "precision": config.train.precision,
                "parameters": sum(p.numel() for p in network.parameters()),
            },
        }
        write_json(out / "metrics.json", report)
        if config.learns_objects:
            write_json(out / "detections.json", details.detections)
            folder, options = out / "pictures", config.eval
            save_pictures(network, dataset, options.pictures, folder, accelerator, options.score_threshold)
        else:
            _write_details(out, details, dataset.class_names)
            if config.eval.pictures:
                worst = [row for row in details.images if row["refined"] is not None]
                worst = sorted(worst, key=lambda row: row["refined"])[: config.eval.pictures]
                _write_worst(out, network, dataset, worst, config.eval, accelerator)
        print(f"written to {out}")
    accelerator.wait_for_everyone()
    return {**result, "left_out": details.left_out}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _write_details(out: Path, details: Details, names: Sequence[str]) -> None:
    """The confusion matrices as arrays, tables and a picture, and the table of images."""
    for kind, stem in (("refined", "confusion"), ("coarse", "confusion_coarse")):
        matrix = details.confusion[kind]
        _write(out / f"{stem}.npy", partial(_save_array, matrix=matrix))
        table = [["label", *names], *([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))]
        _write_csv(out / f"{stem}.csv", table)
    columns = ["index", "name", "pixels", *KINDS]
    images = [["" if row[key] is None else row[key] for key in columns] for row in details.images]
    _write_csv(out / "images.csv", [columns, *images])
    try:
        picture = confusion_picture(details.confusion["refined"], names)
    except ImportError as error:
        print(f"no confusion.png: it needs the package matplotlib ({error})")
    else:
        save_png(out / "confusion.png", picture)


def _save_array(file: Any, matrix: np.ndarray) -> None:
    np.save(file, matrix)


def _write(path: Path, write: Callable[[Any], None]) -> None:
    try:
        write_atomically(path, write)
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}") from error


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)

    def write(file: Any) -> None:
        file.write(text.getvalue().encode("utf-8", "backslashreplace"))  # names of files may be any bytes

    _write(path, write)


def _write_worst(
    out: Path,
    network: nn.Module,
    dataset: Any,
    rows: Sequence[Mapping[str, Any]],
    options: EvalConfig,
    accelerator: Accelerator,
) -> None:
    """``worst.png``: image, coarse and refined prediction, what is wrong, and label, one row per image."""
    if not rows:
        return
    shown = []
    for row in rows:
        sample = dataset[row["index"]]
        found = predict_image(network, sample["image"], accelerator, options, dataset.mean, dataset.std)
        title = f"{row['name']}: mIoU {percent(row['coarse'])} -> {percent(row['refined'])}"
        pixels = to_uint8(sample["image"], dataset.mean, dataset.std, dataset.channel_order)
        shown.append(Comparison(title, pixels, found.coarse, found.refined, sample["label"]))
    save_png(out / "worst.png", comparison_grid(shown, dataset.palette, dataset.class_names, dataset.ignore_index))
