"""Metrics against brute force, torchmetrics and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from rendseg.engine.metrics import SegmentationMetrics, boundary_bands, mean_iou


def blocky(classes: int, height: int, width: int, seed: int, ignored: float = 0.0) -> torch.Tensor:
    """A label map of patches, with ignored patches and single odd pixels."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, classes, (height // 5 + 1, width // 6 + 1), generator=generator)
    labels = small.repeat_interleave(5, 0).repeat_interleave(6, 1)[:height, :width].clone()
    void = torch.rand(height // 4 + 1, width // 4 + 1, generator=generator) < ignored
    labels[void.repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width]] = 255
    rows, columns = (torch.randint(0, n, (5,), generator=generator) for n in (height, width))
    labels[rows, columns] = torch.randint(0, classes, (5,), generator=generator)
    return labels


def brute_force_band(labels: np.ndarray, c: int, distance: int, border: bool) -> np.ndarray:
    """Pixel by pixel: of class c, with another class (or the outside) within the chessboard distance."""
    height, width = labels.shape
    band = np.zeros(labels.shape, bool)
    for row in range(height):
        for column in range(width):
            if labels[row, column] != c:
                continue
            for y in range(row - distance, row + distance + 1):
                for x in range(column - distance, column + distance + 1):
                    if not (0 <= y < height and 0 <= x < width):
                        band[row, column] |= border
                    elif labels[y, x] not in (c, 255):
                        band[row, column] = True
    return band


def brute_force(pred: np.ndarray, labels: np.ndarray, classes: int, ratio: float, border: bool) -> dict[str, list]:
    pred = np.where(labels == 255, 255, pred)
    distance = max(1, round(ratio * math.sqrt(labels.shape[0] ** 2 + labels.shape[1] ** 2)))
    iou: list[float | None] = []
    boundary: list[float | None] = []
    for c in range(classes):
        for result, one, other in (
            (iou, pred == c, labels == c),
            (boundary, *(brute_force_band(m, c, distance, border) for m in (pred, labels))),
        ):
            union = (one | other).sum()
            result.append(float((one & other).sum() / union) if union else None)
    return {"iou": iou, "boundary": boundary}


def close(one: list, other: list) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or math.isclose(a, b, abs_tol=1e-12))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("border", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "classes", "ratio"),
    [(*size, ratio) for size in [(23, 31, 4), (16, 16, 1), (14, 40, 9)] for ratio in (0.01, 0.07, 0.2)]
    + [(*size, ratio) for size in [(1, 9, 2), (8, 1, 2)] for ratio in (0.01, 0.2, 3.0)],  # 3.0: wider than the image
)
def test_against_brute_force(height: int, width: int, classes: int, ratio: float, border: bool) -> None:
    for seed, ignored in ((0, 0.0), (1, 0.25)):
        labels = blocky(classes, height, width, seed, ignored)
        pred = blocky(classes, height, width, seed + 7)
        metrics = SegmentationMetrics(
            classes + 1, boundary_ratio=ratio, image_border=border
        )  # the last class is absent
        metrics.update(pred, labels)
        got = metrics.compute()
        wanted = brute_force(pred.numpy(), labels.numpy(), classes + 1, ratio, border)
        assert close(got["per_class_iou"], wanted["iou"])
        assert close(got["per_class_boundary_iou"], wanted["boundary"])
        present = [v for v in wanted["boundary"] if v is not None]
        if present:
            assert math.isclose(got["boundary_iou"], sum(present) / len(present))
        assert got["per_class_iou"][-1] is None and got["per_class_boundary_iou"][-1] is None


@pytest.mark.parametrize("distance", [1, 2, 3, 7])
def test_band_is_the_mask_minus_its_erosion(distance: int) -> None:
    """Cheng et al. erode by a 3x3 square `distance` times in an image padded by zeros; here with PIL's filter."""
    labels = blocky(3, 40, 52, 3)
    band = boundary_bands(labels[None].to(torch.uint8), torch.zeros(1, 40, 52, dtype=torch.bool), distance)[0].numpy()
    for c in range(3):
        mask = np.pad((labels.numpy() == c).astype(np.uint8) * 255, 1)
        eroded = Image.fromarray(mask)
        for _ in range(distance):
            eroded = eroded.filter(ImageFilter.MinFilter(3))
        inside = np.array(eroded)[1:-1, 1:-1] > 0
        assert np.array_equal(band & (labels.numpy() == c), (mask[1:-1, 1:-1] > 0) & ~inside)


