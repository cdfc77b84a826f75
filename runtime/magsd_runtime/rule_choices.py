"""What a rules file chooses for a code: read in one way, wherever the code belongs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import UsageError

SEVERITIES = ("ok", "review", "rejected")


def read_choices(record: Any, allowed: Mapping[str, Sequence[str]], part: str) -> dict[str, Any]:
    """``record``, an object of code and choice, checked; ``allowed``: the choices of each code; ``part``: its name.

    Raises
    ------
    UsageError
        One line: it is no object, or which code or choice is unknown.
    """
    if not isinstance(record, dict):
        raise UsageError(f"rules: {part} is no object of code and severity")
    for code, chosen in record.items():
        if code not in allowed:
            raise UsageError(f"rules: {short(code)} is no code, expected one of {', '.join(allowed)}")
        *others, last = allowed[code]
        if chosen not in allowed[code]:
            raise UsageError(f"rules: {code} is {short(chosen)}, expected {', '.join(others)} or {last}")
    return record


def short(value: Any) -> str:
    """A value as a message quotes it: on one line, 40 characters at most."""
    return ascii(value)[:40]
