"""The random points of a call by Philox4x32-10 (Salmon et al. 2011): a draw is a function of a key and its place."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

_FACTORS = 0xD2511F53, 0xCD9E8D57
_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def draw_key(device: torch.device, generator: Generator | None = None) -> Tensor:
    """``[1]`` int64, which moves the generator on by one number."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


def _wide_product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of ``word * factor``. By halves of the word, so that nothing overflows."""
    low = (word & 0xFFFF) * factor
    high = (word >> 16) * factor + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits, held in int64, for each counter of four words; ``key`` is int64."""
    x, y, z, w = counter
    keys = [key & _WORD, key >> 32 & _WORD]
    for _ in range(10):
        (high_0, low_0), (high_1, low_1) = _wide_product(x, _FACTORS[0]), _wide_product(z, _FACTORS[1])
        x, y, z, w = high_1 ^ y ^ keys[0], low_1, high_0 ^ w ^ keys[1], low_0
        keys = [k + step & _WORD for k, step in zip(keys, _STEPS, strict=True)]
    return x, y, z, w


def uniform_points(key: Tensor, n: int, points: int) -> Tensor:
    """``[n, points, 2]`` float32 in ``[0, 1)``. Counter ``(0, 0, i, i >> 32)`` gives points 2i and 2i + 1 of all.

    An item has a whole number of counters: of an odd number of points, the last counter gives one.
    """
    pairs = (points + 1) // 2
    index = torch.arange(n * pairs, device=key.device)
    none = torch.zeros_like(index)
    words = torch.stack(philox(key, (none, none, index & _WORD, index >> 32)), 1)
    drawn = (words >> 8).to(torch.float32) * 2.0**-24  # the upper 24 bits, all that a float has
    return drawn.view(n, 2 * pairs, 2)[:, :points]
