"""Under ``make gpu-check``: outcomes as they come, a limit for each test, an end to a process that lost its context.

Nothing here does anything in another run of pytest: the variable RENDSEG_CHECK_RESULTS turns it on.

A kernel that reads beyond its memory breaks the CUDA context of its process, and every later test there would fail for
it. So the process ends; pytest-xdist starts another one, which takes the tests that are left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import smoke  # noqa: E402

smoke.own_tests()

RESULTS = os.environ.get("RENDSEG_CHECK_RESULTS")
REHEARSAL = os.environ.get("RENDSEG_CHECK_REHEARSE", "") not in ("", "0")
LIMIT = float(os.environ.get("RENDSEG_CHECK_TEST_LIMIT", "60"))

if RESULTS and REHEARSAL:
    import on_cpu

    on_cpu.install()


class Recorder:
    """Writes a line before and after each test of this process."""

    def __init__(self, path: str) -> None:
        self.results = smoke.Results(Path(path), stage="tests", pid=os.getpid())
        self.current = ""
        self.entry: dict[str, Any] = {}
        self.watchdog = smoke.Watchdog(LIMIT, self.late)

    def late(self, message: str) -> None:
        self.results.write(case=self.current, event="end", outcome="timeout", message=message)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.current, self.entry = nodeid, {"outcome": "ok", "seconds": 0.0}
        self.results.write(case=nodeid, event="begin")
        self.watchdog.start()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.entry["seconds"] = round(self.entry.get("seconds", 0.0) + report.duration, 3)
        if report.failed:
            self.entry |= {"outcome": "failed", "message": message_of(report)}
        elif report.skipped and self.entry.get("outcome") == "ok":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.entry |= {"outcome": "skipped", "message": str(reason).removeprefix("Skipped: ")[:200]}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.watchdog.stop()
        self.results.write(case=nodeid, event="end", **self.entry)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.results.write(case=report.nodeid, event="collect", message=message_of(report))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.results.write(event="collected", count=len(session.items))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        smoke.planted(smoke.plant("tests", item.nodeid))
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
        report: pytest.TestReport = yield
        lost = smoke.context_lost() if report.failed else ""
        if lost:
            message = f"{message_of(report)} (the CUDA context is lost)"
            self.results.write(
                case=item.nodeid, event="end", outcome="failed", message=message, fatal=lost, seconds=report.duration
            )
            os._exit(smoke.EXIT_STICKY)
        return report


def message_of(report: Any) -> str:
    """The line that says what went wrong."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    # torch.testing says how large the error is on its third line.
    more = [line for line in lines[1:6] if line.startswith(("Mismatched", "Greatest absolute", "Absolute difference"))]
    where = "collecting: " + lines[-1] if isinstance(report, pytest.CollectReport) else "; ".join([lines[0], *more])
    return where[:400]


def pytest_configure(config: pytest.Config) -> None:
    # The process that hands the tests out runs none; without pytest-xdist there is only one process.
    distributed = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if RESULTS and not distributed and not config.option.collectonly:
        config.pluginmanager.register(Recorder(RESULTS), "gpu-check-recorder")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if RESULTS and REHEARSAL:
        on_cpu.choose(config, items)
