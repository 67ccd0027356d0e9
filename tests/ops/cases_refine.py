"""Sample inputs and bad inputs of ``refine``, shared by the tests of every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rendseg.reference import HeadLayers


class Head(nn.Module):
    """A point head with the layers of the paper, written independently of ``rendseg.nn``."""

    def __init__(
        self,
        fine: int,
        classes: int,
        hidden: tuple[int, ...] = (12, 9),
        each: bool = True,
        coarse_first: bool = False,
        stock: bool = True,
    ) -> None:
        super().__init__()
        self.each, self.coarse_first, self.stock = each, coarse_first, stock
        widths = [fine, *hidden]
        generator = torch.Generator().manual_seed(7)
        self.layers = len(hidden) + 1
        for i, out in enumerate((*hidden, classes)):
            inputs = widths[i] + (classes if each or i == 0 else 0)
            weight = torch.randn(out, inputs, generator=generator) * (2 / inputs) ** 0.5
            setattr(self, f"weight{i}", nn.Parameter(weight))
            setattr(self, f"bias{i}", nn.Parameter(torch.randn(out, generator=generator) * 0.1))

    # Not nn.ParameterList, which torch.compile of PyTorch 2.8 does not take.
    @property
    def weights(self) -> list[nn.Parameter]:
        return [getattr(self, f"weight{i}") for i in range(self.layers)]

    @property
    def biases(self) -> list[nn.Parameter]:
        return [getattr(self, f"bias{i}") for i in range(self.layers)]

    def _join(self, x: Tensor, coarse: Tensor) -> Tensor:
        return torch.cat((coarse, x) if self.coarse_first else (x, coarse), dim=1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        coarse = coarse.to(fine.dtype)
        x = self._join(fine, coarse)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i and self.each:
                x = self._join(x, coarse.to(x.dtype))
            x = F.conv1d(x, weight.unsqueeze(2), bias)
            if i + 1 < self.layers:
                x = x.relu()
        return x

    def refine_parameters(self) -> HeadLayers | None:
        return HeadLayers(self.weights, self.biases, self.each, self.coarse_first) if self.stock else None


def inputs(
    n: int = 2, classes: int = 5, h: int = 6, w: int = 9, channels: tuple[int, ...] = (8,), seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """``(coarse, features)`` in float64; feature maps halve in size one after the other."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, classes, h, w, generator=generator, dtype=torch.float64) * 3
    features = [
        torch.randn(n, c, max(1, 2 * h >> i), max(1, 2 * w >> i), generator=generator, dtype=torch.float64)
        for i, c in enumerate(channels)
    ]
    return coarse, features


