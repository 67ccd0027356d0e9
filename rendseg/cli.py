"""The command ``rendseg``. ``doctor`` works with nothing but torch installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["doctor"]:
        from .doctor import report

        print(report())
        return 0
    print("usage: rendseg doctor", file=sys.stderr)
    return 2
