"""Backbones: timm networks that give one feature map per stage. N images, H W their size."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._options import read
from .options import BackboneOptions
from .resnet_stride4 import STRIDE4, create_stride4

# Weights of a classifier, which a backbone does not have.
_CLASSIFIER = ("fc.", "classifier.", "head.", "head_fc.", "last_linear.", "norm.")
# Families that take one image size only, unless told otherwise. Windows are always shifted, as in segmentation codes:
# the size for which the weights were trained must not decide it.
_ANY_SIZE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"),
        {"strict_img_size": False, "always_partition": True},
    ),
    **dict.fromkeys(("vision_transformer", "deit", "eva"), {"dynamic_img_size": True}),
}
_PREFIXES = ("module.", "model.", "backbone.", "encoder.", "net.")


class Backbone(nn.Module):
    """``forward(images [N, in_chans, H, W])`` -> a list of maps ``[N, channels[i], ceil(H / strides[i]), ...]``, fine
    to coarse.

    ``names`` are ``c1`` .. ``c5``: ``c5`` is the last stage, so that ``c2`` of a ResNet is the output of its first
    stage (stride 4); networks without a stride-2 map begin at ``c2``. An image size that is no multiple of
    ``size_divisor`` gives maps that do not fit together: pad first (the models do). Maps of networks that work on
    ``[N, H, W, C]`` (timm's ``output_fmt``) are transposed.

    ``native`` is the side of the images for which ``net`` was made. Where ``net`` takes no other size, so that windows
    of attention fit, it is the ``size_divisor``; ``fixed``: ``net`` takes images of that very size alone, and
    ``forward`` raises ``ValueError`` for others.

    ``any_size``: ``net`` takes every size of images, so that they need not be padded. ``output_norm``: every map goes
    through a ``LayerNorm`` of its own, ``output_norms.0`` .., as Swin and ConvNeXt do in mmsegmentation.

    ``branched``: some parameters serve only some of the maps (HRNet). In training every parameter then receives a
    gradient, of zeros where its map is not used, so that DDP does not wait for it.
    """

    def __init__(
        self,
        net: nn.Module,
        channels: list[int],
        strides: list[int],
        in_chans: int = 3,
        *,
        branched: bool = False,
        native: int | None = None,
        name: str = "",
        output_norm: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.in_chans = in_chans
        self.branched = branched
        self.name = name
        self.fixed = False
        self.nhwc = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
        self.channels = list(channels)
        self.strides = list(strides)
        self.names = [f"c{5 - len(channels) + 1 + i}" for i in range(len(channels))]
        self.output_norms: nn.ModuleList | None = None
        if output_norm:
            eps = next((m.eps for m in net.modules() if isinstance(m, nn.LayerNorm)), None)
            if eps is None:
                raise ValueError(f"backbone.output_norm is for networks with layer norms, which {name!r} is not")
            self.output_norms = nn.ModuleList(nn.LayerNorm(c, eps) for c in channels)
        self.any_size = False
        self.size_divisor = self._find_divisor(native)

    @property
    def channels_of(self) -> dict[str, int]:
        """``channels`` by name."""
        return dict(zip(self.names, self.channels, strict=True))

    @property
    def strides_of(self) -> dict[str, int]:
        """``strides`` by name."""
        return dict(zip(self.names, self.strides, strict=True))

    @torch.no_grad()
    def _find_divisor(self, native: int | None) -> int:
        """1 when every stage rounds its size up (as ResNets do), otherwise the largest stride, or ``native``."""
        largest = max(self.strides)
        height, width = largest + 5, largest + 3 + largest // 2  # odd: patches must not drop pixels either
        if maps := self._tried(height, width):
            self.any_size = True
            exact = (
                tuple(m.shape[2:]) == (-(-height // s), -(-width // s)) for m, s in zip(maps, self.strides, strict=True)
            )
            return 1 if all(exact) else largest
        if native is None or self._tried(2 * largest, 3 * largest):
            return largest
        self.fixed = not self._tried(native, 2 * native)
        if self.fixed and (native % largest or not self._tried(native, native)):
            raise ValueError(
                f"backbone {self.name!r} was made for images of {native} x {native} and cannot segment them (output "
                f"stride {largest}): choose another backbone.name"
            )
        return native

    def takes_odd_sizes(self) -> bool:
        return bool(self._tried(max(self.strides) + 5, max(self.strides) + 3))

    def _tried(self, height: int, width: int) -> list[Tensor]:
        """The maps of an image of this size; none where ``net`` does not take it."""
        training = self.net.training
        self.net.eval()
        try:
            return self._maps(next(self.net.parameters()).new_zeros(1, self.in_chans, height, width))
        except (RuntimeError, AssertionError, ValueError):
            return []
        finally:
            self.net.train(training)

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images must have shape [N, {self.in_chans}, H, W], got {list(images.shape)}")
        side = self.size_divisor
        if self.fixed and images.shape[2:] != (side, side):
            raise ValueError(
                f"backbone {self.name!r} takes images of {side} x {side} alone, got {images.shape[2]} x "
                f"{images.shape[3]}: set data.crop_size=[{side},{side}] and eval.window={side}"
            )
        maps = self._maps(images)
        if self.branched and self.training and torch.is_grad_enabled():
            maps = list(_Together.apply(*maps))
        return maps

    def _maps(self, images: Tensor) -> list[Tensor]:
        maps = list(self.net(images))
        if self.output_norms is not None:
            maps = [m if self.nhwc else m.permute(0, 2, 3, 1) for m in maps]
            maps = [norm(m) for norm, m in zip(self.output_norms, maps, strict=True)]
        return [m.permute(0, 3, 1, 2) for m in maps] if self.nhwc or self.output_norms is not None else maps


class _Together(torch.autograd.Function):
    """The maps themselves; in backward a map without a gradient gets zeros."""

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> tuple[Tensor, ...]:
        return tuple(m.view_as(m) for m in maps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grads


def create_backbone(options: BackboneOptions | None = None, *, channels_last: bool = False, **changes: Any) -> Backbone:
    """The backbone that ``options`` (with ``changes``) describe: a network of timm, or one of ``resnet53``,
    ``resnet103``, ``resnet53c``, ``resnet103c`` (see ``resnet_stride4``; output stride 4).

    Errors: ``ValueError`` for an unknown name (naming the nearest), one without ``features_only``, an output stride
    that the network does not have, or a checkpoint that does not fit; ``FileNotFoundError`` for a missing checkpoint;
    ``RuntimeError`` when the weights cannot be downloaded.
    """
    import timm  # two seconds of imports: only when a model is built
    from timm.models import is_model_in_modules

    from .backbone_switches import apply_switches, fill_up_patches

    options = read(BackboneOptions, changes, "backbone", options)
    if options.pretrained and options.checkpoint is not None:
        raise ValueError("give either pretrained or checkpoint for the backbone, not both")
    if options.checkpoint is not None and not os.path.isfile(options.checkpoint):
        raise FileNotFoundError(f"backbone checkpoint {options.checkpoint!r} does not exist")
    if not timm.is_model(options.name) and options.name not in STRIDE4:
        close = difflib.get_close_matches(options.name, [*timm.list_models(), *STRIDE4], n=3, cutoff=0.4)
        raise ValueError(
            f"timm {timm.__version__} has no network {options.name!r}; nearest: {', '.join(close) or 'none'}"
        )
    stride4 = options.name in STRIDE4
    wanted = (4 if stride4 else 32) if options.output_stride is None else options.output_stride
    arguments: dict[str, Any] = {"features_only": True, "in_chans": options.in_chans}
    if wanted != 32:
        arguments["output_stride"] = wanted
    if not stride4:
        for family, any_size in _ANY_SIZE.items():
            if is_model_in_modules(options.name, [family]):
                arguments.update(any_size)

    def create(pretrained: bool) -> nn.Module:
        if stride4:
            return create_stride4(options.name, wanted, pretrained=pretrained, in_chans=options.in_chans)
        return timm.create_model(options.name, pretrained=pretrained, **arguments)

    failures = (RuntimeError, TypeError, AttributeError, NotImplementedError, AssertionError)
    asked = f"backbone {options.name!r} cannot be built with features_only and output_stride {wanted}"
    try:
        net = create(False)
    except failures as error:
        if arguments.pop("output_stride", None) is None:
            raise ValueError(f"{asked}: {error}") from error
        try:
            net = create(False)  # it cannot be dilated, and may have this stride by itself
        except failures:
            raise ValueError(f"{asked}: {error}") from error
        own = max(net.feature_info.reduction())  # type: ignore[operator, union-attr]
        if own != wanted:
            raise ValueError(
                f"{asked}: {str(error) or 'it cannot be dilated'}; set backbone.output_stride to {own}, its own"
            ) from error
    if options.pretrained:
        try:
            net = create(True)
        except Exception as error:  # noqa: BLE001 - the hub raises many kinds
            raise RuntimeError(
                f"the pretrained weights of {options.name!r} could not be loaded: {type(error).__name__}: {error}. "
                "Without a network, set backbone.checkpoint to a local file of weights, or backbone.pretrained to false"
            ) from error
    if options.checkpoint is not None:
        load_backbone_weights(net, options.checkpoint)
    info: Any = net.feature_info
    channels, strides = list(info.channels()), [int(s) // (2 if stride4 else 1) for s in info.reduction()]
    if options.output_stride is not None and max(strides) != options.output_stride:
        raise ValueError(
            f"backbone {options.name!r} has output stride {max(strides)}, not {options.output_stride}: "
            f"set backbone.output_stride to {max(strides)}"
        )
    apply_switches(net, options)
    if options.freeze_norm:
        from timm.layers import freeze_batch_norm_2d

        net = freeze_batch_norm_2d(net)
    branched = not stride4 and is_model_in_modules(options.name, ["hrnet"])
    made_for = None if stride4 else timm.get_pretrained_cfg(options.name)
    backbone = Backbone(
        net,
        channels,
        strides,
        options.in_chans,
        branched=branched,
        native=None if made_for is None else max(made_for.input_size[1:]),
        name=options.name,
        output_norm=bool(options.output_norm),
    )
    fill_up_patches(net)
    backbone.any_size = backbone.any_size or backbone.takes_odd_sizes()
    return to_channels_last(backbone) if channels_last else backbone


M = TypeVar("M", bound=nn.Module)


def to_channels_last(module: M) -> M:
    """``module`` with its weights in channels_last, except those of :func:`strided_points`."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layer in strided_points(module):
        layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)
    return module


