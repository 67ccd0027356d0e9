"""Batches of images and labels in the order of ``order.py``, so that a run can be continued at any position.

The augmentation of an image depends on (seed, epoch, image), and nothing on the number of workers.

Nothing waits for ever: an exception in a worker, its death, and a signal to this process all end the wait for a batch.
Batches come through shared memory, and through a pipe where that is too small.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from rendseg.data import DataError
from rendseg.engine.order import BatchPositions, sample_order
from rendseg.engine.runtime import interruptible

Sample = dict[str, Any]
Labels = Tensor | dict[str, Tensor] | list[dict[str, Tensor]]  # of one task, by task, or the objects of each image


SHARED = "/dev/shm"


class _Problem:
    """An exception on its way from a worker, without the traceback that a DataLoader would add to its message."""

    def __init__(self, message: str, details: str = "") -> None:
        self.message, self.details = message, details


class _Samples(Dataset[Any]):
    """A data set read by ``(epoch, index)``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, item: tuple[int, int]) -> Sample | _Problem:
        epoch, index = item
        try:
            return self.dataset.sample(index, epoch)
        except DataError as error:
            return _Problem(str(error))
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            message = f"image number {index} could not be prepared: {type(error).__name__}: {first}"
            return _Problem(message, traceback.format_exc())


def _stack(samples: Sequence[Sample | _Problem]) -> tuple[Any, Labels] | _Problem:
    for sample in samples:
        if isinstance(sample, _Problem):
            return sample
    images = [sample["image"] for sample in samples]  # type: ignore[index]
    if "target" in samples[0]:  # type: ignore[operator]
        return images, [sample["target"] for sample in samples]  # type: ignore[index]
    labels = [sample["label"] for sample in samples]  # type: ignore[index]
    if len({image.shape for image in images}) > 1:
        names = ", ".join(f"{s['name']} {list(s['image'].shape[1:])}" for s in samples)  # type: ignore[index]
        return _Problem(f"the images of a training batch differ in size; set data.crop_size ({names})")
    if "labels" in samples[0]:  # type: ignore[operator]
        tasks = [sample["labels"] for sample in samples]  # type: ignore[index]
        return torch.stack(images), {task: torch.stack([of[task] for of in tasks]) for task in tasks[0]}
    return torch.stack(images), torch.stack(labels)


class _Array:
    """A tensor that shared memory has no room for, on its way through a pipe."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


def _sent(value: Any) -> Any:
    """``value`` as a worker sends it: tensors in shared memory, those that find no room there as arrays.

    Left to itself, the thread that sends would find that out, drop the batch, and the parent would wait for ever.
    """
    if isinstance(value, Tensor):
        try:
            return value.share_memory_()
        except (RuntimeError, OSError):
            return _Array(value.numpy())
    if isinstance(value, dict):
        return {key: _sent(item) for key, item in value.items()}
    return type(value)(_sent(item) for item in value) if isinstance(value, (tuple, list)) else value


def _arrived(value: Any) -> Any:
    """The inverse of :func:`_sent`."""
    if isinstance(value, _Array):
        _warn_of_little_shared_memory()
        return torch.from_numpy(value.array)
    if isinstance(value, dict):
        return {key: _arrived(item) for key, item in value.items()}
    return type(value)(_arrived(item) for item in value) if isinstance(value, (tuple, list)) else value


@cache
def _warn_of_little_shared_memory() -> None:
    """Once in a process."""
    tqdm.write(
        f"rendseg: {_shared_memory()} is too small for the batches: they come through pipes, which is slower; "
        "give it more (docker run --shm-size=8g) or set num_workers=0",
        file=sys.stderr,
    )


def _shared_memory() -> str:
    """``/dev/shm (64 MB)``."""
    try:
        status = os.statvfs(SHARED)
    except OSError:
        return SHARED
    return f"{SHARED} ({status.f_blocks * status.f_frsize / 2**20:.0f} MB)"


class _Collate:
    """``stack`` of the samples, made ready to be sent where this is a worker."""

    def __init__(self, stack: Callable[[Any], Any]) -> None:
        self.stack = stack

    def __call__(self, samples: Any) -> Any:
        batch = self.stack(samples)
        return batch if get_worker_info() is None else _sent(batch)


def _same(sample: Any) -> Any:
    return sample


def _leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C and a job's SIGTERM reach the whole process group; workers must live until the parent has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextmanager
def _on_sigchld(handler: Any) -> Iterator[None]:
    """``handler`` for the death of child processes; in another thread than the main one, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGCHLD, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if previous is None else previous)


