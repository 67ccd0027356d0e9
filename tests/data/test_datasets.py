"""Data sets: what they read, how they augment, and what they say of bad input."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from rendseg.data import DataError, SegmentationDataset, build_dataset, parse_options
from rendseg.data.shapes import scene

DATA = Path(os.environ.get("RENDSEG_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
PLAIN = {"scale_range": [1.0, 1.0], "flip": 0.0, "color_jitter": None, "category_max_fraction": 1.0}


def real(name: str) -> str:
    if not (DATA / name).is_dir():
        pytest.skip(f"no real images: {DATA / name} is absent (RENDSEG_DATA names the folder)")
    return str(DATA / name)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """Five small images per split with every label value."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}annot").mkdir()
        for index in range(5):
            label = np.random.default_rng(index).integers(0, 12, (40, 60), np.uint8)
            Image.fromarray(photo(40, 60, index)).save(tmp_path / split / f"im{index}.{'png' if index % 2 else 'jpg'}")
            Image.fromarray(label).save(tmp_path / f"{split}annot" / f"im{index}.png")
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(10):
        for part in ("images", "labels"):
            (tmp_path / part / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(20, 30, index)).save(tmp_path / "images" / "a" / f"n{index}.png")
        label = np.random.default_rng(index).integers(0, 3, (20, 30), np.uint8)
        Image.fromarray(label).save(tmp_path / "labels" / "a" / f"n{index}.png")
    return tmp_path


def folder_options(root: Path, **keys: object) -> dict[str, object]:
    return {"name": "folder", "root": str(root), "split": "fraction", "classes": 3, **PLAIN, **keys}


def same(one: dict, other: dict) -> bool:
    equal = torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])
    return equal and one["name"] == other["name"]


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (7, 31), (64, 64), (96, 160), (33, 200)])
def test_shapes_any_size(size: tuple[int, int]) -> None:
    dataset = build_dataset({"name": "shapes", "size": size, "num_images": 3}, "train")
    for index in range(3):
        image, label = dataset.load(index)
        assert image.size == size[::-1] and label.shape == size and label.dtype == np.uint8
        assert label.max() < dataset.num_classes
        sample = dataset[index]
        assert sample["image"].shape == (3, *size) and sample["image"].dtype == torch.float32
        assert sample["label"].shape == size and sample["label"].dtype == torch.int64


