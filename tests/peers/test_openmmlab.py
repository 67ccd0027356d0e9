"""mmdet and mmsegmentation, patched and not, at the same random points."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

import rendseg
from tests.integrations import openmmlab
from tests.integrations.agreement import agree
from tests.integrations.draws import Draws

openmmlab.prepare()


def test_mmdet() -> None:
    pytest.importorskip("mmdet", reason="needs the package mmdet: pip install -e .[peers]")
    module = importlib.import_module("mmdet.models.dense_heads.mask2former_head")
    select = module.get_uncertain_point_coords_with_randomness
    sample = module.point_sample
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 4, 12, 14, generator=g).requires_grad_(), torch.tensor([2, 0, 3])
    draws = Draws(32)

    def points_and_values() -> tuple[torch.Tensor, torch.Tensor]:
        coords = module.get_uncertain_point_coords_with_randomness(logits, labels, 32, 3.0, 0.75)
        coords = coords.gather(1, coords[..., :1].argsort(1).expand(-1, -1, 2))
        return coords, module.point_sample(logits, coords)

    with draws.recorded():
        wanted = points_and_values()
    with rendseg.patched("mmdet") as report, draws.fed():
        got = points_and_values()
        assert module.point_sample is not sample
    assert len(report.replaced) >= 9
    assert module.get_uncertain_point_coords_with_randomness is select and module.point_sample is sample
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-4, atol=1e-6)
    agree("mmdet", *({"square": values.square()} for _, values in (got, wanted)), [logits])


def test_the_criterion_of_mmdet() -> None:
    pytest.importorskip("mmdet", reason="needs the package mmdet: pip install -e .[peers]")
    kind = importlib.import_module("mmdet.models.dense_heads.mask2former_head").Mask2FormerHead
    structures = importlib.import_module("mmengine.structures")
    example = importlib.import_module("rendseg.integrations.mmdet")._example
    head, _ = example(kind)
    head.num_queries = 6
    g = torch.Generator().manual_seed(1)
    classes = torch.randn(3, 3, 6, 4, generator=g).requires_grad_()
    masks = torch.randn(3, 3, 6, 12, 14, generator=g).requires_grad_()
    instances = [
        structures.InstanceData(
            labels=torch.randint(3, (count,), generator=g), masks=torch.rand(count, 30, 34, generator=g).gt(0.5).long()
        )
        for count in (3, 0, 8)
    ]
    names, draws = ("loss_by_feat" in vars(kind)), Draws(8)
    with draws.recorded():
        wanted = head.loss_by_feat(classes, masks, instances, [{}] * 3)
    with rendseg.patched("mmdet") as report:
        assert any(name.endswith("Mask2FormerHead.loss_by_feat") for name, _ in report.replaced), report
        with draws.fed():
            got = head.loss_by_feat(classes, masks, instances, [{}] * 3)
        head.loss_dice.eps = 1e-3
        head.loss_by_feat(classes, masks, instances, [{}] * 3)
        assert "loss_dice has eps=0.001: its own code runs" in str(report)
    assert ("loss_by_feat" in vars(kind)) == names
    agree("mmdet Mask2FormerHead", got, wanted, [classes, masks])


def test_mmseg() -> None:
    pytest.importorskip("mmseg", reason="needs the package mmsegmentation: pip install -e .[peers]")
    head = importlib.import_module("mmseg.models.decode_heads.point_head")
    encoding = importlib.import_module("mmseg.models.utils.encoding").Encoding
    part = head.PointHead.__new__(head.PointHead)
    torch.nn.Module.__init__(part)
    part.align_corners = False
    g = torch.Generator().manual_seed(0)
    logits, features = torch.randn(2, 5, 9, 8, generator=g), torch.randn(2, 6, 9, 8, generator=g).requires_grad_()
    options = SimpleNamespace(
        num_points=32, oversample_ratio=3, importance_sample_ratio=0.75, subdivision_num_points=20
    )
    torch.manual_seed(0)
    layer, draws = encoding(6, 4), Draws(32)

    def computed() -> dict[str, torch.Tensor]:
        train = part.get_points_train(logits, head.calculate_uncertainty, options)
        train = train.gather(1, train[..., :1].argsort(1).expand(-1, -1, 2))
        index, test = part.get_points_test(logits, head.calculate_uncertainty, options)
        order = index.argsort(1)
        return {
            "train": train,
            "index": index.gather(1, order),
            "test": test.gather(1, order[..., None].expand(-1, -1, 2)),
            "fine": part._get_fine_grained_point_feats([features, logits], train),
            "coarse": part._get_coarse_point_feats(logits, train),
            "codes": layer(features),
        }

    with draws.recorded():
        wanted = computed()
    with rendseg.patched("mmseg") as report, draws.fed():
        got = computed()
    assert [name.rpartition(".")[2] for name, _ in report.replaced] == [
        "forward",
        "get_points_train",
        "get_points_test",
        "point_sample",
    ]
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    squares = ({name: found[name].square() for name in ("fine", "codes")} for found in (got, wanted))
    agree("mmseg", *squares, (features, layer.codewords, layer.scale))
