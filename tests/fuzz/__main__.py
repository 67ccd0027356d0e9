"""``python -m tests.fuzz --calls 50000``: drawn calls of every operator against the reference, in processes apart.

A call that fails is printed as the seed that reproduces it alone: ``python -m tests.fuzz --seed 1234``. The exit status
is 1 where a value was wrong, a process died or hung, or one implementation refuses what another takes.
"""

from __future__ import annotations

import argparse
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CRASH, HANG = "crash", "hang"
BATCH = 2000  # calls of a process
PATIENCE = 120  # seconds for the start of a process, or for one call


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="this call alone, in this process, with what it was")
    parser.add_argument("--against", default="compiled", help="compiled, emulated (CUDA) or triton (interpreted)")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds; more on a machine with other work")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def child(first: int, calls: int, against: str) -> int:
    """Runs seeds; a line with the seed before each, and one with its outcome after it."""
    import warnings

    import torch

    from tests.fuzz.compare import implementations, judge

    warnings.simplefilter("ignore")
    torch.set_num_threads(2)  # the work is tiny; two, so that kernels divide it
    (run,) = implementations([against]).values()
    for seed in range(first, first + calls):
        os.write(1, f"{seed}\n".encode())
        result, said = judge(seed, run, on_device=against != "compiled")
        os.write(1, f"{result}\t{said}".replace("\n", " // ").encode("utf-8", "replace") + b"\n")
    return 0


def one(seed: int, against: str) -> int:
    from tests.fuzz.calls import draw
    from tests.fuzz.compare import GOOD, implementations, judge

    print(draw(seed), flush=True)
    (run,) = implementations([against]).values()
    result, said = judge(seed, run, on_device=against != "compiled")
    print(f"{result}{': ' if said else ''}{said}")
    return result not in GOOD


def batches(first: int, calls: int, against: str, patience: float = PATIENCE) -> Iterator[tuple[int, str, str]]:
    """``(seed, outcome, words)`` of every call. After one that kills its process, a new process goes on behind it."""
    seed = first
    while seed < first + calls:
        count = min(BATCH, first + calls - seed)
        command = [sys.executable, "-m", "tests.fuzz", "--child", f"--first={seed}", f"--calls={count}"]
        environment = {"OMP_NUM_THREADS": "2", **os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
        process = subprocess.Popen(
            [*command, f"--against={against}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            done = _watched(process, seed, count, patience)
        finally:
            process.kill()
        seed += len(done)
        yield from done


def _watched(process: subprocess.Popen[bytes], start: int, count: int, patience: float) -> list[tuple[int, str, str]]:
    assert process.stdout is not None and process.stderr is not None
    done: list[tuple[int, str, str]] = []
    streams = {process.stdout.fileno(): b"", process.stderr.fileno(): b""}
    out, err = streams
    begun, heard = -1, time.monotonic()
    open_streams = set(streams)
    hung = False
    while open_streams:
        ready = select.select(list(open_streams), [], [], 1.0)[0]
        for stream in ready:
            data = os.read(stream, 1 << 16)
            if not data:
                open_streams.discard(stream)
            streams[stream] = (streams[stream] + data)[-(1 << 16) :] if stream == err else streams[stream] + data
        if out in ready:
            heard = time.monotonic()
            *lines, streams[out] = streams[out].split(b"\n")
            for line in lines:
                text = line.decode()
                if "\t" in text:
                    done.append((begun, *text.split("\t", 1)))  # type: ignore[arg-type]
                else:
                    begun = int(text)
        elif time.monotonic() - heard > patience and process.poll() is None:
            hung = True
            process.kill()
    code = process.wait(timeout=PATIENCE)
    if len(done) < count:
        said = streams[err].decode(errors="replace").strip()
        if begun < start + len(done):  # it did not come to a call
            raise SystemExit(
                f"fuzz: the process of seed {start} ended before its first call (status {code}): {said[-2000:]}"
            )
        if hung:
            done.append((begun, HANG, f"no answer for {patience:.0f} s"))
        else:
            done.append((begun, CRASH, f"status {code}: {said[-4000:]}"))
    return done


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.against == "triton":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    if options.child:
        return child(options.first, options.calls, options.against)
    if options.seed is not None:
        return one(options.seed, options.against)
    from tests.fuzz.compare import GOOD

    begun = time.monotonic()
    counts: Counter[str] = Counter()
    try:
        for seed, result, said in batches(options.first, options.calls, options.against, options.patience):
            counts[result] += 1
            if result not in GOOD:
                print(
                    f"{result}: python -m tests.fuzz --seed {seed} --against {options.against}\n    {said}", flush=True
                )
    except KeyboardInterrupt:
        print("stopped")
    seconds = time.monotonic() - begun
    print(f"{counts.total()} calls, {options.against} against the reference, {seconds:.0f} s: ", end="")
    print(", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    return any(result not in GOOD for result in counts)


if __name__ == "__main__":
    sys.exit(main())
