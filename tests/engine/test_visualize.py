"""Pictures: the pixels are where and what they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from rendseg.data.shapes import scene
from rendseg.engine import visualize as vis

PALETTE = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0]], np.uint8)


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    image, label = scene(40, 60, 0)
    return image, label % 3


def test_colorize() -> None:
    labels = torch.tensor([[0, 1], [2, 255], [-1, 3]])
    got = vis.colorize(labels, PALETTE, void=(1, 2, 3))
    wanted = [[[10, 20, 30], [200, 0, 0]], [[0, 200, 0], [1, 2, 3]], [[1, 2, 3], [1, 2, 3]]]
    assert got.dtype == np.uint8 and got.tolist() == wanted
    assert vis.colorize(labels.to(torch.int16).numpy(), PALETTE.tolist()).shape == (3, 2, 3)


def test_overlay(pair: tuple[np.ndarray, np.ndarray]) -> None:
    image, label = pair
    label = label.copy()
    label[:5] = 255
    got = np.asarray(vis.overlay(image, label, PALETTE, alpha=0.25)).astype(float)
    wanted = image.astype(float)
    for c in range(3):
        wanted[label == c] = 0.75 * image[label == c] + 0.25 * PALETTE[c]
    assert np.abs(got - wanted).max() <= 0.5
    assert np.array_equal(got[:5], image[:5])  # ignored: untouched
    assert np.array_equal(np.asarray(vis.overlay(Image.fromarray(image), label, PALETTE, 0.0)), image)


def test_to_uint8_inverts_the_normalisation() -> None:
    image = torch.randint(0, 256, (3, 9, 7))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    normal = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert np.array_equal(vis.to_uint8(normal, mean, std), image.permute(1, 2, 0).numpy())
    assert vis.to_uint8(normal * 100, mean, std).max() == 255  # clamped, no wrap


def test_to_uint8_turns_bgr_round() -> None:
    image = torch.arange(12.0).view(3, 2, 2) / 255
    pixels = vis.to_uint8(image, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bgr")
    assert pixels[..., 2].ravel().tolist() == [0, 1, 2, 3] and pixels[..., 0].ravel().tolist() == [8, 9, 10, 11]


def test_points_are_drawn_at_their_pixels() -> None:
    image = np.full((6, 8, 3), 100, np.uint8)
    coords = torch.tensor([[(2 + 0.5) / 8, (4 + 0.5) / 6], [float("nan"), 0.5]])
    for factor in (1, 7):
        blank = np.asarray(vis.draw_points(image, torch.zeros(0, 2), factor))
        got = np.asarray(vis.draw_points(image, coords, factor))
        rows, columns = np.nonzero((got != blank).any(2))
        assert got.shape == (6 * factor, 8 * factor, 3)
        assert (
            rows.min() // factor == rows.max() // factor == 4
            and columns.min() // factor == columns.max() // factor == 2
        )
        assert len(rows) > 0.4 * factor * factor
    steps = np.asarray(vis.draw_points(image, [coords[:1], coords[None, :1] * 0 + 0.99], 7))
    assert len({tuple(c) for c in steps.reshape(-1, 3).tolist()}) == 3  # grey and one colour per step


def test_side_by_side_holds_the_panels(pair: tuple[np.ndarray, np.ndarray]) -> None:
    image, label = pair
    other = np.roll(label, 3, 1)
    coords = [torch.rand(5, 2), torch.rand(9, 2)]
    plain = vis.side_by_side(image, other, label, coords, palette=PALETTE, min_size=40)
    full = vis.side_by_side(
        Image.fromarray(image), torch.from_numpy(other), torch.from_numpy(label), coords, label, PALETTE,
        class_names=["a", "b"], uncertainty=torch.rand(40, 60), columns=3, min_size=40,
    )  # fmt: skip
    assert plain.width >= 4 * 60 and full.height > plain.height
    sheet = np.asarray(plain)
    for panel in (
        image,
        np.asarray(vis.overlay(image, other, PALETTE, 0.6)),
        np.asarray(vis.overlay(image, label, PALETTE, 0.6)),
    ):
        assert any(
            np.array_equal(sheet[top : top + 40, left : left + 60], panel)
            for top in range(sheet.shape[0] - 39)
            for left in range(sheet.shape[1] - 59)
            if np.array_equal(sheet[top, left : left + 60], panel[0])
        )
    large = vis.side_by_side(image, other, label, None, None, PALETTE, min_size=200)
    assert large.width >= 3 * 300 and large.height >= 200


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)])
def test_a_thin_image_is_not_enlarged_without_end(shape: tuple[int, int]) -> None:
    label = np.zeros(shape, np.int64)
    picture = vis.side_by_side(np.zeros((*shape, 3), np.uint8), label, label, palette=PALETTE)
    assert picture.width * picture.height < 10_000_000
    assert vis.boundary_zoom(np.zeros((*shape, 3), np.uint8), label, label, None, PALETTE).width < 4000


def test_best_window_finds_the_improvement() -> None:
    truth = np.zeros((50, 70), np.uint8)
    coarse, refined = truth.copy(), truth.copy()
    coarse[30:36, 50:56] = 1  # put right by refinement
    refined[5:14, 5:14] = 1  # made worse, and larger
    left, top, right, bottom = vis.best_window(coarse, refined, truth, 10)
    assert left <= 50 and top <= 30 and right >= 56 and bottom >= 36 and right - left == bottom - top == 10
    left, top, right, bottom = vis.best_window(coarse, refined, None, 10)
    assert left <= 5 and top <= 5 and right >= 14 and bottom >= 14
    assert vis.best_window(coarse, refined, truth, 500)[2:] != (0, 0)


def test_boundary_zoom(pair: tuple[np.ndarray, np.ndarray]) -> None:
    image, label = pair
    other = np.roll(label, 3, 1)
    three = vis.boundary_zoom(image, other, label, None, PALETTE, size=120)
    four = vis.boundary_zoom(image, other, label, label, PALETTE, points=[torch.rand(50, 2)], size=120)
    assert four.width > three.width > 4 * 110
    box = (10, 12, 34, 36)
    sheet = np.asarray(vis.boundary_zoom(image, other, label, label, PALETTE, box=box, size=120))
    part = image[12:36, 10:34].repeat(5, 0).repeat(5, 1)
    assert any(
        np.array_equal(sheet[top : top + 120, left : left + 120], part)
        for top in range(sheet.shape[0] - 119)
        for left in range(sheet.shape[1] - 119)
        if np.array_equal(sheet[top, left : left + 120], part[0])
    )
    # coarse and refined panels differ just because the labels do
    same = np.asarray(vis.boundary_zoom(image, label, label, label, PALETTE, box=box, size=120))
    changed = np.nonzero((same != sheet).any((0, 2)))[0]
    assert changed.size and changed.max() - changed.min() <= 130


def test_error_map() -> None:
    label = np.array([[0, 1, 1, 2, 255]])
    coarse, refined = np.array([[0, 0, 1, 0, 0]]), np.array([[0, 1, 0, 1, 0]])
    right, better, worse, wrong, ignored = vis._ERRORS.values()
    assert vis.error_map(coarse, refined, label)[0].tolist() == [
        list(c) for c in (right, better, worse, wrong, ignored)
    ]


def test_comparison_grid(pair: tuple[np.ndarray, np.ndarray]) -> None:
    image, label = pair
    tall = image.transpose(1, 0, 2).copy(), label.T.copy()
    rows = [
        vis.Comparison("first", image, label, np.roll(label, 2, 0), torch.from_numpy(label)),
        vis.Comparison("second", tall[0], tall[1], tall[1], tall[1]),
    ]
    one = vis.comparison_grid(rows[:1], PALETTE, ["a", "b", "c"], width=120)
    two = np.asarray(vis.comparison_grid(rows, PALETTE, ["a", "b", "c"], width=120))
    assert one.width == two.shape[1] > 5 * 120
    assert two.shape[0] - one.height == 180 + 36  # 60 rows at 120/40, and a title
    enlarged = image.repeat(2, 0).repeat(2, 1)
    wrong = vis.error_map(label, np.roll(label, 2, 0), label).repeat(2, 0).repeat(2, 1)
    for column, panel in ((0, enlarged), (3, wrong)):
        left = 8 + column * 128
        assert np.array_equal(two[72 : 72 + 80, left : left + 120], panel)


def test_confusion_picture() -> None:
    """The area in the darkest colour: two full cells of four against one, and none in a row without pixels."""
    pytest.importorskip("matplotlib")

    def dark(matrix: list[list[int]]) -> int:
        picture = np.asarray(vis.confusion_picture(np.array(matrix), ["sky", "road"]))
        return int((picture == (8, 48, 107)).all(2).sum())

    scale = dark([[5, 5], [5, 5]])  # the colour bar
    one, two = dark([[9, 0], [0, 0]]) - scale, dark([[9, 0], [0, 5000]]) - scale
    assert one > 1000 and two == pytest.approx(2 * one, rel=0.05)
    large = vis.confusion_picture(np.eye(45, dtype=np.int64), [f"class {c}" for c in range(45)])
    assert large.width > 1500 and large.height > 1500


@pytest.mark.bad_input
def test_bad_input(pair: tuple[np.ndarray, np.ndarray]) -> None:
    image, label = pair
    with pytest.raises(ValueError, match=r"image must be uint8 \[H, W, 3\] or a PIL image, got float64"):
        vis.overlay(image / 255, label, PALETTE)
    with pytest.raises(ValueError, match=r"labels must have the size of the image, \[40, 60\], got \[39, 60\]"):
        vis.overlay(image, label[1:], PALETTE)
    with pytest.raises(ValueError, match=r"refined_labels must be integers \[H, W\], got float64 \[40, 60\]"):
        vis.side_by_side(image, label, label * 0.5, palette=PALETTE)
    with pytest.raises(ValueError, match=r"palette must have shape \[C, 3\], got \[3\]"):
        vis.colorize(label, PALETTE[0])
    with pytest.raises(ValueError, match="palette is missing"):
        vis.side_by_side(image, label, label)
    with pytest.raises(ValueError, match=r"points must have shape \[N, 2\] per step, got \[4, 3\]"):
        vis.draw_points(image, [np.zeros((4, 3))])
    with pytest.raises(ValueError, match=r"box must lie within the image 60x40, got \(0, 0, 99, 9\)"):
        vis.boundary_zoom(image, label, label, palette=PALETTE, box=(0, 0, 99, 9))
    with pytest.raises(ValueError, match="rows is empty: there is no image to show"):
        vis.comparison_grid([], PALETTE)
    with pytest.raises(ValueError, match=r"refined must have the size of the image, \[40, 60\], got \[39, 60\]"):
        vis.comparison_grid([vis.Comparison("x", image, label, label[1:], label)], PALETTE)
    with pytest.raises(ValueError, match=r"confusion must have shape \[C, C\] with C = 2 names, got \[2, 3\]"):
        vis.confusion_picture(np.zeros((2, 3)), ["a", "b"])
