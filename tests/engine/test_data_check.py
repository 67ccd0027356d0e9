"""``rendseg data check``: its counts against NumPy, and a line for every kind of bad file."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from rendseg.cli import main
from rendseg.data import build_dataset
from rendseg.engine.data_check import _spread, check_data, check_labels
from tests.engine.tiny import tiny_content

CLASSES = ["wall", "door", "cat", "unicorn"]  # the last never occurs


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four training images of two sizes and two for validation, all sound."""
    for split, count in (("train", 4), ("val", 2)):
        for index in range(count):
            rng = np.random.default_rng([index, count])
            size = (24, 32) if index % 2 else (8, 12)
            save(tmp_path / "images" / split / f"{index}.png", rng.integers(0, 256, (*size, 3), np.uint8))
            classes = [0, 0, 0, 1, 255] if index % 2 else [0, 2, 2]
            save(tmp_path / "labels" / split / f"{index}.png", rng.choice(classes, size).astype(np.uint8))
    return tmp_path


def options(folder: Path, **keys: Any) -> dict[str, Any]:
    return {"name": "folder", "root": str(folder), "classes": CLASSES} | keys


def config(folder: Path, **keys: Any) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**tiny_content(folder / "runs"), "data": options(folder, **keys)}))
    return str(path)


def test_counts_are_those_of_numpy(tree: Path) -> None:
    report = check_data(options(tree)).splits[0]
    assert (report.split, report.listed, report.sound, report.problems) == ("train", 4, 4, [])
    assert report.sizes == {(24, 32): 2, (8, 12): 2}
    maps = [np.array(Image.open(path)) for path in sorted((tree / "labels/train").iterdir())]
    everything = np.concatenate([m.ravel() for m in maps])
    pixels = [int((everything == c).sum()) for c in range(4)]
    assert report.pixels[:4].tolist() == pixels and len(report.pixels) == 5 and pixels[3] == 0
    assert report.images[:4].tolist() == [sum((m == c).any() for m in maps) for c in range(4)] == [4, 2, 2, 0]
    assert report.ignored == (everything == 255).sum() and report.labelled == (everything != 255).sum()
    assert report.absent() == ["unicorn"]
    images = np.concatenate([np.array(Image.open(p)).reshape(-1, 3) for p in sorted((tree / "images/train").iterdir())])
    mean, std = report.mean_and_std()
    assert np.allclose(mean, images.mean(0) / 255, atol=1e-4) and np.allclose(std, images.std(0) / 255, atol=1e-4)


def test_class_weights_follow_their_rules(tree: Path) -> None:
    weights = check_data(options(tree), ["train"]).splits[0].class_weights()
    maps = [np.array(Image.open(path)) for path in sorted((tree / "labels/train").iterdir())]
    valid = np.concatenate([m[m != 255] for m in maps])
    share = np.array([(valid == c).mean() for c in range(3)])
    wanted = share**-0.25
    wanted /= np.mean(wanted[valid])  # a mean of 1 over the pixels
    assert np.allclose(weights["share"], [*wanted, 1], rtol=1e-3)
    frequency = []
    for c in range(3):
        having = [m[m != 255] for m in maps if (m == c).any()]
        frequency.append(sum((m == c).sum() for m in having) / sum(m.size for m in having))
    assert np.allclose(weights["median_frequency"], [*(np.median(frequency) / frequency), 1], rtol=1e-3)