def test_worked_by_hand() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]])
    pred = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 3]])
    metrics = SegmentationMetrics(4)
    metrics.update(pred, labels)
    got = metrics.compute()
    assert got["per_class_iou"] == [3 / 4, 3 / 4, None, None]  # prediction 3 lies on an ignored pixel: absent
    assert got["miou"] == 3 / 4 and got["pixel_accuracy"] == 6 / 7 and got["num_pixels"] == 7
    assert got["per_class_accuracy"] == [3 / 4, 1.0, None, None] and got["mean_accuracy"] == 7 / 8
    # every pixel touches the border, so that the bands are the masks
    assert got["per_class_boundary_iou"] == [3 / 4, 3 / 4, None, None]


def test_absent_classes() -> None:
    """Only predicted: IoU 0 and counted. Only labelled: the same. In neither: None and not counted."""
    metrics = SegmentationMetrics(4)
    metrics.update(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 2, 0]]))
    got = metrics.compute()
    assert got["per_class_iou"] == [1 / 3, 0.0, 0.0, None]
    assert math.isclose(got["miou"], 1 / 9) and math.isclose(got["boundary_iou"], 1 / 9)
    assert got["per_class_accuracy"] == [0.5, None, 0.0, None]


def with_absent_classes() -> tuple[torch.Tensor, torch.Tensor]:
    """Of 7 classes one is only predicted (4), one only labelled (5), one neither (6)."""
    labels = blocky(4, 60, 50, 1, 0.2)
    labels[10:14, 20:30] = 5
    pred = blocky(4, 60, 50, 1)
    pred[labels == 5] = 1
    pred[30:40, 3:9] = 4
    return pred, labels


@pytest.mark.parametrize("rule", ["skip", "ignore_without_label", "zero", "one"])
def test_absent_rules_against_numpy(rule: str) -> None:
    """As the frameworks write it: np.nanmean; only classes with labels; 0 for 0/0 and the mean over all."""
    pred, labels = with_absent_classes()
    metrics = SegmentationMetrics(7, absent=rule)
    metrics.update(pred, labels)
    got = metrics.compute()
    valid = (labels != 255).numpy()
    p, t = pred.numpy()[valid], labels.numpy()[valid]
    hit = np.array([((p == c) & (t == c)).sum() for c in range(7)], float)
    truth = np.array([(t == c).sum() for c in range(7)], float)
    guess = np.array([(p == c).sum() for c in range(7)], float)
    assert truth[4] == truth[6] == guess[5] == guess[6] == 0 < guess[4]
    with np.errstate(invalid="ignore"):
        values = {
            "per_class_iou": hit / (truth + guess - hit),
            "per_class_accuracy": hit / truth,
            "per_class_precision": hit / guess,
            "per_class_dice": 2 * hit / (truth + guess),
        }
    for key, wanted in values.items():
        if rule == "ignore_without_label":
            wanted = np.where(truth > 0, wanted, np.nan)
        if rule in ("zero", "one"):
            wanted = np.nan_to_num(wanted, nan=float(rule == "one"))
        found = [math.nan if value is None else value for value in got[key]]
        np.testing.assert_allclose(found, wanted, rtol=1e-12, err_msg=key)
        for mean, each in (("miou", "per_class_iou"), ("mean_accuracy", "per_class_accuracy"), ("mean_dice", key)):
            if each == key and (mean != "mean_dice" or key == "per_class_dice"):
                assert math.isclose(got[mean], np.nanmean(wanted)), mean
    counts = {"skip": 6, "ignore_without_label": 5, "zero": 7, "one": 7}
    assert sum(value is not None for value in got["per_class_iou"]) == counts[rule]
    assert sum(value is not None for value in got["per_class_boundary_iou"]) == counts[rule]
    present = [value for value in got["per_class_boundary_iou"] if value is not None]
    assert math.isclose(got["boundary_iou"], sum(present) / counts[rule])
    assert math.isclose(got["pixel_accuracy"], (p == t).mean())
    weighted = sum(truth[c] * hit[c] / (truth + guess - hit)[c] for c in range(7) if truth[c])
    assert math.isclose(got["fw_iou"], weighted / truth.sum())
    agreed, chance = hit.sum() / truth.sum(), (truth * guess).sum() / truth.sum() ** 2
    assert math.isclose(got["kappa"], (agreed - chance) / (1 - chance))


