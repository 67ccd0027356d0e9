"""One run folder, one writer."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from rendseg.engine import lock as module
from rendseg.engine.checkpoint import CheckpointError
from rendseg.engine.config import ConfigError
from rendseg.engine.lock import RunLock
from rendseg.engine.train import Run, train
from tests.engine import processes
from tests.engine.tiny import tiny_config, tiny_content


@pytest.mark.bad_input
def test_a_second_training_in_a_run_folder_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    content = tiny_content(tmp_path, iterations=2, checkpoint_every=1)
    seen: list[str] = []

    def another(iteration: int) -> None:
        if iteration == 1:
            [(code, _, err)] = processes.launch(processes.run, content)
            seen.append(err if code else "it trained")
            with pytest.raises(ConfigError, match=f"process {os.getpid()} on this machine"):
                train(tiny_config(tmp_path, iterations=2, checkpoint_every=1))

    train(tiny_config(tmp_path, iterations=2, checkpoint_every=1), another)
    said = f"tiny is being written by process {os.getpid()} on {socket.gethostname()} since "
    assert said in seen[0] and f"if it has ended, delete {tmp_path / 'tiny' / '.lock'}" in seen[0]
    assert not list((tmp_path / "tiny").glob(".*"))


def test_the_lock_of_a_process_that_was_killed_is_stale(tmp_path: Path) -> None:
    content = tiny_content(tmp_path, iterations=2)
    [(code, *_)] = processes.launch(processes.run, content, 1)
    assert code == -signal.SIGKILL and (tmp_path / "tiny" / ".lock").is_file()
    left = tmp_path / "tiny" / ".rendseg-1-abc.tmp"
    left.write_text("half a checkpoint")
    train(tiny_config(tmp_path, iterations=2))
    assert not (tmp_path / "tiny" / ".lock").exists() and not left.exists()


def test_another_host(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "noon"}))
    with pytest.raises(ConfigError, match="process 7 on elsewhere since noon"):
        RunLock(tmp_path)
    os.utime(path, (time.time() - 700, time.time() - 700))  # its process has not renewed it for over ten minutes
    RunLock(tmp_path).release()
    assert not path.exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "lockf", none)
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid(), "since": "noon"}))
    with pytest.raises(ConfigError, match=f"process {os.getppid()} on"):
        RunLock(tmp_path)
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 - 1, "since": "noon"}))
    RunLock(tmp_path).release()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("folder", "name", "cause"),
    [
        ("/dev/null", "tiny", "Not a directory"),
        ("/proc", "tiny", "No such file or directory|Permission denied"),
        ("x" * 300, "tiny", "File name too long"),
    ],
)
def test_an_output_folder_that_cannot_be_written(folder: str, name: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=f"{folder}/{name} cannot be written: ({cause}); set output.dir") as error:
        Run.prepare(tiny_config(folder, f"name={name}"))
    assert "\n" not in str(error.value)


@pytest.mark.bad_input
def test_a_full_output_folder(tmp_path: Path) -> None:
    """A file system of 16 kB for the run, of this process alone."""
    [(code, out, err)] = processes.launch(processes.run_on_a_full_disk, tiny_content(tmp_path, tensorboard=True))
    if "not permitted" in err:
        pytest.skip("mounting a file system is not permitted")
    assert code == 0 and out.startswith("ended: could not ") and "No space left on device" in out, err
    assert out.count("\n") == 1 and CheckpointError.__name__ not in out
