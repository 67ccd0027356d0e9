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

import math
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from rendseg._float64 import widest
from rendseg._version import __version__
from rendseg.data import DataError, InstanceDataset
from rendseg.engine import checkpoint as checkpoints
from rendseg.engine.assemble import build_data, build_network
from rendseg.engine.automatic import Pace, adopt, faster_precision, with_choice
from rendseg.engine.checkpoint import BEST, LAST, CheckpointError
from rendseg.engine.config import Config, ConfigError, build_config
from rendseg.engine.data_check import check_labels
from rendseg.engine.evaluate import evaluate, format_table, summary
from rendseg.engine.loader import training_batches
from rendseg.engine.lock import RunLock
from rendseg.engine.optimize import build_optimizer, learning_rate
from rendseg.engine.order import image_keys
from rendseg.engine.predict import make_pictures, save_pictures
from rendseg.engine.resume import Progress, check_shared, find_resume, restore, schedule_change
from rendseg.engine.runtime import (
    StopRequested,
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
from rendseg.engine.sharding import ParallelNetwork, full_optimizer_state
from rendseg.engine.tasks import with_tasks


class TrainingError(Exception):
    """Training cannot go on; the message says at which iteration, why, and what is kept."""


class Interrupted(Exception):
    """A signal asked for the end; everything is saved. ``signal`` is its number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number


def train(config: Config, hook: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Train as ``config`` says and return the content of ``metrics.json``.

    ``hook(iteration)`` is called after every optimizer step (tests use it to end the process at a chosen moment).
    Raises ``ConfigError``, ``DataError``, ``CheckpointError`` for what the user gave, ``TrainingError`` if the loss is
    no longer finite, ``Interrupted`` after SIGINT or SIGTERM, when everything has been saved.
    """
    try:
        run = Run.prepare(config)
        with run.held:
            _drive(run, hook)
            return run.finish()
    except OSError as error:  # what could not be read has errors of its own
        raise CheckpointError(f"could not write to {config.run_dir}: {error}; free space, or set output.dir") from error


def _drive(run: Run, hook: Callable[[int], None] | None) -> None:
    """The loop: until the last iteration, the time limit or a signal."""
    with run.signals, run.bar, closing(run.batches):
        if run.evaluation_due and not run.validate():  # which a signal had ended
            run.stop = run.signals.received
        run.clock.restart(run.progress)
        while not run.ended:
            try:
                run.step()
            except StopRequested:  # while it waited for data
                run.check()
                run.save()
                break
            due = run.due()
            if due.check:
                run.check()
            if due.log:
                run.log()
            saved = due.evaluate and not run.stop and run.validate()
            if due.evaluate:
                run.clock.restart(run.progress)  # evaluation is no training time
                run.stop = run.stop or earliest(run.accelerator, -1, run.signals.received)[1]
            if (due.save or run.stop or run.out_of_time) and not saved:
                run.save()
            if hook is not None:
                hook(run.progress.iteration)
        if not run.stop and not run.evaluated and not run.validate():
            run.stop = run.signals.received


@dataclass
class Run:
    """A run on its way. :meth:`prepare` makes it, :func:`train` drives it; every process has one."""

    config: Config
    accelerator: Accelerator
    training_data: Any
    validation_data: Any
    network: ParallelNetwork
    optimizer: torch.optim.Optimizer
    progress: Progress
    batches: Generator[tuple[Tensor, Any]]
    writer: Any
    """Of TensorBoard, in the first process; None without."""
    bar: Any
    sums: dict[str, Tensor]
    """Of the loss and its terms since the last row."""
    clock: _Clock
    bad_loss: _BadLoss
    pace: Pace
    signals: StopSignals
    held: ExitStack = field(default_factory=ExitStack)
    """Gives the run folder free for others."""
    lr: float = 0.0
    stop: int = 0
    """The signal that ends the run, as all processes know it; 0: none."""
    out_of_time: bool = False

    @classmethod
    def prepare(cls, config: Config) -> Run:
        """Data, network and optimizer as ``config`` says, and the state of the checkpoint that it continues."""
        accelerator = make_accelerator(config)
        training_data, validation_data = build_data(config, "train"), build_data(config, "val")
        notes = check_labels(training_data, validation_data)
        if accelerator.is_main_process:
            for note in notes:
                print(f"note: {note}", file=sys.stderr)
        config = with_tasks(config, training_data)
        with _hold(config, accelerator) as held:
            run = cls._prepare(config, accelerator, training_data, validation_data)
            run.held = held.pop_all()
        return run

    @classmethod
    def _prepare(cls, config: Config, accelerator: Accelerator, training_data: Any, validation_data: Any) -> Run:
        options, requested = config.train, config.train.precision
        device, main = accelerator.device, accelerator.is_main_process
        found = find_resume(config)
        if found is not None:
            config = adopt(config, build_config(found[1]["config"], source=f"the configuration in {found[0]}"))
        check_shared(accelerator, config.run_dir, found)
        seed_everything(config.seed)  # before the network: its initial weights are a function of the seed
        network = build_network(config, training_data.num_classes)
        if found is not None:
            checkpoints.load_weights(network, found[1]["model"], found[0])
        if config.train.precision == "auto":
            config = _choose_precision(config, training_data, network, accelerator)
        if config.train.precision != requested:
            accelerator = make_accelerator(config)
        parallel, optimizer = ParallelNetwork.prepare(
            network, lambda module: build_optimizer(module, options.optimizer), options.fsdp, accelerator
        )
        seed_everything(config.seed + 1 + accelerator.process_index)  # dropout differs between processes
        progress, saved_rng = Progress(), None
        if found is not None:
            progress, saved_rng = restore(found, config, optimizer, accelerator, parallel.sharded)
        if main:
            if options.fsdp.enabled and not parallel.sharded:
                print("train.fsdp: one process has nothing to shard over; start several with torchrun")
            if found is not None:
                print(f"continuing {found[0]} at iteration {progress.iteration} of {config.train.iterations}")
                print(*schedule_change(found, config, progress.iteration), sep="", end="")
            _make_folder(config)
        writer = _tensorboard(config, progress.iteration) if main and options.tensorboard else None
        batches = training_batches(
            training_data,
            config.seed,
            progress.samples,
            (_length(config) - progress.iteration) * options.gradient_accumulation,
            options.batch_size,
            options.num_workers,
            accelerator.process_index,
            accelerator.num_processes,
        )
        if saved_rng is not None:
            set_rng_state(saved_rng)
        parallel.model.train()
        return cls(
            config,
            accelerator,
            training_data,
            validation_data,
            parallel,
            optimizer,
            progress,
            batches,
            writer,
            _progress_bar(config, progress.iteration, main),
            {k: torch.tensor(v, device=device, dtype=widest(device)) for k, v in progress.window.items()},
            _Clock(progress),
            _BadLoss(device),
            Pace(device),
            StopSignals(alone=accelerator.num_processes == 1),
        )

    # ---- one iteration

    @property
    def ended(self) -> bool:
        """Whether no further step is to be made."""
        return self.progress.iteration >= _length(self.config) or bool(self.stop) or self.out_of_time

    @property
    def step_images(self) -> int:
        """Images of one optimizer step, all processes together."""
        options = self.config.train
        return options.batch_size * options.gradient_accumulation * self.accelerator.num_processes

    def step(self) -> None:
        """One optimizer step on the next images."""
        options, progress = self.config.train, self.progress
        self.lr = learning_rate(progress.iteration, _length(self.config), options.optimizer.lr, options.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["lr_factor"]
        # All before the first forward pass, so that a wait that ends early leaves the network as it was.
        batches = [next(self.batches) for _ in range(options.gradient_accumulation)]
        for part, batch in enumerate(batches):
            images, labels = move(batch, self.accelerator.device)
            self.network.before_forward(last=part + 1 == options.gradient_accumulation)
            loss, terms = self._descend(images, labels, *self._keys(part))
            self.bad_loss.watch(progress.iteration, loss, terms)
            for name, term in {"loss": loss, **terms}.items():
                share = term.to(widest(term.device)) / options.gradient_accumulation
                self.sums[name] = self.sums[name] + share if name in self.sums else share
        progress.iteration += 1
        progress.samples += self.step_images
        progress.window_size += 1
        progress.seconds = self.clock.seconds()
        self.bar.update()
        if options.iterations == "auto":
            self._choose_length()

    def _choose_length(self) -> None:
        """Once the speed is known: as many iterations as take ``auto_minutes``."""
        seconds, progress, minutes = self.pace.step(), self.progress, self.config.train.auto_minutes
        if seconds is None:
            return
        left = max(0, round((60 * minutes - gather([progress.seconds])[0]) / seconds))
        self.config = with_choice(self.config, iterations=progress.iteration + left)
        if self.accelerator.is_main_process:
            self.bar.total = self.config.train.iterations
            self.bar.write(
                f"train.iterations: auto is {self.config.train.iterations} here: one takes {seconds:.3g} s, and "
                f"training should take about {minutes:g} minutes"
            )
            checkpoints.write_text(self.config.run_dir / "config.yaml", self.config.to_yaml())

    def _keys(self, part: int) -> tuple[Tensor, ...]:
        """Keys of the images of one forward pass, where the network draws points on them."""
        if not self.network.draws:
            return ()
        accelerator, size = self.accelerator, self.config.train.batch_size
        first = self.progress.samples + (part * accelerator.num_processes + accelerator.process_index) * size
        return (image_keys(self.config.seed, first, size, accelerator.device),)

    def _descend(self, images: Tensor, labels: Any, *keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward pass, and after the last one of an iteration the step; the loss and its terms."""
        accelerator, model, limit = self.accelerator, self.network.model, self.config.train.clip_grad_norm
        with accelerator.accumulate(model):
            with accelerator.autocast():  # DDP's own, but FSDP has none
                try:
                    terms = model(images, labels, *keys)
                except (ValueError, RuntimeError) as error:
                    raise TrainingError(_step_error(error)) from error
            loss = torch.stack([term.float() for term in terms.values()]).sum()
            try:
                accelerator.backward(loss)
            except RuntimeError as error:
                raise TrainingError(_step_error(error)) from error
            if limit is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), limit)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), {name: term.detach() for name, term in terms.items()}

    def due(self) -> _Due:
        """What is to be done after this iteration."""
        options, done = self.config.train, self.progress.iteration
        last = done == _length(self.config)
        log = done % options.log_every == 0 or last
        save = done % options.checkpoint_every == 0 or last
        evaluate_now = self.evaluation_due
        every = 1 if self.accelerator.device.type == "cpu" else options.log_every  # reading a loss makes a GPU wait
        return _Due(done % every == 0 or log or save or evaluate_now, log, save, evaluate_now)

    @property
    def evaluation_due(self) -> bool:
        """Whether the network as it is now is to be evaluated, before the end of the run."""
        every, done = self.config.train.eval_every, self.progress.iteration
        return bool(every and done) and done % every == 0 and done < _length(self.config) and not self.evaluated

    def check(self) -> None:
        """``TrainingError`` if a loss was not finite; asks all processes for signals and the time limit."""
        first_bad, self.stop = earliest(self.accelerator, self.bad_loss.at(), self.signals.received)
        if first_bad >= 0:
            raise TrainingError(self._explain(first_bad))
        limit = self.config.train.time_limit_minutes
        self.out_of_time = agree(self.accelerator, limit is not None and self.progress.seconds > 60 * limit)

    def _explain(self, iteration: int) -> str:
        """Why training ends at ``iteration``, with the terms of the first process whose loss was not finite there."""
        found = gather([(self.bad_loss.at(), self.bad_loss.terms())])
        terms = next(terms for at, terms in found if at == iteration)
        parts = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        last = self.config.run_dir / LAST
        kept = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint had been saved yet"
        return (
            f"the loss is not finite at iteration {iteration + 1} ({parts}); {kept}. "
            "A lower train.optimizer.lr, a longer train.schedule.warmup_iterations, train.clip_grad_norm or "
            "train.precision=fp32 may help"
        )

    # ---- what is kept and shown

    def log(self) -> None:
        """A row of the mean losses since the last one, to the history, the bar and TensorBoard."""
        progress = self.progress
        row: dict[str, Any] = mean_over_processes(self.accelerator, self.sums, progress.window_size)
        speed = self.clock.images_per_second(progress.iteration, self.step_images)
        row = {"iteration": progress.iteration, "lr": self.lr, **row, "images_per_second": round(speed, 3)}
        progress.history.append(row)
        self.sums, progress.window_size = {}, 0
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{self.lr:.2e}")
        if self.writer is not None:
            for name, value in row.items():
                if name != "iteration":
                    self.writer.add_scalar(f"train/{name}", value, progress.iteration)

    def validate(self) -> bool:
        """Evaluate, record and save; False if a signal ended it early."""
        accelerator, progress = self.accelerator, self.progress
        try:
            result = self._measure()
        except DataError as error:
            self.network.train_again()
            if accelerator.num_processes > 1:  # the others wait elsewhere, and a checkpoint needs all
                raise
            self.save()
            raise DataError(
                f"{error}; the run is saved as of iteration {progress.iteration}, and the same command continues it "
                "with this evaluation"
            ) from error
        if result is None:
            return False
        progress.evaluations.append({"iteration": progress.iteration, **result})
        value = result["refined"][self.config.eval.best]
        is_best = value is not None and value > progress.best
        progress.best = value if is_best else progress.best
        self.save(is_best)
        if accelerator.is_main_process:
            self.bar.write(f"iteration {progress.iteration}: {summary(result)}")
        return True

    def _measure(self) -> dict[str, Any] | None:
        """The evaluation of the network as it is; None if a signal ended it early."""
        accelerator, progress, data = self.accelerator, self.progress, self.validation_data
        with unchanged_rng():
            stopped = (lambda: bool(self.signals.received)) if accelerator.num_processes == 1 else None
            network = self.network.trained(accelerator.device)
            try:
                result = evaluate(network, data, self.config.eval, accelerator, stopped)
            except StopRequested:
                result = None
            if result is not None and self.writer is not None:
                _write_evaluation(self.writer, result, progress.iteration)
                threshold = self.config.eval.score_threshold
                for _, picture in make_pictures(network, data, 1, accelerator, threshold=threshold):
                    self.writer.add_image("val/prediction", np.asarray(picture), progress.iteration, dataformats="HWC")
            self.network.train_again()
        return result

    @property
    def evaluated(self) -> bool:
        """Whether the network has been evaluated as it is now."""
        evaluations = self.progress.evaluations
        return bool(evaluations) and evaluations[-1]["iteration"] == self.progress.iteration

    def save(self, is_best: bool = False) -> None:
        """Write the checkpoint and ``metrics.json``; all processes must, since what they hold is gathered."""
        accelerator, progress, options = self.accelerator, self.progress, self.config.train
        rng = gather([rng_state()])
        progress.window = mean_over_processes(accelerator, self.sums, 1) if self.sums else {}
        weights = self.network.weights()
        state = self.optimizer.state_dict()
        state = full_optimizer_state(state) if self.network.sharded else state
        if not accelerator.is_main_process:
            return
        data, run_dir = self.training_data, self.config.run_dir
        contents = {
            "rendseg": __version__,
            "config": self.config.to_dict(),
            "classes": {
                "names": list(data.class_names),
                "palette": [[int(v) for v in color] for color in data.palette],
                "ignore_index": int(data.ignore_index),
                **({"ids": data.category_ids} if isinstance(data, InstanceDataset) else {}),
            },
            "model": weights,
            "training": {
                "progress": dict(vars(progress)),
                "optimizer": state,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "rng": rng,
            },
        }
        aliases = ([f"iteration_{progress.iteration:07d}.pt"] if options.keep_checkpoints else []) + [BEST] * is_best
        checkpoints.save_checkpoint(run_dir / LAST, contents, tuple(aliases))
        for old in checkpoints.numbered_checkpoints(run_dir)[options.keep_checkpoints :]:
            old.unlink(missing_ok=True)
        checkpoints.write_json(run_dir / "metrics.json", self.metrics())

    def metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``."""
        progress, network = self.progress, self.network.network
        final: dict[str, Any] = {"iteration": progress.iteration, "seconds": progress.seconds}
        if progress.history:
            final["loss"] = progress.history[-1]["loss"]
        if self.evaluated:
            final.update({k: v for k, v in progress.evaluations[-1].items() if k not in ("iteration", "seconds")})
        return {
            "name": self.config.name,
            "finished": progress.iteration >= _length(self.config),
            "final": final,
            "environment": {
                "rendseg": __version__,
                "torch": torch.__version__,
                "device": str(self.accelerator.device),
                "processes": self.accelerator.num_processes,
                "threads": torch.get_num_threads(),
                "precision": self.config.train.precision,
                "parameters": sum(p.numel() for p in network.parameters()),
                "training_images": len(self.training_data),
                "validation_images": len(self.validation_data),
            },
            "evaluations": progress.evaluations,
            "history": progress.history,
        }

    def finish(self) -> dict[str, Any]:
        """Write the pictures and return the content of ``metrics.json``; ``Interrupted`` if a signal ended the run."""
        config, iteration = self.config, self.progress.iteration
        if self.stop:
            raise Interrupted(
                f"stopped by {signal.Signals(self.stop).name} at iteration {iteration}; saved {config.run_dir / LAST}; "
                "the same command continues",
                self.stop,
            )
        network = self.network.trained(self.accelerator.device)
        if self.accelerator.is_main_process:
            if self.out_of_time:
                print(f"stopped at iteration {iteration}: train.time_limit_minutes is used up")
            print(format_table(self.progress.evaluations[-1]))
            pictures = config.run_dir / "pictures"
            with unchanged_rng():
                save_pictures(
                    network,
                    self.validation_data,
                    config.eval.pictures,
                    pictures,
                    self.accelerator,
                    config.eval.score_threshold,
                )
            checkpoints.write_json(config.run_dir / "metrics.json", self.metrics())
            if self.writer is not None:
                self.writer.close()
            print(f"written to {config.run_dir}")
        self.accelerator.wait_for_everyone()
        return self.metrics()


# --------------------------------------------------------------------------------------------------- parts of a run


def _step_error(error: Exception) -> str:
    """What the network says against its input, or PyTorch in a step, in one line with a remedy."""
    if "Expected more than 1 value per channel" in str(error):
        return (
            "a batch norm cannot train on a single value per channel: set train.batch_size=2 or more, or a larger "
            "data.crop_size, or model.decoder.norm=gn"
        )
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said:
        return (
            f"no memory is left for a step: {said}; lower train.batch_size (train.gradient_accumulation makes up "
            "for it) or data.crop_size"
        )
    if isinstance(error, ValueError):
        return f"the network cannot train on these images: {error}"
    return f"a training step failed: {said}; RENDSEG_DEBUG=1 shows where"


@dataclass(frozen=True)
class _Due:
    """What is to be done after an iteration."""

    check: bool
    log: bool
    save: bool
    evaluate: bool


class _Clock:
    """The seconds of a run, all resumptions together, and its speed since the last row."""

    def __init__(self, progress: Progress) -> None:
        self.restart(progress)

    def restart(self, progress: Progress) -> None:
        """Go on from ``progress``: what has passed since its last iteration does not count."""
        self._started = self._row_started = time.perf_counter()
        self._before, self._row_iteration = progress.seconds, progress.iteration

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def images_per_second(self, iteration: int, step_images: int) -> float:
        """Since the last call."""
        now = time.perf_counter()
        speed = (iteration - self._row_iteration) * step_images / (now - self._row_started)
        self._row_started, self._row_iteration = now, iteration
        return speed


class _BadLoss:
    """The first loss of this process that is not finite: its iteration and its terms. They stay on the device until
    they are asked for, since reading a loss makes a GPU wait."""

    def __init__(self, device: torch.device) -> None:
        self._iteration = torch.full((), -1, device=device, dtype=torch.int64)
        self._names: list[str] = []
        self._values = torch.zeros((), device=device)

    def watch(self, iteration: int, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Note ``terms`` if ``loss`` is the first one that is not finite."""
        first = (self._iteration < 0) & ~loss.isfinite()
        self._names = list(terms)
        self._values = torch.where(first, torch.stack([term.float() for term in terms.values()]), self._values)
        self._iteration = torch.where(first, iteration, self._iteration)

    def at(self) -> int:
        """The iteration; -1: none."""
        return int(self._iteration)

    def terms(self) -> dict[str, float]:
        """The terms of that loss; of no meaning before there is one."""
        return dict(zip(self._names, self._values.expand(len(self._names)).tolist(), strict=True))


def _length(config: Config) -> float:
    """The iterations of the run; infinite until they are chosen."""
    iterations = config.train.iterations
    return math.inf if iterations == "auto" else iterations


def _choose_precision(config: Config, data: Any, network: Any, accelerator: Accelerator) -> Config:
    """``config`` with the precision that ``auto`` means here."""
    if accelerator.device.type != "cpu":
        return with_choice(config, precision="bf16" if accelerator.mixed_precision == "bf16" else "fp32")
    size, rank, world = config.train.batch_size, accelerator.process_index, accelerator.num_processes
    images, labels = next(training_batches(data, config.seed, 0, 1, size, 0, rank, world))
    keys = (image_keys(config.seed, rank * size, size, accelerator.device),) if getattr(network, "draws", False) else ()
    precision, why = faster_precision(network, images, labels, *keys)
    if accelerator.is_main_process:
        print(f"train.precision: auto is {precision} here: {why}", flush=True)
    return with_choice(config, precision=precision)


def _hold(config: Config, accelerator: Accelerator) -> ExitStack:
    """The folder of the run, made if need be, and kept from other runs until the stack is closed. ``ConfigError`` in
    every process if the first one cannot have it."""
    held, run_dir, problem = ExitStack(), config.run_dir, ""
    if accelerator.is_main_process:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.callback(RunLock(run_dir).release)
            checkpoints.remove_temporaries(run_dir)
        except OSError as error:
            problem = f"{run_dir} cannot be written: {error.strerror}; set output.dir or name to what can"
        except ConfigError as error:
            problem = str(error)
    problem = gather([problem])[0]
    if problem:
        held.close()
        raise ConfigError(problem)
    return held


def _make_folder(config: Config) -> None:
    """What the run folder holds at the start: the configuration, and with ``resume: never`` no checkpoints."""
    run_dir = config.run_dir
    if config.resume == "never":
        for old in (run_dir / LAST, run_dir / BEST, *checkpoints.numbered_checkpoints(run_dir)):
            old.unlink(missing_ok=True)
    checkpoints.write_text(run_dir / "config.yaml", config.to_yaml())


def _progress_bar(config: Config, iteration: int, shown: bool) -> Any:
    return tqdm(
        total=None if config.train.iterations == "auto" else config.train.iterations,
        initial=iteration,
        desc=config.name,
        unit="it",
        disable=not shown,
        dynamic_ncols=True,
        **({} if sys.stderr.isatty() else {"mininterval": 10.0, "ncols": 100}),
    )


def _tensorboard(config: Config, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(f"train.tensorboard: true needs the package tensorboard ({error})") from error
    folder = config.run_dir / "tensorboard"
    try:
        return SummaryWriter(str(folder), purge_step=iteration + 1 if iteration else None)
    except UnicodeError as error:
        raise ConfigError(
            f"TensorBoard cannot write to {folder}, whose name is no text: set train.tensorboard=false or output.dir"
        ) from error


def _write_evaluation(writer: Any, result: Mapping[str, Any], iteration: int) -> None:
    for which in ("coarse", "grid", "refined"):
        for name in ("miou", "pixel_accuracy", "boundary_iou", "mask_ap", "boundary_ap"):
            value = result.get(which, {}).get(name)
            if value is not None:
                writer.add_scalar(f"val/{name}/{which}", value, iteration)
