"""Images, label maps, folders and lists as users have them: what is read, against NumPy, and each remedy tried."""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from rendseg.data import DataError, build_dataset, file_values, linked
from rendseg.data.images import find_images, read_image, read_list, read_values
from rendseg.data.options import AugmentOptions

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (6, 9, 3), np.uint8)


def save(path: Path, pixels: np.ndarray, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)
    return path


def png(path: Path, values: np.ndarray, bits: int, exif: Image.Exif | None = None) -> Path:
    """A PNG of ``bits`` per value, grey or colour, written by hand (PIL writes 8 bits and 16 of grey)."""
    rows = values.reshape(len(values), -1)
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        spread = ((rows[..., None] >> np.arange(bits)[::-1]) & 1).reshape(len(rows), -1)
        packed = [np.packbits(row.astype(np.uint8)).tobytes() for row in spread]

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 2 * (values.ndim == 3), 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in packed))
    tags = b"" if exif is None else chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + tags + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def tiff(path: Path, values: np.ndarray) -> Path:
    """An uncompressed TIFF of uint8 [H, W, C] with bands of no meaning (PIL writes up to four, with one)."""
    height, width, bands = values.shape
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 0), (277, bands), (278, height)]
    tags += [(279, values.size), (284, 1), (338, 0)]
    lists, at = b"", 8 + 2 + 12 * len(tags) + 4
    entries = []
    for tag, value in tags:
        count = {258: bands, 338: bands - 1}.get(tag, 1)
        if count > 2:
            entries.append(struct.pack("<HHII", tag, 3, count, at + len(lists)))
            lists += struct.pack(f"<{count}H", *[value] * count)
        elif count == 2:
            entries.append(struct.pack("<HHIHH", tag, 3, count, value, value))
        else:
            entries.append(struct.pack("<HHII", tag, 4, count, value))
    entries[5] = struct.pack("<HHII", 273, 4, 1, at + len(lists))
    path.parent.mkdir(parents=True, exist_ok=True)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + struct.pack("<I", 0)
    path.write_bytes(head + lists + values.tobytes())
    return path


