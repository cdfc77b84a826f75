"""Reading a field of a JSON object, or saying in one line what is wrong with it."""

from __future__ import annotations

import math
import re
from typing import Any

from .errors import ArtefactError

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Unusable(ArtefactError):
    """A field that is missing or senseless."""


def field(holder: Any, name: str, kind: type | tuple[type, ...], prefix: str = "") -> Any:
    """``holder[name]``, which must be of ``kind``; ``prefix`` says in the message where it stands.

    Raises
    ------
    Unusable
        If it is missing or of another kind.
    """
    if name not in holder:
        raise Unusable(f"{prefix}{name} is missing")
    if not isinstance(holder[name], kind):
        raise Unusable(f"{prefix}{name} is a {type(holder[name]).__name__}")
    return holder[name]


def number(holder: Any, name: str, prefix: str = "") -> float:
    """A finite number, as float. Raises as :func:`field` does, also for true and false."""
    value = field(holder, name, (int, float), prefix)
    try:
        result = float(value)
    except OverflowError:  # an integer of hundreds of digits
        result = math.inf
    if isinstance(value, bool) or not math.isfinite(result):
        raise Unusable(f"{prefix}{name} is {str(value)[:20]}, expected a finite number")
    return result


def fraction(holder: Any, name: str, prefix: str = "") -> float:
    """A number from 0 to 1."""
    value = number(holder, name, prefix)
    if not 0 <= value <= 1:
        raise Unusable(f"{prefix}{name} is {value:g}, expected 0 to 1")
    return value


def interval(holder: Any, name: str, prefix: str = "") -> tuple[float, float]:
    """``[low, high]``, two finite numbers in this order."""
    values = field(holder, name, (list, tuple), prefix)
    if len(values) != 2:
        raise Unusable(f"{prefix}{name} has {len(values)} values, expected two")
    low, high = (number({str(at): values[at]}, str(at), f"{prefix}{name}.") for at in (0, 1))
    if low > high:
        raise Unusable(f"{prefix}{name} is {low:g} to {high:g}: the first must not exceed the second")
    return low, high


def count(holder: Any, name: str, prefix: str = "") -> int:
    """A whole number, 0 or more."""
    value = field(holder, name, int, prefix)
    if isinstance(value, bool) or value < 0:
        raise Unusable(f"{prefix}{name} is {str(value)[:20]}, expected a whole number, 0 or more")
    return value


def sha256(holder: Any, name: str, prefix: str = "") -> str:
    """64 hexadecimal digits."""
    value = field(holder, name, str, prefix)
    if not _SHA256.fullmatch(value):
        raise Unusable(f"{prefix}{name} is {value[:20]!r}, expected a SHA-256: 64 hexadecimal digits")
    return value
