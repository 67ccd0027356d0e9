"""Sizes, colours and normalisation of the samples against independent computations."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from rendseg.data import DataError, PhotometricOptions, SegmentationDataset, build_dataset, parse_options
from rendseg.data.augment import PhotometricDistortion

PLAIN = {"scale_range": [1.0, 1.0], "flip": 0.0, "color_jitter": None, "category_max_fraction": 1.0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One wide and one tall image, 20 x 30 and 30 x 20, for training and for validation."""
    for split in ("train", "val"):
        for name, size in (("wide", (20, 30)), ("tall", (30, 20))):
            rng = np.random.default_rng(len(name) + size[0])
            for kind, pixels in (
                ("images", rng.integers(0, 256, (*size, 3), np.uint8)),
                ("labels", rng.integers(0, 3, size, np.uint8)),
            ):
                path = tmp_path / kind / split / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return tmp_path


def dataset(root: Path, split: str = "train", **keys: Any) -> SegmentationDataset:
    return build_dataset({"name": "folder", "root": str(root), "classes": 3, **PLAIN, **keys}, split)  # type: ignore


def seen(data: SegmentationDataset, index: int, epochs: int = 40) -> set[tuple[int, int]]:
    """Height and width of the labelled part of image `index` over some epochs."""
    sizes = set()
    for epoch in range(epochs):
        valid = data.sample(index, epoch)["label"] != 255
        rows, columns = valid.any(1), valid.any(0)
        assert valid.sum() == rows.sum() * columns.sum()  # a rectangle
        sizes.add((int(rows.sum()), int(columns.sum())))
    return sizes


TALL, WIDE = 0, 1  # sorted by name
CROP = {"crop_size": [256, 256]}


def test_scale_step(root: Path) -> None:
    data = dataset(root, scale_range=[0.5, 2.0], scale_step=0.25, **CROP)
    assert seen(data, WIDE, 80) == {(round(20 * s), round(30 * s)) for s in np.linspace(0.5, 2.0, 7)}
    assert len(seen(dataset(root, scale_range=[0.5, 2.0], **CROP), WIDE, 80)) > 15
    one = dataset(root, scale_range=[0.5, 0.7], scale_step=0.25, **CROP)
    assert seen(one, WIDE, 5) == {(10, 15)}


def test_base_size_keeps_the_shape(root: Path) -> None:
    data = dataset(root, base_size=[64, 128], **CROP)
    assert seen(data, WIDE, 2) == {(64, 96)} and seen(data, TALL, 2) == {(96, 64)}  # 64 / 20 < 128 / 30
    data = dataset(root, base_size=[64, 75], **CROP)
    assert seen(data, WIDE, 2) == {(50, 75)}  # now the longer side decides
    ratios = dataset(root, base_size=[40, 1000], scale_range=[0.5, 1.5], scale_step=0.5, **CROP)
    assert seen(ratios, WIDE) == {(20, 30), (40, 60), (60, 90)}


def test_short_edge(root: Path) -> None:
    data = dataset(root, short_edge=[10, 40, 60], scale_range=[5.0, 5.0], **CROP)
    assert seen(data, WIDE) == {(10, 15), (40, 60), (60, 90)} and (60, 40) in seen(data, TALL)
    data = dataset(root, short_edge=[10, 60], max_size=75, **CROP)
    assert seen(data, WIDE) == {(10, 15), (50, 75)}
    data = dataset(root, short_edge=[20, 24], short_edge_sampling="range", **CROP)
    assert {size[0] for size in seen(data, WIDE, 80)} == {20, 21, 22, 23, 24}
    assert all(size[1] == round(size[0] * 1.5) for size in seen(data, WIDE, 20))


