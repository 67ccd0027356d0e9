"""Processes with a limit in seconds, in groups of their own, killed whole. Only the standard library."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

POLL_S = 0.1
GRACE_S = 2.0  # between the request to end and the kill


class Job:
    """A command; its output goes to a file."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, limit: float, env: Mapping[str, str], cwd: Path
    ) -> None:
        self.name, self.command, self.log, self.limit = name, list(command), log, limit
        self.env, self.cwd = dict(env), cwd
        self.process: subprocess.Popen[bytes] | None = None
        self.started = self.ended = 0.0
        self.timed_out = False
        self.error = ""  # why it could not be started

    def start(self) -> None:
        self.started = time.monotonic()
        with open(self.log, "ab") as out:
            out.write(f"$ {' '.join(self.command)}\n".encode())
            out.flush()
            try:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=self.env,
                    cwd=self.cwd,
                    start_new_session=True,
                )
            except OSError as error:
                self.error = f"cannot be started: {error}"
                self.ended = self.started
                out.write(f"{self.error}\n".encode())

    @property
    def returncode(self) -> int:
        if self.process is None:
            return 127
        return 124 if self.process.returncode is None else self.process.returncode

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started if self.started else 0.0

    def done(self) -> bool:
        """Whether it has ended, by itself or because its time was up."""
        if self.ended:
            return True
        assert self.process is not None
        if self.process.poll() is None:
            if time.monotonic() - self.started < self.limit:
                return False
            self.timed_out = True
        self.kill()  # also when it ended by itself: what it left behind would stay on the GPU
        self.ended = time.monotonic()
        return True

    def kill(self) -> None:
        """Ends the process, its group and all else it started."""
        if self.process is None:
            return
        members = [self.process.pid, *descendants(self.process.pid)]
        alive = self.process.poll() is None
        _signal(members, self.process.pid, signal.SIGTERM)
        if alive:
            try:
                self.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                pass
        _signal(members, self.process.pid, signal.SIGKILL)
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass  # it hangs in the kernel; nothing more can be done about it

    def ended_how(self) -> str:
        """In words; empty after a good end."""
        if self.error:
            return self.error
        if self.timed_out:
            return f"killed after {self.seconds:.0f} s"
        return how_it_ended(self.returncode)

    def tail(self, lines: int = 1) -> str:
        """The last lines of its output that say anything."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, os.path.getsize(self.log) - 20000))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        found = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(found[-lines:])


def how_it_ended(code: int) -> str:
    if code >= 0:
        return f"status {code}" if code else ""
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def _signal(members: Iterable[int], group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except OSError:
        pass
    for pid in members:
        if pid == group:  # its number may be another's once it has been waited for
            continue
        try:
            if number == signal.SIGKILL and os.getpgid(pid) != group:
                os.kill(pid, number)
        except OSError:
            pass


def descendants(root: int) -> list[int]:
    """Children, their children, and so on, of a process that is alive."""
    children: dict[int, list[int]] = {}
    try:
        entries = [entry for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:
        return []
    for entry in entries:
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        children.setdefault(parent, []).append(int(entry))
    found, queue = [], deque([root])
    while queue:
        for child in children.get(queue.popleft(), ()):
            found.append(child)
            queue.append(child)
    return found


def run(
    jobs: Iterable[Job],
    at_once: int,
    deadline: float,
    ended: Callable[[Job], Iterable[Job]] = lambda job: (),
    tick: Callable[[], None] = lambda: None,
) -> list[Job]:
    """Runs the jobs, ``at_once`` at a time, until ``deadline``; those not begun by then come back.

    ``ended(job)`` may give more jobs, which go first; ``tick`` is called about every second.
    """
    waiting, running, last = deque(jobs), list[Job](), 0.0
    try:
        while waiting or running:
            now = time.monotonic()
            while waiting and len(running) < at_once and now < deadline:
                job = waiting.popleft()
                job.limit = min(job.limit, max(deadline - now, 0.1))
                job.start()
                running.append(job)
            if not running:
                break
            time.sleep(POLL_S)
            for job in [job for job in running if job.done()]:
                running.remove(job)
                waiting.extendleft(reversed(list(ended(job))))
            if now - last >= 1:
                last = now
                tick()
    finally:
        for job in running:  # none, unless something was raised
            job.kill()
            job.timed_out, job.ended = True, time.monotonic()
    return list(waiting)
