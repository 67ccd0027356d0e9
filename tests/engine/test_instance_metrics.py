"""Average precision of detections, against pycocotools and by hand."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from rendseg.cli import main
from rendseg.data import DataError, build_dataset
from rendseg.engine import instance_metrics
from rendseg.engine.instance_metrics import detections, evaluate_instances, ground_truth

SHAPES = {"name": "shapes_instances", "size": [64, 80], "num_images": 2, "num_val_images": 6}


@pytest.fixture(scope="module")
def dataset():
    pytest.importorskip("faster_coco_eval", reason="rendseg[instances] is not installed")
    return build_dataset(SHAPES, "val")


def _shifted(dataset, shift, keep=1.0):
    """The objects themselves, shifted to the right, as detections of random scores."""
    rng, found = np.random.default_rng(0), []
    for index in range(len(dataset)):
        target = dataset[index]["target"]
        kept = torch.from_numpy(rng.random(len(target["labels"])) < keep)
        masks = torch.zeros_like(target["masks"])
        masks[..., shift:] = target["masks"][..., : masks.shape[-1] - shift]
        scores = torch.from_numpy(rng.random(int(kept.sum())))
        found += detections(dataset, index, target["labels"][kept], scores, masks[kept])
    return found


def test_perfect_detections_have_an_ap_of_one(dataset):
    result = evaluate_instances(dataset, _shifted(dataset, 0))
    assert result["mask"]["ap"] == result["boundary"]["ap"] == pytest.approx(1)
    assert result["mask"]["ap_large"] is None and result["objects"] == result["detections"] > 20
    nothing = evaluate_instances(dataset, [])
    assert nothing["mask"]["ap"] == 0 and nothing["detections"] == 0


def _coco(tmp_path):
    """A file in COCO's format: polygons, a crowd, an image without objects, ids with gaps."""
    rng = np.random.default_rng(1)
    images = [{"id": 5 * n, "file_name": f"{n}.png", "height": 90, "width": 120} for n in range(1, 6)]
    objects = []
    for image in images[:-1]:
        Image.new("RGB", (120, 90)).save(tmp_path / image["file_name"])
        for _ in range(5):
            (x, y), (w, h) = rng.uniform(0, 60, 2), rng.uniform(15, 50, 2)
            objects.append({"segmentation": [[x, y, x + w, y, x + w, y + h, x + w / 3, y + h]], "area": 0.9 * w * h})
            objects[-1] |= {"image_id": image["id"], "bbox": [x, y, w, h], "iscrowd": 0}
    objects[3] |= {"segmentation": {"size": [90, 120], "counts": [0, 1800, 9000]}, "area": 1800, "iscrowd": 1}
    Image.new("RGB", (120, 90)).save(tmp_path / "5.png")
    for number, entry in enumerate(objects):
        entry |= {"id": 100 + number, "category_id": (4, 9)[number % 2]}
    categories = [{"id": 9, "name": "cat"}, {"id": 4, "name": "boat"}]
    path = tmp_path / "val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    return build_dataset({"name": "coco", "root": str(tmp_path), "images": ".", "annotations": path.name}, "val"), path


@pytest.mark.parametrize("kind", ["shapes", "coco"])
def test_against_pycocotools(dataset, kind, tmp_path):
    pycocotools = pytest.importorskip("pycocotools.coco", reason="needs the package pycocotools")
    from pycocotools.cocoeval import COCOeval

    if kind == "coco":
        dataset, path = _coco(tmp_path)
    found = _shifted(dataset, 1 if kind == "shapes" else 4, keep=0.8)
    result = evaluate_instances(dataset, found)
    with contextlib.redirect_stdout(io.StringIO()):
        wanted = pycocotools.COCO(*([path] if kind == "coco" else []))
        if kind == "shapes":
            wanted.dataset = ground_truth(dataset)
            wanted.createIndex()
        run = COCOeval(wanted, wanted.loadRes([dict(entry) for entry in found]), "segm")
        run.evaluate(), run.accumulate(), run.summarize()
    for key, number in zip(instance_metrics.STATS, run.stats[:6], strict=True):
        assert result["mask"][key] == (None if number < 0 else pytest.approx(number, abs=1e-12)), key
    assert 0.02 < result["mask"]["ap"] < 0.9


def _boundary(mask):
    """What the erosion by a square of 3 x 3, once for each pixel of 2 % of the diagonal, takes away."""
    inner = np.pad(mask, 1)
    for _ in range(max(1, round(0.02 * np.hypot(*mask.shape)))):
        views = [
            inner[1 + i : inner.shape[0] - 1 + i, 1 + j : inner.shape[1] - 1 + j]
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
        ]
        inner = np.pad(np.min(views, 0), 1)
    return mask - inner[1:-1, 1:-1]


def test_boundary_ap_of_one_object_by_hand(dataset):
    """One object and one detection: AP is the share of the thresholds that the smaller of the two IoUs reaches."""

    class One(type(dataset)):
        def __len__(self):
            return 1

        def read_all(self, index):
            image, found = super().read_all(index)
            masks = np.zeros((1, *image.shape[:2]), np.uint8)
            masks[0, 10:50, 10:60] = 1
            return image, type(found)(np.array([2]), masks, np.zeros(1, bool))

    one = One(dataset.options, "val")
    truth = one[0]["target"]["masks"][0].numpy()
    found = np.zeros_like(truth)
    found[11:50, 10:61] = 1
    ious = []
    for a, b in ((truth, found), (_boundary(truth), _boundary(found))):
        ious.append((a & b).sum() / (a | b).sum())
    shares = [(np.linspace(0.5, 0.95, 10) <= iou).mean() for iou in (ious[0], min(ious))]
    assert shares[1] < shares[0]
    result = evaluate_instances(
        one, detections(one, 0, torch.tensor([3]), torch.tensor([0.5]), torch.from_numpy(found)[None])
    )
    assert (result["mask"]["ap"], result["boundary"]["ap"]) == pytest.approx(shares)
    assert [value is not None for value in result["mask"]["per_class"]] == [c == 2 for c in range(7)]


def test_command(dataset, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(
        json.dumps({"name": "a", "data": SHAPES, "model": {"name": "segmenter"}, "train": {"iterations": 1}})
    )
    (tmp_path / "found.json").write_text(json.dumps(_shifted(dataset, 0)))
    arguments = ["data", "score", str(tmp_path / "a.yaml"), str(tmp_path / "found.json")]
    assert main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:2] == ["mask", "100.00"] and lines[3].split()[:2] == ["boundary", "100.00"]
    assert json.loads((tmp_path / "out.json").read_text())["mask"]["ap50"] == pytest.approx(1)
    (tmp_path / "found.json").write_text("{")
    assert main(arguments) == 2
    assert main([*arguments, "data.name=shapes"]) == 2
    error = capsys.readouterr().err
    assert "found.json: cannot be read" in error and "must be a data set of objects" in error and error.count("\n") == 2


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_id": 77}, "detection 0 is of image 77"),
        ({"category_id": 0}, "detection 0 is of category 0"),
        ({"segmentation": [[0, 0, 1, 0, 1, 1]]}, "needs run lengths of size"),
        ({"segmentation": {"size": [64, 80], "counts": [5120]}}, "run lengths as text"),
        ({"score": float("nan")}, "has score nan"),
    ],
)
def test_detections_that_cannot_be_scored(change, message, dataset):
    with pytest.raises(DataError, match=message):
        evaluate_instances(dataset, [{**_shifted(dataset, 0)[0], **change}])