def test_shapes_is_a_function_of_seed_split_and_index() -> None:
    one, again = (build_dataset({"name": "shapes", "seed": 3}, "train") for _ in range(2))
    other_seed = build_dataset({"name": "shapes", "seed": 4}, "train")
    val = build_dataset({"name": "shapes", "seed": 3}, "val")
    last = again.read(5)
    again.read(0)
    for a, b in zip(one.read(5), again.read(5), strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(last[0], one.read(5)[0])
    for other in (other_seed.read(5), val.read(5), one.read(6)):
        assert not np.array_equal(other[0], last[0])


def test_shapes_same_scene_at_another_size() -> None:
    for index in range(6):
        small, large = scene(64, 96, 0, 0, index)[1], scene(192, 288, 0, 0, index)[1]
        # The centre of a small pixel is the centre of the middle of three large ones: labels are exact at the centres.
        assert np.mean(large[1::3, 1::3] != small) < 0.004


def test_shapes_has_all_classes_thin_parts_and_a_learnable_balance() -> None:
    dataset = build_dataset({"name": "shapes"}, "train")
    labels = np.stack([dataset.read(index)[1] for index in range(80)])
    share = np.bincount(labels.ravel(), minlength=dataset.num_classes) / labels.size
    assert len(share) == dataset.num_classes == len(dataset.class_names) == len(dataset.palette) == 8
    assert 0.5 < share[0] < 0.9 and share[1:].min() > 0.004
    wire = torch.from_numpy(labels == dataset.class_names.index("wire")).float()
    eroded = -torch.nn.functional.max_pool2d(-wire[:, None], 5, 1, 2)
    assert wire.sum() > 1000 and eroded.sum() < 0.1 * wire.sum()  # nowhere five pixels wide, but for crossings


def test_shapes_image_shows_the_boundaries() -> None:
    """The mean colour step across label edges is well above that elsewhere, but the background is not flat."""
    dataset = build_dataset({"name": "shapes"}, "train")
    across, within = [], []
    for index in range(20):
        image, label = dataset.read(index)
        step = np.abs(np.diff(image.astype(int), axis=1)).sum(2)
        edge = label[:, 1:] != label[:, :-1]
        across.append(step[edge].mean())
        within.append(step[~edge].mean())
    assert np.mean(across) > 2 * np.mean(within) > 4


# --- camvid and folder ----------------------------------------------------------------------------------------------


def test_camvid_layout(camvid: Path) -> None:
    dataset = build_dataset({"name": "camvid", "root": str(camvid)}, "val")
    assert isinstance(dataset, SegmentationDataset) and len(dataset) == 5 and dataset.num_classes == 11
    assert dataset.class_names[3] == "road" and dataset.palette[3].tolist() == [128, 64, 128]
    for index in range(5):
        raw = np.array(Image.open(camvid / "valannot" / f"im{index}.png"))
        label = dataset.load(index)[1]
        assert np.array_equal(label, np.where(raw == 11, 255, raw))
        sample = dataset[index]
        assert sample["name"] == f"im{index}" and torch.equal(sample["label"], torch.from_numpy(label).long())
        # an independent normalisation, in float64
        pixels = np.asarray(dataset.load(index)[0]).astype(np.float64) / 255
        wanted = (pixels - np.array(dataset.mean)) / np.array(dataset.std)
        assert np.abs(sample["image"].permute(1, 2, 0).numpy() - wanted).max() < 1e-5
    assert dataset.load(-1)[0].tobytes() == dataset.load(4)[0].tobytes()
    with pytest.raises(IndexError):
        dataset[5]


def test_camvid_real_images() -> None:
    root = real("camvid")
    train, val = (build_dataset({"name": "camvid", "root": root, "crop_size": [240, 320]}, s) for s in ("train", "val"))
    assert (len(train), len(val)) == (367, 101)
    sample = train[7]
    assert sample["image"].shape == (3, 240, 320) and sample["label"].shape == (240, 320)
    values = set(sample["label"].unique().tolist()) | set(val[3]["label"].unique().tolist())
    assert values <= {*range(11), 255} and len(values) > 5
    assert val[0]["image"].shape == (3, 360, 480)


def test_isbi_real_images() -> None:
    options = {"name": "folder", "root": real("isbi2012"), "images": "image", "labels": "label", "split": "fraction"}
    dataset = build_dataset({**options, "class_map": {0: 0, 255: 1}, "classes": ["membrane", "cell"]}, "train")
    assert len(dataset) == 24 and dataset.num_classes == 2
    raw = np.array(Image.open(DATA / "isbi2012" / "label" / f"{dataset.sample_name(0)}.png"))
    assert np.array_equal(dataset.load(0)[1], (raw == 255).astype(np.uint8))


def test_folder_fraction(folder: Path) -> None:
    parts = [build_dataset(folder_options(folder, val_fraction=0.3), split) for split in ("train", "val")]
    names = [{d.sample_name(i) for i in range(len(d))} for d in parts]
    assert len(names[0]) == 7 and len(names[1]) == 3 and not names[0] & names[1]
    other = build_dataset(folder_options(folder, val_fraction=0.3, seed=1), "val")
    assert {other.sample_name(i) for i in range(3)} != names[1]


def test_folder_lists_and_sub_folders(folder: Path) -> None:
    (folder / "train.txt").write_text("a/n3\na/n1.png\n\n# comment\n")
    (folder / "held.txt").write_text("a/n0\n")
    options = folder_options(folder, split="lists", val="held.txt")
    train, val = build_dataset(options, "train"), build_dataset(options, "val")
    assert [train.sample_name(i) for i in range(2)] == ["a_n3", "a_n1"] and len(train) == 2 and len(val) == 1
    assert np.array_equal(train.load(0)[1], np.array(Image.open(folder / "labels" / "a" / "n3.png")))
    by_folder = build_dataset(folder_options(folder, split="folders", val="a"), "val")
    assert len(by_folder) == 10 and by_folder.sample_name(9) == "a_n9"


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16", "RGB"])
def test_folder_label_formats(tmp_path: Path, mode: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    truth = np.random.default_rng(0).integers(0, 2 if mode == "1" else 3, (9, 14)).astype(np.uint8)
    truth[0, 0] = 1
    for index in range(2):
        Image.fromarray(photo(9, 14)).save(tmp_path / "images" / f"{index}_rgb.png")
    keys: dict[str, object] = {"image_suffix": "_rgb", "label_suffix": "_gt.png"}
    wanted = truth
    if mode == "P":
        image = Image.fromarray(truth)
        image = image.convert("P") if image.mode != "P" else image
        image.putdata(truth.ravel().tolist())
        image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    elif mode == "1":
        image = Image.fromarray(truth.astype(bool))
    elif mode == "I;16":
        image = Image.fromarray(truth.astype(np.uint16) * 1000)
        keys["class_map"] = {0: 2, 1000: 255, 2000: 0}
        wanted = np.array([2, 255, 0], np.uint8)[truth]
    elif mode == "RGB":
        image = Image.fromarray(np.array([[0, 0, 0], [128, 64, 128], [1, 2, 3]], np.uint8)[truth])
        keys["color_map"] = {"#000000": 1, "#804080": 0, "010203": 255}
        wanted = np.array([1, 0, 255], np.uint8)[truth]
    else:
        image = Image.fromarray(truth)
    for index in range(2):
        image.save(tmp_path / "labels" / f"{index}_gt.png")
    dataset = build_dataset(folder_options(tmp_path, **keys), "val")
    assert np.array_equal(dataset.load(0)[1], wanted)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16"])
def test_image_modes_become_rgb(folder: Path, mode: str) -> None:
    values = np.arange(600, dtype=np.uint8).reshape(20, 30)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 256 + 77)
    else:
        image = Image.fromarray(values).convert(mode)
    for index in range(10):
        image.save(folder / "images" / "a" / f"n{index}.png")
    dataset = build_dataset(folder_options(folder), "val")
    assert np.array_equal(np.asarray(dataset.load(0)[0]), np.repeat(values[..., None], 3, 2))


# --- augmentation ---------------------------------------------------------------------------------------------------


def test_augmentation_is_a_function_of_seed_epoch_and_index(camvid: Path) -> None:
    options = {"name": "camvid", "root": str(camvid), "crop_size": [24, 32]}
    one, other = (build_dataset(options, "train", augment_seed=5) for _ in range(2))
    first = [one[i] for i in range(5)]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert all(same(other[i], first[i]) for i in reversed(range(5)))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    one.set_epoch(1)
    assert not any(same(one[i], first[i]) for i in range(5))
    one.set_epoch(0)
    assert all(same(one[i], first[i]) for i in range(5))
    assert not same(build_dataset(options, "train", augment_seed=6)[0], first[0])
    val = build_dataset(options, "val")
    before = val[0]
    val.set_epoch(1)
    assert same(val[0], before)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_samples(camvid: Path, method: str) -> None:
    dataset = build_dataset({"name": "camvid", "root": str(camvid), "crop_size": [24, 32]}, "train")
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=method, persistent_workers=True
    )
    for epoch in (0, 3):  # the workers persist, and see the epoch all the same
        dataset.set_epoch(epoch)
        assert all(same(sample, dataset[i]) for i, sample in enumerate(loader))
    del loader