def test_sound_data_ends_with_0(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tree / "report" / "check.json"
    assert main(["data", "check", config(tree), "--json", str(out), "--workers", "0"]) == 0
    printed = capsys.readouterr()
    assert "every file is sound" in printed.out and "rendseg:" not in printed.err
    assert "train: 4 images, 4 sound, 2 sizes from 12x8 to 32x24" in printed.out and "val: 2 images" in printed.out
    assert "never occurring: unicorn" in printed.out and "model.loss.class_weights=[" in printed.out
    content = json.loads(out.read_text())
    assert content["problems"] == 0 and list(content["splits"]) == ["train", "val"]
    train = content["splits"]["train"]
    assert train["absent"] == ["unicorn"] and [c["name"] for c in train["classes"]] == CLASSES
    assert train["pixels"] == 2 * (24 * 32 + 8 * 12) == train["labelled_pixels"] + train["ignored_pixels"]
    assert len(train["class_weights"]["share"]) == 4 and list(out.parent.iterdir()) == [out]
    # the printed weights are an override that the configuration accepts
    line = next(line for line in printed.out.splitlines() if "class_weights" in line).split("#")[0].strip()
    assert main(["data", "check", config(tree), line, "--split", "val", "--workers", "0"]) == 0
    assert "train:" not in capsys.readouterr().out


def spoil(tree: Path) -> list[str]:
    """Ten more training images, each with a problem of its own; returns a pattern per line that must name it."""
    photo = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    grey = np.zeros((8, 12), np.uint8)
    images, labels = tree / "images/train", tree / "labels/train"
    for name in "abcdefghij":
        save(images / f"{name}.png", photo)
        save(labels / f"{name}.png", grey)
    (images / "a.png").write_bytes(b"no image")
    (images / "b.png").write_bytes((images / "b.png").read_bytes()[:-60])
    (images / "c.png").unlink()
    save(images / "c.jpg", photo)
    (images / "c.jpg").write_bytes((images / "c.jpg").read_bytes()[:-40])
    save(labels / "d.png", np.zeros((8, 13), np.uint8))
    (labels / "e.png").unlink()
    wrong = grey.copy()
    wrong[2, 3], wrong[4, :2] = 9, 77
    save(labels / "f.png", wrong)
    save(labels / "g.png", photo)
    save(labels / "h.png", grey.astype(np.uint16) + 4000)
    (labels / "i.png").write_bytes(b"")
    (images / "i.png").write_bytes(b"")
    save(images / "j.jpg", photo)
    return [
        "images/train/a.png: image cannot be read",
        "images/train/b.png: image cannot be read",
        "images/train/c.jpg: image cannot be read",
        "labels/train/d.png: label map has size 13x8, its image",
        "labels/train/e.png is missing; add it or remove the image",
        "labels/train/f.png: label value 9 at row 2, column 3 is no class (known values: 0, 1, 2, 3, 255; "
        "3 such pixels: 2 of 77, 1 of 9); correct",
        "labels/train/g.png: label map has mode RGB, wanted one channel",
        "labels/train/h.png: label value 4000 at row 0, column 0 is no class (known values: 0, 1, 2, 3, 255; "
        "96 such pixels: 96 of 4000); correct",
        "images/train/i.png: image cannot be read",
        "labels/train/i.png: label map cannot be read",
        "images/train/j.png: its name 'train_j' is that of",
    ]


@pytest.mark.bad_input
def test_every_bad_file_has_its_line(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = check_data(options(tree)).splits[0]
    patterns = spoil(tree)
    out = tree / "check.json"
    assert main(["data", "check", config(tree), "--json", str(out), "--workers", "0"]) == 1
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("rendseg: ")]
    assert len(lines) == len(patterns)
    for pattern in patterns:
        assert sum(pattern in line for line in lines) == 1, pattern
    assert all(";" in line for line in lines)  # the remedy
    content = json.loads(out.read_text())
    assert sorted(content["splits"]["train"]["problems"]) == sorted(line.removeprefix("rendseg: ") for line in lines)
    assert content["problems"] == 11 and "11 problems; each is one line above" in printed.out
    # 'j.jpg' is sound, and all else that counts is as it was
    report = check_data(options(tree)).splits[0]
    assert (report.listed, report.sound) == (15, sound.sound + 1)
    assert report.pixels[0] == sound.pixels[0] + 96 and report.pixels[1:].tolist() == sound.pixels[1:].tolist()


@pytest.mark.bad_input
def test_the_number_of_processes_changes_nothing(tree: Path) -> None:
    spoil(tree)
    told: list[list[str]] = [[], []]
    alone, together = (check_data(options(tree), workers=w, tell=told[i].append) for i, w in enumerate((0, 2)))
    assert [part.to_dict() for part in alone.splits] == [part.to_dict() for part in together.splits]
    assert told[0] == told[1] and len(told[0]) == 11


@pytest.mark.bad_input
def test_nothing_that_can_be_read_ends_with_2(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ends(code: int, *words: str, arguments: tuple[str, ...] = (), **keys: Any) -> None:
        assert main(["data", "check", config(tree, **keys), "--workers", "0", *arguments]) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rendseg: ")]
        assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True)), lines

    ends(2, "no such folder; set data.root", root=str(tree / "none"))  # one line, although both splits lack it
    ends(1, "images/more: no such folder", val="more")
    ends(2, "images/more: no such folder", val="more", arguments=("--split", "val"))
    ends(2, "unknown key data.clases; did you mean 'classes'", arguments=("data.clases=3",))
    for path in (tree / "images").rglob("*.png"):
        path.write_bytes(b"")
    assert main(["data", "check", config(tree), "--workers", "0"]) == 2
    assert capsys.readouterr().err.count("image cannot be read") == 6
    assert main(["data", "check", config(tree), "--split", "test"]) == 2
    assert main(["data", "check", str(tree / "none.yaml")]) == 2


