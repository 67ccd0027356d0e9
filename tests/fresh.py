"""Programs in processes that are as good as new, but start quickly: forked from a server that has imported torch.

An import of torch takes seconds, and many tests look at what an import of rendseg does. What is read when torch is
imported, such as ``OMP_NUM_THREADS`` or ``LD_PRELOAD``, is that of the server: a test about it starts a Python of its
own.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests.limits import TIMEOUT

ROOT = Path(__file__).resolve().parents[1]

# Takes requests, one line each, until its input ends, and writes the exit status of each program.
_SERVER = r"""
import atexit, json, os, sys, traceback
import torch

def run(request):
    for number, file in enumerate(request["files"], 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[1:1] = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    namespace = sys.modules["__main__"].__dict__
    for name in [name for name in namespace if not name.startswith("__")]:
        del namespace[name]
    try:
        exec(compile(request["program"], "<string>", "exec"), namespace)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        traceback.print_exception(error.with_traceback(error.__traceback__.tb_next))
        return 1
    return 0

def main(run=run, os=os, sys=sys, json=json, atexit=atexit):
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = run(json.loads(line))
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status & 255)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

main()
"""


@cache
def _server() -> subprocess.Popen[bytes]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RENDSEG_", "TRITON_", "PYTHONPATH"))}
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=clean,
        cwd=ROOT,
        start_new_session=True,
    )
    atexit.register(server.communicate)  # the end of its input ends it
    return server


def run(program: str, env: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """``python -c program`` with ``env`` as its whole environment, from the folder ``cwd``."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        for file in files:
            file.touch()
        request = {"program": program, "env": env, "cwd": str(cwd), "files": [str(file) for file in files]}
        server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
        ended = select.select([server.stdout], [], [], TIMEOUT)[0]
        answer = server.stdout.readline() if ended else b""
        out, err = (file.read_text() for file in files)
        if not answer:
            _server.cache_clear()
            os.killpg(server.pid, signal.SIGKILL)  # the program too
            raise AssertionError(f"a program did not end in {TIMEOUT} s, or its server died\n{out}\n{err}")
        return subprocess.CompletedProcess(["python", "-c", program], int(answer), out, err)
