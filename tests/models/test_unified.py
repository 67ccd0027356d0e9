from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rendseg.models import UPP, UnifiedPointRend, UnifiedSegmenter, build_model
from rendseg.models.decoder import DecoderOutput, Targets

OBJECT_PARTS = [[1, 0, 2], [4, 1, 2, 5], [0, 4]]
CLASSES = {"object": 6, "part": 6, "material": 4, "texture": 3, "scene": 5}


def tasks_of(**changes):
    return {
        "scene_classes": 5, "part_classes": 6, "material_classes": 4, "texture_classes": 3,
        "object_parts": OBJECT_PARTS, **changes,
    }  # fmt: skip


def model(name="segmenter", ignore_index=255, **decoder):
    torch.manual_seed(0)
    network = build_model(
        {
            "name": name,
            "backbone": {"name": "test_resnet"},
            "decoder": {"name": "upp", "channels": 8, "fuse_channels": 8, "ppm_channels": 4, "norm": "gn",
                        "texture_channels": 6, **tasks_of(), **decoder},
            "pointrend": {"hidden_channels": 8, "train_points": 32, "inference_points": 32},
            "loss": {"ignore_index": ignore_index},
        },
        CLASSES["object"],
    )  # fmt: skip
    for parameter in network.decoder.parameters():  # logits of some size
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def labels(batch=2, height=48, width=40, seed=1, ignore=255):
    generator = torch.Generator().manual_seed(seed)

    def draw(classes):
        values = torch.randint(0, classes + 1, (batch, -(-height // 8), -(-width // 8)), generator=generator)
        values = values.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].contiguous()
        return values.masked_fill(values == classes, ignore)

    found = {task: draw(classes) for task, classes in CLASSES.items() if task != "scene"}
    found["scene"] = torch.tensor([3, ignore][:batch])
    return found


def decoded(network, images):
    with torch.no_grad():
        return network._features(network._pad(images))[0]


def mean_nll(logits, targets, ignore=255):
    """By loops: logits [C, M], targets [M]."""
    total, count = 0.0, 0
    for column, target in zip(logits.T, targets, strict=True):
        if target != ignore:
            total += math.log(np.exp(column - column.max()).sum()) + column.max() - column[target]
            count += 1
    return total / max(count, 1)


def flat(logits):
    return logits.transpose(0, 1).flatten(1).double().numpy()


def centres(label, stride=4):
    return label[:, stride // 2 :: stride, stride // 2 :: stride].flatten().tolist()


def padded(label, size=(64, 64), ignore=255):
    return F.pad(label, (0, size[1] - label.shape[2], 0, size[0] - label.shape[1]), value=ignore)


def test_losses_equal_loops():
    network, images, wanted = model(), torch.randn(2, 3, 48, 40), labels()
    losses = network(images, wanted)
    out = decoded(network, images)
    logits = {task: network.decoder.task_logits(out, task).detach() for task in CLASSES if task != "object"}
    assert set(losses) == {"loss_coarse", "loss_part", "loss_material", "loss_texture", "loss_scene"}
    for task, weight in (("material", 1.0), ("texture", 1.0)):
        expected = weight * mean_nll(flat(logits[task]), centres(padded(wanted[task])))
        assert losses[f"loss_{task}"].item() == pytest.approx(expected, rel=1e-5)
    scene = mean_nll(logits["scene"].double().numpy().T, wanted["scene"].tolist())
    assert losses["loss_scene"].item() == pytest.approx(0.25 * scene, rel=1e-5) and scene > 0

    # Parts: per object, over images where one of its parts is labelled, over the pixels of the object.
    objects, parts, total = padded(wanted["object"]), padded(wanted["part"]), 0.0
    first = 0
    for owner, *own in OBJECT_PARTS:
        chosen, targets = [], []
        for n in range(2):
            pixels = []
            for y in range(16):
                for x in range(16):
                    if objects[n, 4 * y + 2, 4 * x + 2] == owner:
                        part = int(parts[n, 4 * y + 2, 4 * x + 2])
                        pixels.append((n, y, x, 1 + own.index(part) if part in own else 0))
            if any(pixel[3] for pixel in pixels):
                chosen += [logits["part"][n, first : first + 1 + len(own), y, x] for n, y, x, _ in pixels]
                targets += [pixel[3] for pixel in pixels]
        if targets:
            total += mean_nll(torch.stack(chosen, 1).double().numpy(), targets)
        first += 1 + len(own)
    assert losses["loss_part"].item() == pytest.approx(0.5 * total, rel=1e-5) and total > 0


def test_parts_count_only_within_their_labelled_objects():
    network, images = model(), torch.randn(2, 3, 64, 64)
    wanted = labels(2, 64, 64)
    before = network(images, wanted)["loss_part"]
    elsewhere = ~torch.isin(wanted["object"], torch.tensor([owner for owner, *_ in OBJECT_PARTS]))
    changed = wanted["part"].masked_fill(elsewhere, 3)
    torch.testing.assert_close(network(images, {**wanted, "part": changed})["loss_part"], before)
    # An object none of whose parts is labelled in an image is left out, not learned as "no part".
    own = wanted["object"] == 1
    without = {**wanted, "part": wanted["part"].masked_fill(own, 255)}
    gone = {**without, "object": wanted["object"].masked_fill(own, 255)}
    torch.testing.assert_close(network(images, without)["loss_part"], network(images, gone)["loss_part"])
    assert network(images, {**wanted, "object": torch.full_like(own, 2, dtype=torch.int64)})["loss_part"] == 0


def test_texture_label_of_a_whole_image():
    network, images = model(), torch.randn(2, 3, 48, 40)
    whole = network(images, {"texture": torch.tensor([2, 255])})["loss_texture"]
    maps = torch.stack([torch.full((48, 40), 2), torch.full((48, 40), 255)])
    torch.testing.assert_close(network(images, {"texture": maps})["loss_texture"], whole)


def test_texture_does_not_reach_the_features():
    network = model()
    network(torch.randn(2, 3, 64, 64), {"texture": torch.tensor([2, 0])})["loss_texture"].backward()
    reached = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached and all(name.startswith("decoder.texture_head.") for name in reached)
    assert [m.weight.shape[:2] for m in network.decoder.texture_head] == [(6, 8), (6, 6), (6, 6), (6, 6), (3, 6)]


@pytest.mark.parametrize("name", ["segmenter", "pointrend"])
@pytest.mark.parametrize(
    "given", [["object", "part", "scene"], ["material"], ["texture"], ["scene"], ["object"], ["part"]]
)
def test_tasks_without_labels_are_zero_with_a_graph(name, given):
    network = model(name)
    wanted = {task: value for task, value in labels(2, 64, 64).items() if task in given}
    held = [{key: id(value) for key, value in vars(module).items()} for module in network.modules()]
    losses = network(torch.randn(2, 3, 64, 64), wanted)
    after = [{key: id(value) for key, value in vars(module).items()} for module in network.modules()]
    assert after == held  # nothing of the batch stays behind
    zero = {f"loss_{task}" for task in CLASSES if task != "object" and task not in given}
    zero |= {"loss_part"} if "object" not in given else set()
    zero |= {key for key in losses if key in ("loss_coarse", "loss_point") and "object" not in given}
    assert {key for key, value in losses.items() if value.item() == 0} == zero
    assert all(value.requires_grad for value in losses.values())
    sum(losses.values()).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def test_all_labels_ignored():
    network = model("pointrend")
    wanted = {task: torch.full((2, 64, 64), 255) for task in CLASSES if task != "scene"}
    losses = network(torch.randn(2, 3, 64, 64), {**wanted, "scene": torch.full((2,), 255)})
    total = sum(losses.values())
    assert total.item() == 0
    total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())


def test_object_labels_alone_are_a_plain_segmenter():
    network, images, wanted = model(), torch.randn(2, 3, 64, 64), labels(2, 64, 64)
    one, other = network(images, wanted["object"]), network(images, {"object": wanted["object"]})
    assert one["loss_coarse"] == other["loss_coarse"] and one["loss_coarse"] > 0


@pytest.mark.parametrize("name,kind", [("segmenter", UnifiedSegmenter), ("pointrend", UnifiedPointRend)])
def test_predictions_of_every_task(name, kind):
    network = model(name).eval()
    assert type(network) is kind
    images = torch.randn(2, 3, 48, 40)
    found = network.predict_tasks(images)
    assert set(found) == set(CLASSES) and all(value.dtype == torch.int64 for value in found.values())
    torch.testing.assert_close(found["object"], network.predict(images, output="labels").labels.long())
    out = decoded(network, images)
    for task in ("material", "texture"):
        large = F.interpolate(network.decoder.task_logits(out, task), scale_factor=4, mode="bilinear")
        assert torch.equal(found[task], large[:, :, :48, :40].argmax(1))
    logits = network.decoder.task_logits(out, "part")
    large = F.interpolate(logits, scale_factor=4, mode="bilinear")[:, :, :48, :40]
    first, expected = 0, torch.full((2, 48, 40), -1)
    for owner, *own in OBJECT_PARTS:
        best = large[:, first : first + 1 + len(own)].argmax(1)
        expected = torch.where(found["object"] == owner, torch.tensor([-1, *own])[best], expected)
        first += 1 + len(own)
    assert torch.equal(found["part"], expected)
    x = network.decoder.scene_head[0](out.features["p5"]).mean((2, 3))
    weight, bias = network.decoder.scene_head[1].weight[:, :, 0, 0], network.decoder.scene_head[1].bias
    assert torch.equal(found["scene"], F.linear(x, weight, bias).argmax(1))


def test_decoder_is_upernet_with_a_deeper_object_head():
    """As in the authors' code: 3x3, norm, ReLU and 1x1 on the fused map; the pooling is Precise RoI pooling."""
    network = model()
    decoder = network.decoder
    out = decoded(network, torch.randn(1, 3, 64, 64))
    assert decoder.ppm.pool == "prroi" and not decoder.ppm.conv_before_upsample
    convolution, last = decoder.classifier
    assert convolution.kernel_size == (3, 3) and last.kernel_size == (1, 1)
    torch.testing.assert_close(out.coarse, last(convolution(out.features["fused"])))


def test_many_classes_and_a_wide_ignored_label():
    """More than 255 objects: 255 is an object, and another number is ignored."""
    decoder = UPP({"c4": 4, "c5": 5}, {"c4": 4, "c5": 8}, 300, levels=("c4", "c5"), channels=6, fuse_channels=6,
                  ppm_channels=3, norm="none", part_classes=2, object_parts=[[255, 0, 1]])  # fmt: skip
    features = {"c4": torch.randn(1, 4, 4, 4), "c5": torch.randn(1, 5, 2, 2)}
    tasks = {"part": torch.zeros(1, 16, 16, dtype=torch.int64)}
    out = decoder(features)
    assert isinstance(out, DecoderOutput) and out.coarse.shape == (1, 300, 4, 4)
    assert decoder.task_losses(out, Targets(torch.full((1, 16, 16), 255), tasks=tasks), 65535)["loss_part"] > 0
    assert decoder.task_losses(out, Targets(torch.full((1, 16, 16), 65535), tasks=tasks), 65535)["loss_part"] == 0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "given,error,message",
    [
        ({"colour": torch.zeros(2, 64, 64).long()}, ValueError, r"labels are of tasks \['colour'\]; the model has obj"),
        ({"scene": torch.zeros(2, 64, 64).long()}, ValueError, r"labels of scene must have shape \[B\] = \[2\]"),
        ({"part": torch.zeros(2).long()}, ValueError, r"labels of part must have shape \[B, H, W\] = \[2, 64, 64\]"),
        ({"material": torch.zeros(2, 32, 64).long()}, ValueError, r"got \[2, 32, 64\]"),
        ({"texture": torch.zeros(3).long()}, ValueError, r"labels of texture must have shape \[B\] or \[B, H, W\]"),
        ({"material": torch.zeros(2, 64, 64)}, TypeError, "labels of material must be an integer tensor, got torch.fl"),
        ({"object": torch.zeros(2, 64).long()}, ValueError, r"labels must have shape \[B, H, W\]"),
    ],
)
def test_bad_labels(given, error, message):
    with pytest.raises(error, match=message):
        model()(torch.randn(2, 3, 64, 64), given)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "changes,message",
    [
        ({"object_parts": []}, r"part_classes \(6\) and object_parts \(0 objects\) need each other"),
        ({"object_parts": [[9, 1]]}, r"object_parts must begin with different objects 0..5, got 9"),
        ({"object_parts": [[1, 1], [1, 2]]}, r"object_parts must begin with different objects 0..5, got 1"),
        ({"object_parts": [[1, 6]]}, r"object_parts of object 1 must be different parts 0..5, got \[6\]"),
        ({"object_parts": [[1]]}, r"object_parts of object 1 must be different parts"),
        ({"scene_classes": -1}, "scene_classes must be at least 0, got -1"),
        ({"texture_convs": 0}, "texture_convs must be at least 1, got 0"),
        ({"part_weight": -1.0}, "part_weight must be finite and not negative, got -1.0"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_without_extra_tasks_there_are_no_heads():
    network = model(scene_classes=0, part_classes=0, material_classes=0, texture_classes=0, object_parts=[])
    assert network.decoder.classes == {"object": 6}
    assert not any("_head" in name for name, _ in network.named_parameters())
    assert set(network(torch.randn(2, 3, 64, 64), labels(2, 64, 64)["object"])) == {"loss_coarse"}
