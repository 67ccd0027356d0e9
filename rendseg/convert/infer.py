"""What the names and shapes of a network's tensors, under our names, say about its configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .errors import ConversionError

# Option of the decoder -> the tensor and the axis that give it.
_SIZES: Mapping[str, Mapping[str, tuple[str, int]]] = {
    "semantic_fpn": {"channels": ("fpn.fpn_lateral2.weight", 0), "head_channels": ("predictor.weight", 1)},
    "encnet": {
        "channels": ("bottleneck.weight", 0),
        "num_codes": ("enc_module.encoding.codewords", 0),
        "aux_channels": ("aux_head.convs.0.weight", 0),
    },
    "upernet": {
        "channels": ("lateral2.weight", 0),
        "ppm_channels": ("ppm.branches.0.weight", 0),
        "fuse_channels": ("fuse.weight", 0),
        "ppm_kernel": ("ppm.fuse.weight", 2),
        "output_kernel": ("output2.weight", 2),
        "fuse_kernel": ("fuse.weight", 2),
    },
    "deeplabv3": {"channels": ("aspp.project.weight", 0), "project_kernel": ("aspp.project.weight", 2)},
    "fcn": {"channels": ("head.convs.0.weight", 0), "kernel_size": ("head.convs.0.weight", 2)},
}
_SIZES = {
    **_SIZES,
    "upp": {
        **_SIZES["upernet"],
        "scene_classes": ("scene_head.1.weight", 0),
        "material_classes": ("material_head.1.weight", 0),
    },
    "deeplabv3plus": {**_SIZES["deeplabv3"], "low_channels": ("low.weight", 0)},
}
# Option -> the tensor whose presence it tells.
_PRESENT: Mapping[str, Mapping[str, str]] = {
    "encnet": {"encoding": "enc_module.gate.weight", "project_bias": "enc_module.project.bias"},
    "deeplabv3": {"image_pool": "aspp.pool.weight", "separable": "aspp.branches.1.depthwise.weight"},
    "fcn": {"concat_input": "head.conv_cat.weight"},
    "semantic_fpn": {"output_last": "fpn.fpn_output5.weight"},
}
_PRESENT = {
    **_PRESENT,
    "deeplabv3plus": {**_PRESENT["deeplabv3"], "separable_decoder": "convs.0.depthwise.weight"},
}
# Option -> the pattern whose different numbers it counts.
_COUNTED: Mapping[str, Mapping[str, str]] = {
    "deeplabv3": {"head_convs": r"convs\.(\d+)\."},
    "deeplabv3plus": {"decoder_convs": r"convs\.(\d+)\."},
    "fcn": {"num_convs": r"head\.convs\.(\d+)\."},
}
_BOXES = "roi_heads.box_predictor."
_CLASSIFIERS = ("predictor", "classifier", "classifier.1", "head.classifier")
# Blocks of the four stages, with bottlenecks or not -> the ResNet.
_RESNETS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
_SWINS = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}
_CONVNEXTS = {(96, 9): "tiny", (96, 27): "small", (128, 27): "base", (192, 27): "large", (256, 27): "xlarge"}


def _count(pattern: str, state: Mapping[str, Tensor]) -> int:
    return len({found[1] for name in state if (found := re.match(pattern, name))})


def backbone_name(state: Mapping[str, Tensor], prefix: str, path: object) -> str:
    """timm's name of the network whose tensors begin with ``prefix``."""
    net = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    name = _resnet(net) or _swin(net) or _convnext(net)
    if name is None:
        raise ConversionError(f"{path}: its backbone is none that is known; set model.backbone.name with --set")
    return name


def _resnet(net: Mapping[str, Tensor]) -> str | None:
    if "layer1.0.conv1.weight" not in net:
        return None
    blocks = tuple(_count(rf"layer{stage}\.(\d+)\.", net) for stage in (1, 2, 3, 4))
    depth = _RESNETS.get((blocks, "layer1.0.conv3.weight" in net))  # type: ignore[arg-type]
    stem = net.get("conv1.0.weight")
    if depth is None or net["layer1.0.conv2.weight"].shape[:2] != (64, 64):
        return None
    if "layer2.0.downsample.1.weight" in net and net["layer2.0.downsample.1.weight"].dim() == 4:
        return f"resnet{depth}d"
    return f"resnet{depth}" + ("" if stem is None else {32: "c", 64: "s"}.get(len(stem), "?"))


def _swin(net: Mapping[str, Tensor]) -> str | None:
    table = net.get("layers_0.blocks.0.attn.relative_position_bias_table")
    if table is None:
        return None
    window = (math.isqrt(len(table)) + 1) // 2
    kind = _SWINS.get((len(net["patch_embed.proj.weight"]), _count(r"layers_2\.blocks\.(\d+)\.", net)))
    return kind and f"swin_{kind}_patch4_window{window}_{384 if window == 12 else 224}"