def test_crop_equals_cutting_the_file(camvid: Path) -> None:
    """Without scaling, each crop is a window of the file; image and label are cut, flipped and padded alike."""
    keys = {**PLAIN, "flip": 0.5, "vertical_flip": 0.5}
    dataset = build_dataset({"name": "camvid", "root": str(camvid), "crop_size": [24, 80], **keys}, "train")
    seen = set()
    for epoch in range(8):
        dataset.set_epoch(epoch)
        sample = dataset[1]
        pixels, label = dataset.read(1)
        values = (pixels / 255 - np.array(dataset.mean)) / np.array(dataset.std)
        assert (sample["image"][:, :, 60:] == 0).all() and (sample["label"][:, 60:] == 255).all()  # the mean, and 255
        found = []
        for top in range(17):
            for vertical in (1, -1):
                for horizontal in (1, -1):
                    window = label[top : top + 24][::vertical, ::horizontal]
                    if np.array_equal(window, sample["label"][:, :60].numpy()):
                        wanted = values[top : top + 24][::vertical, ::horizontal]
                        assert np.abs(sample["image"][:, :, :60].permute(1, 2, 0).numpy() - wanted).max() < 1e-5
                        found.append((top, vertical, horizontal))
        assert len(found) == 1
        seen.update(found)
    assert len(seen) > 4