@pytest.mark.bad_input
def test_images_in_both_splits_are_noted(tree: Path) -> None:
    report = check_data(options(tree, train=["train", "val"]))
    assert report.exit_code == 0 and report.notes[0].startswith("2 images belong to train and to val, such as ")


def test_synthetic_data() -> None:
    report = check_data({"name": "shapes", "size": [16, 24], "num_images": 3, "num_val_images": 2})
    assert [part.sound for part in report.splits] == [3, 2] and report.exit_code == 0
    assert report.splits[0].sizes == {(16, 24): 3} and report.splits[0].labelled == 3 * 16 * 24


def test_images_without_a_label(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tree / "labels/train").iterdir():
        size = np.array(Image.open(path)).shape
        save(path, np.full(size, 255, np.uint8))
    assert main(["data", "check", config(tree), "--split", "train", "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "without a labelled pixel: 4 images" in out and "class_weights" not in out and "100.0000%" in out


@pytest.mark.bad_input
def test_a_reading_process_that_dies(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(self: Any, index: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("rendseg.data.folder.Folder.examine", die)
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("the death is handed on by fork")
    assert main(["data", "check", config(tree), "--workers", "1"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rendseg: ")]
    assert len(errors) == 1 and "a process that reads images has ended" in errors[0] and "--workers" in errors[0]


@pytest.mark.bad_input
def test_json_that_cannot_be_written(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "file").write_text("")
    arguments = ["--json", str(tree / "file" / "x.json"), "--workers", "0", "--split", "val"]
    assert main(["data", "check", config(tree), *arguments]) == 2
    assert "could not write" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- nothing to learn


def masks(folder: Path, values: list[int], split: str = "train") -> None:
    for path in (folder / "labels" / split).iterdir():
        size = np.array(Image.open(path)).shape
        save(path, np.resize(np.array(values, np.uint8), size))


def check(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, **keys: Any) -> tuple[int, str]:
    code = main(["data", "check", config(folder, **keys), "--workers", "0", *arguments])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.mark.bad_input
def test_masks_of_0_and_255_with_two_classes(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"classes": ["ground", "crack"], "crop_size": [8, 12]}
    for split in ("train", "val"):
        masks(tree, [0, 255, 255], split)
    path = config(tree, **keys)
    assert main(["train", path, "train.iterations=1"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rendseg: ")]
    assert len(lines) == 1 and "'crack' never occurs, but 255 does" in lines[0]
    assert '"data.class_map={0: 0, 255: 1}"' in lines[0]
    code, text = check(tree, capsys, **keys)
    assert code == 1 and lines[0] in text
    # both lines to paste are taken: the value is the class, or it is ignored on purpose
    code, text = check(tree, capsys, "data.class_map={0: 0, 255: 1}", **keys)
    assert code == 0 and "never occur" not in text
    code, text = check(tree, capsys, "data.class_map={0: 0, 1: 1, 255: 255}", **keys)
    assert code == 0 and "hold no class but 'ground'" in text


@pytest.mark.bad_input
def test_one_class_of_several_that_is_ignored(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        masks(tree, [0, 1, 2, 255], split)
    code, text = check(tree, capsys)
    assert code == 0 and "note: the training set: class 'unicorn' never occurs, but 255 does" in text
    assert '"data.class_map={0: 0, 1: 1, 2: 2, 255: 3}"' in text
    for split in ("train", "val"):
        masks(tree, [0, 1, 2, 200, 255], split)  # two values: no telling which
    code, text = check(tree, capsys, ignore_label=[200, 255])
    assert code == 0 and "note" not in text and "never occurring: unicorn" in text


@pytest.mark.bad_input
def test_training_labels_without_a_class(tree: Path) -> None:
    masks(tree, [255])
    (tree / "labels/train/1.png").write_bytes(b"")  # one bad file hides nothing
    report = check_data(options(tree, class_map={0: 0, 1: 1, 2: 2, 255: 255}))
    assert report.exit_code == 1 and "hold no class at all" in report.splits[0].problems[-1]


@pytest.mark.bad_input
def test_validation_labels_without_a_class(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks(tree, [0, 1])
    masks(tree, [255], "val")
    code, text = check(tree, capsys, classes=2)
    assert code == 0 and "no label map of the validation set has a labelled pixel" in text and "no best.pt" in text
    for path in (tree / "images/train").iterdir():
        save(path, np.resize(np.array(Image.open(path)), (24, 32, 3)))
        save(tree / "labels/train" / path.name, np.resize(np.array([0, 1], np.uint8), (24, 32)))
    assert main(["train", config(tree, classes=2, crop_size=[24, 32]), "train.iterations=1"]) == 0
    assert "there will be no best.pt" in capsys.readouterr().err
    assert not (tree / "runs/tiny/best.pt").exists() and (tree / "runs/tiny/last.pt").is_file()


def test_few_label_maps_are_read_where_they_suffice(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, validation = (build_dataset(options(tree), split) for split in ("train", "val"))
    read: list[int] = []
    monkeypatch.setattr(type(training), "label", lambda self, index: read.append(index) or self.read_label(index))
    monkeypatch.setattr("rendseg.engine.data_check.PROBE", 2)
    assert check_labels(training, validation) == []
    assert len(read) == 3  # two of training, one of validation
    assert [_spread(n) for n in (0, 1, 2, 5)] == [[], [0], [0, 1], [0, 4, 2, 1, 3]]


def test_images_turned_by_exif_are_counted(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[274] = 3
    Image.open(tree / "images/train/0.png").save(tree / "images/train/0.png", exif=exif)
    report = check_data(options(tree)).splits[0]
    assert report.turned == 1 and report.to_dict()["turned_by_exif"] == 1
    assert "turned by their EXIF tag Orientation: 1 image " in check(tree, capsys)[1]


def test_statistics_of_other_channels(tree: Path) -> None:
    report = check_data(options(tree, channels=1)).splits[0]
    grey = np.concatenate([np.array(Image.open(p).convert("L")).ravel() for p in (tree / "images/train").iterdir()])
    assert np.allclose(report.mean_and_std(), [[grey.mean() / 255], [grey.std() / 255]], atol=1e-4)
