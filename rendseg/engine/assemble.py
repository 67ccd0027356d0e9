"""What a configuration names, built: the data, the network, and the network of a checkpoint with its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rendseg.data import build_dataset
from rendseg.engine.checkpoint import load_checkpoint, load_weights
from rendseg.engine.config import Config, ConfigError, build_config
from rendseg.engine.eval_presets import without_conventions


def build_data(config: Config, split: str) -> Any:
    """The data set of a split; ``DataError`` names what is wrong with it."""
    return build_dataset(config.data, split, augment_seed=config.seed)  # type: ignore[arg-type]


def build_network(config: Config, num_classes: int, initialise: bool = True) -> nn.Module:
    """The model of a configuration; ``initialise=False`` does not load the backbone's pretrained weights."""
    from rendseg.models import build_model

    options = dict(config.model)
    if not initialise:
        options["backbone"] = {**options["backbone"], "pretrained": False, "checkpoint": None}
    try:
        return build_model(options, num_classes)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise ConfigError(f"the model cannot be built: {error}") from error


def load_trained(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[Config, Mapping[str, Any], nn.Module, dict[str, Any]]:
    """Configuration, classes, network with the trained weights, and raw contents of a checkpoint."""
    contents = load_checkpoint(path)
    settings = contents["config"]
    if any(override.partition("=")[0].strip() == "eval.preset" for override in overrides):
        settings = without_conventions(settings)
    config = build_config(settings, overrides, source=f"the configuration in {path}")
    classes = contents["classes"]
    network = build_network(config, len(classes["names"]), initialise=False)
    load_weights(network, contents["model"], path)
    return config, classes, network.eval(), contents
