"""The mask losses of RF-DETR, patched and not, at the same random points."""

from __future__ import annotations

import importlib

import pytest
import torch

import rendseg
from tests.integrations.agreement import agree
from tests.integrations.draws import Draws

pytest.importorskip("rfdetr", reason="needs the package rfdetr: pip install -e .[peers]")


def test_loss_masks() -> None:
    module = importlib.import_module("rfdetr.models.criterion")
    criterion = module.SetCriterion.__new__(module.SetCriterion)
    torch.nn.Module.__init__(criterion)
    criterion.mask_point_sample_ratio = 16
    g = torch.Generator().manual_seed(0)
    masks = torch.randn(2, 6, 16, 24, generator=g).requires_grad_()
    targets = [{"masks": torch.rand(count, 40, 44, generator=g) > 0.5} for count in (3, 2)]
    indices = [(torch.tensor([5, 0, 2]), torch.tensor([1, 0, 2])), (torch.tensor([3, 4]), torch.tensor([1, 0]))]

    def losses() -> dict[str, torch.Tensor]:
        return criterion.loss_masks({"pred_masks": masks}, targets, indices, torch.tensor(5.0))

    draws = Draws(24)
    with draws.recorded():
        wanted = losses()
    before = dict(vars(module))
    with rendseg.patched("rfdetr") as report, draws.fed():
        got = losses()
    assert {name.rpartition(".")[2] for name, _ in report.replaced} == {
        "point_sample",
        "get_uncertain_point_coords_with_randomness",
    }
    assert all(vars(module)[name] is value for name, value in before.items())
    agree("rfdetr", got, wanted, [masks])
