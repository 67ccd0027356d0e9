"""Backbones: timm networks that give one feature map per stage. N images, H W their size."""

from __future__ import annotations

import dataclasses
import difflib
import os
from typing import Any

import torch
from torch import Tensor, nn

from .options import BackboneOptions

# Weights of a classifier, which a backbone does not have.
_CLASSIFIER = ("fc.", "classifier.", "head.", "head_fc.", "last_linear.", "norm.")
_PREFIXES = ("module.", "model.", "backbone.", "encoder.", "net.")


class Backbone(nn.Module):
    """``forward(images [N, in_chans, H, W])`` -> a list of maps ``[N, channels[i], ceil(H / strides[i]), ...]``, fine
    to coarse.

    ``names`` are ``c1`` .. ``c5``: ``c5`` is the last stage, so that ``c2`` of a ResNet is the output of its first
    stage (stride 4); networks without a stride-2 map begin at ``c2``. An image size that is no multiple of
    ``size_divisor`` gives maps that do not fit together: pad first (the models do).
    """

    def __init__(self, net: nn.Module, channels: list[int], strides: list[int], in_chans: int = 3) -> None:
        super().__init__()
        self.net = net
        self.in_chans = in_chans
        self.channels = list(channels)
        self.strides = list(strides)
        self.names = [f"c{5 - len(channels) + 1 + i}" for i in range(len(channels))]
        self.size_divisor = self._find_divisor()

    @torch.no_grad()
    def _find_divisor(self) -> int:
        """1 when every stage rounds its size up (as ResNets do), otherwise the largest stride."""
        largest = max(self.strides)
        height, width = largest + 4, largest + 4 + largest // 2
        training = self.net.training
        self.net.eval()
        try:
            maps = self(next(self.net.parameters()).new_zeros(1, self.in_chans, height, width))
            exact = all(
                tuple(m.shape[2:]) == (-(-height // s), -(-width // s)) for m, s in zip(maps, self.strides, strict=True)
            )
        except (RuntimeError, AssertionError, ValueError):  # a network of fixed input size
            exact = False
        finally:
            self.net.train(training)
        return 1 if exact else largest

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images must have shape [N, {self.in_chans}, H, W], got {list(images.shape)}")
        maps = list(self.net(images))
        for i, (m, channels) in enumerate(zip(maps, self.channels, strict=True)):
            if m.shape[1] != channels and m.shape[-1] == channels:  # windowed transformers answer [N, H, W, C]
                maps[i] = m.permute(0, 3, 1, 2)
        return maps


def create_backbone(options: BackboneOptions | None = None, *, channels_last: bool = False, **changes: Any) -> Backbone:
    """The backbone that ``options`` (with ``changes``) describe.

    Errors: ``ValueError`` for an unknown name (naming the nearest), one without ``features_only``, an output stride
    that the network does not have, or a checkpoint that does not fit; ``FileNotFoundError`` for a missing checkpoint;
    ``RuntimeError`` when the weights cannot be downloaded.
    """
    import timm  # two seconds of imports: only when a model is built

    options = dataclasses.replace(options or BackboneOptions(), **changes)
    if options.pretrained and options.checkpoint is not None:
        raise ValueError("give either pretrained or checkpoint for the backbone, not both")
    if options.checkpoint is not None and not os.path.isfile(options.checkpoint):
        raise FileNotFoundError(f"backbone checkpoint {options.checkpoint!r} does not exist")
    if not timm.is_model(options.name):
        close = difflib.get_close_matches(options.name, timm.list_models(), n=3, cutoff=0.4)
        raise ValueError(
            f"timm {timm.__version__} has no network {options.name!r}; nearest: {', '.join(close) or 'none'}"
        )
    wanted = 32 if options.output_stride is None else options.output_stride
    arguments: dict[str, Any] = {"features_only": True, "in_chans": options.in_chans}
    if wanted != 32:
        arguments["output_stride"] = wanted
    try:
        net = timm.create_model(options.name, pretrained=False, **arguments)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError, AssertionError) as error:
        raise ValueError(
            f"backbone {options.name!r} cannot be built with features_only and output_stride {wanted}: {error}"
        ) from error
    if options.pretrained:
        try:
            net = timm.create_model(options.name, pretrained=True, **arguments)
        except Exception as error:  # noqa: BLE001 - the hub raises many kinds
            raise RuntimeError(
                f"the pretrained weights of {options.name!r} could not be loaded: {type(error).__name__}: {error}. "
                "Without a network, set backbone.checkpoint to a local file of weights, or backbone.pretrained to false"
            ) from error
    if options.checkpoint is not None:
        load_backbone_weights(net, options.checkpoint)
    info: Any = net.feature_info
    channels, strides = list(info.channels()), [int(s) for s in info.reduction()]
    if options.output_stride is not None and max(strides) != options.output_stride:
        raise ValueError(f"backbone {options.name!r} has output stride {max(strides)}, not {options.output_stride}")
    if options.freeze_norm:
        from timm.layers import freeze_batch_norm_2d

        net = freeze_batch_norm_2d(net)
    backbone = Backbone(net, channels, strides, options.in_chans)
    return backbone.to(memory_format=torch.channels_last) if channels_last else backbone  # type: ignore[call-overload]


def load_backbone_weights(net: nn.Module, path: str) -> None:
    """Load a local file (``.safetensors``, or a PyTorch file read without executing anything it holds) into ``net``,
    strictly.

    Containers (``state_dict``, ``model``) and prefixes (``module.``, ``backbone.``) are removed, the weights of a
    classifier are dropped, and the first convolution is adapted to the number of input channels as timm does.
    """
    from timm.models import adapt_input_conv

    state = _read(path)
    target = net.state_dict()
    while state and not any(k in target or k.replace(".", "_", 1) in target for k in state):
        prefix = next((p for p in _PREFIXES if any(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        state = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    # features_only flattens some networks by one level: "stages.0" becomes "stages_0".
    flat = {k: k.replace(".", "_", 1) for k in state}
    state = {flat[k] if k not in target and flat[k] in target else k: v for k, v in state.items()}
    unknown = [k for k in state if k not in target and not k.startswith(_CLASSIFIER)]
    missing = [k for k in target if k not in state and not k.endswith("num_batches_tracked")]
    if unknown or missing:
        raise ValueError(
            f"the weights in {path!r} are of another network: {len(missing)} missing (first: {missing[:3]}), "
            f"{len(unknown)} unknown (first: {unknown[:3]})"
        )
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


def _read(path: str) -> dict[str, Tensor]:
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - pickle, zip and safetensors raise many kinds
        raise ValueError(f"{path!r} cannot be read as weights: {type(error).__name__}: {error}") from error
    for key in ("state_dict", "model", "state_dict_ema"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path!r} holds no dictionary of tensors")
    return content
