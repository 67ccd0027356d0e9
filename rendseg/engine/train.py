"""The training loop, in one file: from a configuration to a trained model, with exact resumption.

A run lives in ``<output.dir>/<name>``: ``config.yaml`` (resolved), ``last.pt``, ``best.pt``, ``iteration_*.pt``,
``metrics.json``, ``tensorboard/`` and ``pictures/``.

Resuming continues exactly: the same weights, bit for bit on the CPU with the same number of threads, as a run that was
never interrupted. What makes it so: optimizer state and all random-number states are saved; the learning rate is a
function of the iteration; the order of the data is a function of (seed, position) and augmentation of (seed, epoch,
image), see ``order.py``; the points that PointRend trains on are a function of (seed, position) too; and evaluation
leaves the random-number states as they were.

W processes (``torchrun`` or ``accelerate launch``, on one machine or several) of ``batch_size`` B make the steps of one
process of W B: they share the stream of images and draw the same points, and the first alone writes and prints. What
may differ is batch norm (which is synchronised on GPUs; PyTorch has nothing for CPUs), dropout, and the mean over
labels, of which processes have different numbers where some are ignored: ``model.loss.normalize: global`` takes it over
all processes.
"""

from __future__ import annotations

import copy
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from rendseg._version import __version__
from rendseg.engine import checkpoint as checkpoints
from rendseg.engine.assemble import build_data, build_network
from rendseg.engine.checkpoint import BEST, LAST, CheckpointError
from rendseg.engine.config import Config, ConfigError, OptimizerConfig, ScheduleConfig, build_config, differences
from rendseg.engine.evaluate import evaluate, format_table, summary
from rendseg.engine.loader import training_batches
from rendseg.engine.order import image_keys
from rendseg.engine.predict import make_pictures, save_pictures
from rendseg.engine.runtime import (
    StopSignals,
    agree,
    earliest,
    gather,
    make_accelerator,
    mean_over_processes,
    move,
    rng_state,
    seed_everything,
    set_rng_state,
    unchanged_rng,
)
from rendseg.engine.sharding import (
    broadcast_buffers,
    full_optimizer_state,
    full_state,
    has_own_statistics,
    reduce_gradients,
    shard,
    shard_optimizer_state,
)
from rendseg.engine.tasks import with_tasks

# Keys that may differ between a run and its continuation because they do not change what is learned.
HARMLESS_KEYS = ("resume", "output", "device", "eval", "data.root", "model.backbone.checkpoint") + tuple(
    f"train.{key}"
    for key in (
        "num_workers log_every eval_every checkpoint_every keep_checkpoints time_limit_minutes tensorboard fsdp".split()
    )
)


class TrainingError(Exception):
    """Training cannot go on; the message says at which iteration, why, and what is kept."""


class Interrupted(Exception):
    """A signal asked for the end; everything is saved. ``signal`` is its number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number


# ------------------------------------------------------------------------------------------- schedule, optimizer


def learning_rate(iteration: int, iterations: int, lr: float, schedule: ScheduleConfig) -> float:
    """The learning rate of optimizer step ``iteration`` (from 0) of ``iterations``.

    poly: ``min_lr + (lr - min_lr) (1 - t/T)^power``; cosine: ``min_lr + (lr - min_lr) (1 + cos(pi t/T)) / 2``; step:
    ``lr gamma^n`` after n milestones. During the first w warm-up iterations this is multiplied by ``f + (1 - f) t/w``
    with the warm-up factor f.
    """
    value, done = lr, iteration / iterations
    if schedule.name == "poly":
        value = schedule.min_lr + (lr - schedule.min_lr) * (1 - done) ** schedule.power
    elif schedule.name == "cosine":
        value = schedule.min_lr + (lr - schedule.min_lr) * (1 + math.cos(math.pi * done)) / 2
    elif schedule.name == "step":
        value = lr * schedule.gamma ** sum(iteration >= milestone for milestone in schedule.milestones)
    if iteration < schedule.warmup_iterations:
        value *= schedule.warmup_factor + (1 - schedule.warmup_factor) * iteration / schedule.warmup_iterations
    return value


def build_optimizer(model: nn.Module, options: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over up to four groups: backbone and head (its ``lr_factor``), each with and without weight
    decay."""
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    exempt = set()
    for module in model.modules():
        listed = set(getattr(module, "no_weight_decay", set)())  # of timm's networks
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" or isinstance(module, norms):
                exempt.add(parameter)
        exempt |= {parameter for name, parameter in module.named_parameters() if name in listed}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            head = "backbone" not in name.split(".")
            groups.setdefault((head, options.no_decay_on_norm and parameter in exempt), []).append(parameter)
    parts = [
        {
            "params": parameters,
            "lr_factor": options.head_lr_factor if head else 1.0,
            "weight_decay": 0.0 if free else options.weight_decay,
        }
        for (head, free), parameters in groups.items()
    ]
    if options.name == "adamw":
        return torch.optim.AdamW(parts, lr=options.lr, betas=options.betas, eps=options.eps)
    return torch.optim.SGD(parts, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov)