def test_mean_iou_of_one_image() -> None:
    pred, labels = with_absent_classes()
    metrics = SegmentationMetrics(7)
    metrics.update(pred, labels)
    assert math.isclose(mean_iou(metrics.confusion), metrics.compute()["miou"])
    assert math.isnan(mean_iou(torch.zeros(3, 3, dtype=torch.int64)))


def test_perfect_and_empty() -> None:
    labels = torch.stack([blocky(5, 30, 44, s, 0.2) for s in range(3)])
    metrics = SegmentationMetrics(5)
    metrics.update(labels, labels)  # 255 in a prediction is fine where the label is ignored
    got = metrics.compute()
    assert got["miou"] == got["boundary_iou"] == got["pixel_accuracy"] == 1
    metrics.reset()
    metrics.update(torch.zeros(2, 4, 4, dtype=torch.uint8), torch.full((2, 4, 4), 255))
    metrics.update(torch.zeros(0, 4, 4, dtype=torch.long), torch.zeros(0, 4, 4, dtype=torch.long))
    got = metrics.compute()
    assert math.isnan(got["miou"]) and math.isnan(got["pixel_accuracy"]) and math.isnan(got["boundary_iou"])
    assert got["per_class_iou"] == [None] * 5 and got["num_pixels"] == 0


