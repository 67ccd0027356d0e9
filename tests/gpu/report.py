"""The summary at the end of ``make gpu-check``: at most a hundred lines. Only the standard library."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_LINES, MAX_CHARS, WIDTH = 100, 10_800, 190
MAX_FAILURES, MAX_NOTES, MAX_ROWS = 42, 12, 40
COLUMNS = ("rendseg", "triton", "eager", "hand-tuned", "compile")


def figure(value: Any) -> str:
    """Three digits, or what stands in for a number."""
    if not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    return f"{value:.3g}"


def failure_line(failure: Mapping[str, Any]) -> str:
    """One case, with its error."""
    text = f"{failure['stage']:<11} {failure['case']}: {failure['outcome']}"
    if failure.get("error") is not None:
        text += f", {failure.get('what') or 'error'} {figure(failure['error'])} (bound {figure(failure.get('bound'))}"
        bound, error = failure.get("bound"), failure["error"]
        if isinstance(bound, (int, float)) and isinstance(error, (int, float)) and bound > 0 and math.isfinite(error):
            text += f", {error / bound:.2g} times"
        text += ")"
    if failure.get("message"):
        text += f": {failure['message']}"
    return " ".join(text.split(" ")).replace("\n", " ")


def cut(line: str, width: int = WIDTH) -> str:
    return line if len(line) <= width else line[: width - 3] + "..."


def column_of(candidate: str) -> tuple[str, str]:
    """``(column, variant)``: "rendseg labels nhwc" is the variant "labels nhwc" of rendseg."""
    for ours in ("rendseg", "triton"):
        if candidate == ours or candidate.startswith(ours + " "):
            return ours, candidate.removeprefix(ours).strip()
    if "compile" in candidate:
        return "compile", ""
    if "tuned" in candidate or candidate.startswith("gemm"):
        return "hand-tuned", ""
    return "eager", ""


def speed_lines(rows: Iterable[Mapping[str, Any]], limit: int = MAX_ROWS) -> list[str]:
    """A line for each row of a benchmark and each variant of ours; milliseconds."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        if not row.get("row") or not isinstance(row.get("median"), (int, float)):
            continue
        held = table.setdefault(str(row["row"]), {"others": {}, "ours": {}})
        column, variant = column_of(str(row.get("candidate", "")))
        if column in ("rendseg", "triton"):
            held["ours"].setdefault(variant, {})[column] = row
        else:
            # The first of several forms of a column is the plain one.
            held["others"].setdefault(column, row)
    lines = []
    for name, held in table.items():
        others = {column: row["median"] for column, row in held["others"].items()}
        for variant, ours in held["ours"].items() or [("", {})]:
            times = {**others, **{column: row["median"] for column, row in ours.items()}}
            first = ours.get("rendseg") or ours.get("triton") or {}
            cells = [f"{times[column]:.4g}" if column in times else "-" for column in COLUMNS]
            ratio = f"{others['eager'] / first['median']:.2f}" if first.get("median") and "eager" in others else "-"
            share = first.get("percent_of_floor")
            cells += [ratio, f"{share:.0f}" if isinstance(share, (int, float)) else "-"]
            title = cut(f"{name} {variant}".strip(), 44)
            lines.append(f"{title:<44}" + "".join(f"{cell:>11}" for cell in cells))
    if not lines:
        return []
    heads = (*COLUMNS, "x eager", "% floor")
    head = f"{'ms':<44}" + "".join(f"{name:>11}" for name in heads)
    more = [f"and {len(lines) - limit} more rows in gpu-check-rows.jsonl"] if len(lines) > limit else []
    return [head, *lines[:limit], *more]


def ceilings(rows: Iterable[Mapping[str, Any]]) -> str:
    """What copies and products reach on this device, as the first benchmark measured it."""
    found = next((row["ceilings"] for row in rows if row.get("ceilings")), {})
    return cut("ceilings: " + ", ".join(f"{key} {figure(value)}" for key, value in found.items())) if found else ""


