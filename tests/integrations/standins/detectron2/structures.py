"""Boxes and what is found in an image, with the names and arguments of detectron2's."""

import torch


class Boxes:
    def __init__(self, tensor):
        self.tensor = tensor

    def __len__(self):
        return len(self.tensor)

    @property
    def device(self):
        return self.tensor.device

    @classmethod
    def cat(cls, several):
        return cls(torch.cat([boxes.tensor for boxes in several]))


class Instances:
    def __init__(self, image_size):
        self.image_size = image_size

    def __len__(self):
        return len(self.pred_boxes)