def test_scaled_label_stays_with_the_image(folder: Path) -> None:
    """A two-coloured image and its label agree after any scaling, but for pixels that the border crosses."""
    rows, columns = np.mgrid[0:80, 0:90]
    truth = ((rows - 37) ** 2 + (columns - 41) ** 2 < 600).astype(np.uint8)
    for index in range(2):
        Image.fromarray(np.repeat(truth[..., None] * 255, 3, 2)).save(folder / "images" / "a" / f"n{index}.png")
        Image.fromarray(truth).save(folder / "labels" / "a" / f"n{index}.png")
    (folder / "train.txt").write_text("a/n0\na/n1\n")
    keys = {"split": "lists", "mean": [0, 0, 0], "std": [1, 1, 1], "crop_size": [64, 64]}

    def samples(low: float, high: float) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        dataset = build_dataset(folder_options(folder, scale_range=[low, high], **keys), "train")
        for epoch in range(20):
            dataset.set_epoch(epoch)
            sample = dataset[0]
            yield sample["image"][0], sample["label"], sample["label"] != 255

    differ = []
    for image, label, valid in samples(1.0, 2.5):
        assert valid.all()
        differ.append(float(((image > 0.5) != (label == 1)).float().mean()))
    assert np.mean(differ) < 0.003  # measured: 0.0018, and 0.0099 if labels took the corner of the cell
    shifts = []
    for image, label, valid in samples(0.4, 0.7):  # all of the disc is seen; the centres must agree on average
        assert 0.1 < valid.float().mean() < 1
        places = valid.nonzero().float()
        middles = [(places * w[valid][:, None]).sum(0) / w[valid].sum() for w in (image, label.float())]
        shifts.append(middles[0] - middles[1])
    assert torch.stack(shifts).mean(0).abs().max() < 0.06


def test_category_area_limit(folder: Path) -> None:
    """One corner has other classes; crops prefer it although few windows reach it."""
    label = np.zeros((100, 100), np.uint8)
    label[:40, :40] = np.random.default_rng(0).integers(0, 3, (40, 40))
    for index in range(10):
        Image.fromarray(photo(100, 100)).save(folder / "images" / "a" / f"n{index}.png")
        Image.fromarray(label).save(folder / "labels" / "a" / f"n{index}.png")

    def share(limit: float) -> float:
        keys = {"crop_size": [30, 30], "category_max_fraction": limit, "val_fraction": 0.1}
        dataset = build_dataset(folder_options(folder, **keys), "train")
        hits = 0
        for epoch in range(12):
            dataset.set_epoch(epoch)
            for index in range(9):
                counts = torch.bincount(dataset[index]["label"].flatten(), minlength=3)
                hits += bool(counts.max() <= 0.75 * counts.sum())
        return hits / 108

    free, limited = share(1.0), share(0.75)
    # ten tries: 1 - (1 - p)^10 of the windows are good, where p are good without the limit
    assert 0 < free < 0.3 and limited > 0.5 and abs(limited - (1 - (1 - free) ** 10)) < 0.25


def test_no_crop_size_keeps_the_size(camvid: Path) -> None:
    dataset = build_dataset({"name": "camvid", "root": str(camvid)}, "train")
    assert {tuple(dataset[i]["label"].shape) for i in range(5)} == {(40, 60)}


