"""The tables of every format against names written by hand, and whole conversions of a small network."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from rendseg.cli import main
from rendseg.convert import ConversionError
from rendseg.convert.containers import Source
from rendseg.convert.engine import backbone_weights, configure, gather, identify
from rendseg.convert.registry import FORMATS, load_format
from rendseg.convert.rules import renamed, reversed_rules
from rendseg.convert.source_config import literals, lookup, read_config
from rendseg.engine.assemble import build_network
from rendseg.engine.checkpoint import load_checkpoint
from rendseg.engine.config import build_config
from rendseg.models import build_model

# format, model, backbone -> names there and here. A name that ends in "<" does not come back: it was folded.
NAMES = """
mmseg pointrend 0
  neck.lateral_convs.3.conv.bias                          decoder.fpn.fpn_lateral5.bias
  neck.fpn_convs.0.conv.weight                            decoder.fpn.fpn_output2.weight
  decode_head.0.scale_heads.2.2.bn.running_var            decoder.p4.2.norm.running_var
  decode_head.0.conv_seg.bias                             decoder.predictor.bias
  decode_head.1.fcs.0.conv.weight                         head.fc1.weight
  decode_head.1.fc_seg.weight                             head.predictor.weight
  backbone.stem.0.weight                                  backbone.net.conv1.0.weight
  backbone.stem.4.running_mean                            backbone.net.conv1.4.running_mean
  backbone.stem.7.weight                                  backbone.net.bn1.weight
  backbone.layer3.22.bn2.bias                             backbone.net.layer3.22.bn2.bias
mmseg encnet 1
  decode_head.enc_module.encoding_project.bn.weight       decoder.enc_module.project.norm.weight
  decode_head.enc_module.encoding.0.scale                 decoder.enc_module.encoding.scale
  decode_head.enc_module.encoding.1.running_mean          decoder.enc_module.norm.running_mean
  decode_head.enc_module.fc.0.bias                        decoder.enc_module.gate.bias
  decode_head.se_layer.weight                             decoder.se_layer.weight
  auxiliary_head.convs.0.conv.weight                      decoder.aux_head.convs.0.weight
  backbone.conv1.weight                                   backbone.net.conv1.weight
mmseg upernet 2
  decode_head.psp_modules.1.1.conv.weight                 decoder.ppm.branches.1.weight
  decode_head.bottleneck.bn.bias                          decoder.ppm.fuse.norm.bias
  decode_head.lateral_convs.2.conv.weight                 decoder.lateral4.weight
  decode_head.fpn_bottleneck.conv.weight                  decoder.fuse.weight
  auxiliary_head.conv_seg.weight                          auxiliary.0.classifier.weight
  backbone.stages.2.blocks.5.attn.w_msa.qkv.weight        backbone.net.layers_2.blocks.5.attn.qkv.weight
  backbone.stages.0.blocks.1.ffn.layers.0.0.bias          backbone.net.layers_0.blocks.1.mlp.fc1.bias
  backbone.stages.1.downsample.reduction.weight           backbone.net.layers_2.downsample.reduction.weight
  backbone.norm3.weight                                   backbone.output_norms.3.weight
mmseg deeplabv3plus 3
  decode_head.image_pool.1.conv.weight                    decoder.aspp.pool.weight
  decode_head.aspp_modules.0.bn.weight                    decoder.aspp.branches.0.norm.weight
  decode_head.aspp_modules.2.depthwise_conv.conv.weight   decoder.aspp.branches.2.depthwise.weight
  decode_head.sep_bottleneck.1.pointwise_conv.bn.weight   decoder.convs.1.pointwise.norm.weight
  decode_head.c1_bottleneck.conv.weight                   decoder.low.weight
  backbone.downsample_layers.0.1.weight                   backbone.net.stem_1.weight
  backbone.downsample_layers.2.1.bias                     backbone.net.stages_2.downsample.1.bias
  backbone.stages.3.1.pointwise_conv2.weight              backbone.net.stages_3.blocks.1.mlp.fc2.weight
