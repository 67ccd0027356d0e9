"""Every kernel in every configuration that is used by default, with those of the selection; bfloat16 is float16 too."""

from __future__ import annotations

import functools

import torch

from .._select import MAX_BLOCKS, SMALL
from ..uncertain_points import sample_uncertain_points_triton, uncertain_points_triton, uncertainty_triton
from . import NAMES, Calls, layout_name, meta


def calls() -> Calls:
    classes = meta(2, dtype=torch.int64)
    draws = {"image_index": None, "padding_mode": "zeros", "align_corners": False, "generator": None}
    for dtype, kind in NAMES.items():
        for channels, last in ((19, False), (19, True), (8, True)):
            logits = meta(2, channels, 256, 512, dtype=dtype, channels_last=last)
            name = f"{kind} {layout_name(last)} C={channels}"
            points = functools.partial(sample_uncertain_points_triton, logits, 2048, 3.0, 0.75, **draws)
            yield name, functools.partial(uncertain_points_triton, logits, 2048, None)
            yield f"{name} drawn", functools.partial(points, class_index=None, random_coords=None)
            if last:
                continue
            yield f"{name} given", functools.partial(points, class_index=None, random_coords=meta(2, 6656, 2))
            if dtype == torch.float32:
                yield f"{name} margins", functools.partial(uncertainty_triton, logits, None)
                yield f"{name} class", functools.partial(uncertain_points_triton, logits, 2048, classes)
                yield f"{name} class drawn", functools.partial(points, class_index=classes, random_coords=None)
                masks = {"class_index": meta(300, dtype=torch.int64), "image_index": meta(300, dtype=torch.int64)}
                yield f"{name} masks drawn", functools.partial(points, **masks, random_coords=None)
                strided = logits[..., ::2]
                yield f"{name} strided", functools.partial(uncertain_points_triton, strided, 2048, None)
    for cells in (128, 4096, SMALL, 2048 * MAX_BLOCKS):
        logits = meta(2, 1, cells // 64, 64)
        yield f"{cells} cells", functools.partial(uncertain_points_triton, logits, 112, None)
    for given in (None, meta(2, 3136, 2)):
        logits = meta(2, 1, 256, 512)
        points = functools.partial(sample_uncertain_points_triton, logits, 1024, 2.0, 0.75, **draws)
        yield (
            f"few {'drawn' if given is None else 'given'}",
            functools.partial(points, class_index=None, random_coords=None if given is None else meta(2, 2304, 2)),
        )
