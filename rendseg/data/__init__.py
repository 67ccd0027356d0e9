"""Data sets and transforms."""

from .ade20k import Ade20kOptions
from .base import SegmentationDataset
from .broden import BrodenOptions
from .build import build_dataset, file_values, linked, parse_options
from .camvid import CamVidOptions
from .cityscapes import CityscapesOptions
from .cityscapes_instances import CityscapesInstancesOptions
from .coco import CocoOptions
from .folder import FolderOptions
from .instances import InstanceDataset
from .options import AugmentOptions, ColorJitterOptions, DataError, DatasetOptions, PhotometricOptions
from .registry import dataset_names, register_dataset
from .shapes import ShapesOptions
from .shapes_instances import ShapesInstancesOptions
from .voc import VocOptions

__all__ = [
    "Ade20kOptions",
    "AugmentOptions",
    "BrodenOptions",
    "CamVidOptions",
    "CityscapesInstancesOptions",
    "CityscapesOptions",
    "CocoOptions",
    "ColorJitterOptions",
    "DataError",
    "DatasetOptions",
    "FolderOptions",
    "InstanceDataset",
    "PhotometricOptions",
    "SegmentationDataset",
    "ShapesInstancesOptions",
    "ShapesOptions",
    "VocOptions",
    "build_dataset",
    "dataset_names",
    "file_values",
    "linked",
    "parse_options",
    "register_dataset",
]