def refused(path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(DataError) as error:
        read_image(path, AugmentOptions(**options))
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text and "replace" not in text, text
    assert all(word in text for word in words), text


# -------------------------------------------------------------------------------------------------------- images


def test_exif_orientation(tmp_path: Path) -> None:
    turned = {
        1: PHOTO,
        2: PHOTO[:, ::-1],
        3: PHOTO[::-1, ::-1],
        4: PHOTO[::-1],
        5: PHOTO.transpose(1, 0, 2),
        6: np.rot90(PHOTO, -1),
        7: PHOTO[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PHOTO),
    }
    for tag, wanted in turned.items():
        exif = Image.Exif()
        exif[274] = tag
        path = save(tmp_path / f"{tag}.png", PHOTO, exif=exif)
        assert np.array_equal(read_image(path), wanted), tag
        assert np.array_equal(read_image(path, AugmentOptions(exif_orientation=False)), PHOTO)
        path = save(tmp_path / f"{tag}.tif", PHOTO, tiffinfo={274: tag})
        assert np.array_equal(read_image(path), wanted), tag
        assert np.array_equal(read_image(path, AugmentOptions(exif_orientation=False)), PHOTO)
        deep = png(tmp_path / f"deep{tag}.png", PHOTO.astype(np.uint16), 16, exif)
        assert np.array_equal(read_image(deep, AugmentOptions(image_max=255)), wanted), tag


def folder(root: Path, split: str = "folders", **keys: Any) -> Any:
    return build_dataset({"name": "folder", "root": str(root), "classes": 2, "split": split, **keys}, "val")


@pytest.mark.bad_input
def test_a_label_of_the_image_as_stored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    save(tmp_path / "images/val/a.jpg", PHOTO, exif=exif)
    save(tmp_path / "labels/val/a.png", np.zeros((6, 9), np.uint8))
    with pytest.raises(DataError, match=r"Orientation \(6\).*data.exif_orientation=false"):
        folder(tmp_path).read(0)
    assert folder(tmp_path, exif_orientation=False).read(0)[0].shape == (6, 9, 3)
    save(tmp_path / "labels/val/a.png", np.zeros((9, 6), np.uint8))
    assert folder(tmp_path).examine(0).turned and folder(tmp_path).read(0)[0].shape == (9, 6, 3)
    save(tmp_path / "labels/val/a.png", np.zeros((9, 7), np.uint8))
    with pytest.raises(DataError, match="resize one of them"):
        folder(tmp_path).read(0)


@pytest.mark.bad_input
@pytest.mark.parametrize("colour", [False, True])
def test_bits_stored_in_16(tmp_path: Path, colour: bool) -> None:
    values = RNG.integers(0, 4096, PHOTO.shape if colour else PHOTO.shape[:2]).astype(np.uint16)
    values.flat[0] = 4095
    path = png(tmp_path / "a.png", values, 16)
    refused(path, "image_max=4095")
    scaled = np.round(values / 4095 * 255)
    found = read_image(path, AugmentOptions(image_max=4095))
    assert np.array_equal(found, scaled if colour else np.repeat(scaled[..., None], 3, axis=2))
    # 65535 is what a 16-bit image has otherwise, however dark
    assert (
        np.abs(read_image(path, AugmentOptions(image_max=65535))[..., 0] - values.reshape(6, 9, -1)[..., 0] / 257).max()
        < 1
    )
    bright = values + np.uint16(60000)
    assert np.array_equal(read_image(png(path, bright, 16))[..., 0], (bright.reshape(6, 9, -1) >> 8)[..., 0])


@pytest.mark.bad_input
def test_floating_point_values(tmp_path: Path) -> None:
    values = np.linspace(0, 2, 54, dtype=np.float32).reshape(6, 9)
    path = save(tmp_path / "a.tif", values)
    refused(path, "floating point", "data.image_max")
    assert np.array_equal(read_image(path, AugmentOptions(image_max=2))[..., 0], np.floor(values / 2 * 255 + 0.5))


@pytest.mark.bad_input
@pytest.mark.parametrize("bands", [2, 4, 8])
def test_bands(tmp_path: Path, bands: int) -> None:
    values = RNG.integers(0, 256, (6, 9, bands), np.uint8)
    path = tiff(tmp_path / "a.tif", values)
    refused(path, f"{bands} bands", f"model.backbone.in_chans={bands}")
    if importlib.util.find_spec("tifffile") is None:
        refused(path, "pip install tifffile", channels=bands)
    else:
        assert np.array_equal(read_image(path, AugmentOptions(channels=bands)), values)


@pytest.mark.bad_input
def test_tiffs_that_pil_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiff(tmp_path / "a.tif", RNG.integers(0, 256, (6, 9, 8), np.uint8))
    grey = tiff(tmp_path / "b.tif", RNG.integers(0, 256, (6, 9, 1), np.uint8))
    content = bytearray(grey.read_bytes())
    content[content.index(struct.pack("<HHII", 258, 4, 1, 8)) + 8] = 64  # bits
    grey.write_bytes(content)
    monkeypatch.setitem(sys.modules, "tifffile", None)  # as if not installed
    refused(path, "a TIFF of 8 bands is read by tifffile", "pip install", channels=8)
    refused(grey, "a TIFF of this kind is read by tifffile")
    with pytest.raises(DataError, match="a label map of this kind is read by tifffile"):
        read_values(grey)
    packed = RuntimeError("COMPRESSION.LZMA requires the 'imagecodecs' package")
    monkeypatch.setitem(sys.modules, "tifffile", SimpleNamespace(TiffFile=Mock(side_effect=packed)))
    refused(path, "pip install imagecodecs", channels=8)


@pytest.mark.bad_input
def test_alpha_is_a_channel_only_on_request(tmp_path: Path) -> None:
    values = RNG.integers(0, 256, (6, 9, 4), np.uint8)
    for ending in ("png", "tif"):
        path = save(tmp_path / f"a.{ending}", values)
        assert np.array_equal(read_image(path), values[..., :3])
        assert np.array_equal(read_image(path, AugmentOptions(channels=4)), values)
    refused(save(tmp_path / "rgb.png", PHOTO), "3 bands", "in_chans=3", channels=4)


@pytest.mark.bad_input
def test_pages(tmp_path: Path) -> None:
    pages = [Image.fromarray(RNG.integers(0, 256, (6, 9), np.uint8)) for _ in range(5)]
    path, labels = tmp_path / "a.tif", tmp_path / "b.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    refused(path, "5 pages", "in_chans=5")
    assert np.array_equal(read_image(path, AugmentOptions(channels=5)), np.stack([np.array(p) for p in pages], 2))
    with pytest.raises(DataError, match="5 pages"):
        read_values(path)
    # A smaller copy beside the image is no page.
    pages[0].save(labels, save_all=True, append_images=[pages[1].resize((3, 2))])
    assert np.array_equal(read_image(labels)[..., 0], np.array(pages[0]))


@pytest.mark.bad_input
def test_limit_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", PHOTO)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # PIL's own limit, for which there is no key
    assert np.array_equal(read_image(path), PHOTO)
    refused(path, "54 pixels", "data.max_pixels=54", max_pixels=53)
    assert np.array_equal(read_image(path, AugmentOptions(max_pixels=54)), PHOTO)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_grey_images_of_one_channel(tmp_path: Path) -> None:
    grey = save(tmp_path / "images/val/a.png", PHOTO[..., 0])
    save(tmp_path / "labels/val/a.png", np.zeros((6, 9), np.uint8))
    assert np.array_equal(read_image(grey, AugmentOptions(channels=1)), PHOTO[..., :1])
    data = folder(tmp_path, channels=1, mean=[0.5], std=[0.25])
    wanted = (PHOTO[None, ..., 0] / 255 - 0.5) / 0.25
    assert np.allclose(data[0]["image"].numpy(), wanted, atol=1e-5)
    assert data.load(0)[0].mode == "RGB"


def test_mean_and_std_of_other_channels() -> None:
    assert AugmentOptions(channels=1).mean == (0.449,) and AugmentOptions(channels=2).std == (0.226, 0.226)
    five = AugmentOptions(channels=5)
    assert five.mean == (0.485, 0.456, 0.406, 0.449, 0.449) and five.color_jitter is None
    for wrong in ({"mean": (0.1, 0.2)}, {"channels": 4, "channel_order": "bgr"}):
        with pytest.raises(ValueError, match="in_chans|needs 3 channels"):
            AugmentOptions(**wrong)


@pytest.mark.bad_input
def test_images_that_have_other_channels_than_the_network() -> None:
    data = build_dataset({"name": "shapes", "size": [8, 8], "channels": 1}, "val")
    with pytest.raises(
        DataError, match="val_000000: the image has 3 channels, model.backbone.in_chans is 1; set it to 3"
    ):
        data[0]


def test_what_model_and_data_share() -> None:
    model, data = linked({"backbone": {"in_chans": 1}}, {"name": "folder"})
    assert data["channels"] == 1
    model, data = linked({}, {"channels": 4})
    assert model["backbone"]["in_chans"] == 4
    model, data = linked({"loss": {"ignore_index": -100}}, {"name": "folder"})
    assert data["ignore_label"] == [255, -100] and model["loss"]["ignore_index"] == 255
    with pytest.raises(DataError, match="in_chans is 1, data.channels is 3"):
        linked({"backbone": {"in_chans": 1}}, {"channels": 3})


# -------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_label_maps_of_few_bits_are_read_as_stored(tmp_path: Path, bits: int) -> None:
    values = RNG.integers(0, 2**bits, (5, 11)).astype(np.uint8)
    assert np.array_equal(read_values(png(tmp_path / "a.png", values, bits)), values)


@pytest.mark.parametrize("largest", [3, 200, 1000, 65535])
def test_pgm_is_read_as_stored(tmp_path: Path, largest: int) -> None:
    values = RNG.integers(0, largest + 1, (5, 11))
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 11 5 %d\n" % largest + values.astype(">u2" if largest > 255 else np.uint8).tobytes())
    assert np.array_equal(read_values(path), values)


@pytest.mark.bad_input
def test_negative_values(tmp_path: Path) -> None:
    save(tmp_path / "images/val/a.png", np.zeros((1, 4, 3), np.uint8))
    save(tmp_path / "labels/val/a.tif", np.array([[-1, -100, 0, 1]], np.int32))
    for keys in ({"class_map": {-1: 255, -100: 255, 0: 0, 1: 1}}, {"ignore_label": [-1, -100]}):
        assert folder(tmp_path, **keys).read(0)[1].tolist() == [[255, 255, 0, 1]]
    with pytest.raises(DataError, match="label value -1 .*class_map"):
        folder(tmp_path).read(0)
    with pytest.raises(DataError, match="values must be -32768..65535, got -40000"):
        folder(tmp_path, class_map={-40000: 0})


@pytest.mark.bad_input
def test_an_unknown_value_and_a_class_that_is_missing(tmp_path: Path) -> None:
    save(tmp_path / "images/val/a.png", np.zeros((1, 2, 3), np.uint8))
    save(tmp_path / "labels/val/a.png", np.array([[0, 128]], np.uint8))
    with pytest.raises(DataError, match=r'if 128 is class 1, set "data.class_map=\{0: 0, 128: 1\}"'):
        folder(tmp_path).read(0)
    assert folder(tmp_path, class_map={0: 0, 128: 1}).read(0)[1].tolist() == [[0, 1]]


@pytest.mark.bad_input
def test_two_classes_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.classes: 'a' is given twice"):
        folder(tmp_path, classes=["a", "b", "a"])


@pytest.mark.bad_input
def test_jpeg_label_maps(tmp_path: Path) -> None:
    save(tmp_path / "images/val/a.png", PHOTO)
    save(tmp_path / "labels/val/a.jpg", np.zeros((6, 9), np.uint8))
    for keys in ({}, {"label_suffix": ".jpg"}):
        with pytest.raises(DataError, match="is a JPEG, whose compression changes values.*as PNG"):
            folder(tmp_path, **keys).read(0)


def test_values_of_the_files() -> None:
    ids = file_values({"name": "cityscapes"})
    assert ids is not None and ids[[0, 13, 18]].tolist() == [7, 26, 33]  # road, car, bicycle
    ade = file_values({"name": "ade20k"})
    assert ade is not None and ade.tolist() == list(range(1, 151))
    own = {"name": "folder", "root": ".", "classes": 2}
    assert file_values(own) is None
    values = file_values({**own, "class_map": {-1: 0, 9: 1, 4: 0, 5: 0, 255: 255}})
    assert values is not None and values.tolist() == [4, 9]
    colors = file_values({**own, "color_map": {"#0a0b0c": 1, "#010203": 0}})
    assert colors is not None and colors.tolist() == [[1, 2, 3], [10, 11, 12]]
    with pytest.raises(DataError, match="no value .* class 1"):
        file_values({**own, "class_map": {3: 0}})


# --------------------------------------------------------------------------------------------- folders and lists


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_folders(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    touch(
        inside / "a.PNG",
        inside / "b/c.jpg",
        inside / ".ipynb_checkpoints/a.png",
        inside / ".a.png",
        outside / "d/e.tif",
    )
    (inside / "link").symlink_to(outside, target_is_directory=True)
    (inside / "b/loop").symlink_to("..", target_is_directory=True)
    (inside / "b/wider").symlink_to("../..", target_is_directory=True)
    found = [path.relative_to(inside).as_posix() for path in find_images(inside, recursive=True)]
    assert found == ["a.PNG", "b/c.jpg", "link/d/e.tif"]
    assert find_images(inside) == [inside / "a.PNG"]


@pytest.mark.parametrize("suffix", [".PNG", ".Tif", ".bmp"])
def test_label_suffixes(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path / "images/val/a.png", tmp_path / f"labels/val/a{suffix}", tmp_path / "labels/val/aa.png")
    assert folder(tmp_path).files(0)[1].name == f"a{suffix}"


@pytest.mark.bad_input
def test_label_suffixes_that_are_ambiguous(tmp_path: Path) -> None:
    touch(tmp_path / "images/val/a.png", tmp_path / "labels/val/a.tif", tmp_path / "labels/val/a.bmp")
    with pytest.raises(DataError, match="labels/val/a.png is missing"):
        folder(tmp_path)
    assert folder(tmp_path, label_suffix=".tif").files(0)[1].name == "a.tif"


@pytest.mark.bad_input
def test_lists(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("a", "b c"):
        touch(root / f"images/x/{name}.png", root / f"labels/x/{name}.png")
    touch(root / "labels/other.png")
    texts = {
        "plain": b"x/a\nx/b c.png\n",
        "mark": b"\xef\xbb\xbfx/a\nx/b c\n",
        "utf16": "x/a\r\nx/b c\r\n".encode("utf-16"),
        "utf16 without a mark": "x/a\nx/b c\n".encode("utf-16-be"),
        "windows": b"x\\a.png\r\n.\\images\\x\\b c.png\r\n",
        "dots": b"./x/a.png\nx/../x/b c\n",
        "prefix": b"images/x/a.png\n./images/x/b c.png\n",
        "absolute": f"{root}/images/x/a.png\n{root}/images/x/b c.png\n".encode(),
        "moved": b"C:\\old\\images\\x\\a.png\n/home/old/images/x/b c.png\n",
        "two columns": b"images/x/a.png labels/x/a.png\nx/b c.png\tx/b c.png\n",
        "commas": b"x/a.png,labels/x/a.png\nx/b c,labels/x/b c.png\n",
        "flags": b"x/a 1\nx/b c\t-1\n",
    }
    for name, text in texts.items():
        (root / "val.txt").write_bytes(text)
        data = folder(root, "lists")
        pairs = [[path.relative_to(root).as_posix() for path in data.files(i)] for i in range(len(data))]
        assert pairs == [[f"{kind}/x/{stem}.png" for kind in ("images", "labels")] for stem in ("a", "b c")], name
    (root / "val.txt").write_text("x/a.png labels/other.png\n")
    assert folder(root, "lists").files(0)[1] == root / "labels/other.png"
    for text, words in (("x/a.png labels/none.png", "labels/none.png is missing"), ("x/none", "'x/none' is not in")):
        (root / "val.txt").write_text(text)
        with pytest.raises(DataError, match=words):
            folder(root, "lists")


def test_names_of_any_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xe9\\ n")
    touch(tmp_path / f"images/{name}.png", tmp_path / f"labels/{name}.png")
    (tmp_path / "val.txt").write_bytes(b"\xff\xe9\\ n\n")
    assert read_list(tmp_path / "val.txt", "val") == [name]
    assert folder(tmp_path, "lists").sample_name(0) == name
