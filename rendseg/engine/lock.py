"""One run folder, one writer: a file ``.lock`` in it, which its process holds and which says who that is.

The kernel frees the lock when the process ends, however it ends. Where another machine cannot see it, the age of the
file counts: its process renews it every minute.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from rendseg.engine.config import ConfigError

NAME = ".lock"
STALE_MINUTES = 10
_held: set[Path] = set()  # by this process, which its own locks do not stop


class RunLock:
    """Held from its making to :meth:`release`; ``ConfigError`` names the process that holds it instead."""

    def __init__(self, folder: Path) -> None:
        self.path = folder.resolve() / NAME
        self._descriptor = self._open()
        _held.add(self.path)
        os.ftruncate(self._descriptor, 0)
        content = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.pwrite(self._descriptor, json.dumps(content).encode(), 0)
        self._ended = threading.Event()
        threading.Thread(target=self._renew, daemon=True).start()

    def _open(self) -> int:
        while True:
            if self.path in _held:
                raise self._taken(os.getpid(), "this machine", "")
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._take(descriptor)
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    return descriptor
            except FileNotFoundError:
                pass  # as below: who held it removed the file meanwhile
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        """Lock the file, or ``ConfigError``."""
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken, works = False, True
        except OSError as error:
            taken = works = error.errno in (errno.EACCES, errno.EAGAIN)  # others: the file system has no locks
        try:
            other = json.loads(os.pread(descriptor, 4096, 0))
            host, pid, since = str(other["host"]), int(other["pid"]), str(other["since"])
        except (ValueError, TypeError, KeyError):
            host, pid, since = "another machine", 0, ""
            if not taken:
                return
        if host == socket.gethostname():
            in_use = taken or (not works and pid != os.getpid() and _alive(pid))
        else:
            in_use = taken or time.time() - os.fstat(descriptor).st_mtime < 60 * STALE_MINUTES
        if in_use:
            raise self._taken(pid, host, since)

    def _taken(self, pid: int, host: str, since: str) -> ConfigError:
        return ConfigError(
            f"{self.path.parent} is being written by process {pid} on {host}{f' since {since}' if since else ''}: wait "
            f"for it, or use another name=...; if it has ended, delete {self.path}"
        )

    def _renew(self) -> None:
        while not self._ended.wait(60):
            try:
                os.utime(self.path)
            except OSError:
                pass

    def release(self) -> None:
        """Remove the file, and with it the lock."""
        if self.path in _held and not self._ended.is_set():
            self._ended.set()
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            _held.discard(self.path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
