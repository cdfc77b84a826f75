"""Running `magsd` from a benchmark, as a user would."""

from __future__ import annotations

import subprocess
import sys

from magsd_runtime.errors import DataError


def magsd(*arguments: object) -> None:
    """Run one command; what it prints besides its progress is dropped.

    Raises
    ------
    DataError
        If it fails; its own line is on stderr by then.
    """
    command = [sys.executable, "-m", "magsd.cli", *map(str, arguments)]
    print("magsd " + " ".join(command[3:]), file=sys.stderr, flush=True)
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code:
        raise DataError(f"magsd {command[3]} ended with exit code {code}; see above")
