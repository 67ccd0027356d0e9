"""Average precision of masks and of their boundaries, as COCO defines it, by faster-coco-eval.

Mask AP: the mean over classes and over ten thresholds of the IoU, 0.5 to 0.95, of the area under the curve of precision
over recall. Boundary AP (Cheng et al., CVPR 2021) takes for the IoU the smaller of that of the masks and that of their
boundaries: what lies within 2 % of the image's diagonal from the outside of the mask.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rendseg.data import DataError, InstanceDataset, build_dataset
from rendseg.data.base import Split
from rendseg.data.rle import encode
from rendseg.engine.checkpoint import CheckpointError, write_json

KINDS = {"mask": "segm", "boundary": "boundary"}
STATS = {"ap": "AP_all", "ap50": "AP_50", "ap75": "AP_75"} | {
    f"ap_{s}": f"AP_{s}" for s in ("small", "medium", "large")
}


def detections(
    dataset: InstanceDataset, index: int, labels: Tensor, scores: Tensor, masks: Tensor
) -> list[dict[str, Any]]:
    """The objects found in image `index` in COCO's form of results: `labels` [N] from 1, `scores` [N] and `masks`
    [N, H, W] of the image's size as stored, above 0.5 where the object is."""
    return [
        {
            "image_id": dataset.image_id(index),
            "category_id": dataset.category_id(int(label) - 1),
            "score": float(score),
            "segmentation": encode(mask),
        }
        for label, score, mask in zip(labels.tolist(), scores.tolist(), (masks > 0.5).cpu().numpy(), strict=True)
    ]


def ground_truth(dataset: InstanceDataset, indices: Iterable[int] | None = None) -> dict[str, Any]:
    """The objects of a whole data set, or of the images ``indices``, in COCO's format."""
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for index in range(len(dataset)) if indices is None else indices:
        height, width = dataset.image_size(index)
        images.append({"id": dataset.image_id(index), "height": height, "width": width})
        objects += dataset.annotations(index)
    categories = [{"id": dataset.category_id(c), "name": name} for c, name in enumerate(dataset.class_names)]
    # Numbers from 1: for the evaluation 0 means no match.
    numbered = [{**entry, "id": number} for number, entry in enumerate(objects, 1)]
    return {"images": images, "annotations": numbered, "categories": categories}


def evaluate_instances(
    dataset: InstanceDataset, found: Sequence[dict[str, Any]], truth: dict[str, Any] | None = None
) -> dict[str, Any]:
    """AP of detections in COCO's form of results over all images of `dataset` (or of `truth`, some of its
    :func:`ground_truth`), which are those without any, too.

    Returns:
        ``{"mask": ..., "boundary": ..., "images", "objects", "detections"}``; each of the first two has ``ap``,
        ``ap50``, ``ap75``, ``ap_small``, ``ap_medium``, ``ap_large`` and ``per_class`` in [0, 1], None where there is
        no object to find.
    """
    need_evaluation()
    from faster_coco_eval import COCO, COCOeval_faster

    truth = ground_truth(dataset) if truth is None else truth
    _check(found, truth)
    wanted = COCO(truth)
    result: dict[str, Any] = {}
    for kind, name in KINDS.items():
        # The library writes into what it is given.
        run = COCOeval_faster(wanted, wanted.loadRes([dict(entry) for entry in found]), name, print_function=_nothing)
        run.evaluate()
        run.accumulate()
        run.summarize()
        stats = run.stats_as_dict
        precision = run.eval["precision"][..., 0, -1]  # thresholds, recalls, classes; all sizes, most detections
        result[kind] = {
            **{key: _share(stats[theirs]) for key, theirs in STATS.items()},
            "per_class": [_share(float(values.mean()) if values.min() > -1 else -1.0) for values in precision.T],
        }
    return {
        **result,
        "images": len(truth["images"]),
        "objects": sum(not entry["iscrowd"] for entry in truth["annotations"]),
        "detections": len(found),
    }


def need_evaluation() -> None:
    """``DataError`` where the library that computes average precision is not installed."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise DataError(
            "average precision needs faster-coco-eval, not installed here: pip install 'rendseg[instances]'"
        )


def _nothing(*_: object) -> None:
    """Print nothing."""


def _share(value: float) -> float | None:
    return None if value < 0 else float(value)


def _check(found: Iterable[Any], truth: dict[str, Any]) -> None:
    sizes = {image["id"]: [image["height"], image["width"]] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for number, entry in enumerate(found):
        where = f"detection {number}"
        if not isinstance(entry, dict) or not {"image_id", "category_id", "score", "segmentation"} <= entry.keys():
            raise DataError(f"{where} needs image_id, category_id, score and segmentation (COCO's form of results)")
        if entry["image_id"] not in sizes:
            raise DataError(f"{where} is of image {entry['image_id']}, which the split does not have; name its split")
        if entry["category_id"] not in categories:
            raise DataError(f"{where} is of category {entry['category_id']}, which the data set does not have")
        mask = entry["segmentation"]
        if not isinstance(mask, dict) or list(mask.get("size", ())) != sizes[entry["image_id"]]:
            raise DataError(f"{where} needs run lengths of size {sizes[entry['image_id']]}, that of its image")
        if not isinstance(mask.get("counts"), (str, bytes)):
            raise DataError(f"{where} needs run lengths as text, as pycocotools.mask.encode gives them")
        if not np.isfinite(entry["score"]):
            raise DataError(f"{where} has score {entry['score']}, wanted a finite number")


def score_files(options: Any, split: Split, path: Path, out: Path | None) -> None:
    """``rendseg data score``: prints the table of the detections in a JSON file."""
    dataset = build_dataset(options, split)
    if not isinstance(dataset, InstanceDataset):
        raise DataError("data.name must be a data set of objects, such as coco")
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())}); give a JSON file") from None
    if not isinstance(found, list):
        raise DataError(f"{path}: holds a {type(found).__name__}, wanted a list of detections (COCO's form of results)")
    result = evaluate_instances(dataset, found)
    print(format_scores(result, dataset.class_names))
    if out is not None:
        try:
            write_json(out, {**result, "classes": dataset.class_names})
        except OSError as error:
            raise CheckpointError(f"could not write {out}: {error}") from error


def format_scores(result: dict[str, Any], names: Sequence[str]) -> str:
    """Two rows of averages, and a row per class."""

    def cell(value: float | None) -> str:
        return f"{'-':>9}" if value is None else f"{100 * value:>9.2f}"

    width = max(8, *map(len, names))
    lines = [
        f"{result['detections']:,} detections, {result['objects']:,} objects in {result['images']:,} images; AP in %",
        f"{'':<{width}}" + "".join(f"{key.removeprefix('ap_') if key != 'ap' else 'AP':>9}" for key in STATS),
    ]
    lines += [f"{kind:<{width}}" + "".join(cell(result[kind][key]) for key in STATS) for kind in KINDS]
    lines.append(f"{'class':<{width}}" + "".join(f"{kind:>9}" for kind in KINDS))
    for index, name in enumerate(names):
        lines.append(f"{name:<{width}}" + "".join(cell(result[kind]["per_class"][index]) for kind in KINDS))
    return "\n".join(lines)
