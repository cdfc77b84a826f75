"""The model in the box: the bundle that is installed with magsd."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .errors import UsageError

SHIPPED = Path(__file__).parent / "shipped" / "covid-cxr"


def hash_bundle_ahead(bundle: str) -> None:
    """Begin to hash what opening ``bundle`` will hash, which takes as long as importing what judges a film.

    Of a folder that is no bundle nothing is begun, and nothing said: opening it says what is wrong.
    """
    from .files import hash_ahead
    from .graph_cache import kept_of

    folder = Path(bundle)
    try:
        manifest = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        files = [folder / name for name, facts in manifest["files"].items() if facts["size"] > _WORTH_IT]
        hash_ahead([*files, *kept_of(manifest["model"]["sha256"])])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass


_WORTH_IT = 100_000  # bytes: fewer are hashed while a thread begins


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