def refine_cases() -> Iterator[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """``(name, inputs(...), Head(...), refine(...))`` keyword arguments."""
    plain = {"steps": 2, "num_points": 30}
    yield "plain", {}, {}, plain
    yield "current coarse", {}, {}, plain | {"coarse_source": "current"}
    yield "current coarse, every cell", {}, {}, {"steps": 2, "num_points": 300, "coarse_source": "current"}
    odd = {"scale_factor": 3, "align_corners": True, "coarse_source": "current"}
    yield "current coarse, factor 3, aligned", {"h": 3, "w": 4}, {}, plain | odd
    yield "border padding", {}, {}, plain | {"padding_mode": "border"}
    yield "aligned corners", {}, {}, plain | {"align_corners": True}
    yield "coarse only at first", {}, {"each": False}, plain
    yield "coarse first", {}, {"coarse_first": True}, plain
    yield "coarse first, once", {}, {"coarse_first": True, "each": False}, plain
    yield "one layer", {}, {"hidden": ()}, plain
    yield "wide layers", {"classes": 19}, {"hidden": (64, 33, 70)}, plain
    yield "two maps", {"channels": (8, 3)}, {}, plain
    yield "factor 3", {}, {}, plain | {"scale_factor": 3}
    yield "output size", {}, {}, {"output_size": (24, 36), "num_points": 100}
    yield "every cell at first", {}, {}, {"steps": 3, "num_points": 300}
    yield "every cell always", {"n": 1}, {}, {"steps": 1, "num_points": 100_000}
    yield "one class", {"classes": 1, "n": 5}, {}, plain
    yield "one cell", {"h": 1, "w": 1}, {}, {"steps": 3, "num_points": 5}
    yield "several blocks", {"h": 12, "w": 20}, {}, {"steps": 2, "num_points": 500}
    yield "no step", {}, {}, {"steps": 0, "num_points": 5}


def roi_inputs(
    n: int = 5, images: int = 3, classes: int = 4, side: int = 3, channels: tuple[int, ...] = (8,), seed: int = 0
) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor], Tensor]:
    """``(coarse, features, rois, class_index)`` in float64: boxes in every image but the second, some of them partly
    off the map or of another orientation."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, classes, side, side, generator=generator, dtype=torch.float64) * 3
    features = [
        torch.randn(images, c, 12 >> i, 17 >> i, generator=generator, dtype=torch.float64)
        for i, c in enumerate(channels)
    ]
    image_index = torch.arange(n).flip(0) % images
    image_index[image_index == 1] = 0
    corner = torch.rand(n, 2, generator=generator) * 0.6
    boxes = torch.cat((corner, corner + 0.1 + torch.rand(n, 2, generator=generator) * 0.5), 1)
    boxes[:1] = torch.tensor([0.9, -0.2, 0.3, 1.1])
    return coarse, features, (image_index, boxes), torch.arange(n) % classes


def roi_cases() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """``(name, roi_inputs(...), refine(...))`` keyword arguments."""
    plain = {"steps": 3, "num_points": 40}
    yield "boxes", {}, plain
    yield "two whole steps", {}, {"steps": 4, "num_points": 150}
    yield "one image, two maps", {"images": 1, "channels": (8, 3)}, plain
    yield "border padding", {}, plain | {"padding_mode": "border"}
    yield "current coarse, every cell", {}, {"steps": 2, "num_points": 200, "coarse_source": "current"}
    yield "no box", {"n": 0}, plain


def instance_masks(
    coarse: Tensor,
    features: list[Tensor],
    head: nn.Module,
    rois: tuple[Tensor, Tensor],
    class_index: Tensor,
    steps: int,
    num_points: int,
    padding_mode: str = "zeros",
) -> Tensor:
    """Masks of objects as detectron2 makes them, written out: begin with the largest grid of which every cell is
    predicted anyway, then upsample and predict the most uncertain cells, image by image."""
    image_index, boxes = rois
    n, _, side, _ = coarse.shape
    while 4 * side * side <= num_points and steps > 0:
        side, steps = 2 * side, steps - 1
    logits = None
    for _ in range(steps + 1):
        if logits is None:
            cells = torch.arange(side * side).expand(n, -1)
        else:
            side *= 2
            logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
            cells = (-logits[torch.arange(n), class_index].abs()).flatten(1).topk(num_points, dim=1).indices
        at = torch.stack((cells % side + 0.5, cells // side + 0.5), -1) / side
        placed = boxes[:, None, :2] + at * (boxes[:, None, 2:] - boxes[:, None, :2])

        def sample(maps: Tensor, points: Tensor) -> Tensor:
            grid = (2 * points.to(maps.dtype) - 1).unsqueeze(2)
            return F.grid_sample(maps, grid, padding_mode=padding_mode, align_corners=False)[..., 0]

        fine = coarse.new_zeros(n, sum(f.shape[1] for f in features), cells.shape[1])
        for image in range(features[0].shape[0]):
            own = image_index == image
            for i in own.nonzero().flatten().tolist():
                maps = [f[image : image + 1] for f in features]
                fine[i] = torch.cat([sample(m, placed[i : i + 1]) for m in maps], 1)[0]
        values = head(fine, sample(coarse, at))
        if logits is None:
            logits = values.unflatten(2, (side, side))
        else:
            where = cells.unsqueeze(1).expand_as(values)
            logits = logits.flatten(2).scatter(2, where, values).unflatten(2, (side, side))
    assert logits is not None
    return logits


def bad_inputs() -> list[tuple[str, dict[str, Any], type[Exception], str]]:
    coarse, features = inputs()
    coarse, features = coarse.float(), [f.float() for f in features]
    head = Head(8, 5)

    def case(**changes: Any) -> dict[str, Any]:
        return {"coarse": coarse, "features": features, "head": head, "steps": 1, "num_points": 4} | changes

    def wrong(fine: Tensor, points: Tensor) -> Tensor:
        return points[:, :3]

    index, boxes, several = torch.zeros(2, dtype=torch.int64), torch.rand(2, 4), [features[0], features[0][:1]]
    rois = [
        ("rois", (index,), ValueError, r"rois must be \(image_index \[N\], boxes \[N, 4\]\), got 1 tensors"),
        ("roi images", (index.int(), boxes), TypeError, "image_index must be int64, got torch.int32"),
        ("roi count", (index[:1], boxes), ValueError, r"image_index must have shape \[N\] with N = 2 as in coarse"),
        (
            "roi image",
            (index + 2, boxes),
            IndexError,
            r"image_index must lie in \[0, B\) = \[0, 2\), got 2 at position 0",
        ),
        (
            "roi boxes",
            (index, boxes[:, :3]),
            ValueError,
            r"boxes must have shape \[N, 4\] with N = 2 as in coarse, got",
        ),
        ("roi dtype", (index, boxes.half()), TypeError, "boxes must be float32, got torch.float16"),
    ]

    return [
        *((name, case(rois=given), exception, pattern) for name, given, exception, pattern in rois),
        (
            "roi maps",
            case(features=several, rois=(index, boxes)),
            ValueError,
            r"features\[1\] must have N = 2 as in features\[0\]",
        ),
        (
            "class count",
            case(class_index=index[:1]),
            ValueError,
            r"class_index must have shape \[N\] with N = 2 as in coarse",
        ),
        ("class", case(class_index=index - 1), IndexError, r"class_index must lie in \[0, C\) = \[0, 5\), got -1"),
        (
            "labels of a class",
            case(class_index=index, output="labels"),
            ValueError,
            'output must be "logits" or "class" with class_index: labels compare all classes',
        ),
        ("no class", case(output="class"), ValueError, 'class_index must be given with output="class", got None'),
        ("coarse rank", case(coarse=coarse[0]), ValueError, r"coarse must have shape \[N, C, H, W\], got \[5, 6, 9\]"),
        ("coarse dtype", case(coarse=coarse.long()), TypeError, "coarse must be float32, float64, float16 or bfloat16"),
        ("no features", case(features=[]), ValueError, "features must hold at least one tensor"),
        ("feature rank", case(features=features[0][0]), ValueError, r"features\[0\] must have shape \[N, C, H, W\]"),
        ("feature batch", case(features=[features[0][:1]]), ValueError, r"features\[0\] must have N = 2 as in coarse"),
        (
            "feature dtypes",
            case(features=[features[0], features[0].half()]),
            TypeError,
            r"features\[1\] must have the dtype of features\[0\]",
        ),
        ("feature device", case(features=features[0].to("meta")), RuntimeError, r"features\[0\] must be on the device"),
        (
            "feature side",
            case(features=features[0][:, :, :1].expand(-1, -1, 2**31, -1)),
            ValueError,
            r"features\[0\] must have H and W below 2\^31, got shape \[2, 8, 2147483648, 18\]",
        ),
        ("points", case(num_points=0), ValueError, "num_points must be positive, got 0"),
        (
            "source",
            case(coarse_source="fine"),
            ValueError,
            "coarse_source must be one of original, current, got 'fine'",
        ),
        (
            "padding",
            case(padding_mode="reflect"),
            ValueError,
            "padding_mode must be one of zeros, border, got 'reflect'",
        ),
        ("output", case(output="mask"), ValueError, "output must be one of logits, labels, class, got 'mask'"),
        ("factor", case(scale_factor=1), ValueError, "scale_factor must be at least 2, got 1"),
        (
            "more cells than can be counted",
            case(steps=1000),
            ValueError,
            r"steps must give fewer than 2\^32 cells, got 1000 steps of 2 from 6 x 9: step 14 has 98304 x 147456",
        ),
        ("huge factor", case(scale_factor=2**62 + 1), ValueError, r"scale_factor must be less than 2\^31, got 4611"),
        ("negative steps", case(steps=-1), ValueError, "steps must not be negative, got -1"),
        ("no steps", case(steps=None), ValueError, "exactly one of steps and output_size must be given"),
        ("both", case(output_size=(12, 18)), ValueError, "exactly one of steps and output_size must be given"),
        (
            "unreachable",
            case(steps=None, output_size=(12, 20)),
            ValueError,
            r"cannot be reached .* next size .* \(24, 36\)",
        ),
        ("smaller", case(steps=None, output_size=(3, 4)), ValueError, "cannot be reached"),
        ("size rank", case(steps=None, output_size=(12, 18, 1)), ValueError, r"output_size must be \(height, width\)"),
        (
            "head shape",
            case(head=wrong),
            ValueError,
            r"head must return logits of shape \[N, C, P\] = \[2, 5, 4\], got",
        ),
        ("head type", case(head=lambda f, c: None), TypeError, "head must return a tensor, got NoneType"),
        ("head dtype", case(head=lambda f, c: c.long()), TypeError, "head must return floating-point logits"),
        (
            "too many classes",
            case(coarse=torch.zeros(2, 32769, 1, 1), output="labels"),
            ValueError,
            "at most 32768 classes, got 32769",
        ),
    ]


def bad_layers() -> list[tuple[str, dict[str, Any], type[Exception], str]]:
    """Bad arguments of the private one-call op, by name."""
    coarse, features = inputs()
    coarse, features = coarse.float(), [f.float() for f in features]
    head = Head(8, 5)
    weights, biases = [w.detach() for w in head.weights], [b.detach() for b in head.biases]

    def case(**changes: Any) -> dict[str, Any]:
        return {
            "coarse": coarse,
            "features": features,
            "weights": weights,
            "biases": biases,
            "steps": 1,
            "num_points": 4,
            "coarse_source": "original",
            "scale_factor": 2,
            "align_corners": False,
            "padding_mode": "zeros",
            "coarse_each_layer": True,
            "coarse_first": False,
            "labels": False,
            "class_index": None,
            "class_only": False,
            "image_index": None,
            "boxes": None,
        } | changes

    return [
        (
            "boxes without images",
            case(boxes=torch.rand(2, 4)),
            ValueError,
            "image_index and boxes must be given together, got one of them",
        ),
        (
            "labels of a class",
            case(labels=True, class_index=torch.zeros(2, dtype=torch.int64)),
            ValueError,
            'output must be "logits" or "class" with class_index',
        ),
        ("class alone", case(class_only=True), ValueError, 'class_index must be given with output="class", got None'),
        ("no layer", case(weights=[], biases=[]), ValueError, "weights and biases must hold one tensor per layer"),
        (
            "count",
            case(biases=biases[:1]),
            ValueError,
            "weights and biases must hold one tensor per layer, got 3 and 1",
        ),
        ("inputs", case(coarse_each_layer=False), ValueError, r"weights\[1\] must have shape \[O, I\] with I = 12"),
        ("outputs", case(weights=weights[:2], biases=biases[:2]), ValueError, r"weights\[1\] must have shape \[C, I\]"),
        (
            "bias",
            case(biases=[biases[0][:3], *biases[1:]]),
            ValueError,
            r"biases\[0\] must have shape \[O\] with O = 12",
        ),
        ("dtype", case(biases=[biases[0].half(), *biases[1:]]), TypeError, "must have the dtype of"),
        ("integer", case(weights=[w.long() for w in weights]), TypeError, r"weights\[0\] must be float32"),
        ("mixed", case(features=[f.double() for f in features]), TypeError, "must all be float64 or none"),
        ("source", case(coarse_source="x"), ValueError, "coarse_source must be one of original, current, got 'x'"),
        ("padding", case(padding_mode="x"), ValueError, "padding_mode must be one of zeros, border, got 'x'"),
        ("factor", case(scale_factor=1), ValueError, "scale_factor must be at least 2, got 1"),
        ("steps", case(steps=-1), ValueError, "steps must not be negative, got -1"),
        ("many steps", case(steps=1000), ValueError, r"1000 steps of 2 from 6 x 9: step 14 has 98304 x 147456"),
        ("huge factor", case(scale_factor=2**62 + 1), ValueError, r"scale_factor must be less than 2\^31, got 4611"),
        (
            "feature side",
            case(features=[features[0][:, :, :1].expand(-1, -1, 2**31, -1)]),
            ValueError,
            r"features\[0\] must have H and W below 2\^31, got shape \[2, 8, 2147483648, 18\]",
        ),
        ("points", case(num_points=-1), ValueError, "num_points must be positive, got -1"),
    ]
