"""The usual point head, with the names and arguments of detectron2's PointRend."""

import torch
from torch import nn


class StandardPointHead(nn.Module):
    def __init__(self, in_channels, num_classes, width, layers, coarse_pred_each_layer=True, mask_classes=None):
        super().__init__()
        self.coarse_pred_each_layer = coarse_pred_each_layer
        self.fc_layers, inputs = [], in_channels + num_classes
        for number in range(1, layers + 1):
            layer = nn.Conv1d(inputs, width, 1)
            self.add_module(f"fc{number}", layer)
            self.fc_layers.append(layer)
            inputs = width + num_classes * coarse_pred_each_layer
        self.predictor = nn.Conv1d(inputs, mask_classes or num_classes, 1)

    def forward(self, fine_grained_features, coarse_features):
        x = torch.cat((fine_grained_features, coarse_features), 1)
        for layer in self.fc_layers:
            x = layer(x).relu()
            x = torch.cat((x, coarse_features), 1) if self.coarse_pred_each_layer else x
        return self.predictor(x)
