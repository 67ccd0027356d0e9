"""Ours beside the networks of other projects: logits, labels and losses, with sizes that the strides do not divide.

Run by ``make test-peers``, which installs them; a project that is not here is skipped.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("timm", reason="rendseg[train] is not installed")
from peers import pairs  # noqa: E402

SIZE = (65, 97)
CASES = {
    "mmseg pointrend": ("mmseg", lambda: pairs.mmseg("semantic_fpn")),
    "mmseg encnet": ("mmseg", lambda: pairs.mmseg("encnet")),
    "mmseg upernet": ("mmseg", lambda: pairs.mmseg("upernet")),
    "mmseg upernet caffe": ("mmseg", lambda: pairs.mmseg("upernet", "resnet50", caffe=True)),
    "mmseg upernet swin": ("mmseg", lambda: pairs.mmseg("upernet", "swin")),
    "mmseg deeplabv3plus": ("mmseg", lambda: pairs.mmseg("deeplabv3plus")),
    "mmseg fcn": ("mmseg", lambda: pairs.mmseg("fcn")),
    "transformers convnext": ("transformers", lambda: pairs.transformers("convnext")),
    "transformers swin": ("transformers", lambda: pairs.transformers("swin")),
    "transformers resnet": ("transformers", lambda: pairs.transformers("resnet")),
    "torchvision deeplabv3": ("torchvision", lambda: pairs.torchvision("deeplabv3")),
    "torchvision fcn": ("torchvision", lambda: pairs.torchvision("fcn")),
}


def made(project: str, make: Callable[[], pairs.Peer]) -> pairs.Peer:
    try:
        importlib.import_module(project)
    except Exception as error:  # noqa: BLE001 - one that is there and cannot be imported fails in its own way
        pytest.skip(f"{project} cannot be imported: {type(error).__name__}: {error}")
    torch.manual_seed(0)
    peer = make()
    pairs.calibrate(peer, (64, 96))
    return peer


@pytest.mark.parametrize("case", list(CASES))
def test_equal(case: str) -> None:
    found = pairs.compared(made(*CASES[case]), SIZE)
    assert found.coarse < 1e-5 and found.refined < 1e-5 and found.loss < 1e-5
    # Of two logits that agree to rounding either can be the larger, and the choice of points can differ at its end.
    assert found.labels <= 1e-3


def test_class_weights_divide_as_in_mmseg() -> None:
    """Without ignored labels: mmsegmentation indexes its weights with them, and stops."""
    weights = torch.linspace(0.5, 3.0, pairs.CLASSES).tolist()
    for decoder in ("semantic_fpn", "encnet"):
        peer = made("mmseg", lambda decoder=decoder: pairs.mmseg(decoder, weights=weights))  # type: ignore[misc]
        assert pairs.compared(peer, SIZE, ignored=0.0).loss < 1e-5
        with pytest.raises(IndexError):
            pairs.compared(peer, SIZE)


@pytest.mark.parametrize("mean", ["valid", "all"])
@pytest.mark.parametrize("weighted", [False, True])
def test_means_of_the_cross_entropy_of_mmseg(mean: str, weighted: bool) -> None:
    pytest.importorskip("mmseg", reason="needs the package mmsegmentation: pip install -e .[peers]")
    pairs._mmseg()
    from mmseg.models.losses import CrossEntropyLoss

    from rendseg.models import segmentation_loss

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 9, 11, generator=generator)
    labels = torch.randint(0, 5, (2, 9, 11), generator=generator)
    weights = [0.5, 2.0, 1.0, 3.0, 0.7] if weighted else None
    # A class is ignored: mmsegmentation stops at 255 with weights, and its "all" then counts the weight of what it
    # ignores, so that this case has nothing ignored.
    ignored = 255 if weighted and mean == "all" else 3
    theirs = CrossEntropyLoss(class_weight=weights, avg_non_ignore=mean == "valid")
    found = segmentation_loss(
        logits, labels, class_weights=weights and torch.tensor(weights), ignore_index=ignored, mean=mean
    )
    torch.testing.assert_close(found, theirs(logits, labels, ignore_index=ignored))


@pytest.mark.parametrize(
    ("switch", "value"),
    [("pad", "stride"), ("output_norm", False), ("pad_before_shift", False)],
)
def test_every_switch_is_needed(switch: str, value: object) -> None:
    """Without it many labels differ."""
    peer = made("mmseg", lambda: pairs.mmseg("upernet", "swin"))
    ours = pairs.ours_of(peer)
    section = {switch: value} if switch == "pad" else {"backbone": {**peer.ours["backbone"], switch: value}}
    torch.manual_seed(0)
    other = pairs.build_model({**peer.ours, **section, "channels_last": False}, pairs.CLASSES).eval()
    own = other.state_dict()
    other.load_state_dict({key: value for key, value in ours.state_dict().items() if key in own})
    images = pairs.images_of(SIZE)
    with torch.no_grad():
        wanted = peer.logits(images).argmax(1)
    assert (other.predict(images, "labels").labels != wanted).float().mean() > 0.01
    assert (ours.predict(images, "labels").labels != wanted).float().mean() < 0.001


def test_losses_of_segmentation_models_pytorch() -> None:
    try:
        from segmentation_models_pytorch import losses as theirs
    except Exception as error:  # noqa: BLE001
        pytest.skip(f"segmentation_models_pytorch cannot be imported: {type(error).__name__}: {error}")
    from rendseg.models import dice_loss, lovasz_softmax_loss, segmentation_loss

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, 16, 24, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 16, 24), generator=generator)
    every = theirs.DiceLoss("multiclass", smooth=1.0, eps=0.0)(logits, labels)
    # Its smooth is added to the intersection and to half of the sizes: ours is twice as large.
    torch.testing.assert_close(dice_loss(logits, labels, exponent=1.0, smooth=2.0), every)
    labels[torch.rand(labels.shape, generator=generator) < 0.15] = 255
    lovasz = theirs.LovaszLoss("multiclass", ignore_index=255)(logits.float(), labels)  # it knows no other dtype
    torch.testing.assert_close(lovasz_softmax_loss(logits.float(), labels), lovasz)
    soft = theirs.SoftCrossEntropyLoss(reduction="mean", smooth_factor=0.0, ignore_index=255)(logits, labels)
    torch.testing.assert_close(segmentation_loss(logits, labels, mean="all"), soft)
