"""What a run has done, and from which checkpoint it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rendseg.engine import checkpoint as checkpoints
from rendseg.engine.automatic import adopt
from rendseg.engine.checkpoint import CheckpointError
from rendseg.engine.config import Config, ConfigError, build_config, differences
from rendseg.engine.optimize import learning_rate
from rendseg.engine.runtime import gather
from rendseg.engine.sharding import shard_optimizer_state

# Keys that may differ between a run and its continuation because they do not change what is learned.
HARMLESS_KEYS = ("resume", "output", "device", "eval", "data.root", "model.backbone.checkpoint") + tuple(
    f"train.{key}"
    for key in (
        "num_workers log_every eval_every checkpoint_every keep_checkpoints time_limit_minutes tensorboard fsdp".split()
    )
)


@dataclass
class Progress:
    """What a run has done; all of it goes into every checkpoint."""

    iteration: int = 0  # optimizer steps done
    samples: int = 0  # position in the stream of training images, all processes together
    seconds: float = 0.0  # time spent in the training loop, all resumptions together
    best: float = -1.0  # best value of eval.best so far
    history: list[dict[str, Any]] = field(default_factory=list)  # one row per log_every iterations
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    window: dict[str, float] = field(default_factory=dict)  # sums of the loss terms since the last row
    window_size: int = 0


def training_differences(kept: Mapping[str, Any], config: Config, source: str) -> list[tuple[str, Any, Any]]:
    """``(dotted key, value kept, value now)`` where the configuration ``kept`` in ``source`` would train differently;
    keys newer than it have their defaults, and ``auto`` is what was chosen. ``ConfigError`` if it cannot be read."""
    complete = build_config(kept, source=source)
    return [
        found
        for found in differences(complete.to_dict(), adopt(config, complete).to_dict())
        if not any(found[0] == key or found[0].startswith(key + ".") for key in HARMLESS_KEYS)
    ]


def _checked_resume(config: Config, path: Path, contents: Mapping[str, Any]) -> None:
    """Refuse to continue a run silently with a configuration that would have trained differently."""
    changed = training_differences(contents["config"], config, f"the configuration in {path}")
    if changed:
        key, old, new = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ConfigError(
            f"{path} was trained with another configuration ({key}: {old} there, {new} now{more}); "
            f"use another name=..., resume=never to start again, or resume={path} to continue with the new settings"
        )


def find_resume(config: Config) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that ``config.resume`` means, and its contents; None to begin at the start."""
    if config.resume == "never":
        return None
    if config.resume != "auto":
        return Path(config.resume), checkpoints.load_checkpoint(config.resume)
    found = checkpoints.newest_usable(config.run_dir)
    if found is not None:
        _checked_resume(config, *found)
    return found


def check_shared(accelerator: Accelerator, run_dir: Path, found: tuple[Path, Any] | None) -> None:
    """Every process must continue the same checkpoint, which takes a folder that all machines see."""
    if accelerator.num_processes == 1:
        return
    mine = -1 if found is None else found[1]["training"]["progress"]["iteration"]
    seen = gather([mine])
    if len(set(seen)) > 1:
        other = next(i for i, iteration in enumerate(seen) if iteration != seen[0])
        texts = ["no checkpoint" if seen[i] < 0 else f"a checkpoint of iteration {seen[i]}" for i in (0, other)]
        raise ConfigError(
            f"process 0 finds {texts[0]} in {run_dir}, process {other} {texts[1]}; output.dir must lie on a file "
            "system that all machines share"
        )


def schedule_change(found: tuple[Path, Mapping[str, Any]], config: Config, iteration: int) -> list[str]:
    """What changes in the learning rate where a run goes on with another schedule or length: a line, or none."""
    before, now = build_config(found[1]["config"], source=str(found[0])).train, config.train
    if (before.iterations, before.schedule, before.optimizer.lr) == (now.iterations, now.schedule, now.optimizer.lr):
        return []
    rates = []
    for options in (before, now):
        length = options.iterations
        if length == "auto":  # not chosen yet, so no schedule had begun
            return []
        rates.append(learning_rate(min(iteration, length), length, options.optimizer.lr, options.schedule))
    old, new = rates
    return [
        f"the learning rate changes at iteration {iteration}: {old:.3g} in the schedule of {before.iterations} "
        f"iterations so far, {new:.3g} in that of {now.iterations} from here\n"
    ]


def restore(
    found: tuple[Path, Mapping[str, Any]],
    config: Config,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    sharded: bool,
) -> tuple[Progress, Mapping[str, Any] | None]:
    """Give optimizer and loss scaler their state; returns the progress, and the random state of this process (None if
    the checkpoint is of another number of processes)."""
    path, contents = found
    state = contents["training"]
    name = config.train.optimizer.name
    kept = build_config(contents["config"], source=f"the configuration in {path}").train.optimizer.name
    if kept != name:
        raise CheckpointError(
            f"{path} has the optimizer state of {kept}, which train.optimizer.name={name} cannot continue; start again "
            "with resume=never and model.backbone.checkpoint"
        )
    missing = [key for key in ("optimizer", "rng") if key not in state]
    if missing:
        raise CheckpointError(f"{path} cannot be continued: it has no training.{missing[0]}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        whole = state["optimizer"]
        for index, entries in whole["state"].items():
            shape = parameters[index].shape
            if any(isinstance(v, Tensor) and v.dim() and v.shape != shape for v in entries.values()):
                raise ValueError(f"the shapes in training.optimizer.state.{index} are not {list(shape)}")
        own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(shard_optimizer_state(optimizer, whole) if sharded else whole)
        for group, options in zip(optimizer.param_groups, own, strict=True):
            group.update(options)  # of the configuration, not of the file
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has the optimizer state of another model: {error}") from error
    if accelerator.scaler is not None and state.get("scaler"):
        try:
            accelerator.scaler.load_state_dict(state["scaler"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: training.scaler is no state of a loss scaler: {error}") from error
    same = len(state["rng"]) == accelerator.num_processes
    progress = Progress(**state["progress"])
    length = config.train.iterations
    if length != "auto" and progress.iteration > length:
        raise ConfigError(
            f"{path} is at iteration {progress.iteration}, beyond train.iterations={length}: raise that, or begin at "
            "the start with resume=never"
        )
    return progress, state["rng"][accelerator.process_index] if same else None