def strided_points(module: nn.Module) -> list[nn.Conv2d]:
    """Convolutions 1x1 of a stride over an image of up to 4 channels (stems of RepVGG, FastViT and MobileOne): on the
    CPU, PyTorch writes out of bounds where these get channels_last."""
    layers = (m for m in module.modules() if isinstance(m, nn.Conv2d) and m.in_channels <= 4)
    return [m for m in layers if m.kernel_size == (1, 1) and max(m.stride) > 1]


def load_backbone_weights(net: nn.Module, path: str) -> None:
    """Load a local file of weights (``rendseg.convert`` reads it, without executing anything it holds) into ``net``,
    strictly.

    The weights of a classifier are dropped, and the first convolution is adapted to the number of input channels as
    timm does. Names are timm's, behind prefixes (``module.``, ``backbone.``) or not, or those of another framework.
    """
    from timm.models import adapt_input_conv

    from ..convert import ConversionError, read
    from ..convert.engine import backbone_weights

    target = net.state_dict()
    try:
        loaded = read(path).tensors
        state = _of_timm(loaded, target)
        unknown = [k for k in state if k not in target and not k.startswith(_CLASSIFIER)]
        missing = [k for k in target if k not in state and not k.endswith("num_batches_tracked")]
        if unknown or missing:
            renamed = backbone_weights(loaded, list(target), path)
            if renamed is None:
                raise ValueError(
                    f"the weights in {path!r} are of another network: {len(missing)} missing (first: {missing[:3]}), "
                    f"{len(unknown)} unknown (first: {unknown[:3]})"
                )
            state = renamed
    except ConversionError as error:
        raise ValueError(f"the weights of the backbone cannot be read: {error}") from None
    state = {k: v for k, v in state.items() if k in target}
    for name, weight in state.items():
        wanted = target[name].shape
        if (
            weight.dim() == 4
            and weight.shape != wanted
            and weight.shape[0] == wanted[0]
            and weight.shape[2:] == wanted[2:]
        ):
            state[name] = adapt_input_conv(wanted[1], weight)
        if state[name].shape != wanted:
            raise ValueError(f"weight {name} in {path!r} must have shape {list(wanted)}, got {list(weight.shape)}")
    net.load_state_dict(state, strict=False)


def _of_timm(state: dict[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without prefixes, and with the names that ``features_only`` gives."""
    while state and not any(k in target or k.replace(".", "_", 1) in target for k in state):
        prefix = next((p for p in _PREFIXES if any(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        state = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    # features_only flattens some networks by one level: "stages.0" becomes "stages_0".
    flat = {k: k.replace(".", "_", 1) for k in state}
    return {flat[k] if k not in target and flat[k] in target else k: v for k, v in state.items()}