def test_against_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    labels = torch.stack([blocky(6, 40, 50, s, 0.1) for s in range(4)])
    pred = torch.stack([blocky(6, 40, 50, s + 10) for s in range(4)])
    metrics = SegmentationMetrics(6)
    metrics.update(pred, labels)
    kwargs = {"num_classes": 6, "ignore_index": 255}
    matrix = classification.MulticlassConfusionMatrix(**kwargs)(pred, labels)
    assert torch.equal(metrics.confusion, matrix)
    iou = classification.MulticlassJaccardIndex(average="none", **kwargs)(pred, labels)
    assert np.allclose(metrics.compute()["per_class_iou"], iou.numpy(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_label_types_and_layouts(dtype: torch.dtype) -> None:
    labels, pred = blocky(5, 20, 30, 0), blocky(5, 20, 30, 9)
    one, other = SegmentationMetrics(5), SegmentationMetrics(5)
    one.update(pred, labels)
    other.update(pred.to(dtype).t().contiguous().t()[None], labels.to(dtype)[None])
    assert one.compute() == other.compute()


def test_other_ignore_index_and_many_classes() -> None:
    labels, pred = blocky(255, 50, 60, 0), blocky(255, 50, 60, 5)
    one, other = SegmentationMetrics(255), SegmentationMetrics(255, ignore_index=-1)
    void = torch.zeros(50, 60, dtype=torch.bool)
    void[10:20, 30:] = True
    one.update(pred, labels.masked_fill(void, 255))
    other.update(pred, labels.masked_fill(void, -1))
    assert one.compute() == other.compute()
    assert close(one.compute()["per_class_iou"], brute_force_iou(pred, labels.masked_fill(void, 255), 255))


def brute_force_iou(pred: torch.Tensor, labels: torch.Tensor, classes: int) -> list[float | None]:
    valid = labels != 255
    result: list[float | None] = []
    for c in range(classes):
        union = int((((pred == c) | (labels == c)) & valid).sum())
        result.append(int(((pred == c) & (labels == c)).sum()) / union if union else None)
    return result


def test_parts_add_up() -> None:
    """Any division into batches and processes gives the same numbers, by merge, by reduce and by state_dict."""
    labels = torch.stack([blocky(4, 24, 28, s, 0.2) for s in range(6)])
    pred = torch.stack([blocky(4, 24, 28, s + 20) for s in range(6)])
    whole = SegmentationMetrics(4)
    whole.update(pred, labels)
    parts = [SegmentationMetrics(4) for _ in range(3)]
    for index in range(6):
        parts[index % 3].update(pred[index], labels[index])
    merged = SegmentationMetrics(4).merge(parts[0]).merge(parts[1].state_dict()).merge(parts[2])
    assert merged.compute() == whole.compute()
    loaded = SegmentationMetrics(4)
    loaded.update(pred, labels)
    loaded.load_state_dict(whole.state_dict())
    assert loaded.compute() == whole.compute()

    flat = [torch.cat([value.flatten() for value in part.state_dict().values()]) for part in parts]

    class Processes:
        """As accelerate.Accelerator: the sum over all processes."""

        def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "sum" and torch.equal(tensor, flat[0])
            return sum(flat[1:], tensor.clone())

    by_function = SegmentationMetrics(4)
    by_function.load_state_dict(parts[0].state_dict())
    assert by_function.reduce(lambda tensor: sum(flat[1:], tensor.clone())).compute() == whole.compute()
    assert parts[0].reduce(Processes()).compute() == whole.compute()


def test_state_dict_is_a_copy() -> None:
    metrics = SegmentationMetrics(2)
    state = metrics.state_dict()
    metrics.update(torch.zeros(1, 3, 3, dtype=torch.long), torch.zeros(1, 3, 3, dtype=torch.long))
    assert all(int(value.sum()) == 0 for value in state.values())


ZERO = torch.zeros(1, 3, 3, dtype=torch.long)
BAD = [
    (ZERO, ZERO[:, :2], ValueError, r"one shape \[B, H, W\], got \[1, 3, 3\] and \[1, 2, 3\]"),
    (ZERO[None], ZERO[None], ValueError, r"one shape \[B, H, W\]"),
    (ZERO.float(), ZERO, TypeError, "pred_labels must be integers, got torch.float32"),
    (ZERO, ZERO.bool(), TypeError, "labels must be integers, got torch.bool"),
    (ZERO + 2, ZERO, ValueError, r"pred_labels must be 0..1, got 2"),
    (ZERO - 1, ZERO, ValueError, r"pred_labels must be 0..1, got -1"),
    (ZERO, ZERO + 254, ValueError, r"labels must be 0..1, got 254"),
    (ZERO, ZERO - 3, ValueError, r"labels must be 0..1, got -3"),
    (ZERO, ZERO + 2**40, ValueError, r"labels must be 0..1, got 1099511627776"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("pred", "labels", "kind", "message"), BAD)
def test_bad_update(pred: torch.Tensor, labels: torch.Tensor, kind: type, message: str) -> None:
    metrics = SegmentationMetrics(2)
    with pytest.raises(kind, match=message):
        metrics.update(pred, labels)
    assert all(int(value.sum()) == 0 for value in metrics.state_dict().values())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 0}, "num_classes must be 1 to 4095, got 0"),
        ({"num_classes": 4096}, "num_classes must be 1 to 4095, got 4096"),
        ({"num_classes": 3, "ignore_index": 2}, r"ignore_index must lie outside 0..2, got 2"),
        ({"num_classes": 3, "boundary_ratio": 0}, "boundary_ratio must be positive, got 0"),
        (
            {"num_classes": 3, "absent": "none"},
            "absent must be one of skip, .*, zero, one, got 'none'",
        ),
    ],
)
def test_bad_settings(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationMetrics(**kwargs)


@pytest.mark.bad_input
def test_merge_of_another_number_of_classes() -> None:
    with pytest.raises(ValueError, match=r"confusion must have shape \[2, 2\], got \[3, 3\]"):
        SegmentationMetrics(2).merge(SegmentationMetrics(3))
