from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rendseg.data import DataError, build_dataset
from rendseg.engine.config import ConfigError, build_config
from rendseg.engine.loader import training_batches
from rendseg.engine.metrics import SegmentationMetrics
from rendseg.engine.order import SourceOrder
from rendseg.engine.tasks import TaskMetrics, with_tasks

COLUMNS = ["image", "split", "ih", "iw", "sh", "sw", "object", "part", "material", "texture", "scene"]
OBJECTS = ["sky", "car", "house", "tree"]
PARTS = ["wheel", "door", "window"]
MATERIALS = ["wood", "metal", "glass"]
TEXTURES = ["striped", "dotted"]
SCENES = ["street", "forest"]
OBJECT_PARTS = [("car", "wheel"), ("car", "door"), ("house", "door"), ("3", "3")]


def encode(label):
    """Numbers as red + 256 green."""
    return np.stack([label % 256, label // 256, np.zeros_like(label)], -1).astype(np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def blocks(rng, count, size, cells=4):
    """A map of blocks of numbers 1 to count."""
    side = size // cells
    return rng.integers(1, count + 1, (cells, cells)).repeat(side, 0).repeat(side, 1).astype(np.int64)


def colours(label, base, rng):
    """An image whose colours tell the numbers."""
    table = np.random.default_rng(base).integers(40, 216, (16, 3))
    return np.clip(table[label] + rng.normal(0, 6, (*label.shape, 3)), 0, 255).astype(np.uint8)


def make_broden(root: Path, size: int = 64, train: int = 8, val: int = 2, first_number: int = 1) -> Path:
    """A tree of three kinds of images: objects, parts and scenes; materials; textures. What is to be learned shows in
    the colours, or in the direction of stripes; all kinds have the same colours, so that statistics of batch
    normalisation fit all. Object numbers start at ``first_number``."""
    rng = np.random.default_rng(0)
    rows = [COLUMNS]
    shift = first_number - 1
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            # an object with a part in its left half, in half of the images
            label = blocks(rng, len(OBJECTS), size)
            part = np.zeros_like(label)
            left = np.arange(size) % (size // 4) < size // 8
            part[(label == 2) & left] = 1 + i % 2
            part[(label == 3) & left] = 2
            name = f"ade/{split}_{i}"
            save(root / "images" / f"{name}.png", colours(label + 4 * (part > 0), 1, rng))
            save(root / "images" / f"{name}_object.png", encode(label + shift))
            save(root / "images" / f"{name}_part.png", encode(part))
            scene = 1 + i % 2
            rows.append(
                [f"{name}.png", split, size, size, "", "", f"{name}_object.png", f"{name}_part.png", "", "", scene]
            )
            name = f"os/{split}_{i}"
            label = blocks(rng, len(MATERIALS), size)
            save(root / "images" / f"{name}.png", colours(label, 1, rng))
            small = label[::2, ::2].astype(np.uint8)
            save(root / "images" / f"{name}_material.png", small)
            rows.append(
                [f"{name}.png", split, size, size, size // 2, size // 2, "", "", f"{name}_material.png", "", ""]
            )
        for i in range(max(1, count // 2)):
            name = f"dtd/{split}_{i}"
            kind = 1 + i % 2
            stripes = (np.add.outer(np.arange(size), (kind - 1) * np.arange(size)) // 4) % 2  # level, or oblique
            save(root / "images" / f"{name}.png", colours(rng.integers(1, 9, 2)[stripes], 1, rng))
            rows.append([f"{name}.png", split, "", "", "", "", "", "", "", f"{kind};1", ""])
    write_csv(root / "index.csv", rows)
    lists = {"object": OBJECTS, "part": PARTS, "material": MATERIALS, "texture": TEXTURES, "scene": SCENES}
    for task, names in lists.items():
        start = first_number if task == "object" else 1
        write_csv(root / f"{task}.csv", [["number", "name"], *([start + i, name] for i, name in enumerate(names))])
    parts = [row if row[0] != "3" else (str(2 + first_number), row[1]) for row in OBJECT_PARTS]
    write_csv(root / "object_part.csv", [["object", "part"], *parts])
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_broden(tmp_path_factory.mktemp("broden"))


def dataset(root, split="val", **options):
    return build_dataset({"name": "broden", "root": str(root), **options}, split)


PLAIN = {"scale_range": [1, 1], "flip": 0.0, "color_jitter": None}


def test_names_and_sizes(root):
    data = dataset(root, "train")
    assert data.class_names == OBJECTS and data.num_classes == 4 and data.ignore_index == 255
    assert data.task_classes["material"] == MATERIALS and data.task_classes["scene"] == SCENES
    assert data.object_parts == [[1, 0, 1], [2, 1, 2]]
    assert data.source_sizes == [8, 8, 4] and len(data) == 20
    assert len(dataset(root, "val")) == 5
    names = [dataset(root, "val").sample_name(i) for i in range(5)]
    assert len(set(names)) == 5 and names[0] == "ade_val_0"


def test_labels_are_those_of_the_files(root):
    data = dataset(root, "val")
    for i in range(len(data)):
        sample = data[i]
        name = data.sample_name(i).replace("_val", "/val")
        kind = name.split("/")[0]
        assert sample["image"].shape == (3, 64, 64) and sample["label"].dtype == torch.int64
        image = np.asarray(Image.open(root / "images" / f"{name}.png")).transpose(2, 0, 1) / 255
        mean, std = np.reshape(data.mean, (3, 1, 1)), np.reshape(data.std, (3, 1, 1))
        np.testing.assert_allclose(sample["image"].numpy(), (image - mean) / std, atol=1e-5)
        if kind == "ade":
            label = np.asarray(Image.open(root / "images" / f"{name}_object.png")).astype(int)[..., 0] - 1
            part = np.asarray(Image.open(root / "images" / f"{name}_part.png")).astype(int)[..., 0] - 1
            assert np.array_equal(sample["label"], label) and np.array_equal(sample["labels"]["object"], label)
            assert np.array_equal(sample["labels"]["part"], np.where(part < 0, 255, part))
            assert sample["labels"]["scene"].item() == int(name[-1]) % 2
            assert set(sample["labels"]) == {"object", "part", "scene"}
        else:
            assert (sample["label"] == 255).all()
        if kind == "os":  # the label map has half of the size
            small = np.asarray(Image.open(root / "images" / f"{name}_material.png")).astype(int) - 1
            assert np.array_equal(sample["labels"]["material"], small.repeat(2, 0).repeat(2, 1))
        if kind == "dtd":
            assert (sample["labels"]["texture"] == 0).all()


def test_read_gives_the_object_map(root):
    data = dataset(root, "val", cache=True)
    image, label = data.read(0)
    assert image.dtype == np.uint8 and label.dtype == np.uint8 and label.shape == (64, 64)
    assert np.array_equal(label, data[0]["label"].numpy())
    assert (data.read(1)[1] == 255).all()


def test_augmentation_moves_image_and_maps_together(tmp_path):
    """Colours are exact here, so that the label of a pixel can be read off the image after scale, crop and flip."""
    rng = np.random.default_rng(1)
    label = blocks(rng, 4, 64, 8)
    part = np.where(label % 2 == 0, label // 2, 0)
    make_broden(tmp_path, train=1, val=1)
    value = np.array([0, 50, 110, 170, 230])
    save(tmp_path / "images/ade/train_0.png", np.repeat(value[label][..., None], 3, 2).astype(np.uint8))
    save(tmp_path / "images/ade/train_0_object.png", encode(label))
    save(tmp_path / "images/ade/train_0_part.png", encode(part))
    data = dataset(tmp_path, "train", crop_size=[48, 80], scale_range=[1.0, 1.0], color_jitter=None, tasks=None)
    seen = set()
    for epoch in range(6):
        sample = data.sample(0, epoch)
        grey = sample["image"][0] * data.std[0] + data.mean[0]
        image = (grey * 255).round().long()
        label, part = sample["labels"]["object"], sample["labels"]["part"]
        inside = label != 255
        assert (inside == (torch.arange(80) < 64)).all()  # narrower than the crop: padded at the right
        assert torch.equal(image[inside], torch.from_numpy(value)[label[inside] + 1])
        assert torch.equal(part[inside], torch.where(label[inside] % 2 == 1, label[inside] // 2, 255))
        assert (part[~inside] == 255).all()
        seen.add(image.numpy().tobytes())
        assert torch.equal(data.sample(0, epoch)["labels"]["part"], part)
    assert len(seen) > 2


def test_training_samples_hold_the_tasks_of_one_source(root):
    data = dataset(root, "train")
    kinds = [set(data[i]["labels"]) for i in range(len(data))]
    assert kinds == [{"object", "part", "scene"}] * 8 + [{"material"}] * 8 + [{"texture"}] * 4
    everything = dataset(root, "train", sources=[["object", "scene"], ["part"], ["material", "texture"]])
    assert everything.source_sizes == [8, 8, 12]
    mixed = everything[16]["labels"]
    assert set(mixed) == {"material", "texture"} and (mixed["texture"] == 255).all() and (mixed["material"] < 3).all()


def test_object_alone(root):
    data = dataset(root, "train", tasks=["object"])
    assert data.source_sizes == [8, 0, 0] and len(data) == 8 and "labels" not in data[0]
    images, labels = next(training_batches(data, 0, 0, 1, 4, 0))
    assert labels.shape == (4, 64, 64)


def test_numbers_beyond_one_byte(tmp_path):
    make_broden(tmp_path, train=2, val=1, first_number=300)
    data = dataset(tmp_path)
    assert data.num_classes == 4 and data.object_parts == [[1, 0, 1], [2, 1, 2]]
    assert set(data[0]["label"].unique().tolist()) <= {0, 1, 2, 3}
    # 260 objects: 255 is one of them, and ignored is another number
    rows = [
        ["number", "name"],
        *([i, OBJECTS[i - 300] if i in range(300, 304) else f"thing {i}"] for i in range(1, 400)),
    ]
    write_csv(tmp_path / "object.csv", rows)
    data = dataset(tmp_path)
    assert data.num_classes == 399 and data.ignore_index == 65535
    assert set(data[0]["label"].unique().tolist()) <= {299, 300, 301, 302} and (data[1]["label"] == 65535).all()
    assert data.read(0)[1].dtype == np.uint16
    train = dataset(tmp_path, "train", crop_size=[96, 96])
    assert (train[0]["labels"]["object"][:, -1] == 65535).all() or (train[0]["labels"]["object"] < 399).all()


def test_layers_lists_and_broden_plus_names(tmp_path):
    make_broden(tmp_path, train=1, val=1)
    over = np.zeros((64, 64), np.int64)
    over[:32] = 4
    save(tmp_path / "images/over.png", encode(over))
    text = (tmp_path / "index.csv").read_text()
    (tmp_path / "index.csv").write_text(text.replace("ade/val_0_object.png", "over.png;ade/val_0_object.png"))
    (tmp_path / "material.csv").rename(tmp_path / "c_material.csv")
    write_csv(tmp_path / "scene.csv", [["label", "name", "count"], [0, "-", 9], [1, "street", 5], [2, "forest", 4]])
    (tmp_path / "object_part.csv").unlink()
    write_csv(
        tmp_path / "object_part_hierarchy.csv",
        [["object_label", "object_name", "part_labels", "part_names"], [3, "house", "0;3;1", "-;window;wheel"]],
    )
    data = dataset(tmp_path)
    under = np.asarray(Image.open(tmp_path / "images/ade/val_0_object.png")).astype(int)[..., 0] - 1
    assert np.array_equal(data[0]["label"], np.where(over > 0, 3, under))
    assert data.object_parts == [[2, 2, 0]] and data.task_classes["scene"] == SCENES
    assert data.task_classes["material"] == MATERIALS


# ------------------------------------------------------------------------------------------------- broken trees


def edit(name, old, new):
    def change(root):
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))

    return change


def spoil(name, array):
    return lambda root: save(root / "images" / name, array)


BROKEN = {
    "no index": (lambda r: (r / "index.csv").unlink(), r"index.csv: no such file; set data.index"),
    "no column": (edit("index.csv", "split", "part_of"), r"index.csv: has no column 'split' \(columns: image, part_of"),
    "no such split": (edit("index.csv", ",val,", ",test,"), r"no line has split 'val' \(splits: test, train\)"),
    "ragged line": (
        edit("index.csv", "ade/val_0_part.png,,,1", "ade/val_0_part.png,,1"),
        r"index.csv: line 5 has not 11 columns like the first; correct it",
    ),
    "no image": (
        lambda r: (r / "images/os/val_0.png").unlink(),
        r"index.csv: line 6: image .*os/val_0.png is missing; add the file or remove the line",
    ),
    "no label": (
        lambda r: (r / "images/ade/val_0_part.png").unlink(),
        r"index.csv: line 5: part label map .*ade/val_0_part.png is missing; correct the line",
    ),
    "unknown scene": (
        edit("index.csv", "ade/val_0_part.png,,,1", "ade/val_0_part.png,,,7"),
        r"index.csv: line 5: scene '7' is no class of .*scene.csv; correct the line",
    ),
    "bad size": (
        edit("index.csv", "os/val_0.png,val,64,64,32,32", "os/val_0.png,val,64,64,32,x"),
        r"line 6: sh,sw must be two positive numbers, got \['32', 'x'\]; correct them",
    ),
    "image size": (
        edit("index.csv", "os/val_0.png,val,64,64", "os/val_0.png,val,64,60"),
        r"os/val_0.png: image has size 64x64, line 6 of the index says 60x64; correct ih,iw",
    ),
    "label size": (
        edit("index.csv", "os/val_0.png,val,64,64,32,32", "os/val_0.png,val,64,64,16,16"),
        r"os/val_0_material.png: label map has size 32x32, line 6 of the index says 16x16; correct sh,sw",
    ),
    "label size without sh": (
        edit("index.csv", "os/val_0.png,val,64,64,32,32", "os/val_0.png,val,64,64,,"),
        r"os/val_0_material.png: label map has size 32x32, its image .*os/val_0.png 64x64",
    ),
    "no class": (
        spoil("ade/val_0_object.png", encode(np.full((64, 64), 300))),
        r"ade/val_0_object.png: number 300 at row 0, column 0 is not in .*object.csv; add it there or correct",
    ),
    "grey with alpha": (
        spoil("os/val_0_material.png", np.full((32, 32, 2), 1, np.uint8)),
        r"os/val_0_material.png: label map has mode LA, wanted one channel of integers or red \+ 256 green",
    ),
    "truncated label": (
        lambda r: (r / "images/os/val_0_material.png").write_bytes(
            (r / "images/os/val_0_material.png").read_bytes()[:60]
        ),
        r"os/val_0_material.png: label map cannot be read",
    ),
    "no object list": (lambda r: (r / "object.csv").unlink(), r"object.csv: list of names is missing; add it"),
    "no part list": (
        lambda r: (r / "object_part.csv").unlink(),
        r"object_part.csv: list of the parts of objects is missing; add it .* or take 'part' out of data.tasks",
    ),
    "wrong part": (edit("object_part.csv", "car,wheel", "car,wing"), r"line 2: 'wing' is no part of part.csv"),
    "wrong owner": (edit("object_part.csv", "car,wheel", "cat,wheel"), r"line 2: 'cat' is no object of object.csv"),
    "no parts": (lambda r: write_csv(r / "object_part.csv", [["object", "part"]]), r"lists no part of any object"),
    "number twice": (edit("material.csv", "2,metal", "1,metal"), r"material.csv: line 3: number 1 occurs twice"),
    "number": (edit("material.csv", "2,metal", "two,metal"), r"line 3: number must be 0..65535, got 'two'"),
    "list column": (edit("material.csv", "number,name", "id,name"), r"has no column 'label' \(columns: id, name\)"),
    "empty list": (lambda r: write_csv(r / "scene.csv", [["number", "name"]]), r"scene.csv: lists no class"),
    "not text": (lambda r: (r / "index.csv").write_bytes(b"\xff\xfe\x00"), r"index.csv: cannot be read as CSV"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("case", BROKEN)
def test_broken_trees(tmp_path, case):
    change, message = BROKEN[case]
    make_broden(tmp_path, size=64, train=1, val=1)
    change(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        data = dataset(tmp_path)
        for i in range(len(data)):
            data[i]
    assert "\n" not in str(caught.value)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options,message",
    [
        ({"root": "/no/such/folder"}, r"/no/such/folder: no such folder; set data.root"),
        ({"tasks": ["part"]}, r"data.tasks must hold 'object', got \['part'\]"),
        ({"sources": [["object"], ["object", "part"]]}, r"data.sources must divide the tasks between them"),
        ({"sources": [[]]}, r"data.sources must divide the tasks"),
        ({"tasks": ["colour"]}, r"data.tasks must be a list of one of object, .*'colour'"),
        ({"sorces": []}, r"unknown key data.sorces; did you mean 'sources'\?"),
    ],
)
def test_bad_options(root, options, message):
    with pytest.raises(DataError, match=message):
        dataset(**{"root": root, "split": "train", **options})


@pytest.mark.bad_input
def test_no_training_label_of_any_source(root):
    with pytest.raises(DataError, match="no image of 'train' has a label of data.sources"):
        dataset(root, "train", sources=[["texture"]], tasks=["object"])


# -------------------------------------------------------------------------------------------------- order, training


def test_order_of_sources():
    """Whole batches of one source, in proportion, the same from any position, every image once per epoch."""
    sizes, batch = [30, 9, 0, 21], 6
    order = SourceOrder(sizes, 3, batch)
    bounds = np.cumsum([0, *sizes])
    steps, per_source = [], {0: [], 1: [], 3: []}
    for step in range(2000):
        found = [order[step * batch + k] for k in range(batch)]
        sources = {int(np.searchsorted(bounds, index, "right")) - 1 for _, index in found}
        assert len(sources) == 1
        steps.append(sources.pop())
        per_source[steps[-1]] += found
    for source, size in ((0, 30), (1, 9), (3, 21)):
        assert abs(steps.count(source) / 2000 - size / 60) < 0.04
        stream = per_source[source]
        for epoch in range(len(stream) // size):
            part = stream[epoch * size : (epoch + 1) * size]
            assert {e for e, _ in part} == {epoch}
            assert sorted(i for _, i in part) == list(range(bounds[source], bounds[source + 1]))
    for position in (0, 999, 5 * 4096 * batch + 17, 4096 * batch - 1):
        assert SourceOrder(sizes, 3, batch)[position] == order[position]
    small = SourceOrder(sizes, 3, batch)
    small._block = 64
    assert [small.source(s) for s in (5000, 3, 64, 63)] == [small.source(s) for s in (5000, 3, 64, 63)]
    counts = [sum(small.source(s)[0] == 0 for s in range(200)), small.source(200)[1]]
    assert counts[1] == sum(small.source(s)[0] == small.source(200)[0] for s in range(200))
    assert [SourceOrder(sizes, 4, batch).source(s)[0] for s in range(50)] != steps[:50]


def test_processes_share_the_source(root):
    data = dataset(root, "train", **PLAIN)
    for step, (one, two) in enumerate(
        zip(training_batches(data, 0, 0, 12, 2, 0, 0, 2), training_batches(data, 0, 0, 12, 2, 0, 1, 2), strict=True)
    ):
        assert set(one[1]) == set(two[1]), step
    together = list(training_batches(data, 0, 0, 12, 4, 0))
    assert {tuple(labels) for _, labels in together} == {("object", "part", "scene"), ("material",), ("texture",)}
    assert torch.equal(together[-1][0], torch.cat([one[0], two[0]]))
    later = list(training_batches(data, 0, 7 * 4, 5, 4, 0))  # resumed at step 7
    for (images, labels), (again, same) in zip(together[7:], later, strict=True):
        assert torch.equal(images, again) and all(torch.equal(labels[task], same[task]) for task in labels)


def test_task_metrics_equal_counting():
    classes = {"object": ["a"], "part": ["p", "q"], "texture": ["s", "t", "u"], "scene": ["x", "y"]}

    class Network:
        def predict_tasks(self, images):
            return self.answers

    network, metrics = Network(), TaskMetrics(classes, 255, torch.device("cpu"))
    network.answers = {
        "object": torch.zeros(2, 2, 3).long(),
        "part": torch.tensor([[[0, 1, -1], [0, 0, 1]], [[1, 1, 1], [1, 1, 1]]]),
        "texture": torch.tensor([[[0, 0, 1], [0, 2, 0]], [[1, 1, 2], [2, 2, 2]]]),
        "scene": torch.tensor([1, 0]),
    }
    samples = [
        {"labels": {"part": torch.tensor([[0, 1, 1], [1, 255, 255]]), "scene": torch.tensor(1)}},
        {"labels": {"texture": torch.tensor([[1, 1, 1], [1, 1, 255]]), "scene": torch.tensor(255)}},
    ]
    metrics.update(network, torch.zeros(2, 3, 2, 3), samples)
    found = metrics.compute()
    # part: class 0: 1 right, 1 wrongly found; class 1: 1 right, 2 missed, one of them as "none"
    assert found["part"]["per_class_iou"] == {"p": 0.5, "q": pytest.approx(1 / 3)}
    assert found["part"]["pixel_accuracy"] == 0.5 and found["part"]["num_pixels"] == 4
    assert found["texture"]["per_class_iou"] == {"s": None, "t": 0.4, "u": 0.0}
    assert found["texture"]["miou"] == pytest.approx(0.2) and found["texture"]["image_accuracy"] == 0
    assert found["scene"] == {"image_accuracy": 1.0, "num_images": 1}
    empty = TaskMetrics(classes, 255, torch.device("cpu")).compute()
    assert empty["part"]["miou"] is None and empty["scene"]["image_accuracy"] is None
    json.dumps(empty)


def test_metrics_of_many_classes():
    """335 objects: the counts of a few classes do not change when these have large numbers, 255 among them."""
    generator = torch.Generator().manual_seed(0)
    label, guess = (torch.randint(0, 5, (2, 8, 10), generator=generator) for _ in range(2))
    label, guess = (x.repeat_interleave(4, 1).repeat_interleave(4, 2) for x in (label, guess))
    void = torch.rand(label.shape, generator=generator) < 0.1
    numbers = torch.tensor([0, 3, 255, 256, 334])
    few, many = SegmentationMetrics(5), SegmentationMetrics(335, ignore_index=65535)
    few.update(guess, label.masked_fill(void, 255))
    many.update(numbers[guess], numbers[label].masked_fill(void, 65535))
    one, other = few.compute(), many.compute()
    for key in ("miou", "boundary_iou", "pixel_accuracy", "mean_accuracy"):
        assert one[key] == pytest.approx(other[key], rel=1e-12), key
    assert [other["per_class_boundary_iou"][i] for i in numbers] == one["per_class_boundary_iou"]
    assert other["per_class_iou"][1] is None


def content(root, out, **train):
    return {
        "name": "upp",
        "device": "cpu",
        "model": {
            "backbone": {"name": "test_resnet"},
            "decoder": {"name": "upp", "preset": "mmseg", "channels": 16, "ppm_channels": 8, "fuse_channels": 16,
                        "texture_channels": 8, "texture_convs": 2, "pool": "avg"},
            "pointrend": {"hidden_channels": 16, "train_points": 64, "inference_points": 64},
        },
        "data": {"name": "broden", "root": str(root), "crop_size": [64, 64], "cache": True, **PLAIN},
        "train": {"iterations": 200, "precision": "fp32", "batch_size": 4, "optimizer": {"lr": 0.05},
                  "num_workers": 0, "log_every": 20, "checkpoint_every": 1000, "tensorboard": False, **train},
        "eval": {"num_workers": 0, "pictures": 0},
        "output": {"dir": str(out)},
    }  # fmt: skip


def test_two_hundred_iterations(root, tmp_path):
    """The losses of every task fall, and the evaluation has every task; the checkpoint holds what it needs."""
    from rendseg.engine.evaluate import evaluate_checkpoint
    from rendseg.engine.train import train

    result = train(build_config(content(root, tmp_path)))
    history = result["history"]
    names = ["loss", "loss_coarse", "loss_point", "loss_part", "loss_material", "loss_texture", "loss_scene"]
    first, last = history[0], history[-1]
    print({name: (round(first[name], 4), round(last[name], 4)) for name in names})
    for name in names[:6]:
        assert sum(row[name] for row in history[-3:]) < 0.6 * sum(row[name] for row in history[:3]), name
    final = result["final"]
    assert final["refined"]["miou"] > 0.35 and final["tasks"]["material"]["miou"] > 0.3
    assert final["tasks"]["texture"]["num_images"] == 1 and final["tasks"]["scene"]["num_images"] == 2
    assert final["tasks"]["part"]["num_pixels"] > 0
    again = evaluate_checkpoint(tmp_path / "upp" / "last.pt")
    assert again["tasks"] == final["tasks"] and again["refined"] == final["refined"]
    written = json.loads((tmp_path / "upp" / "last_eval" / "metrics.json").read_text())
    assert written["tasks"]["material"]["miou"] == final["tasks"]["material"]["miou"]


class Killed(Exception):
    pass


def test_resuming_is_exact(root, tmp_path):
    from rendseg.engine.checkpoint import load_checkpoint
    from rendseg.engine.train import train

    short = {"iterations": 12, "checkpoint_every": 5}
    train(build_config(content(root, tmp_path / "whole", **short)))

    def kill(iteration):
        if iteration == 8:
            raise Killed

    with pytest.raises(Killed):
        train(build_config(content(root, tmp_path / "parts", **short)), kill)
    train(build_config(content(root, tmp_path / "parts", **short)))
    one, two = (load_checkpoint(tmp_path / part / "upp" / "last.pt") for part in ("whole", "parts"))
    assert one["training"]["progress"]["iteration"] == two["training"]["progress"]["iteration"] == 12
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name


@pytest.mark.bad_input
def test_configurations_that_do_not_fit(root, tmp_path):
    data = dataset(root)
    values = content(root, tmp_path)
    config = with_tasks(build_config(values), data)
    decoder = config.model["decoder"]
    assert decoder["object_parts"] == [[1, 0, 1], [2, 1, 2]]
    assert [decoder[f"{task}_classes"] for task in ("scene", "part", "material", "texture")] == [2, 3, 3, 2]
    assert with_tasks(build_config(config.to_dict()), data) == config  # as read back from a checkpoint
    with pytest.raises(
        ConfigError, match=r"model.decoder.material_classes differs from what the data has \(3\): remove"
    ):
        with_tasks(build_config(values, ["model.decoder.material_classes=5"]), data)
    with pytest.raises(ConfigError, match="the decoder 'semantic_fpn' only object: set model.decoder.name=upp, or"):
        with_tasks(build_config({**values, "model": {"backbone": {"name": "test_resnet"}}}), data)