def _convnext(net: Mapping[str, Tensor]) -> str | None:
    if "stem_0.weight" not in net:
        return None
    kind = _CONVNEXTS.get((len(net["stem_0.weight"]), _count(r"stages_2\.blocks\.(\d+)\.", net)))
    return kind and f"convnext_{kind}"


def num_classes(state: Mapping[str, Tensor], path: object) -> int:
    """The classes that the coarse logits have; of a detector without the background."""
    boxes = state.get(_BOXES + "cls_score.weight")
    if boxes is not None:
        return len(boxes) - 1
    found = next((state[key] for name in _CLASSIFIERS if (key := f"decoder.{name}.weight") in state), None)
    if found is None:
        raise ConversionError(f"{path}: the classifier is missing")
    return len(found)


def _norm(state: Mapping[str, Tensor], module: str) -> str:
    if f"{module}.norm.running_mean" in state:
        return "bn"
    return "gn" if f"{module}.norm.weight" in state else "none"


def options(decoder: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keys of ``model``, dotted, that the shapes of everything but the backbone give."""
    keys: dict[str, Any] = {}
    inner = {name.removeprefix("decoder."): tensor for name, tensor in state.items() if name.startswith("decoder.")}
    for option, (name, axis) in _SIZES[decoder].items():
        if name in inner:
            keys[f"model.decoder.{option}"] = inner[name].shape[axis]
    for option, name in _PRESENT.get(decoder, {}).items():
        keys[f"model.decoder.{option}"] = name in inner
    for option, pattern in _COUNTED.get(decoder, {}).items():
        keys[f"model.decoder.{option}"] = _count(pattern, inner)
    if decoder == "semantic_fpn":
        keys["model.decoder.norm"] = _norm(state, "decoder.p2.0")
        keys["model.decoder.neck_norm"] = _norm(state, "decoder.fpn.fpn_lateral2")
    if decoder == "encnet":
        keys["model.decoder.laterals"] = [("c3", "c4"), ()]["laterals.0.weight" not in inner]
        if "se_layer.weight" not in inner:
            keys["model.decoder.se_weight"] = 0.0
        if "aux_head.classifier.weight" not in inner:
            keys["model.decoder.aux_weight"] = 0.0
    if "head.predictor.weight" in state:
        keys |= _head(state)
    levels = _widths(state)
    heads = _count(r"auxiliary\.(\d+)\.", state)
    if heads:
        keys["model.auxiliary"] = [_auxiliary(state, f"auxiliary.{i}", levels) for i in range(heads)]
    return keys


def detector(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """As ``options``, of a detector with masks."""
    sizes = {
        "fpn_channels": "backbone.fpn.inner_blocks.0.0.weight",
        "box_hidden_channels": "roi_heads.box_head.fc6.weight",
        "mask.hidden_channels": "roi_heads.mask_head.point_head.fc1.weight",
        "mask.coarse_hidden_channels": "roi_heads.mask_head.coarse_head.fc1.weight",
    }
    keys = {f"model.{option}": len(state[name]) for option, name in sizes.items() if name in state}
    coarse, classes = state.get("roi_heads.mask_head.coarse_head.prediction.bias"), state.get(_BOXES + "cls_score.bias")
    if coarse is not None and classes is not None and len(classes) > 1:
        keys["model.mask.coarse_size"] = math.isqrt(len(coarse) // (len(classes) - 1))
    return keys


def _head(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The point head."""
    layers = _count(r"head\.fc(\d+)\.", state)
    last = state["head.predictor.weight"]
    hidden = len(state["head.fc1.weight"]) if layers else 0
    return {
        "model.pointrend.num_layers": layers,
        **({"model.pointrend.hidden_channels": hidden} if layers else {}),
        "model.pointrend.coarse_each_layer": last.shape[1] > hidden if layers else True,
    }


def _widths(state: Mapping[str, Tensor]) -> dict[int, str]:
    """Channels of the backbone's maps -> their names, from the last tensors of each stage."""
    widths = {}
    for stage in (1, 2, 3, 4):
        names = (
            f"backbone.net.layer{stage}.0.conv3.weight",
            f"backbone.net.layer{stage}.0.conv2.weight",
            f"backbone.net.layers_{stage - 1}.blocks.0.mlp.fc2.weight",
            f"backbone.net.stages_{stage - 1}.blocks.0.mlp.fc2.weight",
        )
        found = next((state[name] for name in names if name in state), None)
        if found is not None:
            widths[len(found)] = f"c{stage + 1}"
    return widths


def _auxiliary(state: Mapping[str, Tensor], module: str, levels: Mapping[int, str]) -> dict[str, Any]:
    first = state.get(f"{module}.convs.0.weight", state[f"{module}.classifier.weight"])
    return {
        "level": levels.get(first.shape[1], "c4"),
        "channels": len(first),
        "num_convs": _count(rf"{re.escape(module)}\.convs\.(\d+)\.", state),
        "concat_input": f"{module}.conv_cat.weight" in state,
        "norm": _norm(state, f"{module}.convs.0"),
    }
