"""What a format is: tables of rules, and what is known, read or asked about the models behind the tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .errors import ConversionError
from .rules import FOLD, Rule, matched

FORMATS = (
    "mmseg",
    "mmdet",
    "detectron2",
    "paddleseg",
    "pytorch_encoding",
    "csail",
    "unifiedparsing",
    "transformers",
    "torchvision",
)
IMAGENET = {"data.mean": [0.485, 0.456, 0.406], "data.std": [0.229, 0.224, 0.225], "data.channel_order": "rgb"}
CAFFE = {
    "data.mean": [103.53, 116.28, 123.675],
    "data.std": [1.0, 1.0, 1.0],
    "data.channel_order": "bgr",
    "data.pixel_max": 255,
}
HALF = {"data.mean": [0.5, 0.5, 0.5], "data.std": [0.5, 0.5, 0.5], "data.channel_order": "rgb"}
NORMALIZATIONS = {"imagenet": IMAGENET, "caffe": CAFFE, "half": HALF}


class Part(NamedTuple):
    """A network's decoder, or a backbone."""

    name: str
    sign: str
    """The pattern of a tensor that only this part has, of those that are not listed before it."""
    rules: tuple[Rule, ...]
    dead: tuple[str, ...] = ()
    """Patterns of tensors without an effect."""
    settings: Mapping[str, Any] = {}
    """Keys of our configuration that are always so."""
    asks: Mapping[str, str] = {}
    """Keys that leave no sign in the tensors, with their values in words: from the source's configuration, or --set."""
    fill: Mapping[str, float] = {}
    """Patterns of our tensors that such files lack, with the number that stands for them."""
    backbone: str = "backbone."
    """What the names of a backbone begin with in such a model of ours."""
    reads: tuple[Read, ...] = ()
    """Before those of the format."""
    fresh: tuple[str, ...] = ()
    """Patterns of our tensors that such a model lacks: they begin with random weights."""


class Read(NamedTuple):
    """A value of the source's configuration. In ``path``, ``a.b``, a list stands for its first item."""

    path: str
    key: str
    """Ours, or ``""``: the value is only checked. A key that the decoder does not have is left out."""
    via: Mapping[Any, Any] | Callable[[Any], Any] | None = None
    default: Any = None
    """What the framework takes where its configuration does not say; None: nothing."""


class Format(NamedTuple):
    """All that is known of a framework."""

    models: tuple[Part, ...]
    backbones: tuple[Part, ...]
    """Their patterns begin after the prefix there, after ``Part.backbone`` of the model here."""
    prefix: str
    """Of the backbone in a whole model."""
    leaves: Mapping[str, str] = {}
    """Last components of names, theirs to ours."""
    dead: tuple[str, ...] = ()
    settings: Mapping[str, Any] = {}
    reads: tuple[Read, ...] = ()
    asks: Mapping[str, str] = {}
    files: int = 1

    def rules(self, model: Part, backbone: Part) -> list[Rule]:
        """The rules of a whole model."""
        return [*model.rules, *self.backbone_rules(backbone, self.prefix, model.backbone)]

    @staticmethod
    def backbone_rules(backbone: Part, prefix: str, ours: str) -> list[Rule]:
        """The rules of a backbone under other prefixes."""
        return [(prefix + rule[0], ours + rule[1], *rule[2:]) for rule in backbone.rules]  # type: ignore[misc]

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``tensors`` without the prefix of parallel training, and with our last components."""
        result = {}
        for name, tensor in tensors.items():
            head, dot, leaf = name.removeprefix("module.").rpartition(".")
            result[head + dot + self.leaves.get(leaf, leaf)] = tensor
        return result


def find_part(parts: Sequence[Part], tensors: Mapping[str, Any], prefix: str = "") -> Part | None:
    """The first part whose sign is among the names."""
    return next((p for p in parts if any(matched(prefix + p.sign, name) is not None for name in tensors)), None)


def pair(theirs: str, ours: str, conv: str = ".conv", norm: str = ".bn") -> tuple[Rule, ...]:
    """The rules of a convolution with its norm: one module of ours."""
    return (
        (f"{theirs}{norm}.*", f"{ours}.norm.*"),
        (f"{theirs}{conv}.weight", f"{ours}.weight"),
        (f"{theirs}{conv}.bias", f"{ours}.bias"),
    )


def folded(theirs: str, ours: str, conv: str = "._conv", norm: str = "._batch_norm") -> tuple[Rule, ...]:
    """As ``pair``, for a convolution whose bias comes before a batch norm."""
    return (
        (f"{theirs}{norm}.*", f"{ours}.norm.*"),
        (f"{theirs}{conv}.weight", f"{ours}.weight"),
        (f"{theirs}{conv}.bias", f"{ours}.norm.running_mean", FOLD),
    )


def separable(theirs: str, ours: str, rules: Callable[[str, str], tuple[Rule, ...]] = pair) -> tuple[Rule, ...]:
    """The rules of a depthwise separable convolution."""
    depthwise, pointwise = ("depthwise_conv", "piontwise_conv" if rules is folded else "pointwise_conv")
    return (*rules(f"{theirs}.{depthwise}", f"{ours}.depthwise"), *rules(f"{theirs}.{pointwise}", f"{ours}.pointwise"))


def load_format(name: str) -> Format:
    """The format of this name, from its own file."""
    if name not in FORMATS:
        raise ConversionError(f"--from must be one of {', '.join(FORMATS)}, rendseg; got {name!r}")
    return importlib.import_module(f"rendseg.convert.formats.{name}").FORMAT


def only(*allowed: Any, what: str) -> Callable[[Any], Any]:
    """For ``Read.via``: refuse what there is no switch for."""

    def check(value: Any) -> Any:
        plain = list(value) if isinstance(value, (tuple, list)) else value
        if plain not in allowed:
            raise ConversionError(f"{what} {value!r} cannot be expressed here: such a model cannot be converted")
        return value

    return check
