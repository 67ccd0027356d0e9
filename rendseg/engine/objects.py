"""Objects with masks in evaluation and prediction: what label maps have in ``evaluate.py`` and ``predict.py``.

Three masks of the same boxes and classes are compared, each enlarged bilinearly to its box: ``coarse``, the coarse
head's (7 x 7); ``grid``, that after two steps (28 x 28, the size of Mask R-CNN's), whose every cell the point head has
predicted; and ``refined``, that after all steps (224 x 224), in which only uncertain cells were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from rendseg.data import InstanceDataset
from rendseg.data.rle import encode
from rendseg.engine.checkpoint import write_json
from rendseg.engine.instance_metrics import KINDS as MEASURES
from rendseg.engine.instance_metrics import STATS, detections, evaluate_instances, ground_truth
from rendseg.engine.loader import Sample
from rendseg.engine.runtime import clock, gather, move
from rendseg.engine.visualize import Objects, best_window, boundary_zoom, numbered, objects_side_by_side, to_uint8

if TYPE_CHECKING:
    from accelerate import Accelerator

STAGES = ("coarse", "grid", "refined")


def predict_objects(
    network: Any, images: Sequence[Tensor], accelerator: Accelerator, sizes: Sequence[tuple[int, int]] | None = None
) -> list[dict[str, Any]]:
    """``PointRendRCNN.predict`` of images on the device, in the precision of the run."""
    network.eval()
    with accelerator.autocast():
        return network.predict(images, sizes)


class ObjectMeter:
    """Predicts batches of images and keeps their detections until all are measured together."""

    def __init__(self, network: Any, dataset: InstanceDataset, accelerator: Accelerator) -> None:
        self.network, self.dataset, self.accelerator = network, dataset, accelerator
        self.found: list[tuple[int, str, dict[str, list[dict[str, Any]]]]] = []

    def add(self, batch: Sequence[Sample]) -> float:
        """The seconds from images on the device to masks of the size of the files."""
        device = self.accelerator.device
        images = move([sample["image"] for sample in batch], device)
        sizes = [self.dataset.image_size(sample["index"]) for sample in batch]
        begun = clock(device)
        predicted = predict_objects(self.network, images, self.accelerator, sizes)
        seconds = clock(device) - begun
        for sample, of in zip(batch, predicted, strict=True):
            index = sample["index"]
            kinds = {
                kind: detections(self.dataset, index, of["labels"], of["scores"], of["masks"][kind]) for kind in STAGES
            }
            self.found.append((index, sample["name"], kinds))
        return seconds

    def result(self, details: Any = None) -> dict[str, Any]:
        """Average precision of each kind over the images that were added in all processes; ``details`` gets the refined
        detections."""
        found = sorted(gather(self.found), key=lambda of: of[0])
        truth = ground_truth(self.dataset, [index for index, *_ in found])
        result: dict[str, Any] = {}
        head = self.network.roi_heads.mask_head
        cells = {kind: head.coarse_head.output_size * 2**steps for kind, steps in head.stages.items()}
        for kind in STAGES:
            of_kind = [entry for _, _, kinds in found for entry in kinds[kind]]
            measured = evaluate_instances(self.dataset, of_kind, truth)
            values = {f"{measure}_ap": measured[measure]["ap"] for measure in MEASURES}
            for measure in MEASURES:
                each = dict(zip(self.dataset.class_names, measured[measure].pop("per_class"), strict=True))
                values[measure] = {**measured[measure], "per_class": each}
            result[kind] = {**values, "cells": cells[kind]}
        if details is not None:
            details.images = [{"index": index, "name": name} for index, name, _ in found]
            details.detections = [entry for _, _, kinds in found for entry in kinds["refined"]]
        return {**result, "objects": measured["objects"], "detections": measured["detections"]}


# ------------------------------------------------------------------------------------------------------ printing


def object_summary(result: Mapping[str, Any]) -> str:
    """One line: mask AP and boundary AP, coarse -> grid -> refined, in percent."""
    return ", ".join(
        f"{measure} AP {' -> '.join(percent(result[kind][f'{measure}_ap']) for kind in STAGES)}" for measure in MEASURES
    )


def object_table(result: Mapping[str, Any]) -> str:
    """AP of masks and boundaries in percent, of each kind, and what the refined masks gain on those of the grid: over
    all classes, at two thresholds and three sizes, and of each class."""
    names = list(result["refined"]["mask"]["per_class"])
    rows: list[tuple[str, tuple[str, ...]]] = [
        ("AP" + key.removeprefix("ap").replace("_", " "), (key,)) for key in STATS
    ]
    rows += [(name, ("per_class", name)) for name in names]
    title = f"{result['images']} images, {result['objects']} objects, %"
    width = max(map(len, [title, *names]))
    head = "".join(f"{kind:>9}" for kind in STAGES) + f"{'gain':>8}"
    cells = "".join(f"{side:>9}" for side in (f"{result[kind]['cells']}²" for kind in STAGES)) + " " * 8
    lines = [
        " " * width + "   ".join(f"{measure + ' AP':>{len(head)}}" for measure in MEASURES),
        f"{title:<{width}}" + "   ".join([head] * len(MEASURES)),
        " " * width + "   ".join([cells] * len(MEASURES)).rstrip(),
    ]
    for number, (name, path) in enumerate(rows):
        if number in (0, len(STATS)):
            lines.append("-" * (width + len(MEASURES) * (len(head) + 3) - 3))
        parts = []
        for measure in MEASURES:
            values = [_at(result[kind][measure], path) for kind in STAGES]
            gain = "-" if None in values[1:] else f"{100 * (values[2] - values[1]):+.2f}"
            parts.append("".join(f"{percent(value):>9}" for value in values) + f"{gain:>8}")
        lines.append(f"{name:<{width}}" + "   ".join(parts))
    return "\n".join(lines)


def _at(values: Any, path: Sequence[str]) -> Any:
    for key in path:
        values = values[key]
    return values


def percent(value: float | None) -> str:
    """A share in percent, ``-`` where there is none."""
    return "-" if value is None else f"{100 * value:.2f}"


# ------------------------------------------------------------------------------------------------------ pictures


def shown_objects(found: Mapping[str, Any], kind: str, threshold: float) -> Objects:
    """The objects of one image whose score reaches ``threshold``, the surest ones on top."""
    scores = found["scores"].float().cpu()
    kept = scores.argsort(stable=True)
    kept = kept[scores[kept] >= threshold]
    labels, masks = found["labels"].cpu()[kept] - 1, found["masks"][kind].cpu()[kept]
    return Objects(labels.numpy(), masks.numpy(), scores[kept].numpy())


def object_pictures(
    network: Any,
    dataset: InstanceDataset,
    indices: Iterable[int],
    accelerator: Accelerator,
    threshold: float,
    zoom: bool,
) -> Iterator[tuple[str, Image.Image]]:
    """Names and pictures of images: the objects of each kind and of the annotations. With ``zoom`` each is followed by
    the window in which refinement changed most, enlarged."""
    for index in indices:
        sample = dataset[index]
        target = sample["target"]
        found = predict_objects(network, [sample["image"].to(accelerator.device)], accelerator)[0]
        pixels = to_uint8(sample["image"], dataset.mean, dataset.std, dataset.channel_order)
        kinds = {kind: shown_objects(found, kind, threshold) for kind in STAGES}
        truth = Objects(target["labels"].numpy() - 1, target["masks"].numpy() > 0)
        yield (
            sample["name"],
            objects_side_by_side(pixels, {**kinds, "label": truth}, dataset.palette, dataset.class_names),
        )
        if zoom:
            maps = [numbered(kinds["coarse"]), numbered(kinds["refined"]), numbered(truth)]
            count = len(kinds["refined"].classes)
            maps[2] = np.where(maps[2] < 0, -1, maps[2] + count)
            colors = dataset.palette[np.concatenate([kinds["refined"].classes, truth.classes, [0]])]
            box = best_window(maps[0], maps[1], None, max(24, min(pixels.shape[:2]) // 4))
            yield f"{sample['name']}_zoom", boundary_zoom(pixels, maps[0], maps[1], maps[2], colors, box=box)


# -------------------------------------------------------------------------------------------------------- files


def write_objects(
    path: Path, found: Mapping[str, Any], number: int, name: str, classes: Mapping[str, Any], threshold: float
) -> None:
    """The refined objects of one image file in COCO's form of results, with names; ``number`` is the image's."""
    ids = classes.get("ids") or range(1, len(classes["names"]) + 1)
    entries = []
    for label, score, box, mask in zip(
        found["labels"].tolist(),
        found["scores"].tolist(),
        found["boxes"].tolist(),
        found["masks"]["refined"],
        strict=True,
    ):
        if score >= threshold:
            left, top, right, bottom = box
            entries.append(
                {
                    "image_id": number,
                    "file_name": name,
                    "category_id": ids[label - 1],
                    "category": classes["names"][label - 1],
                    "bbox": [left, top, right - left, bottom - top],
                    "score": score,
                    "segmentation": encode(mask.cpu().numpy()),
                }
            )
    write_json(path, entries)
