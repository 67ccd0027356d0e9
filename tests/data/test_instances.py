"""Data sets of objects: the forms of masks, the published layouts with made-up images, and what a sample holds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from rendseg.data import DataError, build_dataset
from rendseg.data.rle import decode, encode, polygons_to_mask
from rendseg.engine.assemble import build_data
from rendseg.engine.config import build_config
from rendseg.engine.data_check import check_data, format_report

# --------------------------------------------------------------------------------------------------------- masks


def test_pixels_of_polygons_are_those_whose_centre_is_inside():
    assert polygons_to_mask([[1, 0, 4, 0, 4, 2, 1, 2]], 3, 5).tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0] * 5]
    triangle = polygons_to_mask([[0, 0, 4, 0, 0, 4]], 4, 4)  # x + y < 4 at the centres
    rows, columns = np.indices((4, 4)) + 0.5
    assert (triangle == (rows + columns < 4)).all()
    two = [[-3, -3, 1, -3, 1, 1, -3, 1], [2.4, 2.4, 9, 2.4, 9, 9, 2.4, 9]]  # both reach beyond the image
    assert np.argwhere(polygons_to_mask(two, 4, 4)).tolist() == [[0, 0], [2, 2], [2, 3], [3, 2], [3, 3]]
    rows, columns = np.indices((3, 4)) + 0.5
    bow = polygons_to_mask([[0, 0, 4, 3, 4, 0, 0, 3]], 3, 4)  # crosses itself
    assert (bow == ((rows - 0.75 * columns) * (3 - 0.75 * columns - rows) > 0)).all()


def test_run_lengths_are_those_of_coco():
    # Made by pycocotools.mask.encode: columns; text of small and large numbers, and of negative differences.
    mask = np.zeros((40, 50), np.uint8)
    mask[3:20, 5:9], mask[30:35, 10:40], mask[0, 45] = 1, 1, 1
    text = "[6a0g000000S2DYN000000000000000000000000000000000000000000000000000000000Z5LJ"
    assert encode(mask) == {"size": [40, 50], "counts": text} and (decode(text, 40, 50) == mask).all()
    assert decode([1, 2, 3], 2, 3).tolist() == [[0, 1, 0], [1, 0, 0]]
    for empty in (np.zeros((2, 3), np.uint8), np.ones((2, 3), np.uint8)):
        assert (decode(encode(empty)["counts"], 2, 3) == empty).all()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "counts, message",
    [
        ([1, 2], "of 3 pixels"),
        ([7, -1], "not negative"),
        ([1.5, 4.5], "whole numbers"),
        ("\x10", "damaged"),
        ("P", "ends"),
    ],
)
def test_run_lengths_that_cannot_be_read(counts, message):
    with pytest.raises(ValueError, match=message):
        decode(counts, 2, 3)


# ---------------------------------------------------------------------------------------------------------- coco


def _coco(root, change=lambda content: None):
    """Two images of 6 x 8 with objects and one without, for both splits."""
    full = encode(np.pad(np.ones((2, 3), np.uint8), ((4, 0), (5, 0))))
    content = {
        "images": [{"id": n, "file_name": f"{n:03}.png", "height": 6, "width": 8} for n in (7, 3, 9)],
        "categories": [{"id": 18, "name": "dog"}, {"id": 2, "name": "bicycle"}],
        "annotations": [
            {"id": 11, "image_id": 7, "category_id": 18, "segmentation": [[1, 1, 4, 1, 4, 3, 1, 3]], "iscrowd": 0},
            {"id": 12, "image_id": 7, "category_id": 2, "segmentation": full, "iscrowd": 0},
            {"id": 13, "image_id": 7, "category_id": 2, "iscrowd": 1},
            {"id": 14, "image_id": 3, "category_id": 18, "segmentation": [[0, 0, 8, 0, 8, 6, 0, 6]]},
        ],
    }
    content["annotations"][2]["segmentation"] = {"size": [6, 8], "counts": [0, 12, 36]}  # the first two columns
    for entry in content["annotations"]:
        entry |= {"area": 1.0, "bbox": [0, 0, 1, 1]}
    change(content)
    (root / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for image in ("003", "007", "009"):
            Image.fromarray(np.full((6, 8, 3), 200, np.uint8)).save(root / split / f"{image}.png")
    return {"name": "coco", "root": str(root), "flip": 0.0, "color_jitter": None, "scale_range": [1.0, 1.0]}


def test_coco(tmp_path):
    options = _coco(tmp_path)
    val, train = build_dataset(options, "val"), build_dataset(options, "train")
    assert val.class_names == ["bicycle", "dog"] and len(val) == 3 and len(train) == 2  # in the order of the ids
    sample = val[0]
    target = sample["target"]
    assert sample["name"] == "007" and sample["image"].shape == (3, 6, 8) and target["image_id"] == 7
    assert target["labels"].tolist() == [2, 1, 1] and target["iscrowd"].tolist() == [0, 0, 1]
    assert target["boxes"].tolist() == [[1, 1, 4, 3], [5, 4, 8, 6], [0, 0, 2, 6]]
    assert target["area"].tolist() == [6, 6, 12] and target["masks"].sum((1, 2)).tolist() == [6, 6, 12]
    kinds = {"boxes": torch.float32, "labels": torch.int64, "masks": torch.uint8, "iscrowd": torch.int64}
    assert all(target[key].dtype == dtype for key, dtype in kinds.items())
    assert train[0]["target"]["labels"].tolist() == [2, 1]  # without the crowd
    none = val[2]["target"]
    assert none["boxes"].shape == (0, 4) and none["masks"].shape == (0, 6, 8) and none["labels"].shape == (0,)
    assert len(build_dataset({**options, "keep_empty": True}, "train")) == 3
    label = val.label(0)
    assert label[1, 2] == 1 and label[5, 7] == 0 and label[5, 0] == 255 and label[0, 7] == 255


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["annotations"][0].update(image_id=5), "annotation 11 is of image 5, which is not listed"),
        (lambda c: c["annotations"][0].update(category_id=1), "annotation 11 is of category 1, which has no name"),
        (lambda c: c["annotations"][1].pop("segmentation"), r"annotations\[1\] needs any value for 'segmentation'"),
        (lambda c: c["images"][1].update(height="6"), r"images\[1\] needs a value of type int for 'height'"),
        (lambda c: c["images"][0].update(file_name="x.png"), "x.png: image is missing"),
        (lambda c: c["images"][1].update(width=9), "label map has size 9x6, its image"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "of 007.png has no mask .* three corners"),
        (lambda c: c["annotations"][0].update(segmentation={"counts": [48]}), "of 007.png has no mask .*lacks 'size'"),
        (lambda c: c["annotations"][2]["segmentation"].update(counts=[3]), "annotation 13 .* of 3 pixels"),
        (lambda c: c["images"][0].update(height=10**5, width=10**5), "007.png has 10000000000 pixels"),
        (lambda c: c["images"][2].update(id=7), "two images have the id 7"),
        (lambda c: c["categories"][0].update(id=2), "2 categories with 1 ids"),
        (lambda c: c.pop("categories"), "no list 'categories'"),
    ],
)
def test_annotations_that_cannot_be_used(change, message, tmp_path):
    options = _coco(tmp_path, change)
    with pytest.raises(DataError, match=message) as error:
        for index in range(len(dataset := build_dataset(options, "val"))):
            dataset[index]
    assert "\n" not in str(error.value)
    report = check_data(options, ["val"])
    assert report.exit_code in (1, 2) and str(error.value) in report.splits[0].problems


# ----------------------------------------------------------------------------------------------------- cityscapes


def test_cityscapes_instances(tmp_path):
    values = np.full((6, 8), 7, np.uint16)  # road
    values[0, :3], values[1, :2], values[2, 0] = 26001, 26002, 33000  # two cars, a bicycle
    values[4], values[5] = 24, 29  # a group of persons; a caravan, which is not evaluated
    for split in ("train", "val"):
        for folder, ending, image in (
            ("leftImg8bit", "leftImg8bit", np.zeros((6, 8, 3), np.uint8)),
            ("gtFine", "gtFine_instanceIds", values),
        ):
            place = tmp_path / folder / split / "ulm"
            place.mkdir(parents=True)
            Image.fromarray(image).save(place / f"ulm_0_{ending}.png")
    dataset = build_dataset({"name": "cityscapes_instances", "root": str(tmp_path)}, "val")
    target = dataset[0]["target"]
    names = [dataset.class_names[label - 1] for label in target["labels"]]
    assert dict(zip(names, target["area"].tolist(), strict=True)) == {"person": 8, "car": 2, "bicycle": 1}
    assert sorted(target["area"].tolist()) == [1, 2, 3, 8] and target["iscrowd"].tolist() == [1, 0, 0, 0]
    assert dataset.category_id(2) == 26
    train = build_dataset({"name": "cityscapes_instances", "root": str(tmp_path), "scale_range": [1.0, 1.0]}, "train")
    assert train[0]["target"]["labels"].tolist() == [3, 3, 8]


# --------------------------------------------------------------------------------------------------------- shapes

SHAPES = {"name": "shapes_instances", "size": [48, 64], "num_images": 8, "num_val_images": 4}


def test_shapes_instances_are_those_of_the_label_map():
    objects = build_dataset({**SHAPES, "min_pixels": 1}, "val")
    labels = build_dataset({**SHAPES, "name": "shapes"}, "val")
    for index in range(4):
        image, label = labels.read(index)
        target = objects[index]["target"]
        assert (objects.read_all(index)[0] == image).all()
        masks = target["masks"].numpy().astype(np.int64)
        assert masks.sum(0).max() == 1  # what is visible: no pixel has two objects
        assert ((masks * target["labels"].numpy()[:, None, None]).sum(0) == label).all()
        assert len(masks) > len(np.unique(label)) - 2
    assert all(build_dataset(SHAPES, "val")[i]["target"]["area"].min() >= 16 for i in range(4))


def test_masks_follow_the_image():
    """Scaled, cropped and flipped: the mask of a bright rectangle stays on it."""
    options = {**SHAPES, "crop_size": [40, 40], "scale_range": [0.5, 2.0], "vertical_flip": 0.5}
    dataset = build_dataset(options, "train")
    image, found = dataset.read_all(0)
    found.masks[:] = 0
    found.masks[0, 10:30, 12:40] = 1
    dataset.read_all = lambda index: (np.repeat(255 * found.masks[0, ..., None], 3, 2), found)
    seen = set()
    for epoch in range(12):
        sample = dataset.sample(0, epoch)
        target, bright = sample["target"], (sample["image"] > 0).all(0)
        if len(target["masks"]) == 0:
            assert not bright.any()
            continue
        assert len(target["masks"]) == 1
        wrong = (target["masks"][0] > 0) != bright
        rows, columns = torch.nonzero(target["masks"][0], as_tuple=True)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert target["boxes"][0].tolist() == [float(side) for side in box]
        # Where the image is enlarged or reduced its edges are soft: at most a pixel along them.
        assert wrong.sum() <= 2 * sum(target["masks"].shape[1:])
        seen.add(tuple(target["boxes"][0].tolist()))
        assert torch.equal(dataset.sample(0, epoch)["target"]["masks"], target["masks"])
    assert len(seen) > 6


def test_short_edge_needs_no_crop():
    """The images of a detector's batch may differ in size."""
    options = {**SHAPES, "short_edge": [24, 36], "max_size": 40}
    sizes = {tuple(build_dataset(options, "train").sample(0, epoch)["image"].shape[1:]) for epoch in range(8)}
    assert sizes == {(24, 32), (30, 40)}
    enlarged = build_dataset({**SHAPES, "short_edge": [96]}, "train").sample(0, 0)
    assert enlarged["image"].shape[1:] == enlarged["target"]["masks"].shape[1:] == (96, 128)  # not a crop of 48 x 64
    with pytest.raises(DataError, match="short_edge needs crop_size"):
        build_dataset({"name": "shapes", "short_edge": [24]}, "train")
    with pytest.raises(DataError, match="category_max_fraction"):
        build_dataset({**SHAPES, "category_max_fraction": 0.5}, "train")


