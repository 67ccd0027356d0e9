"""The same random points for a criterion and for what replaces it.

``recorded`` notes what the original draws with ``torch.rand``: the points of the matching, one set per image, and the
candidates and the uniform points of the selection. ``fed`` gives them to rendseg's functions, which draw the points of
all images of a layer together, and candidates and uniform points in one piece. Under autocast the originals compare
candidates in float32, and rendseg in the dtype of the logits: ``fed`` then widens them, so that both keep the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from rendseg import ops


class Draws:
    def __init__(self, num_points: int, oversample_ratio: float = 3.0, importance_ratio: float = 0.75) -> None:
        self.sizes = {
            num_points: "matching",
            int(num_points * oversample_ratio): "candidates",
            num_points - int(num_points * importance_ratio): "uniform",
        }
        assert len(self.sizes) == 3
        self.drawn: dict[str, list[torch.Tensor]] = {"matching": [], "candidates": [], "uniform": []}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        real = torch.rand

        def rand(*size: Any, **options: Any) -> torch.Tensor:
            drawn = real(*size, **options)
            self.drawn[self.sizes[drawn.shape[1]]].append(drawn)
            return drawn

        with mock.patch.object(torch, "rand", rand):
            yield

    @contextmanager
    def fed(self) -> Iterator[None]:
        left = {name: list(drawn) for name, drawn in self.drawn.items()}
        real = ops.sample_uncertain_points

        def rand(images: int, *size: Any, **options: Any) -> torch.Tensor:
            taken = torch.cat([left["matching"].pop(0) for _ in range(images)])
            assert taken.shape == (images, *size)
            return taken

        def select(logits: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            coords = torch.cat((left["candidates"].pop(0), left["uniform"].pop(0)), 1)
            return real(logits.float(), *args, random_coords=coords, **options)

        with mock.patch.object(torch, "rand", rand), mock.patch.object(ops, "sample_uncertain_points", select):
            yield
        assert not any(left.values()), {name: len(drawn) for name, drawn in left.items()}