mmdet pointrend_rcnn 1
  neck.lateral_convs.3.conv.bias                          backbone.fpn.inner_blocks.3.0.bias
  neck.fpn_convs.0.conv.weight                            backbone.fpn.layer_blocks.0.0.weight
  rpn_head.rpn_conv.weight                                rpn.head.conv.0.0.weight
  roi_head.bbox_head.shared_fcs.1.bias                    roi_heads.box_head.fc7.bias
  roi_head.bbox_head.fc_cls.weight                        roi_heads.box_predictor.cls_score.weight
  roi_head.mask_head.downsample_conv.conv.bias            roi_heads.mask_head.coarse_head.reduce_spatial_dim_conv.bias
  roi_head.mask_head.fcs.1.weight                         roi_heads.mask_head.coarse_head.fc2.weight
  roi_head.point_head.fcs.2.conv.weight                   roi_heads.mask_head.point_head.fc3.weight
  backbone.layer4.2.bn3.running_var                       backbone.body.net.layer4.2.bn3.running_var
detectron2 pointrend_rcnn 1
  backbone.fpn_lateral5.bias                              backbone.fpn.inner_blocks.3.0.bias
  proposal_generator.rpn_head.anchor_deltas.weight        rpn.head.bbox_pred.weight
  roi_heads.box_predictor.bbox_pred.bias                  roi_heads.box_predictor.bbox_pred.bias
  roi_heads.mask_coarse_head.coarse_mask_fc2.weight       roi_heads.mask_head.coarse_head.fc2.weight
  roi_heads.mask_point_head.fc1.bias                      roi_heads.mask_head.point_head.fc1.bias
  backbone.bottom_up.res5.2.conv3.norm.weight             backbone.body.net.layer4.2.bn3.weight
torchvision maskrcnn 1
  backbone.body.layer2.0.downsample.1.bias                backbone.body.layer2.0.downsample.1.bias
  backbone.fpn.inner_blocks.2.weight                      backbone.fpn.inner_blocks.2.0.weight
  rpn.head.conv.bias                                      rpn.head.conv.0.0.bias
  roi_heads.box_predictor.cls_score.bias                  roi_heads.box_predictor.cls_score.bias
detectron2 pointrend 1
  backbone.fpn_lateral4.weight                            decoder.fpn.fpn_lateral4.weight
  sem_seg_head.coarse_sem_seg_head.p5.4.norm.bias         decoder.p5.4.norm.bias
  sem_seg_head.coarse_sem_seg_head.predictor.weight       decoder.predictor.weight
  sem_seg_head.point_head.fc3.weight                      head.fc3.weight
  backbone.bottom_up.stem.conv1.norm.running_var          backbone.net.bn1.running_var
  backbone.bottom_up.res2.0.shortcut.weight               backbone.net.layer1.0.downsample.0.weight
  backbone.bottom_up.res5.2.conv3.norm.weight             backbone.net.layer4.2.bn3.weight
paddleseg pointrend 0
  neck.lateral_convs.1.1.weight                           decoder.fpn.fpn_lateral3.norm.weight
  neck.lateral_convs.1.0.bias                             decoder.fpn.fpn_lateral3.norm.running_mean<
  fpnhead.scale_heads.0.0._conv.weight                    decoder.p5.0.weight
  fpnhead.scale_heads.3.4._conv.bias                      decoder.p2.4.bias
  pointhead.fcs.2._conv.weight                            head.fc3.weight
  backbone.conv1_3._batch_norm.running_mean               backbone.net.bn1.running_mean
  backbone.bb_2_22.conv1._conv.weight                     backbone.net.layer3.22.conv2.weight
  backbone.bb_1_0.short._batch_norm.weight                backbone.net.layer2.0.downsample.2.weight
paddleseg encnet 0
  bottleneck._conv.bias                                   decoder.bottleneck.norm.running_mean<
  enc_module.encoding_project._conv.bias                  decoder.enc_module.project.bias
  enc_module.fc.0.weight                                  decoder.enc_module.gate.weight
  head.weight                                             decoder.classifier.weight
  fcn_head.conv_bn_relu._batch_norm.bias                  decoder.aux_head.convs.0.norm.bias
