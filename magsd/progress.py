"""Progress on stderr: a bar on a terminal, plain lines elsewhere; and lines that leave a running bar in place."""

from __future__ import annotations

import sys
from collections.abc import Callable

Update = Callable[[int, int], None]
"""Called with (done, total)."""

Progress = Callable[[str], Update | None]
"""Called with what is being done; returns how to show its progress, or None."""

Report = Callable[[str], None]
"""Called with a line for the user."""


def bar(text: str) -> Update:
    """A bar on a terminal; elsewhere one line when all is done."""

    def line(done: int, total: int) -> None:
        if done >= total:
            print(f"{text}: {total} done", file=sys.stderr, flush=True)

    return terminal_bar(text) or line


def terminal_bar(text: str) -> Update | None:
    """A bar on a terminal, for what reports lines of its own; elsewhere None."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    shown = tqdm(desc=text, leave=False, dynamic_ncols=True)

    def update(done: int, total: int) -> None:
        shown.total = total
        shown.update(done - shown.n)
        if done >= total:
            shown.close()

    return update


def say(line: str) -> None:
    """One line on stderr, above a running bar."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)


def no_bar(text: str) -> None:
    """``--quiet``."""


def silent(line: str) -> None:
    """``--quiet``."""
