"""The point head: PointRend (Kirillov et al. 2020), section 3.3. N images, C classes, P points, Cf fine channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from ..reference import HeadLayers

INITS = ("detectron2", "mmseg", "paddleseg", "torch")

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def plain_layers(head: nn.Module, layers: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]] | None:
    """``[O, I]`` weights and biases of the layers of a head, or ``None`` if one is no plain 1x1 ``nn.Conv1d`` in
    evaluation mode with a bias, or a hook is attached to one or to the head."""
    if any(getattr(_module, name, None) for name in _GLOBAL_HOOKS):
        return None
    if any(getattr(module, name, None) for module in (head, *layers) for name in _HOOKS):
        return None
    for layer in layers:
        if type(layer) is not nn.Conv1d or layer.bias is None or "forward" in layer.__dict__:
            return None
        if (
            layer.training
            or layer.kernel_size != (1,)
            or layer.groups != 1
            or layer.stride != (1,)
            or layer.padding != (0,)
        ):
            return None
    return [layer.weight.squeeze(-1) for layer in layers], [layer.bias for layer in layers]


class PointHead(nn.Module):
    """MLP shared by all points: ``forward(fine [N, Cf, P], coarse [N, C, P]) -> logits [N, C, P]``.

    It has ``num_layers`` hidden layers (1x1 convolution and ReLU) of ``hidden_channels``, called ``fc1``, ``fc2``, ...,
    and then ``predictor``. The input of the first layer is ``cat(fine, coarse)``. With ``coarse_each_layer`` the coarse
    logits are concatenated again to the input of every later layer, and of the predictor. ``coarse_first`` puts them
    first in every concatenation. ``num_layers=0`` is a single linear layer.

    ``init`` chooses the initial weights; biases are zero except with ``torch``:

    * ``detectron2``: hidden layers Kaiming normal over the fan out, predictor ``N(0, 0.001)``;
    * ``mmseg``: the same, but the predictor ``N(0, 0.01)``;
    * ``paddleseg``: ``N(0, sqrt(2 / fan in))`` everywhere;
    * ``torch``: PyTorch's default.

    Dtypes: ``coarse`` is converted to the dtype of ``fine``. Under autocast the layers run in the autocast dtype, like
    every convolution. Errors: ``ValueError`` for shapes that do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        hidden_channels: int = 256,
        num_layers: int = 3,
        coarse_each_layer: bool = True,
        coarse_first: bool = False,
        init: str = "detectron2",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("num_classes", num_classes, 1),
            ("hidden_channels", hidden_channels, 1),
            ("num_layers", num_layers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.hidden_channels = hidden_channels
        self.num_layers = num_layers
        self.coarse_each_layer = coarse_each_layer
        self.coarse_first = coarse_first
        self.init = init
        channels = in_channels + num_classes
        for i in range(num_layers):
            setattr(self, f"fc{i + 1}", nn.Conv1d(channels, hidden_channels, 1))
            channels = hidden_channels + (num_classes if coarse_each_layer else 0)
        self.predictor = nn.Conv1d(channels, num_classes, 1)
        self.reset_parameters()

    def layers(self) -> list[Any]:
        """The hidden layers in order, then the predictor."""
        return [getattr(self, f"fc{i + 1}") for i in range(self.num_layers)] + [self.predictor]

    def reset_parameters(self) -> None:
        *hidden, predictor = self.layers()
        for layer in (*hidden, predictor):
            assert isinstance(layer, nn.Conv1d) and layer.bias is not None
            if self.init == "torch":
                layer.reset_parameters()
                continue
            nn.init.zeros_(layer.bias)
            if self.init == "paddleseg":
                nn.init.normal_(layer.weight, std=(2 / layer.in_channels) ** 0.5)
            elif layer is predictor:
                nn.init.normal_(layer.weight, std=0.001 if self.init == "detectron2" else 0.01)
            else:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        if fine.dim() != 3 or fine.shape[1] != self.in_channels:
            raise ValueError(f"fine must have shape [N, {self.in_channels}, P], got {list(fine.shape)}")
        if coarse.dim() != 3 or coarse.shape[1] != self.num_classes or coarse.shape[::2] != fine.shape[::2]:
            wanted = [fine.shape[0], self.num_classes, fine.shape[2]]
            raise ValueError(f"coarse must have shape [N, C, P] = {wanted} as in fine, got {list(coarse.shape)}")
        coarse = coarse.to(fine.dtype)
        if fine.shape[2] == 0:  # convolutions refuse an empty set of points; an empty result still has a graph
            empty = coarse * fine.sum()
            return empty + sum(p.sum() for p in self.parameters()) * 0
        x = self._join(fine, coarse)
        *hidden, predictor = self.layers()
        for layer in hidden:
            x = F.relu(layer(x), inplace=True)
            if self.coarse_each_layer:
                # Under autocast the output of the layer may have a narrower dtype than the features.
                x = self._join(x, coarse.to(x.dtype))
        return predictor(x)

    def _join(self, x: Tensor, coarse: Tensor) -> Tensor:
        return torch.cat((coarse, x) if self.coarse_first else (x, coarse), dim=1)

    def refine_parameters(self) -> HeadLayers | None:
        """What the one-call form of ``rendseg.ops.refine`` needs, or ``None`` if calling the module could give another
        result.

        ``weights`` are the ``[O, I]`` matrices of the hidden layers and of the predictor (views, which still require
        grad), ``biases`` their ``[O]``; ``coarse_each_layer`` and ``coarse_first`` are as in the constructor. The
        result is ``None`` in training mode, when a hook is attached to the head or to a layer, when ``forward`` is
        overridden, and when a layer is no longer a plain ``torch.nn.Conv1d`` with a bias (quantised, parametrised,
        adapted).
        """
        if self.training or type(self).forward is not PointHead.forward or type(self)._join is not PointHead._join:
            return None
        if type(self).layers is not PointHead.layers or "forward" in self.__dict__:
            return None
        plain = plain_layers(self, self.layers())
        return None if plain is None else HeadLayers(*plain, self.coarse_each_layer, self.coarse_first)

    def extra_repr(self) -> str:
        return f"coarse_each_layer={self.coarse_each_layer}, coarse_first={self.coarse_first}, init={self.init!r}"
