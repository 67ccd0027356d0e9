"""The Triton kernels of mask_losses and mask_costs against the reference; see _triton.py for where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _common import close
from _triton import TRITON, implementation, to_device
from cases_mask_losses import bad_inputs, cases

from rendseg import reference
from rendseg.reference.mask_losses import _mask_losses_backward

pytestmark = TRITON
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = [name for name, _ in cases()]
FEW = ("channels_last", "bilinear border (12, 13)", "nearest zeros None", "every dtype of targets")


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    return implementation("mask_losses", op)(*to_device(args), **to_device(kwargs))


@pytest.mark.parametrize("name,dtype", [(n, torch.float32) for n in NAMES] + [(n, d) for n in FEW for d in DTYPES[1:]])
def test_losses_and_costs(name: str, dtype: torch.dtype) -> None:
    losses, costs = dict(cases(dtype))[name]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    wide = {"logits": losses["logits"].double()}
    for op, case in (("mask_losses", losses), ("mask_costs", costs)):
        wanted = getattr(reference, op)(**case | wide)
        for mine, theirs in zip(call(op, **case), wanted, strict=True):
            assert mine.dtype == compute
            close(mine.cpu(), theirs, compute, op)
    tensors = [losses[key] for key in ("logits", "targets", "coords", "image_index", "query_index", "target_index")]
    modes = [losses.get("label_mode", "bilinear"), losses.get("padding_mode", "zeros"), losses.get("canvas")]
    grads = torch.linspace(-1, 2, 2 * len(losses["coords"]), dtype=torch.float64).view(2, -1)
    wanted = _mask_losses_backward(*grads, tensors[0].double(), *tensors[1:], *modes)
    got = call("_mask_losses_backward", *grads.to(compute), *tensors, *modes)
    assert got.dtype == dtype and got.stride() == torch.empty_like(wanted).stride()
    close(got.cpu(), wanted, compute, "gradient")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "op,kwargs,error,words", [pytest.param(*case[1:], id=f"{case[1]}: {case[0]}") for case in bad_inputs()]
)
def test_bad_input(op: str, kwargs: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        implementation("mask_losses", op)(**kwargs)