def test_cache_and_pickle(camvid: Path) -> None:
    plain = build_dataset({"name": "camvid", "root": str(camvid)}, "train")
    cached = build_dataset({"name": "camvid", "root": str(camvid), "cache": True}, "train")
    for path in [*(camvid / "train").iterdir(), *(camvid / "trainannot").iterdir()]:
        path.rename(path.with_suffix(path.suffix + ".gone"))
    with pytest.raises(DataError):
        plain[0]
    first = cached[2]
    label = cached.load(2)[1]
    label[:] = 77  # a copy
    assert same(cached[2], first) and same(pickle.loads(pickle.dumps(cached))[2], first)


# --- registration ---------------------------------------------------------------------------------------------------


def test_a_data_set_is_found_without_an_entry_in_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rendseg.data
    from rendseg.data import registry

    (tmp_path / "dropped_in.py").write_text(
        "from typing import Literal\n"
        "import numpy as np\n"
        "from rendseg.data import DatasetOptions, SegmentationDataset, register_dataset\n"
        "class Options(DatasetOptions):\n"
        "    name: Literal['dropped_in'] = 'dropped_in'\n"
        "    size: int = 3\n"
        "@register_dataset(Options)\n"
        "class DroppedIn(SegmentationDataset):\n"
        "    def __init__(self, options, split, augment_seed=0):\n"
        "        super().__init__(options, split, ['a', 'b'], np.zeros((2, 3), np.uint8), augment_seed)\n"
        "        self.size = options.size\n"
        "    def __len__(self):\n"
        "        return self.size\n"
    )
    monkeypatch.setattr(rendseg.data, "__path__", [*rendseg.data.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_DATASETS", dict(registry._DATASETS))
    registry.import_modules.cache_clear()
    assert len(build_dataset({"name": "dropped_in", "size": 5}, "val")) == 5
    with pytest.raises(DataError, match="unknown key data.sise; did you mean 'size'"):
        parse_options({"name": "dropped_in", "sise": 5})


@pytest.mark.bad_input
def test_a_data_set_is_registered_once_and_by_name() -> None:
    from rendseg.data import AugmentOptions, ShapesOptions, register_dataset

    with pytest.raises(ValueError, match="a data set called 'shapes' is registered already"):
        register_dataset(ShapesOptions)
    with pytest.raises(TypeError, match="AugmentOptions needs a name with a default"):
        register_dataset(AugmentOptions)  # type: ignore[arg-type]


# --- options --------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"name": "shapez"}, "data.name 'shapez' is no data set; did you mean 'shapes'"),
    ({"name": "shapes", "num_image": 3}, "unknown key data.num_image; did you mean 'num_images'"),
    ({"name": "shapes", "xyz": 3}, "unknown key data.xyz; known: "),
    ({"name": "camvid", "rot": "x"}, "unknown key data.rot; did you mean 'root'"),
    ({"name": "shapes", "color_jitter": {"hues": 0.1}}, "data.color_jitter.hues; did you mean 'color_jitter.hue'"),
    ({"name": "shapes", "size": [0, 4]}, r"data.size must be at least 1, got \[0, 4\]"),
    ({"name": "shapes", "size": 5}, r"data.size must be a list of 2: an integer, an integer, got 5"),
    ({"name": "shapes", "flip": 1.5}, r"data.flip must lie in \[0, 1\], got 1.5"),
    ({"name": "shapes", "scale_range": [2, 1]}, r"scale_range must be \[smallest, largest\], got \[2.0, 1.0\]"),
    ({"name": "shapes", "scale_range": [0, 1]}, r"data.scale_range must be positive, got \[0, 1\]"),
    ({"name": "shapes", "std": [1, 1, 0]}, r"data.std must be positive"),
    ({"name": "shapes", "num_images": 0}, r"data.num_images"),
    ({"name": "folder"}, r"data.root is missing"),
    ({"name": "folder", "root": "x", "split": "lists?"}, r"data.split"),
    ({"name": "folder", "root": "x"}, "data.classes is missing"),
    ({"name": "folder", "root": "x", "classes": 0}, "wanted 1 to 255 classes, got 0"),
    ({"name": "folder", "root": "x", "classes": 300}, "wanted 1 to 255 classes, got 300"),
    ({"name": "folder", "root": "x", "classes": 2, "class_map": {7: 2}}, r"data.class_map: 7 -> 2 is no class \(0..1"),
    ({"name": "folder", "root": "x", "class_map": {1: 0}, "color_map": {"#000000": 0}}, "exclude each other"),
    ({"name": "folder", "root": "x", "color_map": {"red": 0}}, "key 'red' is no colour"),
    ({"name": "folder", "root": "x", "classes": 2, "palette": [[1, 2, 3]]}, "wanted 2 colours"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        build_dataset(options, "train")
    assert "\n" not in str(error.value)


@pytest.mark.bad_input
def test_bad_split_and_bad_section() -> None:
    with pytest.raises(DataError, match="split must be 'train' or 'val', got 'test'"):
        build_dataset({"name": "shapes"}, "test")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="data must be a mapping"):
        parse_options(["shapes"])  # type: ignore[arg-type]


def test_options_round_trip() -> None:
    options = parse_options({"name": "shapes", "size": [32, 48]})
    assert parse_options(options) == options  # type: ignore[arg-type]
    assert options.size == (32, 48) and options.color_jitter is None  # type: ignore[union-attr]
    assert parse_options({"name": "camvid", "color_jitter": {"hue": 0.1}}).color_jitter.brightness > 0  # type: ignore


# --- bad files ------------------------------------------------------------------------------------------------------


def fails(options: dict, message: str, split: str = "val", index: int | None = None) -> None:
    with pytest.raises(DataError, match=message) as error:
        dataset = build_dataset(options, split)  # type: ignore[arg-type]
        if index is None:
            raise AssertionError("built without an error")
        dataset[index]
    assert "\n" not in str(error.value)


@pytest.mark.bad_input
@pytest.mark.parametrize("gone", ["", "val", "valannot"])
def test_missing_folder(camvid: Path, gone: str) -> None:
    if gone:
        (camvid / gone).rename(camvid / "elsewhere")
    fails(
        {"name": "camvid", "root": str(camvid / gone if not gone else camvid) + ("x" if not gone else "")},
        "no such folder",
    )


@pytest.mark.bad_input
def test_no_images_and_image_without_label(camvid: Path) -> None:
    (camvid / "valannot" / "im3.png").unlink()
    fails(
        {"name": "camvid", "root": str(camvid)}, r"val/im3.png: image without label map, .*valannot/im3.png is missing"
    )
    for path in (camvid / "val").iterdir():
        path.unlink()
    (camvid / "val" / "notes.txt").write_text("none")
    fails({"name": "camvid", "root": str(camvid)}, r"val: holds no images")


@pytest.mark.bad_input
def test_folder_bad_files(folder: Path) -> None:
    fails(folder_options(folder, images="pictures"), r"pictures: no such folder; .*data.images")
    fails(folder_options(folder, split="folders"), r"images/val: no such folder; .*data.val")
    fails(folder_options(folder, split="lists"), r"val: no such list file")
    (folder / "val.txt").write_text("a/n1\na/none\n")
    fails(folder_options(folder, split="lists"), r"val.txt: 'a/none' is not in ")
    (folder / "val.txt").write_text("\n")
    fails(folder_options(folder, split="lists"), r"val.txt: the list is empty")
    fails(folder_options(folder, image_suffix="_x"), r"no image name ends in data.image_suffix '_x'")
    fails(folder_options(folder, label_suffix="_y.png"), r"image without label map, .*_y.png is missing")
    fails(folder_options(folder / "none"), r"none: no such folder; set data.root")


@pytest.mark.bad_input
def test_sizes_differ(camvid: Path) -> None:
    Image.fromarray(photo(40, 61)).save(camvid / "val" / "im1.png")
    message = r"valannot/im1.png: label map has size 60x40, its image .*val/im1.png 61x40"
    fails({"name": "camvid", "root": str(camvid)}, message, index=1)
    fails({"name": "camvid", "root": str(camvid), "cache": True}, message)


@pytest.mark.bad_input
def test_label_value_outside_the_classes(camvid: Path, folder: Path) -> None:
    label = np.zeros((40, 60), np.uint8)
    label[12, 34] = 12
    Image.fromarray(label).save(camvid / "valannot" / "im2.png")
    message = r"valannot/im2.png: label value 12 at row 12, column 34 is no class \(known values: 0, 1, 2.*class_map"
    fails({"name": "camvid", "root": str(camvid)}, message, index=2)
    fails({"name": "camvid", "root": str(camvid), "cache": True}, message)

    path = folder / "labels" / "a" / "n0.png"
    (folder / "val.txt").write_text("a/n0")
    wide = np.zeros((20, 30), np.int32)
    wide[1, 2] = 70000
    rgb = np.zeros((20, 30, 3), np.uint8)
    rgb[3, 4] = (1, 2, 255)
    Image.fromarray(rgb).save(path)
    fails(folder_options(folder, split="lists"), r"a/n0.png: label map has mode RGB", index=0)
    colors = {"#000000": 0}
    fails(
        folder_options(folder, split="lists", color_map=colors),
        r"a/n0.png: colour #0102ff at row 3, column 4 is not in data.color_map",
        index=0,
    )
    Image.fromarray(wide).save(path.with_suffix(".tif"))
    fails(
        folder_options(folder, split="lists", label_suffix=".tif"),
        r"a/n0.tif: label value 70000 at row 1, column 2",
        index=0,
    )
    # 255 is no longer ignored when the option says so
    Image.fromarray(np.full((20, 30), 255, np.uint8)).save(path)
    fails(folder_options(folder, split="lists", ignore_label=None), r"label value 255 at row 0, column 0", index=0)
    assert (build_dataset(folder_options(folder, split="lists"), "val")[0]["label"] == 255).all()


@pytest.mark.bad_input
@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_unreadable(camvid: Path, content: bytes) -> None:
    (camvid / "val" / "im0.jpg").write_bytes(content)
    fails({"name": "camvid", "root": str(camvid)}, r"val/im0.jpg: image cannot be read \(.*\); replace", index=0)
    (camvid / "valannot" / "im1.png").write_bytes(content)
    fails({"name": "camvid", "root": str(camvid)}, r"valannot/im1.png: label map cannot be read \(.*\)", index=1)


@pytest.mark.bad_input
def test_modes_without_rgb(camvid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"name": "camvid", "root": str(camvid)}
    Image.new("F", (60, 40)).save(camvid / "val" / "im0.jpg", "tiff")
    fails(options, r"val/im0.jpg: image of floating point values; convert", index=0)
    monkeypatch.setattr("rendseg.data.images._open", lambda *_: Image.new("La", (60, 40)))
    fails(options, r"val/im0.jpg: image has mode La, which has no RGB; convert it to 8-bit RGB", index=0)


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", ["jpeg", "progressive", "png", "png palette", "bmp", "tiff", "webp"])
@pytest.mark.parametrize("lenient", [False, True])
def test_truncated_is_never_accepted_silently(
    camvid: Path, kind: str, lenient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut anywhere, a file is refused, or else nothing of the picture is missing."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)  # as another library may have left it
    smooth = np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8)
    picture = Image.fromarray(np.stack([smooth, photo(40, 60)[..., 0], smooth[::-1]], 2))
    buffer = io.BytesIO()
    if kind.startswith("png"):
        (picture.convert("P") if "palette" in kind else picture).save(buffer, "png")
    else:
        picture.save(
            buffer, "jpeg" if kind == "progressive" else kind, **({"progressive": True} if "pro" in kind else {})
        )
    content = buffer.getvalue()
    path = camvid / "val" / "im0.jpg"
    dataset = build_dataset({"name": "camvid", "root": str(camvid)}, "val")
    path.write_bytes(content)
    whole = dataset.read(0)[0]
    refused = 0
    cuts = sorted({*range(0, len(content), max(1, len(content) // 60)), *range(len(content) - 20, len(content))})
    for cut in cuts:
        path.write_bytes(content[:cut])
        try:
            assert np.array_equal(dataset.read(0)[0], whole), (
                f"{kind} cut at {cut} of {len(content)} bytes was accepted"
            )
        except DataError as error:
            assert "im0.jpg" in str(error)
            refused += 1
    assert refused >= len(cuts) - 20
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient
