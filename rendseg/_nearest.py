"""The rule by which an error names the known word nearest to an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

ALIKE = 0.5  # share of the letters of both words that match in order


def nearest(word: object, known: Iterable[str], alike: float = ALIKE) -> str | None:
    """The word of ``known`` that is most like ``word``, in any case of letters; ``None`` where none is like it."""
    words = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), words, n=1, cutoff=alike)
    return words[close[0]] if close else None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """``"; did you mean ...?"`` for the end of a message, or nothing."""
    close = nearest(word, known)
    return "" if close is None else f"; did you mean {close!r}?"