def stage_lines(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{'stage':<12}{'outcome':<11}{'seconds':>8}{'limit':>7}  counts"]
    for stage in stages:
        counts = ", ".join(f"{number} {what}" for what, number in stage.get("counts", {}).items() if number)
        text = "; ".join(part for part in (counts, stage.get("reason", "")) if part)
        ran = stage["outcome"] != "not run" or stage.get("seconds", 0) > 1
        seconds = f"{stage.get('seconds', 0):.1f}" if ran else "-"
        limit = f"{stage['limit']:.0f}" if ran and stage.get("limit") else "-"
        lines.append(cut(f"{stage['name']:<12}{stage['outcome']:<11}{seconds:>8}{limit:>7}  {text}"))
    return lines


def failure_lines(failures: Sequence[Mapping[str, Any]], limit: int) -> list[str]:
    if not failures:
        return ["no failing case in what ran"]
    # Every stage shows its first ones: fifty of one must not hide one of another.
    shown: list[Mapping[str, Any]] = []
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for failure in failures:
        by_stage.setdefault(failure["stage"], []).append(failure)
    queues = [list(group) for group in by_stage.values()]
    while len(shown) < limit and any(queues):
        for queue in queues:
            if queue and len(shown) < limit:
                shown.append(queue.pop(0))
    chosen = {id(failure) for failure in shown}
    lines = [f"{len(failures)} failing cases"]
    lines += [cut("  " + failure_line(f)) for group in by_stage.values() for f in group if id(f) in chosen]
    if len(failures) > len(shown):
        rest = Counter(f"{f['stage']} {str(f['case']).partition('[')[0]}" for f in failures if id(f) not in chosen)
        names = ", ".join(f"{name} ({count})" for name, count in rest.most_common())
        lines.append(cut(f"  and {len(failures) - len(shown)} more: {names}", 600))
    return lines


def summary(report: Mapping[str, Any]) -> str:
    """The whole text; cut where it would be too long."""
    stages = report["stages"]
    failures = [{"stage": stage["name"], **failure} for stage in stages for failure in stage.get("failures", ())]
    notes = [f"{stage['name']}: {note}" for stage in stages for note in stage.get("notes", ())]
    machine = report["machine"]
    head = [
        "== gpu-check: summary ==",
        cut(
            f"device {machine.get('device') or 'none'} | driver {machine.get('driver') or '-'} | "
            f"torch {machine.get('torch') or '-'} | CUDA {machine.get('cuda') or '-'} | "
            f"triton {machine.get('triton') or '-'} | python {machine.get('python')}"
        ),
        cut(
            f"commit {report.get('commit') or 'unknown'}{' with local changes' if report.get('dirty') else ''} | "
            f"{report['seconds']:.0f} s of {report['budget']:.0f} | {report['verdict']}"
        ),
    ]
    if report.get("rehearsal"):
        head.append("REHEARSAL: emulated kernels on a CPU at small sizes; the times and speeds below mean nothing.")
    for shown, kept in ((MAX_FAILURES, MAX_ROWS), (MAX_FAILURES, 28), (30, 24), (20, 20), (12, 12), (5, 5)):
        speed = speed_lines(report.get("rows", ()), kept)
        if speed and ceilings(report["rows"]):
            speed.insert(0, ceilings(report["rows"]))
        lines = [*head, "", *stage_lines(stages), "", *failure_lines(failures, shown)]
        if notes:
            lines += ["", *(cut(note) for note in notes[:MAX_NOTES])]
            lines += [f"and {len(notes) - MAX_NOTES} more notes in gpu-check.json"] if len(notes) > MAX_NOTES else []
        lines += ["", *speed] if speed else []
        lines += ["", cut(f"written to {report['out']}: {', '.join(report.get('files', ()))}")]
        if len(lines) <= MAX_LINES and sum(len(line) + 1 for line in lines) <= MAX_CHARS:
            break
    return "\n".join(line[:600] for line in lines[:MAX_LINES])[:MAX_CHARS]
