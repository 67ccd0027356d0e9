"""Cityscapes, ADE20K and Pascal VOC with SBD in tiny trees of their layouts, and splits of several parts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rendseg.data import DataError, build_dataset

# Written down from the label table of the data set: id -> class of the benchmark, all others ignored.
CITYSCAPES = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"} | {
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}


def save(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def photo(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def labels(values: list[int] | range, height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    """Random values, each of them at least once."""
    chosen = np.random.default_rng(seed).choice(list(values), (height, width)).astype(np.uint8)
    chosen.flat[: len(values)] = list(values)
    return chosen


def fails(options: dict[str, Any], message: str, split: str = "train", read: int | None = None) -> None:
    """Building, or reading image `read`, ends with one line that has the message."""
    with pytest.raises(DataError, match=message) as error:
        dataset = build_dataset(options, split)  # type: ignore[arg-type]
        assert read is not None, "built without an error"
        dataset.read(read)
    assert "\n" not in str(error.value)


def names(options: dict[str, Any], split: str = "train") -> list[str]:
    dataset = build_dataset(options, split)  # type: ignore[arg-type]
    return [dataset.sample_name(index) for index in range(len(dataset))]


# --- cityscapes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """Two cities per split; bonn has train ids too, and train_extra coarse labels alone."""
    seed = 0
    for split in ("train", "val", "train_extra"):
        for city in ("aachen", "bonn"):
            for kind in ("gtFine", "gtCoarse"):
                if split == "train_extra" and kind == "gtFine":
                    continue
                seed += 1
                stem = f"{split}/{city}/{city}_{split.replace('_', '')}_000019"
                save(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png", photo())
                save(tmp_path / kind / f"{stem}_{kind}_labelIds.png", labels(range(34), seed=seed))
                if city == "bonn" and kind == "gtFine":
                    save(tmp_path / kind / f"{stem}_{kind}_labelTrainIds.png", labels([*range(19), 255], seed=seed))
                save(tmp_path / kind / f"{stem}_{kind}_color.png", photo())
    return tmp_path


def city(root: Path, **keys: Any) -> dict[str, Any]:
    return {"name": "cityscapes", "root": str(root), **keys}


def test_cityscapes_ids_become_the_benchmark_classes(cityscapes: Path) -> None:
    dataset = build_dataset(city(cityscapes), "train")
    assert names(city(cityscapes)) == ["aachen_train_000019", "bonn_train_000019"]
    assert dataset.num_classes == 19 and dataset.palette[13].tolist() == [0, 0, 142]
    assert dataset.palette[11].tolist() == [220, 20, 60] and dataset.palette[18].tolist() == [119, 11, 32]
    raw = np.array(Image.open(next((cityscapes / "gtFine/train/aachen").glob("*labelIds.png"))))
    read = dataset.read(0)[1]
    for value in range(34):
        found = {dataset.class_names[c] if c != 255 else None for c in read[raw == value].tolist()}
        assert found == {CITYSCAPES.get(value)}, value
    # bonn has train ids, which are taken as they are
    raw = np.array(Image.open(next((cityscapes / "gtFine/train/bonn").glob("*labelTrainIds.png"))))
    assert np.array_equal(dataset.read(1)[1], raw)


def test_cityscapes_kinds_of_labels(cityscapes: Path) -> None:
    by_id = build_dataset(city(cityscapes, labels="labelIds"), "train").read(1)[1]
    raw = np.array(Image.open(next((cityscapes / "gtFine/train/bonn").glob("*labelIds.png"))))
    known = {value: list(CITYSCAPES.values()).index(name) for value, name in CITYSCAPES.items()}
    assert np.array_equal(by_id, np.vectorize(lambda value: known.get(value, 255))(raw))
    fails(
        city(cityscapes, labels="labelTrainIds"),
        r"aachen_train_000019_leftImg8bit.png: image without label map, .*aachen_train_000019_gtFine_labelTrainIds.png "
        r"is missing; set data.labels to auto, or make it with cityscapesscripts",
    )


def test_cityscapes_coarse_and_several_splits(cityscapes: Path) -> None:
    options = city(cityscapes, train=["train", "val"])
    assert names(options) == [f"{c}_{s}_000019" for s in ("train", "val") for c in ("aachen", "bonn")]
    coarse = build_dataset(city(cityscapes, annotations="gtCoarse", train=["train", "train_extra"]), "train")
    folders = [str(coarse.files(i)[1].relative_to(cityscapes).parent) for i in range(4)]  # type: ignore[attr-defined]
    assert folders == [f"gtCoarse/{s}/{c}" for s in ("train", "train_extra") for c in ("aachen", "bonn")]
    fine = build_dataset(city(cityscapes, annotations="gtCoarse"), "val")
    assert all("gtFine" in str(fine.files(i)[1]) for i in range(2))  # type: ignore[attr-defined]


@pytest.mark.bad_input
def test_cityscapes_bad_trees(cityscapes: Path) -> None:
    fails(city(cityscapes / "none"), "none: no such folder; put Cityscapes")
    fails(city(cityscapes / "gtFine"), "leftImg8bit: no such folder; set data.root")
    fails(city(cityscapes, train="trian"), r"leftImg8bit/trian: no such folder; .*there: train, train_extra, val")
    fails(city(cityscapes, train=["train", "train"]), r"data.train: 'train' is given twice")
    fails(city(cityscapes, train=[]), r"data.train: wanted a name or a list of names, got \[\]")
    fails(city(cityscapes, train=3), r"data.train: wanted a name or a list of names, got 3")
    fails(city(cityscapes, labels="ids"), r"data.labels must be one of auto, labelIds, labelTrainIds, got 'ids'")
    label = next((cityscapes / "gtFine/train/aachen").glob("*labelIds.png"))
    save(label, labels([7, 8, 200]))
    fails(city(cityscapes), rf"{label.name}: label value 200 at row 0, column 2 is no class .*fetch the file", read=0)
    save(label, photo())
    fails(city(cityscapes), rf"{label.name}: label map has mode RGB", read=0)
    save(label, labels([7], 12, 17))
    fails(city(cityscapes), rf"{label.name}: label map has size 17x12, its image .* 16x12", read=0)
    (cityscapes / "gtFine").rename(cityscapes / "fine")
    fails(city(cityscapes), "gtFine/train: no such folder; it must hold the label maps")
    for image in (cityscapes / "leftImg8bit/train").rglob("*.png"):
        image.rename(image.with_name("x" + image.name.replace("_leftImg8bit", "")))
    (cityscapes / "fine").rename(cityscapes / "gtFine")
    fails(city(cityscapes), "leftImg8bit/train: no image name ends in _leftImg8bit")


# --- ade20k ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    root = tmp_path / "ADEChallengeData2016"
    for part, short in (("training", "train"), ("validation", "val")):
        for index in range(2):
            name = f"ADE_{short}_{index:08d}"
            save(root / "images" / part / f"{name}.jpg", photo())
            save(root / "annotations" / part / f"{name}.png", labels(range(151), seed=index))
    return root


def test_ade20k_classes(ade20k: Path) -> None:
    options = {"name": "ade20k", "root": str(ade20k)}
    dataset = build_dataset(options, "val")
    assert len(dataset) == 2 and dataset.num_classes == 150 == len(set(dataset.class_names)) == len(dataset.palette)
    raw = np.array(Image.open(ade20k / "annotations/validation/ADE_val_00000001.png"))
    label = dataset.read(1)[1]
    assert (label[raw == 0] == 255).all() and (label[raw > 0] == raw[raw > 0] - 1).all()
    # the table of the benchmark: value in the file, name, colour
    for value, name, color in (
        (1, "wall", [120, 120, 120]),
        (2, "building", [180, 120, 120]),
        (3, "sky", [6, 230, 230]),
        (13, "person", [150, 5, 61]),
        (21, "car", [0, 102, 200]),
        (76, "swivel chair", [10, 0, 255]),
        (101, "poster", [143, 255, 0]),
        (128, "bicycle", [255, 245, 0]),
        (137, "traffic light", [41, 0, 255]),
        (150, "flag", [92, 0, 255]),
    ):
        assert dataset.class_names[value - 1] == name and dataset.palette[value - 1].tolist() == color, value
    assert names({**options, "root": str(ade20k.parent)}, "train") == ["ADE_train_00000000", "ADE_train_00000001"]
    assert len(names({**options, "train": ["training", "validation"]})) == 4


@pytest.mark.bad_input
def test_ade20k_bad_trees(ade20k: Path) -> None:
    options = {"name": "ade20k", "root": str(ade20k)}
    fails({**options, "train": "train"}, r"images/train: no such folder; set data.root .* and data.train to folders")
    fails({**options, "root": str(ade20k / "x")}, r"x: no such folder; put ADEChallengeData2016 there")
    save(ade20k / "annotations/training/ADE_train_00000000.png", labels([0, 150, 151]))
    fails(options, r"ADE_train_00000000.png: label value 151 at row 0, column 2 is no class", read=0)
    save(ade20k / "annotations/training/ADE_train_00000000.png", labels([1, 2], 6, 8))
    fails(options, r"label map has size 8x6, its image .* 16x12", read=0)
    (ade20k / "annotations/training/ADE_train_00000001.png").unlink()
    fails(options, r"ADE_train_00000001.jpg: image without label map, .*ADE_train_00000001.png is missing")
    (ade20k / "annotations/validation").rename(ade20k / "annotations/val")
    fails(options, r"annotations/validation: no such folder", "val")


# --- voc ------------------------------------------------------------------------------------------------------------

VOC_TRAIN, VOC_VAL = ["2007_000032", "2007_000039"], ["2007_000033", "2008_000001"]
SBD_TRAIN, SBD_VAL = ["2008_000001", "2008_000002", "2007_000032"], ["2008_000003", "2007_000033"]


def palette_png(path: Path, values: np.ndarray) -> None:
    """As VOC stores labels: a palette image in VOC's colours, 255 for the border."""
    image = Image.fromarray(values).convert("P") if values.dtype != np.uint8 else Image.fromarray(values, "P")
    image.putpalette([component for index in range(256) for component in voc_color(index)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def voc_color(index: int) -> tuple[int, int, int]:
    """The colour map of the development kit: bit 3k + c of the class goes to bit 7 - k of channel c."""
    color = [0, 0, 0]
    for k in range(8):
        for c in range(3):
            color[c] |= ((index >> (3 * k + c)) & 1) << (7 - k)
    return color[0], color[1], color[2]


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    home = tmp_path / "VOCdevkit" / "VOC2012"
    lists = home / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, entries in (("train", VOC_TRAIN), ("val", VOC_VAL), ("trainval", VOC_TRAIN + VOC_VAL)):
        (lists / f"{name}.txt").write_text("\n".join(entries) + "\n")
    for index, name in enumerate(sorted({*VOC_TRAIN, *VOC_VAL, *SBD_TRAIN, *SBD_VAL})):
        save(home / "JPEGImages" / f"{name}.jpg", photo(seed=index))
        if name in VOC_TRAIN + VOC_VAL:
            palette_png(home / "SegmentationClass" / f"{name}.png", labels([*range(21), 255], seed=index))
    return tmp_path


def pascal(root: Path, **keys: Any) -> dict[str, Any]:
    return {"name": "voc", "root": str(root), **keys}


def sbd(root: Path) -> Path:
    """The published layout of SBD, with what stands in for its MATLAB files."""
    dataset = root / "benchmark_RELEASE" / "dataset"
    (dataset / "cls").mkdir(parents=True)
    (dataset / "train.txt").write_text("\n".join(SBD_TRAIN))
    (dataset / "val.txt").write_text("\n".join(SBD_VAL))
    for index, name in enumerate(SBD_TRAIN + SBD_VAL):
        np.save(dataset / "cls" / f"{name}.npy", labels(range(21), seed=50 + index))
        (dataset / "cls" / f"{name}.npy").rename(dataset / "cls" / f"{name}.mat")
    return dataset


@pytest.fixture
def loadmat(monkeypatch: pytest.MonkeyPatch) -> None:
    """scipy.io.loadmat for the files of `sbd`, in the arrays of structures that the real one returns."""

    def load(path: str, variable_names: list[str]) -> dict[str, np.ndarray]:
        assert variable_names == ["GTcls"]
        inner = np.empty((1, 1), [("Boundaries", object), ("Segmentation", object), ("CategoriesPresent", object)])
        inner["Segmentation"][0, 0] = np.load(path)
        return {"GTcls": inner}

    package, module = ModuleType("scipy"), ModuleType("scipy.io")
    package.__spec__ = SimpleNamespace(name="scipy")  # type: ignore[assignment]
    module.loadmat, package.io = load, module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "scipy", package)
    monkeypatch.setitem(sys.modules, "scipy.io", module)


def test_voc_lists_and_palette_images(voc: Path) -> None:
    for root in (voc, voc / "VOCdevkit", voc / "VOCdevkit" / "VOC2012"):
        assert names(pascal(root)) == VOC_TRAIN and names(pascal(root), "val") == VOC_VAL
    assert names(pascal(voc, train="trainval")) == VOC_TRAIN + VOC_VAL == names(pascal(voc, train=["train", "val"]))
    dataset = build_dataset(pascal(voc), "val")
    assert dataset.num_classes == 21 and dataset.class_names[0] == "background" and dataset.class_names[15] == "person"
    assert [tuple(color) for color in dataset.palette.tolist()] == [voc_color(index) for index in range(21)]
    for index, name in enumerate(VOC_VAL):
        colors = np.array(Image.open(voc / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png").convert("RGB"))
        label = dataset.read(index)[1]
        assert set(label.flat) == {*range(21), 255}
        for row, column in ((0, 3), (1, 4), (1, 5), (7, 7)):  # (1, 5) is the border
            assert voc_color(int(label[row, column])) == tuple(colors[row, column])


def test_voc_converted_augmentation(voc: Path) -> None:
    home = voc / "VOCdevkit" / "VOC2012"
    for name in ("2007_000032", "2008_000002", "2008_000003"):
        save(home / "SegmentationClassAug" / f"{name}.png", np.full((12, 16), 7, np.uint8))
    lists = home / "ImageSets" / "Segmentation"
    (lists / "aug.txt").write_text("2008_000002\n2008_000003\n")
    # as published with the converted labels: two paths per line
    (lists / "train_aug.txt").write_text(
        "".join(f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n" for n in ("2007_000032", "2008_000002"))
    )
    assert names(pascal(voc, train="trainaug")) == ["2007_000032", "2008_000002"]
    both = build_dataset(pascal(voc, train=["train", "aug"]), "train")
    assert [both.sample_name(i) for i in range(4)] == [*VOC_TRAIN, "2008_000002", "2008_000003"]
    assert set(both.read(0)[1].flat) == {*range(21), 255} and set(both.read(3)[1].flat) == {7}
    fails(pascal(voc, train=["train", "trainaug"]), r"2007_000032.jpg: is listed twice in the split train")
    (home / "SegmentationClassAug/2008_000003.png").unlink()
    fails(pascal(voc, train="aug"), r"2008_000003.png is missing; add it or take 2008_000003 off the list aug")
    (lists / "aug.txt").unlink()
    fails(pascal(voc, train="aug"), r"aug.txt: no such list; data.train may name .*: train, train_aug, trainval, val")


@pytest.mark.usefixtures("loadmat")
def test_voc_with_sbd_as_published(voc: Path, tmp_path: Path) -> None:
    dataset_folder = sbd(tmp_path)
    # everything of SBD and of VOC's train, but nothing of VOC's val
    wanted = sorted({"2007_000032", "2007_000039", "2008_000002", "2008_000003"})
    dataset = build_dataset(pascal(voc, train="trainaug"), "train")
    assert names(pascal(voc, train="trainaug")) == wanted
    kinds = [dataset.files(i)[1].suffix for i in range(4)]  # type: ignore[attr-defined]
    assert kinds == [".png", ".png", ".mat", ".mat"]  # VOC's own labels where there are some
    with open(dataset_folder / "cls/2008_000002.mat", "rb") as file:
        assert np.array_equal(dataset.read(2)[1], np.load(file))
    assert names(pascal(voc, train="aug")) == ["2008_000002", "2008_000003"]
    assert names(pascal(voc, train="aug", sbd=str(tmp_path / "benchmark_RELEASE"))) == ["2008_000002", "2008_000003"]
    # an image that only SBD has
    (voc / "VOCdevkit/VOC2012/JPEGImages/2008_000003.jpg").rename(voc / "x.jpg")
    fails(pascal(voc, train="aug"), r"img/2008_000003.jpg: image is missing; add it or take 2008_000003 off the list")
    (dataset_folder / "img").mkdir()
    (voc / "x.jpg").rename(dataset_folder / "img" / "2008_000003.jpg")
    assert len(names(pascal(voc, train="aug"))) == 2
    # label maps that are not SBD's
    mat = dataset_folder / "cls" / "2008_000002.mat"
    for content, message in (
        (labels([3, 21]), r"2008_000002.mat: label value 21 at row 0, column 1 is no class"),
        (np.full((12, 16), -1), r"2008_000002.mat: label value -1 at row 0, column 0 is no class"),
        (labels([3], 5, 5), r"2008_000002.mat: label map has size 5x5"),
        (np.zeros((2, 12, 16), np.uint8), r"2008_000002.mat: .* shape \[2, 12, 16\], wanted integers \[H, W\]"),
        (np.zeros((12, 16)), r"2008_000002.mat: .* type float64"),
    ):
        with open(mat, "wb") as file:
            np.save(file, content)
        fails(pascal(voc, train="aug"), message, read=0)
    mat.write_bytes(b"MATLAB 5.0")
    fails(pascal(voc, train="aug"), r"2008_000002.mat: label map cannot be read as one of SBD \(.*\); fetch", read=0)
    (dataset_folder / "train.txt").write_text("\n")
    fails(pascal(voc, train="aug"), r"dataset/train.txt: the list is empty; write one image name per line")


def test_voc_with_real_matlab_files(voc: Path, tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io", reason="scipy reads SBD's files")
    dataset_folder = sbd(tmp_path)
    truth = labels(range(21))
    io.savemat(dataset_folder / "cls/2008_000002.mat", {"GTcls": {"Boundaries": [[1]], "Segmentation": truth}})
    dataset = build_dataset(pascal(voc, train="aug"), "train")
    assert np.array_equal(dataset.read(0)[1], truth)
    fails(pascal(voc, train="aug"), r"2008_000003.mat: label map cannot be read as one of SBD", read=1)


@pytest.mark.bad_input
def test_sbd_without_scipy(voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbd(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "scipy" else find(name, *a))
    fails(pascal(voc, train="trainaug"), r"cls: SBD's label maps are MATLAB files, .* pip install scipy, or use a conv")
    assert len(names(pascal(voc), "val")) == 2  # nothing else needs it


@pytest.mark.bad_input
def test_voc_bad_trees(voc: Path) -> None:
    home = voc / "VOCdevkit" / "VOC2012"
    lists = home / "ImageSets" / "Segmentation"
    fails(pascal(voc / "none"), r"none: no such folder; put Pascal VOC 2012")
    fails(pascal(home / "JPEGImages"), r"JPEGImages: no ImageSets/Segmentation in it")
    fails(pascal(voc, train="test"), r"test.txt: no such list; data.train may name what is there: train, trainval, val")
    fails(pascal(voc, train="aug"), r"no label maps of SBD; put them there or set data.sbd")
    fails(pascal(voc, train="aug", sbd="elsewhere"), r"^elsewhere: no label maps of SBD")
    (lists / "train.txt").write_text("\n# none\n")
    fails(pascal(voc), r"train.txt: the list is empty")
    (lists / "train.txt").write_bytes(b"\xff\xfe\x00")
    fails(pascal(voc), r"train.txt: the list cannot be read \(.*\); save it as plain text")
    (lists / "train.txt").write_text("2007_000032\n2007_000039\n2007_000032\n")
    fails(pascal(voc), r"2007_000032.jpg: is listed twice in the split train; remove one mention")
    (lists / "train.txt").write_text("2007_000032\n2007_999999\n")
    fails(pascal(voc), r"JPEGImages/2007_999999.jpg: image is missing; add it or take 2007_999999 off the list train")
    (lists / "train.txt").write_text("2008_000002\n")
    fails(pascal(voc), r"SegmentationClass/2008_000002.png is missing; add it or take 2008_000002 off the list train")
    Image.open(home / "SegmentationClass/2007_000033.png").convert("RGB").save(
        home / "SegmentationClass/2007_000033.png"
    )
    fails(pascal(voc), r"2007_000033.png: label map has mode RGB, wanted one channel", "val", read=0)
    (home / "SegmentationClass").rename(home / "Segmentation")
    fails(pascal(voc), r"SegmentationClass: no such folder; it must hold the label maps of the list val", "val")


# --- several parts of camvid and folder -----------------------------------------------------------------------------


def test_camvid_of_several_folders(tmp_path: Path) -> None:
    for part, count in (("train", 2), ("val", 1), ("test", 1)):
        for index in range(count):
            save(tmp_path / part / f"{index}.png", photo(seed=index))
            save(tmp_path / f"{part}annot" / f"{index}.png", labels(range(12), seed=count))
    options = {"name": "camvid", "root": str(tmp_path), "train": ["train", "val"], "val": "test"}
    assert names(options) == ["train_0", "train_1", "val_0"] and names(options, "val") == ["0"]
    raw = np.array(Image.open(tmp_path / "valannot/0.png"))
    label = build_dataset(options, "train").read(2)[1]
    assert np.array_equal(label, np.where(raw == 11, 255, raw))
    save(tmp_path / "train" / "1.jpg", photo())  # two images, one label map
    fails(options, r"train/1.png: its name 'train_1' is that of .*train/1.jpg too; rename or remove one of them")
    fails({**options, "train": ["train", "more"]}, r"more: no such folder|rename or remove")


def test_folder_of_several_parts(tmp_path: Path) -> None:
    for part in ("one", "two", "three"):
        save(tmp_path / "images" / part / "a.png", photo())
        save(tmp_path / "labels" / part / "a.png", labels([0, 1]))
    options = {"name": "folder", "root": str(tmp_path), "classes": 2, "train": ["one", "two"], "val": "three"}
    assert names(options) == ["one_a", "two_a"] and names(options, "val") == ["three_a"]
    (tmp_path / "first.txt").write_text("one/a\n")
    (tmp_path / "second.txt").write_text("three/a.png\n")
    lists = {**options, "split": "lists", "train": ["first", "second.txt"]}
    assert names(lists) == ["one_a", "three_a"]
    (tmp_path / "second.txt").write_text("three/a.png\none/a.png\n")
    fails(lists, r"one/a.png: is listed twice in the split train")


def test_what_is_wrong_with_files_can_be_collected(cityscapes: Path) -> None:
    """With a list for them, problems do not end the listing; without, the first does."""
    for path in (cityscapes / "gtFine").glob("*/aachen/*labelIds.png"):
        path.unlink()
    problems: list[str] = []
    options = city(cityscapes, train=["train", "none", "val"])
    dataset = build_dataset(options, "train", problems=problems)
    assert len(dataset) == 2 and len(problems) == 3 and dataset.left_out == 2  # type: ignore[attr-defined]
    assert [("is missing" in line, "no such folder" in line) for line in problems] == [
        (True, False),
        (False, True),
        (True, False),
    ]
    fails(options, "aachen_train_000019_leftImg8bit.png: image without label map")
