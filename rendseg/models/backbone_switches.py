"""The switches of ``BackboneOptions`` that change a network of timm after it was made. Importing this imports timm."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from .options import BackboneOptions


def apply_switches(net: nn.Module, options: BackboneOptions) -> None:
    """Apply ``first_dilation``, ``dilated_shortcut_pool``, ``stride_in_1x1`` and ``pad_before_shift``; ``ValueError``
    where a network has nothing that they could change."""
    if options.first_dilation == "full" or not options.dilated_shortcut_pool:
        blocks = _blocks(net, (BasicBlock, Bottleneck))
        if not blocks:
            raise ValueError(
                "backbone.first_dilation and backbone.dilated_shortcut_pool apply to ResNets only, got "
                f"{options.name!r}"
            )
        for block in blocks:
            _set_dilation(block, options)
    if options.stride_in_1x1:
        blocks = _blocks(net, (Bottleneck,))
        if not blocks:
            raise ValueError(f"backbone.stride_in_1x1 applies to ResNets with bottlenecks only, got {options.name!r}")
        for block in blocks:
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    if options.pad_before_shift:
        blocks = _blocks(net, (SwinTransformerBlock,))
        if not blocks:
            raise ValueError(f"backbone.pad_before_shift applies to Swin Transformers only, got {options.name!r}")
        for block in blocks:
            block.__class__ = _PaddedFirst


def _blocks(net: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[Any]:
    return [m for m in net.modules() if isinstance(m, kinds)]


def _set_dilation(block: Any, options: BackboneOptions) -> None:
    first = block.conv2 if isinstance(block, Bottleneck) else block.conv1
    if options.first_dilation == "full" and first.dilation[0] != block.dilation:
        first.dilation = first.padding = (block.dilation, block.dilation)
    if not options.dilated_shortcut_pool and block.downsample is not None:
        pool = block.downsample[0]
        if isinstance(pool, nn.AvgPool2d) and pool.stride in (1, (1, 1)):
            block.downsample[0] = nn.Identity()


class _PaddedFirst(SwinTransformerBlock):
    """Fills its map up to whole windows before the shift, so that the filling is shifted with it."""

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        return super()._attn(x)[:, :height, :width]


def fill_up_patches(net: nn.Module) -> None:
    """Let a Swin Transformer fill images up to whole patches, as mmsegmentation and transformers do."""
    if _blocks(net, (SwinTransformerBlock,)):
        net.patch_embed.dynamic_img_pad = True  # type: ignore[union-attr]
