"""What a converted network computes, against the frameworks that cannot be installed, written here in plain functions.

Each function is a framework's forward pass. It draws the tensors of a layer at its first call, under the name that the
framework gives them, so that it makes the file and says what the file means. None of the rules of ``rendseg.convert``
and none of our layers takes part. Files hold float32; both sides compute in float64, where rounding hides nothing.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm", reason="rendseg[train] is not installed")
from rendseg.convert import command, engine  # noqa: E402

CLASSES, POINTS = 7, 300
SIZE = (49, 65)


class Source:
    """Tensors under a framework's names. ``conv_name`` and ``norm_name`` hold ``{}`` for the layer; ``mean`` and
    ``var`` are what the statistics of a norm are called; ``transposed``: the weights of linear layers are."""

    def __init__(self, conv_name, norm_name, mean="running_mean", var="running_var", transposed=False):
        self.tensors = {}
        self.conv_name, self.norm_name = conv_name, norm_name
        self.mean, self.var, self.transposed = mean, var, transposed
        self.generator = torch.Generator().manual_seed(0)

    def kept(self, name, tensor):
        """As float32 in the file, as float64 to compute with."""
        assert name not in self.tensors, f"{name} is there already"
        self.tensors[name] = tensor.float()
        return self.tensors[name].double()

    def normal(self, name, *shape, scale=0.3):
        return self.kept(name, torch.randn(shape, generator=self.generator) * scale)

    def uniform(self, name, *shape, low):
        return self.kept(name, torch.rand(shape, generator=self.generator) + low)

    def conv(self, x, name, out, kernel=1, *, bias=False, **options):
        """A convolution that keeps the size, except for its stride."""
        inputs = x.shape[1]
        weight = self.normal(name + ".weight", out, inputs, kernel, kernel, scale=math.sqrt(2 / inputs) / kernel)
        offset = self.normal(name + ".bias", out) if bias else None
        return F.conv2d(x, weight, offset, padding=kernel // 2 * options.get("dilation", 1), **options)

    def norm(self, x, name, *, groups=None):
        """Batch norm, whose statistics are about those of ``x``; with ``groups`` group norm."""
        count = x.shape[1]
        scale, shift = self.uniform(name + ".weight", count, low=0.5), self.normal(name + ".bias", count)
        if groups:
            return F.group_norm(x, groups, scale, shift)
        dims = [d for d in range(x.dim()) if d != 1]
        mean = self.kept(f"{name}.{self.mean}", x.mean(dims) + 0.1 * torch.randn(count, generator=self.generator))
        var = self.kept(f"{name}.{self.var}", x.var(dims, unbiased=False) + 0.1)
        return F.batch_norm(x, mean, var, scale, shift)

    def block(self, x, name, out, kernel=1, *, relu=True, **options):
        """Convolution, norm, ReLU."""
        x = self.norm(self.conv(x, self.conv_name.format(name), out, kernel, **options), self.norm_name.format(name))
        return x.relu() if relu else x

    def linear(self, x, name, out):
        weight = self.normal(name + ".weight", out, x.shape[1], scale=x.shape[1] ** -0.5)
        if self.transposed:
            self.tensors[name + ".weight"] = self.tensors[name + ".weight"].t().contiguous()
        return F.linear(x, weight, self.normal(name + ".bias", out))


def resized(x, like, aligned=False):
    size = like if isinstance(like, tuple) else like.shape[2:]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=aligned)


def resnet50(s, x, name, *, stride_in_1x1=False, dilations=(1, 1, 1, 1), first=None, pooled_shortcut=False):
    """Stages two to five. ``name(stage, block, part)`` with part 1, 2, 3 or "shortcut"; ``dilations`` of each stage,
    ``first`` those of its first block. A stage of dilation over 1 has no stride."""
    maps = []
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 1 and dilations[stage - 1] == 1 else 1
            dilation = (first or dilations)[stage - 1] if block == 0 else dilations[stage - 1]
            y = s.block(x, name(stage, block, 1), width, stride=stride if stride_in_1x1 else 1)
            other = 1 if stride_in_1x1 else stride
            y = s.block(y, name(stage, block, 2), width, 3, stride=other, dilation=dilation)
            y = s.block(y, name(stage, block, 3), 4 * width, relu=False)
            if block == 0:
                if pooled_shortcut and stride == 2:
                    x, stride = F.avg_pool2d(x, 2, 2, ceil_mode=True), 1
                x = s.block(x, name(stage, block, "shortcut"), 4 * width, stride=stride, relu=False)
            x = (x + y).relu()
        maps.append(x)
    return maps


def _torchvision(stage, block, part):
    """A convolution and its norm in blocks that torchvision named."""
    found = ("downsample.0", "downsample.1") if part == "shortcut" else (f"conv{part}", f"bn{part}")
    return (f"layer{stage}.{block}.", *found)


def pointrend(s, coarse, fine, fcs, predictor, *, width, each_layer):
    """Two steps; a point's features are those of ``fine`` and of the first logits."""

    def sampled(x, coords):
        return F.grid_sample(x, 2 * coords[:, None] - 1, align_corners=False)[:, :, 0]  # zeros outside

    refined, layers = coarse, None
    for _ in range(2):
        refined = F.interpolate(refined, scale_factor=2, mode="bilinear", align_corners=False)
        top = refined.topk(2, 1).values
        height, width_ = refined.shape[2:]
        index = (top[:, 1] - top[:, 0]).flatten(1).topk(min(POINTS, height * width_)).indices
        coords = torch.stack([(index % width_ + 0.5) / width_, (index // width_ + 0.5) / height], -1).double()
        rough = sampled(coarse, coords)
        x = torch.cat([sampled(fine, coords), rough], 1)
        if layers is None:
            layers, inputs = [], x.shape[1]
            for name in fcs:
                weight = s.normal(name + ".weight", width, inputs, 1, scale=math.sqrt(2 / inputs))
                layers.append((weight, s.normal(name + ".bias", width)))
                inputs = width + (rough.shape[1] if each_layer else 0)
            weight = s.normal(predictor + ".weight", CLASSES, inputs, 1, scale=inputs**-0.5)
            layers.append((weight, s.normal(predictor + ".bias", CLASSES)))
        for weight, bias in layers[:-1]:
            x = F.conv1d(x, weight, bias).relu()
            x = torch.cat([x, rough], 1) if each_layer else x
        x = F.conv1d(x, *layers[-1])
        refined = (
            refined.flatten(2).scatter(2, index[:, None].expand(-1, CLASSES, -1), x).unflatten(2, (height, width_))
        )
    return refined


# ----------------------------------------------------------------------------------------------------- the frameworks


def detectron2(images):
    """PointRend on a ResNet-50 that strides its 1x1 convolutions; images are padded to multiples of 32."""
    s = Source("backbone.bottom_up.{}", "backbone.bottom_up.{}.norm")
    height, width = images.shape[2:]
    x = F.pad(images, (0, -width % 32, 0, -height % 32))
    x = F.max_pool2d(s.block(x, "stem.conv1", 64, 7, stride=2), 3, 2, 1)

    def name(stage, block, part):
        return f"res{stage + 1}.{block}." + (part if part == "shortcut" else f"conv{part}")

    maps, pyramid, above = resnet50(s, x, name, stride_in_1x1=True), {}, None
    for level in (5, 4, 3, 2):
        y = s.conv(maps[level - 2], f"backbone.fpn_lateral{level}", 32, bias=True)
        above = y if above is None else y + F.interpolate(above, scale_factor=2, mode="nearest")
        pyramid[level] = s.conv(above, f"backbone.fpn_output{level}", 32, 3, bias=True)
    head, total = "sem_seg_head.coarse_sem_seg_head.", 0
    for level in (2, 3, 4, 5):
        y = pyramid[level]
        for i in range(max(1, level - 2)):
            layer = f"{head}p{level}.{2 * i}"
            y = s.norm(s.conv(y, layer, 64, 3), layer + ".norm", groups=32).relu()
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False) if level > 2 else y
        total = total + y
    coarse = s.conv(total, head + "predictor", CLASSES, bias=True)
    point = "sem_seg_head.point_head."
    layers = [f"{point}fc{i}" for i in (1, 2, 3)]
    refined = pointrend(s, coarse, pyramid[2], layers, point + "predictor", width=24, each_layer=False)
    config = {
        "MODEL": {"POINT_HEAD": {"SUBDIVISION_NUM_POINTS": POINTS}, "PIXEL_MEAN": [0, 0, 0], "PIXEL_STD": [1, 1, 1]}
    }
    return s, refined[..., :height, :width], config, {}


def _csail(s, images):
    """The pyramid P2 to P5 of UPerNet, and its concatenation, on a ResNet-50 with three first convolutions."""
    x = images
    for i, width in ((1, 64), (2, 64), (3, 128)):
        x = s.conv(x, f"encoder.conv{i}", width, 3, stride=2 if i == 1 else 1)
        x = s.norm(x, f"encoder.bn{i}").relu()
    maps = resnet50(s, F.max_pool2d(x, 3, 2, 1), _torchvision)
    s.conv_name, s.norm_name = "decoder.{}.0", "decoder.{}.1"
    top, parts = maps[3], [maps[3]]
    for i, bins in enumerate((1, 2, 3, 6)):
        parts.append(s.block(resized(F.adaptive_avg_pool2d(top, bins), top), f"ppm_conv.{i}", 16))
    above = s.block(torch.cat(parts, 1), "ppm_last_conv", 24, 3)
    pyramid = [above]
    for i in (2, 1, 0):
        y = s.block(maps[i], f"fpn_in.{i}", 24)
        above = y + resized(above, y)
        pyramid.insert(0, s.block(above, f"fpn_out.{i}.0", 24, 3))
    return pyramid, torch.cat([resized(y, pyramid[0]) for y in pyramid], 1)


def csail(images):
    s = Source("encoder.{0[0]}{0[1]}", "encoder.{0[0]}{0[2]}")
    _, joined = _csail(s, images)
    x = s.conv(s.block(joined, "conv_last.0", 20, 3), "decoder.conv_last.1", CLASSES, bias=True)
    s.tensors["encoder.bn1._running_iter"] = torch.ones(1)
    return s, resized(x, tuple(images.shape[2:])), None, {}


def unifiedparsing(images):
    """The four heads, its newer code with average pooling; the parts of object 2 are 0 and 3, of object 5 are 1."""
    s, size = Source("encoder.{0[0]}{0[1]}", "encoder.{0[0]}{0[2]}"), tuple(images.shape[2:])
    pyramid, joined = _csail(s, images)
    fused = s.block(joined, "conv_fusion", 24, 3)

    def head(x, task, classes, last=1, pool=False):
        x = s.block(x, f"{task}_head.0", 24, 3)
        return s.conv(x.mean((2, 3), keepdim=True) if pool else x, f"decoder.{task}_head.{last}", classes, bias=True)

    objects = resized(head(fused, "object", CLASSES), size)
    parts = resized(head(fused, "part", 5), size)
    first, second = torch.tensor([-1, 0, 3])[parts[:, :3].argmax(1)], torch.tensor([-1, 1])[parts[:, 3:].argmax(1)]
    owner = objects.argmax(1)
    tasks = {
        "object": owner,
        "scene": head(pyramid[3], "scene", 9, 2, pool=True).flatten(1).argmax(1),
        "part": torch.where(owner == 2, first, torch.where(owner == 5, second, -1)),
        "material": resized(head(pyramid[0], "material", 6), size).argmax(1),
    }
    given = {
        "model.decoder.pool": "avg",
        "model.decoder.part_classes": 4,
        "model.decoder.object_parts": [[2, 0, 3], [5, 1]],
    }
    return s, objects, None, {**given, "tasks": tasks}


def _encoded(s, x, projected, codes, names):
    """Context encoding of ``x`` from its projection; ``names`` of codes, norm, gate and the presence of classes."""
    codewords = s.normal(names[0] + ".codewords", codes, x.shape[1])
    scale = s.uniform(names[0] + ".scale", codes, low=-1.0)
    apart = projected.flatten(2).transpose(1, 2)[:, :, None] - codewords  # N HW K D
    share = (scale * apart.square().sum(3)).softmax(2)
    encoded = s.norm((share[..., None] * apart).sum(1), names[1]).relu().mean(1)
    gate = s.linear(encoded, names[2], x.shape[1]).sigmoid()
    s.linear(encoded, names[3], CLASSES)
    return (x + x * gate[:, :, None, None]).relu()


def pytorch_encoding_encnet(images):
    """EncNet with laterals on a ResNet-50 of stride 8, whose first block of a stage has the dilation before."""
    s = Source("pretrained.{0[0]}{0[1]}", "pretrained.{0[0]}{0[2]}")
    x = images
    for i, width in ((0, 64), (3, 64), (6, 128)):
        x = s.conv(x, f"pretrained.conv1.{i}", width, 3, stride=2 if i == 0 else 1)
        x = s.norm(x, f"pretrained.conv1.{i + 1}" if i < 6 else "pretrained.bn1").relu()
    maps = resnet50(s, F.max_pool2d(x, 3, 2, 1), _torchvision, dilations=(1, 1, 2, 4), first=(1, 1, 1, 2))
    s.conv_name, s.norm_name = "{}.0", "{}.1"
    x = s.block(maps[3], "head.conv5", 32, 3)
    parts = [x, *(s.block(maps[i + 1], f"head.connect.{i}", 32) for i in (0, 1))]
    x = s.block(torch.cat(parts, 1), "head.fusion", 32, 3)
    module = "head.encmodule."
    projected = s.block(x, module + "encoding", 32)
    x = _encoded(s, x, projected, 6, [module + n for n in ("encoding.3", "encoding.4", "fc.0", "selayer")])
    x = s.conv(x, "head.conv6.1", CLASSES, bias=True)
    s.conv(s.block(maps[2], "auxlayer.conv5", 8, 3), "auxlayer.conv5.4", CLASSES, bias=True)
    return s, resized(x, tuple(images.shape[2:]), aligned=True), None, {}


def _paddle(images):
    """ResNet50_vd of stride 8: all blocks of a dilated stage have its dilation, and a shortcut with a stride is
    pooled."""
    s = Source("backbone.{}._conv", "backbone.{}._batch_norm", "_mean", "_variance", transposed=True)
    x = images
    for i, width in ((1, 32), (2, 32), (3, 64)):
        x = s.block(x, f"conv1_{i}", width, 3, stride=2 if i == 1 else 1)

    def name(stage, block, part):
        return f"bb_{stage - 1}_{block}." + ("short" if part == "shortcut" else f"conv{part - 1}")

    maps = resnet50(s, F.max_pool2d(x, 3, 2, 1), name, dilations=(1, 1, 2, 4), pooled_shortcut=True)
    s.conv_name, s.norm_name = "{}._conv", "{}._batch_norm"
    normalize = [{"type": "Normalize", "mean": [0.5] * 3, "std": [0.5] * 3}]
    return s, maps, {"model": {"align_corners": False}, "val_dataset": {"transforms": normalize}}


def paddleseg_encnet(images):
    s, maps, config = _paddle(images)
    x = s.block(maps[3], "bottleneck", 32, 3, bias=True)
    parts = [x, *(s.block(maps[i + 1], f"lateral_convs.{i}", 32, bias=True) for i in (0, 1))]
    x = s.block(torch.cat(parts, 1), "fusion", 32, 3, bias=True)
    projected = s.block(x, "enc_module.encoding_project", 32, bias=True)
    names = ["enc_module.encoding.0", "enc_module.encoding.1", "enc_module.fc.0", "se_layer"]
    x = s.conv(_encoded(s, x, projected, 6, names), "head", CLASSES, bias=True)
    s.conv(s.block(maps[2], "fcn_head.conv_bn_relu", 8, 3, bias=True), "fcn_head.conv", CLASSES, bias=True)
    return s, resized(x, tuple(images.shape[2:])), config, {}


def paddleseg_pointrend(images):
    """Its pyramid gives maps from coarse to fine, which the heads take for fine to coarse."""
    s, maps, config = _paddle(images)
    s.conv_name, s.norm_name = "neck.lateral_convs.{}.0", "neck.lateral_convs.{}.1"
    above = s.block(maps[3], "3", 32, bias=True)
    pyramid = [above]
    for i in (2, 1, 0):
        s.conv_name, s.norm_name = "neck.lateral_convs.{}.0", "neck.lateral_convs.{}.1"
        y = s.block(maps[i], str(i), 32, bias=True)
        above = y + resized(above, y, aligned=True)
        s.conv_name, s.norm_name = "neck.fpn_out.{}.0._conv", "neck.fpn_out.{}.0._batch_norm"
        pyramid.append(s.block(above, str(i), 32, 3, bias=True))
    total = None
    for i, y in enumerate(pyramid):
        for k in range(max(1, i)):
            y = s.conv(y, f"fpnhead.scale_heads.{i}.{2 * k}._conv", 16, 3, bias=True).relu()
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False) if i else y
        total = y if total is None else total + resized(y, total)
    coarse = s.conv(total, "fpnhead.conv_seg", CLASSES, bias=True)
    layers = [f"pointhead.fcs.{i}._conv" for i in (0, 1, 2)]
    refined = pointrend(s, coarse, pyramid[0], layers, "pointhead.fc_seg", width=24, each_layer=True)
    config["model"]["point_subdivision_num_points"] = POINTS
    return s, resized(refined, tuple(images.shape[2:])), config, {}


def _upernet(s, maps, parts, fuse, laterals, outputs, **bias):
    """UPerNet's pyramid, P2 to P5, with corners aligned: ``parts`` of the pooling, joined."""
    above = s.block(torch.cat(parts, 1), fuse, 24, 3, **bias)
    pyramid = [above]
    for i in (2, 1, 0):
        names = s.conv_name, s.norm_name
        s.conv_name, s.norm_name = laterals
        y = s.block(maps[i], str(i), 24, **bias)
        s.conv_name, s.norm_name = names
        above = y + resized(above, y, aligned=True)
        pyramid.insert(0, s.block(above, outputs.format(i), 24, 3, **bias))
    return [pyramid[0], *(resized(y, pyramid[0], aligned=True) for y in pyramid[1:])]


def _pooled(s, x, name, start=0, **bias):
    """The branches of a pooling: pooled, convolved, resized."""
    branches = []
    for i, bins in enumerate((1, 2, 3, 6), start):
        y = s.block(F.adaptive_avg_pool2d(x, bins), name.format(i), 16, **bias)
        branches.append(resized(y, x, aligned=True))
    return branches


def paddleseg_upernet(images):
    """The branches of its pooling are joined from 6 to 1."""
    s, maps, config = _paddle(images)
    parts = [maps[3], *_pooled(s, maps[3], "head.ppm.stages.{}.1", bias=True)[::-1]]
    laterals = "head.lateral_convs.{}.0", "head.lateral_convs.{}.1"
    levels = _upernet(s, maps, parts, "head.ppm.conv_bn_relu2", laterals, "head.fpn_convs.{}.0", bias=True)
    x = s.block(torch.cat(levels, 1), "head.fpn_bottleneck", 20, 3, bias=True)
    s.conv(s.block(maps[2], "head.dsn.0", 8, 3, bias=True), "head.dsn.2", CLASSES, bias=True)
    s.conv(x, "head.conv_last", CLASSES, bias=True)  # without an effect
    return s, resized(s.conv(x, "head.conv_seg", CLASSES, bias=True), tuple(images.shape[2:])), config, {}


def paddleseg_deeplabv3plus(images):
    s, maps, config = _paddle(images)

    def separable(x, name, out, dilation):
        weight = s.normal(f"{name}.depthwise_conv._conv.weight", x.shape[1], 1, 3, 3, scale=0.3)
        offset = s.normal(f"{name}.depthwise_conv._conv.bias", x.shape[1])
        y = F.conv2d(x, weight, offset, padding=dilation, dilation=dilation, groups=x.shape[1])
        y = s.norm(y, f"{name}.depthwise_conv._batch_norm")  # without a ReLU
        return s.block(y, name + ".piontwise_conv", out, bias=True)  # spelt so there

    top, rates = maps[3], (12, 24, 36)
    parts = [s.block(top, "head.aspp.aspp_blocks.0", 16, bias=True)]
    parts += [separable(top, f"head.aspp.aspp_blocks.{i}", 16, rate) for i, rate in enumerate(rates, 1)]
    whole = s.block(top.mean((2, 3), keepdim=True), "head.aspp.global_avg_pool.1", 16, bias=True)
    x = s.block(torch.cat([*parts, resized(whole, top)], 1), "head.aspp.conv_bn_relu", 16, bias=True)
    low = s.block(maps[0], "head.decoder.conv_bn_relu1", 12, bias=True)
    x = separable(torch.cat([resized(x, low), low], 1), "head.decoder.conv_bn_relu2", 16, 1)
    x = s.conv(separable(x, "head.decoder.conv_bn_relu3", 16, 1), "head.decoder.conv", CLASSES, bias=True)
    config["model"]["aspp_ratios"] = [1, *rates]
    return s, resized(x, tuple(images.shape[2:])), config, {}


def pytorch_encoding_upernet(images):
    """On torchvision's ResNet-50; its levels are joined from coarse to fine."""
    s = Source("pretrained.{0[0]}{0[1]}", "pretrained.{0[0]}{0[2]}")
    x = s.block(images, ("", "conv1", "bn1"), 64, 7, stride=2)
    maps = resnet50(s, F.max_pool2d(x, 3, 2, 1), _torchvision)
    s.conv_name, s.norm_name = "{}.0", "{}.1"
    parts = [maps[3], *_pooled(s, maps[3], "head.extramodule.conv{}", start=1)]
    laterals = "head.fpn_lateral.{}.0", "head.fpn_lateral.{}.1"
    levels = _upernet(s, maps, parts, "head.c4conv", laterals, "head.fpn_out.{}")
    x = s.block(torch.cat(levels[::-1], 1), "head.conv5", 20, 3)
    return s, resized(s.conv(x, "head.conv5.4", CLASSES, bias=True), tuple(images.shape[2:]), aligned=True), None, {}


FRAMEWORKS = {
    "detectron2": detectron2,
    "csail": csail,
    "unifiedparsing": unifiedparsing,
    "pytorch_encoding encnet": pytorch_encoding_encnet,
    "pytorch_encoding upernet": pytorch_encoding_upernet,
    "paddleseg encnet": paddleseg_encnet,
    "paddleseg pointrend": paddleseg_pointrend,
    "paddleseg upernet": paddleseg_upernet,
    "paddleseg deeplabv3plus": paddleseg_deeplabv3plus,
}


@pytest.mark.parametrize("name", list(FRAMEWORKS))
@torch.no_grad()
def test_converted_networks_compute_the_same(name):
    noise = torch.randn(1, 3, 7, 9, generator=torch.Generator().manual_seed(1))
    images = resized(noise.double(), SIZE)
    source, wanted, config, given = FRAMEWORKS[name](images)
    tasks = given.pop("tasks", {})
    path = Path("weights")
    found = engine.identify(source.tensors, name.split()[0], path)
    command._check_round_trip(found, path)
    network = command._network(command._contents(found, [], config, given, path), path).double()
    got = network.predict(images).refined
    # Coordinates of points are float32, and so is a mean into which a bias was folded.
    assert (got - wanted).abs().max() < 2e-6 * wanted.abs().max()
    assert torch.equal(got.argmax(1), wanted.argmax(1)) and len(wanted.unique()) > 1000  # not constant
    if tasks:
        assert {
            task: torch.equal(x, tasks[task]) for task, x in network.predict_tasks(images).items()
        } == dict.fromkeys(tasks, True)
