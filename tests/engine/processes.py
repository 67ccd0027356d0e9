"""Fresh processes, alone or as a gloo group, that start quickly: forked from a server that has imported everything."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rendseg.engine.config import Config, build_config
from tests.limits import TIMEOUT

REPO = Path(__file__).resolve().parents[2]


def launch(
    function: Callable[..., Any], *args: Any, world: int = 1, timeout: float = TIMEOUT
) -> list[tuple[int, str, str]]:
    """Call ``function(*args)`` in ``world`` processes and return exit code, stdout and stderr of each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["rendseg.engine.train", "rendseg.models", "timm", "torch.distributed.fsdp", "torch.distributed.tensor"]
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(REPO)  # for the server, which is started by the first call
    try:
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                context.Process(target=_run, args=(folder, rank, world, torch.get_num_threads(), function, args))
                for rank in range(world)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join(timeout)
            late = [process for process in processes if process.is_alive()]
            for process in late:
                process.kill()
                process.join()
            found = []
            for rank, process in enumerate(processes):
                out, err = (Path(folder, f"{rank}.{name}").read_text() for name in ("out", "err"))
                found.append((process.exitcode, out, err))
            assert not late, f"{len(late)} of {world} processes did not end\n" + "\n".join(e[-3000:] for *_, e in found)
            return found
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def succeed(function: Callable[..., Any], *args: Any, world: int = 1) -> list[str]:
    """``launch`` where every process must end well; returns what each printed."""
    found = launch(function, *args, world=world)
    assert all(code == 0 for code, *_ in found), "\n".join(err[-3000:] for *_, err in found)
    return [out for _, out, _ in found]


def _run(folder: str, rank: int, world: int, threads: int, function: Callable[..., Any], args: Any) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(threads)
    try:
        if world > 1:
            os.environ |= {"OMP_NUM_THREADS": str(threads), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
            torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
        function(*args)
        if world > 1:
            torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()


def run(content: dict[str, Any], kill_at: int = 0) -> None:
    """Train; with ``kill_at`` every process is killed after that iteration."""
    from rendseg.engine.train import train

    config: Config = build_config(content)
    train(
        config, (lambda iteration: iteration == kill_at and os.kill(os.getpid(), signal.SIGKILL)) if kill_at else None
    )


def poisoned(network: Any, call: int) -> Any:
    """``network``, whose loss has a second term: 0, but NaN at the forward pass ``call`` (from 1)."""
    forward, calls = network.forward, []

    def wrapped(images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        losses = forward(images, labels)
        return {**losses, "loss_point": losses["loss_coarse"] * (float("nan") if len(calls) == call else 0.0)}

    network.forward = wrapped
    return network


def run_until_a_bad_loss(content: dict[str, Any], rank: int, call: int) -> None:
    """Train a tiny network whose loss is NaN at one forward pass of one process; print how training ends."""
    from rendseg.engine import train as module
    from tests.engine.tiny import tiny_network

    here = int(os.environ["RANK"]) == rank
    module.build_network = lambda *args: poisoned(tiny_network(*args), call if here else 0)
    try:
        run(content)
    except module.TrainingError as error:
        print(f"ended: {error}")


def run_and_die_in_a_save(content: dict[str, Any]) -> None:
    """Train, and be killed within the second save, when half of the file is written: nothing is cleaned up."""
    save, saves = torch.save, []

    def dying(contents: Any, file: Any) -> None:
        saves.append(1)
        if len(saves) == 2:
            file.write(b"PK" * 1000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(contents, file)

    torch.save = dying
    run(content)


def run_all(contents: list[dict[str, Any]]) -> None:
    """Train one after the other, within one process group."""
    for content in contents:
        run(content)


def evaluate(checkpoint: str, out: str) -> None:
    from rendseg.engine.evaluate import evaluate_checkpoint

    evaluate_checkpoint(checkpoint, (), Path(out))


def mount_small(folder: str, size: str) -> None:
    """A memory file system of ``size`` on ``folder``, seen by this process and its children alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    calls = (
        lambda: libc.unshare(0x20000),  # CLONE_NEWNS
        lambda: libc.mount(b"none", b"/", None, 0x44000, None),  # MS_REC | MS_PRIVATE
        lambda: libc.mount(b"none", folder.encode(), b"tmpfs", 0, f"size={size}".encode()),
    )
    for call in calls:
        if call() != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def load_with_little_shared_memory() -> None:
    from rendseg.data import build_dataset
    from rendseg.engine.loader import evaluation_samples, training_batches

    mount_small("/dev/shm", "64k")
    data = build_dataset({"name": "shapes", "size": [64, 64], "num_images": 4, "num_val_images": 2}, "train")
    batches = list(training_batches(data, 0, 0, 4, 2, 1))
    print(f"{len(batches)} batches, {len(list(evaluation_samples(data, 1, [0, 1])))} samples")


def run_on_a_full_disk(content: dict[str, Any]) -> None:
    from rendseg.engine.checkpoint import CheckpointError

    mount_small(content["output"]["dir"], "16k")
    try:
        run(content)
    except CheckpointError as error:
        print(f"ended: {error}")
