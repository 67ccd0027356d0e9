"""Least bytes and floating-point operations of each workload, and the time they take at given ceilings.

The arithmetic is that of the workloads W1-W3, T1-T3 and Enc: every input is read once, every output written once, and
only distinct feature pixels are fetched. ``tests/bench/test_floors.py`` holds it to independently worked figures.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Floor:
    """Least traffic and work of one call; ``serial`` holds where work cannot start before the traffic ends."""

    bytes: float
    flops: float

    def seconds(self, bytes_per_s: float, flops_per_s: float, serial: bool = False) -> float:
        traffic, work = self.bytes / bytes_per_s, self.flops / flops_per_s
        return traffic + work if serial else max(traffic, work)


@dataclass(frozen=True)
class RefineWorkload:
    """One refinement job: ``n`` maps of ``classes`` channels, ``coarse`` (h, w), doubled ``steps`` times. With
    ``boxes`` the maps are masks of boxes in one image, whose features are read through them."""

    name: str
    n: int
    classes: int
    coarse: tuple[int, int]
    steps: int
    num_points: int
    feature_size: tuple[int, int]
    feature_channels: int = 256
    hidden: int = 256
    layers: int = 3
    # distinct feature pixels fetched per selected point (measured on the benchmark's own input where possible)
    pixels_per_point: float = 2.4
    boxes: bool = False

    def output_size(self) -> tuple[int, int]:
        return self.coarse[0] << self.steps, self.coarse[1] << self.steps

    def points(self) -> int:
        """Points evaluated per map over all steps: of those that predict every cell, the last alone is needed."""
        cells = [(self.coarse[0] << s) * (self.coarse[1] << s) for s in range(1, self.steps + 1)]
        whole = [count for count in cells if count <= self.num_points]
        return sum(whole[-1:]) + self.num_points * (len(cells) - len(whole))

    def flops_per_point(self) -> int:
        """MLP with the coarse logits at every layer, predictor included."""
        width = self.feature_channels + self.classes
        per_hidden = self.hidden + self.classes
        return 2 * (width * self.hidden + (self.layers - 1) * per_hidden * self.hidden + per_hidden * self.classes)

    def floor(self, element_size: int, output: str = "logits") -> Floor:
        height, width = self.output_size()
        coarse = self.n * self.classes * self.coarse[0] * self.coarse[1] * element_size
        # a feature pixel fetched once stays in cache, so the whole map is the most that is read
        maps = 1 if self.boxes else self.n
        pixels = min(self.points() * self.n / maps * self.pixels_per_point, self.feature_size[0] * self.feature_size[1])
        features = maps * pixels * self.feature_channels * element_size
        if output == "logits":
            out = self.n * self.classes * height * width * element_size
        else:
            out = self.n * height * width * (1 if self.classes <= 256 else 2)
        return Floor(coarse + features + out, float(self.n * self.points() * self.flops_per_point()))


W1 = RefineWorkload("W1", 1, 19, (256, 512), 2, 8192, (256, 512))
W2 = RefineWorkload("W2", 16, 150, (32, 32), 4, 8096, (128, 128))
W3 = RefineWorkload("W3", 100, 1, (7, 7), 5, 784, (200, 336), pixels_per_point=1.0, boxes=True)


def encode_forward(batch: int, channels: int, positions: int, codes: int, element_size: int) -> Floor:
    """X and the codebook read once, E written once; two products of 2*M*K*D."""
    traffic = batch * channels * positions * element_size + codes * (channels + 1) * element_size
    traffic += batch * codes * channels * element_size
    return Floor(traffic, 4.0 * batch * positions * codes * channels)


def encode_backward(batch: int, channels: int, positions: int, codes: int, element_size: int) -> Floor:
    """X read once, its gradient written once; five products of 2*M*K*D."""
    traffic = 2 * batch * channels * positions * element_size + 2 * codes * (channels + 1) * element_size
    traffic += batch * codes * channels * element_size
    return Floor(traffic, 10.0 * batch * positions * codes * channels)


def point_sample_forward(n: int, channels: int, points: int, element_size: int) -> Floor:
    """Four taps read and one value written per point and channel, plus the coordinates."""
    return Floor(n * points * (5 * channels * element_size + 8), 8.0 * n * points * channels)


def point_sample_backward(n: int, channels: int, height: int, width: int, points: int, element_size: int) -> Floor:
    """The dense gradient written once, the incoming gradient and coordinates read once."""
    dense = n * channels * height * width * element_size
    return Floor(dense + n * points * (channels * element_size + 8), 8.0 * n * points * channels)


def selection(n: int, classes: int, height: int, width: int, num_points: int, element_size: int) -> Floor:
    """Training selection: the map read once, the coordinates written once."""
    return Floor(n * classes * height * width * element_size + n * num_points * 8, 0.0)
