"""Errors that any room may raise, and what messages of several rooms have in common."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class RunFailed(Exception):
    """A run that stops with a message and an exit status; its run folder can be resumed."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def difference(name: str, was: Any, now: Any) -> tuple[str, str, str]:
    """Name and both values of what differs: of two mappings the first key that does."""
    while isinstance(was, dict) and isinstance(now, dict):
        key = next(k for k in [*was, *now] if was.get(k) != now.get(k))
        name, was, now = f"{name}.{key}", was.get(key), now.get(key)
    return name, f"{was!s:.200}", f"{now!s:.200}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest of those that exist, if one is near
    enough."""
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def listed(what: str, lines: Sequence[str], shown: int) -> str:
    """A message with a heading, the first lines below it, and the number of lines left out."""
    first = [f"  {line}" for line in lines[:shown]]
    more = [f"  and {len(lines) - shown:,} more"] if len(lines) > shown else []
    return "\n".join([f"{what}:", *first, *more])
