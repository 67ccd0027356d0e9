"""Shared by all tests: what a machine without a GPU or Triton skips, counts of the kinds of cases, and several workers.

Under pytest-xdist (``make test`` starts a worker for each core) a worker computes with its share of the cores, and the
long tests come first. Nothing here needs xdist: ``pytest tests/`` runs everything in one process.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from typing import Any

import pytest
import torch

KINDS = ("gradcheck", "opcheck", "bad_input")
_COUNTS: Counter[tuple[str, str]] = Counter()
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


def share_of_cores(cores: int, workers: int) -> int:
    """Threads for each of ``workers`` processes that run at the same time."""
    return max(1, cores // max(workers, 1))


if WORKERS > 1:
    # Set also for the processes that tests start. A test about numbers of threads sets its own.
    os.environ.setdefault("OMP_NUM_THREADS", str(share_of_cores(len(os.sched_getaffinity(0)), WORKERS)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))


def dealt(items: list[Any], slow: list[bool], workers: int) -> list[Any]:
    """``items`` in an order that gives every worker its share of the slow ones, and those first.

    Under ``--dist worksteal`` each worker gets a part of the list, and takes from the end of another's when its own is
    done. A long test begun last would keep one worker busy while the others have nothing left to do.
    """
    long = [item for item, is_slow in zip(items, slow, strict=True) if is_slow]
    short = [item for item, is_slow in zip(items, slow, strict=True) if not is_slow]
    order: list[Any] = []
    for worker in range(workers):
        mine = long[worker::workers]
        size = (len(items) - len(order)) // (workers - worker)
        taken = max(size - len(mine), 0)
        order += mine + short[:taken]
        short = short[taken:]
    return order + short


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = {}
    if not torch.cuda.is_available():
        absent["gpu"] = "needs a CUDA GPU, and torch finds none"
    if importlib.util.find_spec("triton") is None:
        absent["triton"] = "needs the package triton"
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    if WORKERS > 1:
        items[:] = dealt(items, [item.get_closest_marker("slow") is not None for item in items], WORKERS)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A case counts once: by its call, or by the set-up that skipped or broke it. The markers are among the keywords,
    # which reach the process that prints the summary also from a worker.
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        for kind in KINDS:
            if kind in report.keywords:
                _COUNTS[kind, report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.option.collectonly:
        return
    terminalreporter.section("cases by kind")
    for kind in KINDS:
        outcomes = [f"{_COUNTS[kind, outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")]
        terminalreporter.write_line(f"{kind:<10} {', '.join(outcomes)}")
