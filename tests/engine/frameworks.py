"""What mmsegmentation, PaddleSeg, detectron2 and PyTorch-Encoding compute, written down once more in plain PyTorch.

``net(images) -> [coarse, refined]``: logits [1, C, h, w] of the size of the images. Each function returns
[coarse, refined] label maps [H, W] of one image [1, 3, H, W]. ``window`` and ``stride``: (height, width) or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Net = Callable[[Tensor], list[Tensor]]
Pair = Sequence[int] | None


def bilinear(x: Tensor, height: int, width: int, aligned: bool = False, antialias: bool = False) -> Tensor:
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=aligned, antialias=antialias)


def sliding(net: Net, x: Tensor, window: Pair, stride: Pair) -> list[Tensor]:
    """mmseg's slide_inference; PaddleSeg's is the same."""
    if window is None or stride is None:
        return net(x)
    height, width = x.shape[2:]
    totals, count = [], torch.zeros(1, 1, height, width)
    for i in range(max(height - window[0] + stride[0] - 1, 0) // stride[0] + 1):
        for j in range(max(width - window[1] + stride[1] - 1, 0) // stride[1] + 1):
            bottom, right = min(i * stride[0] + window[0], height), min(j * stride[1] + window[1], width)
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            parts = net(x[:, :, top:bottom, left:right])
            around = (left, width - right, top, height - bottom)
            padded = [F.pad(part, around) for part in parts]
            totals = [a + b for a, b in zip(totals, padded, strict=True)] if totals else padded
            count[:, :, top:bottom, left:right] += 1
    assert count.min() > 0
    return [total / count for total in totals]


def mmseg(
    net: Net, image: Tensor, scales: Sequence[float], flip: bool, window: Pair, stride: Pair, aligned: bool = False
) -> list[Tensor]:
    height, width = image.shape[2:]
    results = []
    for scale in scales:
        boxed = sorted((int(width * scale + 0.5), int(height * scale + 0.5)))
        factor = min(boxed[1] / max(height, width), boxed[0] / min(height, width))
        x = bilinear(image, int(height * factor + 0.5), int(width * factor + 0.5))
        for flipped in (False, True)[: 1 + flip]:
            parts = sliding(net, x.flip(3) if flipped else x, window, stride)
            parts = [part.flip(3) if flipped else part for part in parts]
            results.append([bilinear(part, height, width, aligned) for part in parts])
    if len(results) == 1:
        return [part.argmax(1)[0] for part in results[0]]
    sums = [sum(part.softmax(1) for part in parts) for parts in zip(*results, strict=True)]
    return [total.argmax(1)[0] for total in sums]


def rendseg(
    net: Net, image: Tensor, scales: Sequence[float], flip: bool, window: Pair, stride: Pair, aligned: bool = False
) -> list[Tensor]:
    height, width = image.shape[2:]
    totals: list[Tensor] = [torch.zeros(()), torch.zeros(())]
    for scale in scales:
        x = bilinear(image, int(height * scale + 0.5), int(width * scale + 0.5), antialias=True)
        for axes in ((), (3,))[: 1 + flip]:
            for k, part in enumerate(sliding(net, x.flip(axes), window, stride)):
                score = bilinear(part.flip(axes), height, width, aligned)
                totals[k] = totals[k] + (score.softmax(1) if len(scales) + flip > 1 else score)
    return [total.argmax(1)[0] for total in totals]


def paddleseg(
    net: Net, image: Tensor, scales: Sequence[float], flip: bool, window: Pair, stride: Pair, aligned: bool = False
) -> list[Tensor]:
    height, width = image.shape[2:]
    if list(scales) == [1.0] and not flip:  # without --aug_eval: the argmax of the logits
        return [part.argmax(1)[0] for part in sliding(net, image, window, stride)]
    totals: list[Tensor] = [torch.zeros(()), torch.zeros(())]
    x = image
    for scale in scales:
        x = bilinear(x, int(height * scale + 0.5), int(width * scale + 0.5))  # of the scale before: PaddleSeg's loop
        for flipped in (False, True)[: 1 + flip]:
            for k, part in enumerate(sliding(net, x.flip(3) if flipped else x, window, stride)):
                part = part.flip(3) if flipped else part
                totals[k] = totals[k] + bilinear(part, height, width, aligned).softmax(1)
    return [total.argmax(1)[0] for total in totals]


def detectron2(
    net: Net,
    image: Tensor,
    scales: Sequence[float],
    flip: bool,
    window: Pair = None,
    stride: Pair = None,
    aligned: bool = False,
    max_size: float = math.inf,
) -> list[Tensor]:
    height, width = image.shape[2:]
    results = []
    for scale in scales:
        target = int(min(height, width) * scale + 0.5)
        ratio = target / min(height, width)
        high, wide = (target, ratio * width) if height < width else (ratio * height, target)
        if max(high, wide) > max_size:
            ratio = max_size / max(high, wide)
            high, wide = high * ratio, wide * ratio
        size = int(high + 0.5), int(wide + 0.5)
        x = image if size == (height, width) else bilinear(image, *size, antialias=True)
        for flipped in (False, True)[: 1 + flip]:
            parts = sliding(net, x.flip(3) if flipped else x, window, stride)
            parts = [part.flip(3) if flipped else part for part in parts]
            results.append([bilinear(part, height, width, aligned) for part in parts])
    return [sum(parts).argmax(1)[0] for parts in zip(*results, strict=True)]


def pytorch_encoding(
    net: Net,
    image: Tensor,
    scales: Sequence[float],
    flip: bool,
    window: Pair,
    stride: Pair,
    aligned: bool = True,
    base: int | None = None,
    fill: Sequence[float] = (0.0, 0.0, 0.0),
) -> list[Tensor]:
    """In float64 from the exponential on."""

    def filled(x: Tensor) -> Tensor:
        assert window is not None
        x_pad = torch.empty(1, 3, max(x.shape[2], window[0]), max(x.shape[3], window[1]), dtype=x.dtype)
        for channel in range(3):
            x_pad[:, channel] = fill[channel]
        x_pad[:, :, : x.shape[2], : x.shape[3]] = x
        return x_pad

    def both(x: Tensor) -> list[Tensor]:
        parts = net(x)
        if flip:
            parts = [a + b.flip(3) for a, b in zip(parts, net(x.flip(3)), strict=True)]
        return [part.double().exp() for part in parts]

    height, width = image.shape[2:]
    totals: list[Tensor] = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for scale in scales:
        long = math.ceil((base or max(height, width)) * scale)
        if height > width:
            high, wide = long, int(1.0 * width * long / height + 0.5)
        else:
            high, wide = int(1.0 * height * long / width + 0.5), long
        x = bilinear(image, high, wide, aligned=True) if (high, wide) != (height, width) else image
        if window is None or stride is None:
            outputs = both(x)
        else:
            x = filled(x)
            tall, broad = x.shape[2:]
            outputs, count = [], torch.zeros(1, 1, tall, broad)
            for i in range(math.ceil((tall - window[0]) / stride[0]) + 1):
                for j in range(math.ceil((broad - window[1]) / stride[1]) + 1):
                    top, left = i * stride[0], j * stride[1]
                    bottom, right = min(top + window[0], tall), min(left + window[1], broad)
                    parts = both(filled(x[:, :, top:bottom, left:right]))
                    if not outputs:
                        outputs = [torch.zeros(1, part.shape[1], tall, broad, dtype=part.dtype) for part in parts]
                    for output, part in zip(outputs, parts, strict=True):
                        output[:, :, top:bottom, left:right] += part[:, :, : bottom - top, : right - left]
                    count[:, :, top:bottom, left:right] += 1
            outputs = [(output / count)[:, :, :high, :wide] for output in outputs]
        for k, output in enumerate(outputs):
            same = (high, wide) == (height, width)
            totals[k] = totals[k] + (output if same else bilinear(output, height, width, aligned))
    return [total.argmax(1)[0] for total in totals]


FRAMEWORKS: dict[str, Callable[..., list[Tensor]]] = {
    "rendseg": rendseg,
    "mmseg": mmseg,
    "paddleseg": paddleseg,
    "detectron2": detectron2,
    "pytorch_encoding": pytorch_encoding,
}
