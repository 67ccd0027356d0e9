"""What a configuration names, built: the data, the network, and the network of a checkpoint with its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rendseg.data import DataError, InstanceDataset, build_dataset
from rendseg.engine.checkpoint import load_checkpoint, load_weights
from rendseg.engine.config import Config, ConfigError, build_config
from rendseg.engine.eval_presets import without_conventions
from rendseg.engine.instance_metrics import need_evaluation


def build_data(config: Config, split: str) -> Any:
    """The data set of a split; ``DataError`` names what is wrong with it."""
    dataset = build_dataset(config.data, split, augment_seed=config.seed)  # type: ignore[arg-type]
    has_objects = isinstance(dataset, InstanceDataset)
    if has_objects != config.learns_objects:
        has, learn = ("objects", "label maps") if has_objects else ("label maps", "objects")
        raise DataError(
            f"data.name {config.data['name']} has {has}, and the networks of model.name {config.model['name']} learn "
            f"{learn}; name another data set or model"
        )
    if has_objects:
        need_evaluation()  # at the start, not after a training
    return dataset


def build_network(config: Config, num_classes: int, initialise: bool = True) -> nn.Module:
    """The model of a configuration; ``initialise=False`` does not load the weights that the configuration names."""
    from rendseg.models import build_model

    options = dict(config.model)
    start = options.get("checkpoint") if initialise else None
    if start is not None or not initialise:
        options["backbone"] = {**options["backbone"], "pretrained": False, "checkpoint": None}
    try:
        network = build_model(options, num_classes)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise ConfigError(f"the model cannot be built: {error}") from error
    if start is not None:
        _start_from(network, start, num_classes)
    return network


def _start_from(network: nn.Module, path: str, num_classes: int) -> None:
    """Load the weights of a checkpoint; what depends on the number of classes may differ, and stays as it is."""
    contents = load_checkpoint(path)
    state, own = contents["model"], network.state_dict()
    if len(contents["classes"]["names"]) != num_classes:
        other = [key for key in own if key in state and own[key].shape != state[key].shape]
        print(f"{path} has other classes: {', '.join(other)} begin with random weights")
        state = {**state, **{key: own[key] for key in other}}
    load_weights(network, state, path)


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