paddleseg deeplabv3plus 0
  head.aspp.aspp_blocks.1.piontwise_conv._conv.weight     decoder.aspp.branches.1.pointwise.weight
  head.aspp.global_avg_pool.1._batch_norm.weight          decoder.aspp.pool.norm.weight
  head.decoder.conv_bn_relu3.depthwise_conv._conv.weight  decoder.convs.1.depthwise.weight
paddleseg upernet 0
  head.ppm.conv_bn_relu2._conv.weight                     decoder.ppm.fuse.weight
  head.fpn_convs.2.0._batch_norm.weight                   decoder.output4.norm.weight
pytorch_encoding encnet 0
  head.conv5.1.running_var                                decoder.bottleneck.norm.running_var
  head.encmodule.encoding.0.weight                        decoder.enc_module.project.weight
  head.encmodule.encoding.4.bias                          decoder.enc_module.norm.bias
  head.encmodule.selayer.bias                             decoder.se_layer.bias
  head.conv6.1.weight                                     decoder.classifier.weight
  auxlayer.conv5.4.weight                                 decoder.aux_head.classifier.weight
  pretrained.conv1.6.weight                               backbone.net.conv1.6.weight
  pretrained.bn1.bias                                     backbone.net.bn1.bias
pytorch_encoding upernet 1
  head.extramodule.conv4.0.weight                         decoder.ppm.branches.3.weight
  head.c4conv.1.weight                                    decoder.ppm.fuse.norm.weight
  head.conv5.4.bias                                       decoder.classifier.bias
csail upernet 0
  decoder.ppm_last_conv.0.weight                          decoder.ppm.fuse.weight
  decoder.fpn_out.1.0.1.weight                            decoder.output3.norm.weight
  decoder.conv_last.1.bias                                decoder.classifier.bias
  encoder.conv2.weight                                    backbone.net.conv1.3.weight
  encoder.bn3.running_var                                 backbone.net.bn1.running_var
unifiedparsing upp 0
  decoder.conv_fusion.0.weight                            decoder.fuse.weight
  decoder.scene_head.2.bias                               decoder.scene_head.1.bias
  decoder.object_head.0.1.weight                          decoder.classifier.0.norm.weight
transformers upernet 0
  decode_head.psp_modules.3.1.batch_norm.weight           decoder.ppm.branches.3.norm.weight
  backbone.encoder.layers.2.blocks.4.intermediate.dense.bias  backbone.net.layers_2.blocks.4.mlp.fc1.bias
  backbone.encoder.layers.0.downsample.norm.bias          backbone.net.layers_1.downsample.norm.bias
  backbone.hidden_states_norms.stage1.weight              backbone.output_norms.0.weight
transformers upernet 1
  backbone.swin.encoder.layers.0.blocks.1.attention.o_proj.weight  backbone.net.layers_0.blocks.1.attn.proj.weight
transformers upernet 2
  backbone.encoder.stages.1.layers.0.layer_scale_parameter  backbone.net.stages_1.blocks.0.gamma
transformers upernet 3
  backbone.encoder.stages.3.layers.1.layer.2.normalization.bias  backbone.net.layer4.1.bn3.bias
torchvision deeplabv3 0
  classifier.0.convs.4.1.weight                           decoder.aspp.pool.weight
  classifier.0.convs.2.1.weight                           decoder.aspp.branches.2.norm.weight
  classifier.1.weight                                     decoder.convs.0.weight
  classifier.2.running_mean                               decoder.convs.0.norm.running_mean
  aux_classifier.4.bias                                   auxiliary.0.classifier.bias