class _WorkerDied(BaseException):
    """Raised by a signal handler wherever the main thread waits."""


def _check_alive(workers: Sequence[Any], *_: object) -> None:
    if any(worker.exitcode not in (None, 0) for worker in workers):
        raise _WorkerDied


def _received(key: str, dataset: Any, workers: int, stack: Callable[[Any], Any], **options: Any) -> Generator[Any]:
    """What ``workers`` processes (``key`` of the configuration) or this one make of ``dataset``, in order.

    ``DataError`` for every failure in them; ``StopRequested`` as :func:`interruptible` says.
    """
    loader = DataLoader(
        _Samples(dataset),
        num_workers=workers,
        collate_fn=_Collate(stack),
        worker_init_fn=_leave_signals_to_the_parent if workers else None,
        generator=torch.Generator().manual_seed(0),  # so that the global generator is left alone
        pin_memory=torch.cuda.is_available(),
        **options,
    )
    less = f" or below {workers}" if workers > 1 else ""
    remedy = f"set {key}=0{less}; {_shared_memory()} grows with docker run --shm-size=8g"
    try:
        with _on_sigchld(signal.SIG_DFL):  # DataLoader's own handler raises at any moment, not only in a wait
            iterator = iter(loader)
    except (OSError, RuntimeError) as error:
        raise DataError(f"the {workers} processes that prepare images cannot be started: {error}; {remedy}") from error
    processes: list[Any] = getattr(iterator, "_workers", [])
    try:
        while True:
            try:
                with interruptible(), _on_sigchld(partial(_check_alive, processes)):
                    _check_alive(processes)
                    item = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError, _WorkerDied) as error:
                how = _ending(processes) or f"cannot be reached: {(str(error).splitlines() or [''])[0]}"
                raise DataError(
                    f"a process that prepares images {how}; often memory or {SHARED} is full: {remedy}"
                ) from error
            if isinstance(item, _Problem):
                raise DataError(item.message) from (RuntimeError(item.details) if item.details else None)
            yield _arrived(item) if workers else item
    finally:
        with _on_sigchld(signal.SIG_DFL):
            if not torch.cuda.is_available():  # else a thread that pins memory waits for what they send
                _kill(processes)
            del iterator
            _kill(processes)


def _ending(processes: Sequence[Any]) -> str:
    """How the first of ``processes`` that failed ended."""
    for process in processes:
        code = process.exitcode
        if code not in (None, 0):
            return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return ""


def _kill(processes: Sequence[Any]) -> None:
    """End those that are left, which ignore what is politer."""
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join(5)


def training_batches(
    dataset: Any, seed: int, start: int, batches: float, batch_size: int, workers: int, rank: int = 0, world: int = 1
) -> Generator[tuple[Any, Labels]]:
    """``batches`` (maybe infinitely many) pairs of images [B, 3, H, W] and labels [B, H, W] (or a dictionary of them,
    by task) from stream position ``start`` on; of objects, pairs of a list of images [3, H, W], which may differ in
    size, and a list of their targets."""
    order = sample_order(dataset, seed, batch_size * world)
    positions = BatchPositions(order, start, batches, batch_size, rank, world)
    return _received("train.num_workers", dataset, workers, _stack, batch_sampler=positions)


def evaluation_samples(dataset: Any, workers: int, indices: Sequence[int]) -> Generator[Sample]:
    """The samples of ``indices`` one by one, in order."""
    items = [(0, index) for index in indices]
    return _received("eval.num_workers", dataset, workers, _same, sampler=items, batch_size=None)
