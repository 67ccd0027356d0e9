"""Views, windows and their merging against the frameworks' rules written down once more (``frameworks.py``)."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rendseg.engine.config import EvalConfig
from rendseg.engine.inference import black, is_plain, predict_labels, predict_scores, scaled_size, window_spans
from tests.engine.frameworks import FRAMEWORKS, detectron2, mmseg, pytorch_encoding

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


class Net(nn.Module):
    """Two convolutions in float64 whose result depends on the neighbourhood and on the border; coarse at stride 4."""

    refines = True
    align_corners = False

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, classes, 3, padding=1)
        ).double()
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def predict(self, images: Tensor, output: str = "logits") -> SimpleNamespace:
        self.calls.append((output, tuple(images.shape)))
        logits = 4 * self.body(images)
        coarse = F.avg_pool2d(F.pad(logits, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4)), 4)
        if output == "labels":
            return SimpleNamespace(coarse=coarse, refined=None, labels=logits.argmax(1).to(torch.uint8))
        return SimpleNamespace(coarse=coarse, refined=logits, labels=None)

    def upsample(self, coarse: Tensor, size: Any) -> Tensor:
        return F.interpolate(coarse, scale_factor=4, mode="bilinear", align_corners=False)[:, :, : size[0], : size[1]]

    @torch.no_grad()
    def both(self, images: Tensor) -> list[Tensor]:
        """[coarse, refined] logits, for the other implementations."""
        output = self.predict(images)
        return [self.upsample(output.coarse, images.shape[2:]), output.refined]


def image(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(1, 3, height // 3 + 2, width // 3 + 2, generator=generator, dtype=torch.float64)
    return F.interpolate(small, (height, width), mode="bilinear") + 0.1 * torch.randn(
        1, 3, height, width, generator=generator, dtype=torch.float64
    )


WINDOWS = [None, ([16, 20], [10, 13]), ([24, 24], [24, 24]), ([90, 16], [7, 16]), ([80, 80], [80, 80])]
VIEWS = [([1.0], False), ([1.0], True), ([0.5, 0.75, 1.0, 1.6], False), ([0.5, 1.0, 1.25], True), ([0.75], False)]


@pytest.mark.parametrize("preset", FRAMEWORKS)
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_equals_the_frameworks(preset: str, windows: Any) -> None:
    net = Net()
    window, stride = windows or (None, None)
    for (scales, flip), size in itertools.product(VIEWS, [(35, 47), (41, 23)]):
        options = EvalConfig(preset=preset, scales=scales, flip=flip, window=window, window_stride=stride)
        x = image(*size)
        got = predict_labels(net, x, size, options, black(MEAN, STD))
        extra = {"fill": black(MEAN, STD)} if preset == "pytorch_encoding" else {}
        wanted = FRAMEWORKS[preset](net.both, x, scales, flip, window, stride, **extra)
        for kind, labels in zip(("coarse", "refined"), wanted, strict=True):
            assert torch.equal(got[kind][0].long(), labels), (preset, kind, scales, flip, size)
        assert len(wanted[1].unique()) > 2  # a picture of one class would prove nothing


def test_the_presets_differ() -> None:
    """What the test above compares is not the same five times."""
    net, x = Net(), image(35, 47)
    options = {"scales": [0.5, 1.0, 1.25], "window": [16, 20], "flip": True}
    maps = [predict_labels(net, x, (35, 47), EvalConfig(preset=p, **options))["refined"] for p in FRAMEWORKS]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(maps, 2))


def test_base_size_max_size_and_aligned_logits() -> None:
    net, x = Net(), image(30, 44)
    options = EvalConfig(preset="pytorch_encoding", scales=[0.5, 1.1], window=[24, 24], base_size=52)
    wanted = pytorch_encoding(net.both, x, [0.5, 1.1], True, [24, 24], [16, 16], base=52)
    assert torch.equal(predict_labels(net, x, (30, 44), options)["refined"][0].long(), wanted[1])
    options = EvalConfig(preset="detectron2", scales=[0.5, 2.0], max_size=61)
    wanted = detectron2(net.both, x, [0.5, 2.0], False, max_size=61)
    assert torch.equal(predict_labels(net, x, (30, 44), options)["coarse"][0].long(), wanted[0])
    net.align_corners = True  # mmseg: as the model has it
    wanted = mmseg(net.both, x, [0.5, 1.5], True, None, None, aligned=True)
    got = predict_labels(net, x, (30, 44), EvalConfig(preset="mmseg", scales=[0.5, 1.5], flip=True))
    assert torch.equal(got["refined"][0].long(), wanted[1])
    other = mmseg(net.both, x, [0.5, 1.5], True, None, None, aligned=False)
    assert not torch.equal(other[1], wanted[1])


def test_both_flips_and_another_size() -> None:
    """Four mirror images (PaddleSeg's order), and labels of another size than the image."""
    net, x = Net(), image(21, 26)
    options = EvalConfig(flip=True, flip_vertical=True, merge="softmax")
    total = torch.zeros(())
    for axes in ((), (3,), (2,), (3, 2)):
        logits = net.both(x.flip(axes))[1].flip(axes)
        total = total + F.interpolate(logits, (33, 40), mode="bilinear").softmax(1)
    scores = predict_scores(net, x, (33, 40), options)["refined"]
    torch.testing.assert_close(scores, total, rtol=1e-12, atol=1e-12)
    assert len([c for c in net.calls if c[0] == "logits"]) == 8


def test_one_view_of_the_image_makes_labels_without_scores() -> None:
    net, x = Net(), image(20, 24)
    for options in (EvalConfig(), EvalConfig(window=[20, 30]), EvalConfig(window=[20, 24], window_border="pad")):
        net.calls.clear()
        assert is_plain(20, 24, (20, 24), options)
        labels = predict_labels(net, x, (20, 24), options)
        assert net.calls == [("labels", (1, 3, 20, 24))]
        assert torch.equal(labels["refined"].long(), net.both(x)[1].argmax(1))
        assert torch.equal(labels["coarse"].long(), net.both(x)[0].argmax(1))
    for changes in (
        {"scales": [0.5]},
        {"flip": True},
        {"flip_vertical": True},
        {"window": [19, 24]},
        {"window": [20, 30], "window_border": "pad"},
        {"scale_divisor": 16},
        {"rounding": "short_side", "base_size": 21},
    ):
        assert not is_plain(20, 24, (20, 24), EvalConfig(**changes)), changes
    assert not is_plain(20, 24, (20, 25), EvalConfig())


def test_a_network_that_does_not_refine_is_asked_once() -> None:
    net = Net()
    net.refines = False
    scores = predict_scores(net, image(20, 24), (20, 24), EvalConfig(flip=True, merge="logits"))
    assert scores["coarse"] is scores["refined"]


@pytest.mark.parametrize("merge", ["softmax", "logits", "exp"])
def test_images_of_a_batch_do_not_mix(merge: str) -> None:
    net = Net()
    batch = torch.cat([image(22, 27, seed) for seed in range(3)])
    options = EvalConfig(scales=[0.5, 1.0], flip=True, window=[12, 16], merge=merge)
    together = predict_scores(net, batch, (22, 27), options)["refined"]
    alone = torch.cat([predict_scores(net, x[None], (22, 27), options)["refined"] for x in batch])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_large_logits_do_not_overflow_under_exp() -> None:
    """exp of 2 x 60 is infinite in float32, and then the class that comes first would win."""

    class Loud(Net):
        def predict(self, images: Tensor, output: str = "logits") -> SimpleNamespace:
            logits = torch.tensor([58.0, 60.0, 59.0])[None, :, None, None].expand(1, 3, *images.shape[2:])
            return SimpleNamespace(coarse=logits, refined=logits.clone())

        def upsample(self, coarse: Tensor, size: Any) -> Tensor:
            return coarse

    labels = predict_labels(Loud(), torch.zeros(1, 3, 9, 9), (9, 9), EvalConfig(merge="exp", flip=True, scales=[1, 2]))
    assert (labels["refined"] == 1).all()


def test_input_is_left_as_it_was() -> None:
    net, x = Net(), image(20, 24)
    kept = x.clone()
    for preset in FRAMEWORKS:
        predict_labels(net, x, (20, 24), EvalConfig(preset=preset, window=[15, 15], scales=[1.0, 0.5]), [1, 1, 1])
        assert torch.equal(x, kept)


# ------------------------------------------------------------------------------------------------------ geometry


def brute_force_spans(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Walk along until the end is reached; a window that would stick out is moved back."""
    spans, start = [], 0
    while True:
        if start + window >= length:
            return [*spans, (max(0, length - window), length)]
        spans.append((start, start + window))
        start += stride


def test_windows_against_brute_force() -> None:
    for length, window in itertools.product(range(1, 26), range(1, 13)):
        for stride in range(1, window + 1):
            spans = window_spans(length, window, stride, "shift")
            assert spans == brute_force_spans(length, window, stride), (length, window, stride)
            grid = window_spans(length, window, stride, "pad")
            assert [start for start, _ in grid] == [i * stride for i in range(len(grid))]
            assert [end for start, end in grid] == [min(start + window, length) for start, _ in grid]
            assert len(grid) == 1 or grid[-2][1] < length  # none too many
            for found in (spans, grid):
                covered = {position for start, end in found for position in range(start, end)}
                assert covered == set(range(length))


def test_sizes() -> None:
    def size(height: int, width: int, scale: float, **options: Any) -> tuple[int, int]:
        return scaled_size(height, width, scale, EvalConfig(**options))

    assert size(1024, 2048, 0.75) == (768, 1536)
    assert size(7, 9, 0.75) == (5, 7) and size(7, 9, 0.75, rounding="mmcv") == (5, 6)  # 5.25, 6.75; then 9 * 5/7 = 6.4
    assert size(360, 480, 1.0, rounding="mmcv", base_size=[2048, 512]) == (512, 683)
    assert size(480, 100, 1.0, rounding="mmcv", base_size=[2048, 512]) == (2048, 427)  # the box stands up
    assert size(480, 100, 0.5, rounding="mmcv", base_size=[2048, 512]) == (1024, 213)
    assert size(375, 500, 1.75, rounding="long_side", base_size=520) == (683, 910)
    assert size(500, 375, 0.75, rounding="long_side", base_size=521) == (391, 293)  # ceil(390.75)
    assert size(10, 10, 0.33, rounding="long_side") == (4, 4)
    assert size(1024, 2048, 1.0, rounding="short_side", base_size=512) == (512, 1024)
    assert size(333, 500, 1.0, rounding="short_side", base_size=800, max_size=1100) == (733, 1100)
    assert size(500, 333, 0.5, rounding="short_side") == (251, 167)
    assert size(100, 101, 1.0, scale_divisor=32) == (128, 128) and size(96, 64, 1.0, scale_divisor=32) == (96, 64)
    assert size(3, 50, 0.1) == (1, 5)  # never nothing
    for rounding in ("half_up", "mmcv", "long_side", "short_side"):
        assert size(37, 91, 1.0, rounding=rounding) == size(37, 91, 1, rounding=rounding) == (37, 91)


@pytest.mark.parametrize("merge", ["softmax", "logits", "exp"])
@pytest.mark.parametrize("border", ["shift", "pad"])
@pytest.mark.parametrize(
    ("size", "window", "stride"), [((50, 37), 16, 5), ((33, 64), [16, 64], 11), ((20, 70), 24, 24)]
)
def test_strips_give_the_labels_of_whole_scores(
    merge: str, border: str, size: tuple[int, int], window: Any, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rendseg.engine import inference

    heights, labels_of = [], inference._labels
    monkeypatch.setattr(inference, "_labels", lambda scores: heights.append(scores.shape[2]) or labels_of(scores))
    options = EvalConfig(window=window, window_stride=stride, window_border=border, merge=merge, flip=True)
    network, images = Net(), torch.cat([image(*size), image(*size, seed=1)])
    found = predict_labels(network, images, size, options, black(MEAN, STD))
    assert max(heights) <= options.window[0]  # of full height there are no scores
    scores = predict_scores(network, images, size, options, black(MEAN, STD))
    for kind in ("coarse", "refined"):
        assert found[kind].shape == (2, *size) and torch.equal(found[kind], scores[kind].argmax(1).to(torch.uint8))