"""


def _names():
    for line in NAMES.strip().splitlines():
        words = line.split()
        if len(words) == 3:
            heading = words
        else:
            yield pytest.param(*heading, *words, id=f"{heading[0]}-{words[0]}")


@pytest.mark.parametrize("name, model, backbone, theirs, ours", list(_names()))
def test_names(name, model, backbone, theirs, ours):
    form = load_format(name)
    part = next(part for part in form.models if part.name == model)
    rules = form.rules(part, form.backbones[int(backbone)])
    assert renamed(rules, theirs)[0] == ours.removesuffix("<")
    if not ours.endswith("<"):
        assert renamed(list(reversed_rules(rules)), ours)[0] == theirs


def test_every_format_has_names_here():
    assert {line.split()[0] for line in NAMES.splitlines() if line[:1].strip()} == set(FORMATS)


# ---------------------------------------------------------------------------------------------- a whole conversion


def _to_mmseg(state):
    """PointRend around a plain ResNet under mmsegmentation's names, without its rules."""
    result = {}
    for name, value in state.items():
        head, _, leaf = name.rpartition(".")
        if name.startswith("backbone.net."):
            result["backbone." + name.removeprefix("backbone.net.")] = value
            continue
        norm = head.endswith(".norm")
        *words, module = head.removesuffix(".norm").split(".")
        if words == ["head"]:
            new = "decode_head.1.fc_seg" if module == "predictor" else f"decode_head.1.fcs.{int(module[2:]) - 1}.conv"
        elif module == "predictor":
            new = "decode_head.0.conv_seg"
        elif words == ["decoder", "fpn"]:
            kind = "lateral_convs" if "lateral" in module else "fpn_convs"
            new = f"neck.{kind}.{int(module[-1]) - 2}.conv"
        else:
            new = f"decode_head.0.scale_heads.{int(words[1][1:]) - 2}.{module}.{'bn' if norm else 'conv'}"
        result[f"{new}.{leaf}"] = value
    return result


CONFIG = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='CascadeEncoderDecoder',
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(type='ResNet', depth=18, strides=(1, 2, 2, 2), norm_cfg=norm_cfg, style='pytorch'),
    decode_head=[dict(type='FPNHead', align_corners=False), dict(type='PointHead')],
    test_cfg=dict(mode='whole', subdivision_steps=2, subdivision_num_points=100, scale_factor=2))
"""
MODEL = {
    "pad": "none",
    "backbone": {"name": "resnet18", "output_stride": 32},
    "decoder": {"name": "semantic_fpn", "channels": 16, "head_channels": 8, "norm": "bn"},
    "pointrend": {"preset": "mmseg", "hidden_channels": 12, "inference_points": 100},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small PointRend, and its file of mmsegmentation."""
    torch.manual_seed(0)
    network = build_model(MODEL, 11).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("mmseg") / "small.pth"
    names = [f"name {i}" for i in range(11)]
    meta = {"cfg": CONFIG, "dataset_meta": {"classes": names, "palette": [[i, 2, 3] for i in range(11)]}}
    torch.save({"meta": meta, "state_dict": _to_mmseg(network.state_dict())}, path)
    return network, path


def test_a_model_of_mmseg_predicts_here(trained, tmp_path, monkeypatch, capsys):
    network, path = trained
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # 300 MB in all
    assert main(["convert", str(path), "--from", "mmseg", "--check"]) == 0
    assert f"{len(network.state_dict())} tensors -> small.pt" in capsys.readouterr().out
    contents = load_checkpoint("small.pt")
    assert contents["classes"]["names"][3] == "name 3" and contents["classes"]["palette"][3] == [3, 2, 3]
    assert contents["config"]["data"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert contents["config"]["model"]["pointrend"]["steps"] == 2
    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8)
    Image.fromarray(pixels).save("image.png")
    assert main(["predict", "small.pt", "image.png", "--out", "out", "--set", "device=cpu"]) == 0
    image = (torch.from_numpy(pixels).permute(2, 0, 1) - torch.tensor([123.675, 116.28, 103.53])[:, None, None]) / (
        torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    )
    wanted = network.predict(image[None], "labels").labels[0].numpy()
    assert np.mean(np.array(Image.open("out/image_labels.png")) != wanted) < 0.002

    for target, suffix in (("mmseg", "pth"), ("safetensors", "safetensors")):
        assert main(["convert", "small.pt", "--to", target, "--out", f"back.{suffix}"]) == 0
    back, source = (torch.load(file, weights_only=True)["state_dict"] for file in ("back.pth", path))
    assert back.keys() == source.keys() and all(torch.equal(back[name], source[name]) for name in source)
    assert main(["convert", "back.safetensors", "--from", "rendseg", "--out", "again.pt"]) == 0
    again = load_checkpoint("again.pt")
    assert again["config"] == contents["config"]
    assert all(torch.equal(again["model"][name], value) for name, value in contents["model"].items())

    config = build_config(contents["config"], ["model.checkpoint=again.pt"])
    for classes, equal in ((11, True), (5, False)):
        started = build_network(config, classes).state_dict()
        assert len(started["decoder.predictor.bias"]) == classes
        assert torch.equal(started["decoder.fpn.fpn_output2.weight"], again["model"]["decoder.fpn.fpn_output2.weight"])
        assert torch.equal(started["head.predictor.weight"], again["model"]["head.predictor.weight"]) is equal