# ------------------------------------------------------------------------------------------------- state of a run


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
    keys newer than it have their defaults. ``ConfigError`` if it cannot be read."""
    complete = build_config(kept, source=source).to_dict()
    return [
        found
        for found in differences(complete, config.to_dict())
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
            f"use another name=..., resume=never to begin anew, or resume={path} to continue with the new settings"
        )


def _find_resume(config: Config) -> tuple[Path, dict[str, Any]] | None:
    if config.resume == "never":
        return None
    if config.resume != "auto":
        return Path(config.resume), checkpoints.load_checkpoint(config.resume)
    found = checkpoints.newest_usable(config.run_dir)
    if found is not None:
        _checked_resume(config, *found)
    return found


# -------------------------------------------------------------------------------------------------------- training


def train(config: Config, hook: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Train as ``config`` says and return the content of ``metrics.json``.

    ``hook(iteration)`` is called after every optimizer step (tests use it to end the process at a chosen moment).
    Raises ``ConfigError``, ``DataError``, ``CheckpointError`` for what the user gave, ``TrainingError`` if the loss is
    no longer finite, ``Interrupted`` after SIGINT or SIGTERM, when everything has been saved.
    """
    options = config.train
    accelerator = make_accelerator(config)
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    main = accelerator.is_main_process
    say: Callable[[str], object] = print if main else (lambda text: None)  # accelerator.print: one voice per machine
    run_dir = config.run_dir

    # Data and model. The seed comes first, so that the initial weights are a function of it.
    training_data = build_data(config, "train")
    validation_data = build_data(config, "val")
    config = with_tasks(config, training_data)
    found = _find_resume(config)
    _check_shared(accelerator, run_dir, found)
    seed_everything(config.seed)
    network = build_network(config, training_data.num_classes)
    if world > 1 and device.type == "cuda":  # PyTorch has no synchronised batch norm on the CPU
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if found is not None:
        checkpoints.load_weights(network, found[1]["model"], found[0])
    sharded = options.fsdp.enabled and world > 1
    if options.fsdp.enabled and not sharded:
        say("train.fsdp: one process has nothing to shard over; start several with torchrun")
    whole = network  # what is evaluated
    if sharded:
        whole = copy.deepcopy(network)
        model = network = shard(network, options.fsdp, device)
        optimizer = accelerator.prepare(build_optimizer(network, options.optimizer))
    else:
        model, optimizer = accelerator.prepare(network, build_optimizer(network, options.optimizer))
        whole = network = accelerator.unwrap_model(model)
    own_statistics = world > 1 and has_own_statistics(network)
    draws = getattr(network, "draws", False)
    seed_everything(config.seed + 1 + rank)  # dropout differs between processes

    # Resume.
    progress = Progress()
    saved_rng = None
    if found is not None:
        state = found[1]["training"]
        kept = build_config(found[1]["config"], source=f"the configuration in {found[0]}").train.optimizer.name
        if kept != options.optimizer.name:
            raise CheckpointError(
                f"{found[0]} has the optimizer state of {kept}, which train.optimizer.name={options.optimizer.name} "
                "cannot continue; begin anew with resume=never and model.backbone.checkpoint"
            )
        try:
            whole_state = state["optimizer"]
            optimizer.load_state_dict(shard_optimizer_state(optimizer, whole_state) if sharded else whole_state)
        except (ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"{found[0]} has the optimizer state of another model: {error}") from error
        progress = Progress(**state["progress"])
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) == world:
            saved_rng = state["rng"][rank]
        say(f"continuing {found[0]} at iteration {progress.iteration} of {options.iterations}")
    if main:
        run_dir.mkdir(parents=True, exist_ok=True)
        if config.resume == "never":
            for old in (run_dir / LAST, run_dir / BEST, *checkpoints.numbered_checkpoints(run_dir)):
                old.unlink(missing_ok=True)
        checkpoints.write_atomically(run_dir / "config.yaml", lambda f: _write(f, config.to_yaml()))
    writer = _tensorboard(config, progress.iteration) if main and options.tensorboard else None
    environment = {
        "rendseg": __version__,
        "torch": torch.__version__,
        "device": str(device),
        "processes": world,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "training_images": len(training_data),
        "validation_images": len(validation_data),
    }

    def metrics() -> dict[str, Any]:
        final: dict[str, Any] = {"iteration": progress.iteration, "seconds": progress.seconds}
        if progress.history:
            final["loss"] = progress.history[-1]["loss"]
        if progress.evaluations and progress.evaluations[-1]["iteration"] == progress.iteration:
            final.update({k: v for k, v in progress.evaluations[-1].items() if k not in ("iteration", "seconds")})
        return {
            "name": config.name,
            "finished": progress.iteration >= options.iterations,
            "final": final,
            "environment": environment,
            "evaluations": progress.evaluations,
            "history": progress.history,
        }

    def save(is_best: bool = False) -> None:
        rng = gather([rng_state()])
        window = mean_over_processes(accelerator, sums, 1) if sums else {}
        progress.window = window
        if own_statistics:
            broadcast_buffers(network)
        weights = full_state(network) if sharded else network.state_dict()
        optimizer_state = full_optimizer_state(optimizer.state_dict()) if sharded else optimizer.state_dict()
        if not main:
            return
        contents = {
            "rendseg": __version__,
            "config": config.to_dict(),
            "classes": {
                "names": list(training_data.class_names),
                "palette": [[int(v) for v in color] for color in training_data.palette],
                "ignore_index": int(training_data.ignore_index),
            },
            "model": weights,
            "training": {
                "progress": dict(vars(progress)),
                "optimizer": optimizer_state,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "rng": rng,
            },
        }
        aliases = ([f"iteration_{progress.iteration:07d}.pt"] if options.keep_checkpoints else []) + [BEST] * is_best
        checkpoints.save_checkpoint(run_dir / LAST, contents, tuple(aliases))
        for old in checkpoints.numbered_checkpoints(run_dir)[options.keep_checkpoints :]:
            old.unlink(missing_ok=True)
        checkpoints.write_json(run_dir / "metrics.json", metrics())

    def trained() -> nn.Module:
        """The network to evaluate, the same in every process; all must ask."""
        if own_statistics:
            broadcast_buffers(network)
        if sharded:
            whole.load_state_dict(full_state(network))
        return whole.to(device)

    def validate() -> bool:
        """Evaluate and record; False if a signal ended it early."""
        with unchanged_rng():
            stopped = (lambda: bool(signals.received)) if world == 1 else None
            evaluated = trained()
            result = evaluate(evaluated, validation_data, config.eval, accelerator, stopped)
            if result is None:
                network.train()
                return False
            if main and writer is not None:
                _write_evaluation(writer, result, progress.iteration)
                for _, picture in make_pictures(evaluated, validation_data, 1, accelerator):
                    writer.add_image("val/prediction", np.asarray(picture), progress.iteration, dataformats="HWC")
            network.train()
            if sharded:
                whole.cpu()
        progress.evaluations.append({"iteration": progress.iteration, **result})
        value = result["refined"][config.eval.best]
        is_best = value is not None and value > progress.best
        progress.best = value if is_best else progress.best
        save(is_best)
        if main:
            bar.write(f"iteration {progress.iteration}: {summary(result)}")
        return True

    # The loop.
    step_images = options.batch_size * options.gradient_accumulation * world
    batches = training_batches(
        training_data,
        config.seed,
        progress.samples,
        (options.iterations - progress.iteration) * options.gradient_accumulation,
        options.batch_size,
        options.num_workers,
        rank,
        world,
    )
    if saved_rng is not None:
        set_rng_state(saved_rng)
    check_every = 1 if device.type == "cpu" else options.log_every  # reading a loss makes a GPU wait
    bad_iteration = torch.full((), -1, device=device, dtype=torch.int64)
    sums: dict[str, Tensor] = {
        k: torch.tensor(v, device=device, dtype=torch.float64) for k, v in progress.window.items()
    }
    started, seconds_before = time.perf_counter(), progress.seconds
    row_started, row_iteration = started, progress.iteration
    stop = 0
    out_of_time = False
    model.train()
    bar = tqdm(
        total=options.iterations,
        initial=progress.iteration,
        desc=config.name,
        unit="it",
        disable=not main,
        dynamic_ncols=True,
        **({} if sys.stderr.isatty() else {"mininterval": 10.0, "ncols": 100}),
    )
    with StopSignals() as signals, bar:
        while progress.iteration < options.iterations and not stop and not out_of_time:
            lr = learning_rate(progress.iteration, options.iterations, options.optimizer.lr, options.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_factor"]
            for part in range(options.gradient_accumulation):
                images, labels = move(next(batches), device)
                keys: tuple[Tensor, ...] = ()
                if draws:
                    first = progress.samples + (part * world + rank) * options.batch_size
                    keys = (image_keys(config.seed, first, options.batch_size, device),)
                if sharded:
                    if own_statistics:
                        broadcast_buffers(network)
                    reduce_gradients(network, part + 1 == options.gradient_accumulation)
                with accelerator.accumulate(model):
                    with accelerator.autocast():  # DDP's own, but FSDP has none
                        terms = model(images, labels, *keys)
                    loss = torch.stack([term.float() for term in terms.values()]).sum()
                    accelerator.backward(loss)
                    if options.clip_grad_norm is not None and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), options.clip_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                loss = loss.detach()
                bad_iteration = torch.where((bad_iteration < 0) & ~loss.isfinite(), progress.iteration, bad_iteration)
                for name, term in {"loss": loss, **terms}.items():
                    share = term.detach().double() / options.gradient_accumulation
                    sums[name] = sums[name] + share if name in sums else share
            progress.iteration += 1
            progress.samples += step_images
            progress.window_size += 1
            progress.seconds = seconds_before + time.perf_counter() - started
            bar.update()
            done = progress.iteration
            last = done == options.iterations
            log = done % options.log_every == 0 or last
            save_now = done % options.checkpoint_every == 0 or last
            evaluate_now = bool(options.eval_every) and done % options.eval_every == 0 and not last

            if done % check_every == 0 or log or save_now or evaluate_now:
                first_bad, stop = earliest(accelerator, int(bad_iteration), signals.received)
                if first_bad >= 0:
                    raise TrainingError(_explain_bad_loss(first_bad, run_dir, terms))
                limit = options.time_limit_minutes
                out_of_time = agree(accelerator, limit is not None and progress.seconds > 60 * limit)
            if log:
                row = mean_over_processes(accelerator, sums, progress.window_size)
                now = time.perf_counter()
                speed = (done - row_iteration) * step_images / (now - row_started)
                row_started, row_iteration = now, done
                row = {"iteration": done, "lr": lr, **row, "images_per_second": round(speed, 3)}
                progress.history.append(row)
                sums, progress.window_size = {}, 0
                bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{lr:.2e}")
                if writer is not None:
                    for name, value in row.items():
                        if name != "iteration":
                            writer.add_scalar(f"train/{name}", value, done)
            saved = evaluate_now and not stop and validate()
            if evaluate_now:
                started, seconds_before, row_started = time.perf_counter(), progress.seconds, time.perf_counter()
                row_iteration = done
                stop = stop or earliest(accelerator, -1, signals.received)[1]
            if (save_now or stop or out_of_time) and not saved:
                save()
            if hook is not None:
                hook(done)

        # The end: evaluate, unless asked to stop at once.
        evaluated = progress.evaluations and progress.evaluations[-1]["iteration"] == progress.iteration
        if not stop and not evaluated and not validate():
            stop = signals.received
    finished = network if stop else trained()
    if stop:
        raise Interrupted(
            f"stopped by {signal.Signals(stop).name} at iteration {progress.iteration}; saved {run_dir / LAST}; "
            "the same command continues",
            stop,
        )
    if main:
        if out_of_time:
            say(f"stopped at iteration {progress.iteration}: train.time_limit_minutes is used up")
        say(format_table(progress.evaluations[-1]))
        with unchanged_rng():
            save_pictures(finished, validation_data, config.eval.pictures, run_dir / "pictures", accelerator)
        checkpoints.write_json(run_dir / "metrics.json", metrics())
        if writer is not None:
            writer.close()
        say(f"written to {run_dir}")
    accelerator.wait_for_everyone()
    return metrics()


def _check_shared(accelerator: Accelerator, run_dir: Path, found: tuple[Path, Any] | None) -> None:
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


def _explain_bad_loss(iteration: int, run_dir: Path, terms: Mapping[str, Tensor]) -> str:
    parts = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in terms.items())
    last = run_dir / LAST
    kept = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint had been saved yet"
    return (
        f"the loss is not finite at iteration {iteration + 1} ({parts}); {kept}. "
        "A lower train.optimizer.lr, a longer train.schedule.warmup_iterations, train.clip_grad_norm or "
        "train.precision=fp32 may help"
    )


def _tensorboard(config: Config, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(f"train.tensorboard: true needs the package tensorboard ({error})") from error
    return SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=iteration + 1 if iteration else None)


def _write_evaluation(writer: Any, result: Mapping[str, Any], iteration: int) -> None:
    for which in ("coarse", "refined"):
        for name in ("miou", "pixel_accuracy", "boundary_iou"):
            if result[which][name] is not None:
                writer.add_scalar(f"val/{name}/{which}", result[which][name], iteration)


def _write(file: Any, text: str) -> None:
    file.write(text.encode())