# ---------------------------------------------------------------------------------------------------------- check


def test_objects_are_counted(tmp_path):
    options = _coco(tmp_path, lambda content: content["annotations"][3].update(segmentation=[[9, 9, 11, 9, 11, 11]]))
    report = check_data(options, ["train", "val"])
    train, val = report.splits
    assert report.exit_code == 0 and not report.notes
    assert val.objects.tolist() == [[1, 0, 0, 1], [1, 0, 0, 0]]
    assert (val.most, val.bare, val.empty, val.sound) == (3, 1, 1, 3) and train.sound == 2
    assert val.to_dict()["objects"]["classes"][0] == {
        "name": "bicycle",
        "small": 1,
        "medium": 0,
        "large": 0,
        "crowds": 1,
    }
    text = format_report(val)
    assert "2 objects, at most 3 in an image; 1 image without any" in text and "1 object\n" in text
    assert "class_weights" not in text
    report = check_data({**SHAPES, "num_images": 2, "num_val_images": 2})
    assert report.exit_code == 0 and report.splits[0].objects.sum() > 4


def test_networks_that_learn_label_maps_refuse_objects():
    config = build_config({"name": "x", "data": SHAPES, "train": {"iterations": 1}, "model": {"name": "segmenter"}})
    with pytest.raises(DataError, match="shapes_instances has objects, and the networks .* learn label maps"):
        build_data(config, "train")
