"""The model in the box: the bundle that is installed with magsd."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UsageError

SHIPPED = Path(__file__).parent / "shipped" / "covid-cxr"


def choose_bundle(named: str | None) -> str:
    """The bundle that was named on the command line, else $MAGSD_BUNDLE, else the one in the box.

    Raises
    ------
    UsageError
        If none was named and this installation has none.
    """
    chosen = named or os.environ.get("MAGSD_BUNDLE")
    if chosen:
        return chosen
    if (SHIPPED / "bundle.json").is_file():
        return str(SHIPPED)
    raise UsageError(
        "no bundle: this installation has no model of its own; name one with --bundle DIR or in MAGSD_BUNDLE "
        "(magsd train and then magsd export RUN --out DIR make one)"
    )
