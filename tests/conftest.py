"""Shared by all tests: what a machine without a GPU or Triton skips, and counts of the kinds of cases that ran."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest
import torch

KINDS = ("gradcheck", "opcheck", "bad_input")
_KINDS_OF: dict[str, list[str]] = {}
_COUNTS: Counter[tuple[str, str]] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = {}
    if not torch.cuda.is_available():
        absent["gpu"] = "needs a CUDA GPU, and torch finds none"
    if importlib.util.find_spec("triton") is None:
        absent["triton"] = "needs the package triton"
    for item in items:
        _KINDS_OF[item.nodeid] = [kind for kind in KINDS if item.get_closest_marker(kind)]
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A case counts once: by its call, or by the set-up that skipped or broke it.
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        for kind in _KINDS_OF.get(report.nodeid, ()):
            _COUNTS[kind, report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.option.collectonly:
        return
    terminalreporter.section("cases by kind")
    for kind in KINDS:
        outcomes = [f"{_COUNTS[kind, outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")]
        terminalreporter.write_line(f"{kind:<10} {', '.join(outcomes)}")
