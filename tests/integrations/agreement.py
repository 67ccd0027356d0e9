"""How far a patched criterion is from the original: checked, and printed as a row of the table in docs/integrations.md.

``pytest tests/integrations tests/peers -s | grep '^| '`` prints the whole table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

TOLERANCE = 1e-4


def agree(
    label: str,
    got: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    leaves: Sequence[Tensor],
    dtype: str = "float32",
) -> None:
    """Each loss agrees relative to itself, the gradient of their sum to the largest of each tensor."""
    assert list(got) == list(wanted)
    losses = max(_relative(got[name], wanted[name]) for name in wanted)
    sums = [sum(loss.sum() for loss in found.values() if loss.requires_grad) for found in (got, wanted)]
    pairs = zip(*(torch.autograd.grad(total, leaves) for total in sums), strict=True)
    gradients = max(_relative(a, b) for a, b in pairs)
    print(f"\n| {label} | {dtype} | {losses:.1e} | {gradients:.1e} |")
    # A gradient in bfloat16 is rounded at the end: the next number is a step away.
    assert losses <= TOLERANCE and gradients <= max(TOLERANCE, torch.finfo(leaves[0].dtype).eps)


def _relative(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, to the largest of ``wanted``."""
    assert got.isfinite().all() and got.shape == wanted.shape
    difference = (got.detach().double() - wanted.detach().double()).abs().max()
    return float(difference / wanted.detach().double().abs().max()) if difference else 0.0