def test_sizes_are_a_function_of_seed_epoch_and_index(root: Path) -> None:
    keys: dict[str, Any] = {
        "short_edge": [16, 24, 32, 40],
        "crop_size": [16, 16],
        "flip": 0.5,
        "photometric_distortion": {},
    }
    one, again = dataset(root, **keys), dataset(root, **keys)
    again.sample(1, 9)
    for epoch in range(4):
        for index in (1, 0):
            a, b = one.sample(index, epoch), again.sample(index, epoch)
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
    assert not torch.equal(one.sample(0, 0)["image"], one.sample(0, 1)["image"])


# --- colours --------------------------------------------------------------------------------------------------------


def distorted(pixels: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """The distortion pixel by pixel, with the HSV of the standard library; brightness in 0..255, hue in turns."""
    result = np.empty(pixels.shape, np.float64)
    for place in np.ndindex(pixels.shape[:2]):
        rgb = pixels[place] / 255
        if params["brightness"] is not None:
            rgb = np.clip(rgb + params["brightness"] / 255, 0, 1)
        if params["contrast"] is not None and not params["contrast_last"]:
            rgb = np.clip(rgb * params["contrast"], 0, 1)
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        if params["saturation"] is not None:
            s = min(1.0, s * params["saturation"])
        if params["hue"] is not None:
            h = (h + params["hue"]) % 1
        rgb = np.array(colorsys.hsv_to_rgb(h, s, v))
        if params["contrast"] is not None and params["contrast_last"]:
            rgb = np.clip(rgb * params["contrast"], 0, 1)
        result[place] = rgb * 255
    return result


@pytest.mark.parametrize(
    "changed",
    [
        {"brightness": 25.0},
        {"brightness": -200.0},
        {"contrast": 1.4},
        {"saturation": 0.5},
        {"saturation": 1.5},
        {"saturation": 0.0},
        {"hue": 0.1},
        {"hue": -0.07},
        {"brightness": 31.0, "contrast": 1.5, "saturation": 1.4, "hue": 0.05, "contrast_last": False},
        {"brightness": -31.0, "contrast": 0.6, "saturation": 0.7, "hue": -0.05, "contrast_last": True},
    ],
)
def test_photometric_distortion(changed: dict[str, Any]) -> None:
    params = {"brightness": None, "contrast": None, "saturation": None, "hue": None, "contrast_last": False, **changed}
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    pixels[0, :4] = [[0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 0]]
    image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
    result = PhotometricDistortion(PhotometricOptions()).transform(image, params)
    assert isinstance(result, tv_tensors.Image) and result.dtype == torch.uint8
    assert np.abs(result.permute(1, 2, 0).numpy() - distorted(pixels, params)).max() <= 0.51


def test_photometric_parameters_keep_their_ranges_and_shares() -> None:
    options = PhotometricOptions(brightness_delta=10, contrast_range=(0.9, 1.3), hue_delta=18, probability=0.25)
    transform = PhotometricDistortion(options)
    torch.manual_seed(0)
    drawn = [transform.make_params([]) for _ in range(800)]
    for name, low, high in (
        ("brightness", -10, 10),
        ("contrast", 0.9, 1.3),
        ("saturation", 0.5, 1.5),
        ("hue", -0.1, 0.1),
    ):
        values = [p[name] for p in drawn if p[name] is not None]
        assert 140 < len(values) < 260  # 200, give or take five deviations
        assert low <= min(values) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(values) <= high
    assert 320 < sum(p["contrast_last"] for p in drawn) < 480


def test_photometric_distortion_replaces_the_jitter_and_leaves_labels(root: Path) -> None:
    still = {"probability": 0.0}
    plain = dataset(root).sample(0, 0)
    data = dataset(root, photometric_distortion=still, color_jitter={"brightness": 0.9}).sample(0, 0)
    assert torch.equal(plain["image"], data["image"])
    data = dataset(root, photometric_distortion={"probability": 1.0}).sample(0, 0)
    assert torch.equal(plain["label"], data["label"]) and not torch.equal(plain["image"], data["image"])
    assert torch.equal(
        dataset(root, "val", photometric_distortion={"probability": 1.0})[0]["image"], dataset(root, "val")[0]["image"]
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_values_as_caffe_has_them(root: Path, split: str) -> None:
    """BGR, 0..255, the mean subtracted: detectron2's MSRA weights."""
    keys = {"channel_order": "bgr", "pixel_max": 255, "mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0]}
    data = dataset(root, split, **keys)
    pixels = data.read(1)[0].astype(np.float64)
    wanted = pixels[..., ::-1] - np.array([103.53, 116.28, 123.675])
    assert np.abs(data[1]["image"].permute(1, 2, 0).numpy() - wanted).max() < 1e-3
    assert data.channel_order == "bgr" and np.allclose(data.mean, np.array(keys["mean"]) / 255)
    assert parse_options(data.options) == data.options  # type: ignore[arg-type]


def test_values_of_mmsegmentation(root: Path) -> None:
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    data = dataset(root, "val", pixel_max=255, mean=mean, std=std)
    wanted = (data.read(0)[0] - np.array(mean)) / np.array(std)
    assert np.abs(data[0]["image"].permute(1, 2, 0).numpy() - wanted).max() < 1e-5


def test_val_size(root: Path) -> None:
    fitted = dataset(root, "val", val_size=[40, 100])
    assert fitted[WIDE]["label"].shape == (40, 60) and fitted[TALL]["image"].shape == (3, 60, 40)
    stretched = dataset(root, "val", val_size=[40, 90], val_keep_ratio=False)
    sample = stretched[WIDE]
    assert sample["image"].shape == (3, 40, 90) and stretched[TALL]["label"].shape == (40, 90)
    assert np.array_equal(sample["label"].numpy(), stretched.read(WIDE)[1].repeat(2, 0).repeat(3, 1))
    assert dataset(root, val_size=[40, 100])[WIDE]["label"].shape == (20, 30)  # of val alone
    same = dataset(root, "val", val_size=[20, 30])
    assert torch.equal(same[WIDE]["image"], dataset(root, "val")[WIDE]["image"])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"short_edge": [512]}, "short_edge needs crop_size: the images of a batch must have one size"),
        ({"base_size": [512, 512]}, "base_size needs crop_size"),
        ({"short_edge": [5], "base_size": [5, 5], **CROP}, "short_edge and base_size exclude each other"),
        ({"short_edge": [], **CROP}, r"short_edge must hold at least one length"),
        ({"short_edge": [0], **CROP}, r"data.short_edge must be at least 1, got \[0\]"),
        (
            {"short_edge": [5], "short_edge_sampling": "range", **CROP},
            r"short_edge must be \[smallest, largest\] .*\[5",
        ),
        ({"short_edge": [9, 5], "short_edge_sampling": "range", **CROP}, r"got \[9, 5\]"),
        ({"max_size": 100}, "max_size needs short_edge"),
        ({"scale_step": 0}, "data.scale_step must be positive, got 0"),
        ({"mean": [123.675, 116.28, 103.53]}, "is of values 0..255: set pixel_max: 255"),
        ({"mean": [0.485, 0.456, 0.406], "pixel_max": 255}, "is of values 0..1: leave pixel_max at 1"),
        ({"pixel_max": 100}, "data.pixel_max must be one of 1, 255, got 100"),
        ({"channel_order": "gbr"}, "data.channel_order must be one of rgb, bgr, got 'gbr'; did you mean 'rgb'"),
        ({"val_size": [0, 5]}, r"data.val_size must be at least 1, got \[0, 5\]"),
        (
            {"photometric_distortion": {"hue": 3}},
            "unknown key data.photometric_distortion.hue; did you mean 'photometric_distortion.hue_delta'",
        ),
        (
            {"photometric_distortion": {"hue_delta": 99}},
            r"data.photometric_distortion.hue_delta must lie in \[0, 90\], got 99",
        ),
        ({"photometric_distortion": {"contrast_range": [2, 1]}}, r"contrast_range must be \[smallest, largest\]"),
    ],
)
def test_bad_options(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        parse_options({"name": "shapes", **keys})
    assert "\n" not in str(error.value)