@pytest.mark.bad_input
def test_commands_that_cannot_be_done(trained, tmp_path, monkeypatch, capsys):
    path = trained[1]
    monkeypatch.chdir(tmp_path)
    whole = torch.load(path, weights_only=True)
    torch.save({"state_dict": whole["state_dict"]}, "bare.pth")
    torch.save({**whole, "state_dict": {**whole["state_dict"], "decode_head.2.x": torch.zeros(1)}}, "more.pth")
    less = dict(whole["state_dict"])
    del less["neck.fpn_convs.1.conv.bias"]
    torch.save({**whole, "state_dict": less}, "less.pth")
    for arguments, message in (
        (["bare.pth", "--from", "mmseg"], "leaves open data.mean (--normalize); align_corners"),
        (["more.pth", "--from", "mmseg"], "1 tensors have no place in the pointrend of mmseg, first decode_head.2.x"),
        (["less.pth", "--from", "mmseg"], "lacks 1 tensors of the network, first decoder.fpn.fpn_output3.bias"),
        (["less.pth", "--from", "torchvision"], "it looks like mmseg"),
        (["less.pth"], "name its framework with --from"),
        (["less.pth", "--from", "nobody"], "--from must be one of"),
        (["less.pth", "bare.pth", "--from", "mmseg"], "takes one file or folder, got 2"),
        (["less.pth", "--from", "mmseg", "--to", "onnx"], "--to must be one of"),
        (["nowhere.pth", "--from", "mmseg"], "nowhere.pth cannot be read"),
    ):
        assert main(["convert", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not list(tmp_path.glob("*.pt"))


# --------------------------------------------------------------------------------------------- what is asked or read


def _resnet50(rename, prefix):
    """Names and empty tensors of the backbone of a ResNet-50, as ``rename`` calls layers."""
    state = {}
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(blocks):
            for conv, shape in ((1, (width, 4, 1, 1)), (2, (width, width, 3, 3)), (3, (4 * width, width, 1, 1))):
                state[prefix + rename(stage, block, conv)] = torch.empty(0).expand(0).new_empty(1).expand(shape)
    return state


def test_detectron2_takes_the_stride_from_its_configuration(tmp_path):
    state = _resnet50(lambda s, b, c: f"res{s + 1}.{b}.conv{c}.weight", "backbone.bottom_up.")
    state |= {
        "backbone.bottom_up.stem.conv1.weight": torch.empty(64, 3, 7, 7),
        "sem_seg_head.point_head.predictor.weight": torch.empty(19, 256, 1),
        "sem_seg_head.point_head.fc1.weight": torch.empty(256, 275, 1),
        "sem_seg_head.coarse_sem_seg_head.predictor.weight": torch.empty(19, 128, 1, 1),
        "pixel_mean": torch.zeros(3),
    }
    found = identify(state, "detectron2", "x.pkl")
    assert found.applied.dead == ["pixel_mean"]
    with pytest.raises(ConversionError, match="stride_in_1x1"):
        configure(found, None, {"data.mean": [0.5] * 3}, "x.pkl")
    (tmp_path / "base.yaml").write_text("MODEL: {POINT_HEAD: {SUBDIVISION_NUM_POINTS: 784}, RESNETS: {DEPTH: 50}}\n")
    for text, stride in (("", True), ("MODEL: {RESNETS: {STRIDE_IN_1X1: false}}\n", False)):
        (tmp_path / "x.yaml").write_text("_BASE_: base.yaml\n" + text)
        keys, classes = configure(found, read_config(tmp_path / "x.yaml"), {}, "x.pkl")
        assert keys["model.backbone.stride_in_1x1"] is stride and classes == 19
        assert keys["model.pointrend.inference_points"] == 784 and keys["model.backbone.name"] == "resnet50"
        assert keys["data.channel_order"] == "bgr" and keys["data.pixel_max"] == 255
        assert keys["model.pointrend.coarse_each_layer"] is False
    (tmp_path / "base.yaml").unlink()
    with pytest.raises(ConversionError, match="builds on base.yaml, which is not there"):
        read_config(tmp_path / "x.yaml")


def test_csail_takes_an_encoder_and_a_decoder(tmp_path):
    files = {
        "encoder.pth": {"layer1.0.conv1.weight": torch.zeros(1), "bn1._running_iter": torch.zeros(1)},
        "decoder.pth": {"conv_last.1.weight": torch.zeros(1)},
    }
    sources = [Source(tmp_path / name, state, {}) for name, state in files.items()]
    for order in (sources, sources[::-1]):
        wanted = {"encoder.layer1.0.conv1.weight", "encoder.bn1._running_iter", "decoder.conv_last.1.weight"}
        assert gather(order, "csail").keys() == wanted
    with pytest.raises(ConversionError, match="must be an encoder and a decoder"):
        gather([sources[0]] * 2, "csail")


def test_python_configurations_are_read_and_not_executed(tmp_path):
    (tmp_path / "base.py").write_text(
        "import os\nos.system('touch called')\nmodel = dict(a=1, b=dict(c=[1, -2], d=2))\n"
    )
    (tmp_path / "own.py").write_text(
        "_base_ = ['./base.py']\nsize = (512, 1024)\nmodel = dict(b=dict(d={'e': size}, f=open('x').read(), g=None))\n"
    )
    config = read_config(tmp_path / "own.py")
    assert config["model"] == {"a": 1, "b": {"c": [1, -2], "d": {"e": [512, 1024]}, "g": None}}
    assert lookup(config, "model.b.c") == [1, -2] and not (tmp_path / "called").exists()
    assert literals("model = dict(b=dict(_delete_=True, x=1))", "text")["model"]["b"]["x"] == 1
    with pytest.raises(ConversionError, match="not readable Python"):
        literals("model = dict(", "text")


def test_backbones_of_other_frameworks():
    wanted = {f"bn1.{leaf}": 2 for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    names = ["conv1.weight", *wanted, "layer1.0.conv1.weight", "layer1.0.downsample.0.weight"]
    caffe = {
        "conv1_w": torch.ones(1),
        "res_conv1_bn_s": torch.full((2,), 3.0),
        "res_conv1_bn_b": torch.full((2,), 4.0),
        "res2_0_branch2a_w": torch.ones(1),
        "res2_0_branch1_w": torch.ones(1),
        "fc1000_w": torch.ones(1),
    }
    found = backbone_weights(caffe, names, "R-50.pkl")
    assert set(found) == set(names) - {"bn1.num_batches_tracked"}
    assert found["bn1.weight"].tolist() == [3, 3] and found["bn1.running_mean"].tolist() == [0, 0]
    # What a scale and a bias alone compute.
    assert (found["bn1.running_var"] + 1e-5).tolist() == pytest.approx([1, 1])
    paddle = {
        "conv1_1._conv.weight": torch.ones(1),
        "bb_0_0.conv0._conv.weight": torch.ones(1),
        "conv1_3._batch_norm._mean": torch.ones(1),
        "fc.weight": torch.ones(1),
    }
    names = ["conv1.0.weight", "layer1.0.conv1.weight", "bn1.running_mean"]
    assert set(backbone_weights(paddle, names, "x.pdparams")) == set(names)
    assert backbone_weights({**paddle, "more": torch.ones(1)}, names, "x.pdparams") is None
