"""A bundle's folder is written whole, beside its place, and put there in the last step."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .bundle import MANIFEST_NAME, Bundle, load_bundle
from .calibration_record import Calibration
from .errors import UsageError
from .files import replacing_directory, sha256_file, write_json, write_text

CARD_NAME = "MODEL_CARD.md"


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in ``folder`` but ``bundle.json``: its field ``files``."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME)
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "size": path.stat().st_size}
        for path in paths
    }


def check_out(out: Path, force: bool) -> None:
    """Before the work: whether there is a bundle to replace, and room for a new one.

    Raises
    ------
    UsageError
        If ``out`` exists and is not to be replaced or is no bundle, or cannot be written.
    """
    if out.exists() or out.is_symlink():
        if not force:
            raise UsageError(f"--out {out} exists: add --force to replace the bundle, or choose another folder")
        if out.is_symlink() or not out.is_dir() or not (out / MANIFEST_NAME).is_file():
            raise UsageError(f"--out {out} is no bundle (no {MANIFEST_NAME}), so --force does not replace it")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: no folder can be made there ({error.strerror})") from error
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out}: no permission to write there")


@contextmanager
def publishing(out: Path, force: bool) -> Iterator[Path]:
    """A folder that becomes ``out`` when the block succeeds; a bundle there before is then replaced.

    A folder cannot be replaced in one step: for the moment between two renames there is none, and if
    the second fails, the old one is put back.
    """
    out = out.absolute()
    if not (force and out.exists()):
        with replacing_directory(out) as folder:
            yield folder
        return
    fresh = out.with_name(f".{out.name[:32]}.{secrets.token_hex(6)}.new")
    aside = out.with_name(f".{out.name[:32]}.{secrets.token_hex(6)}.old")
    with replacing_directory(fresh) as folder:
        yield folder
    os.rename(out, aside)
    try:
        os.rename(fresh, out)
    except OSError:
        os.rename(aside, out)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def copy_bundle(bundle: Bundle, folder: Path) -> None:
    """Copy what ``bundle`` lists into ``folder``, to be changed there: as it was when the bundle was opened.

    Raises
    ------
    BundleError
        If a file was altered since: a new list of files must not bless it.
    OSError
        If a file cannot be read or written.
    """
    for name in bundle.manifest["files"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, folder / name)
    write_json(folder / MANIFEST_NAME, bundle.manifest)
    load_bundle(folder)


def write_calibrated(bundle: Bundle, calibration: Calibration, out: Path, *, force: bool = False) -> Bundle:
    """Copy ``bundle`` to ``out`` with another calibration; nothing of ``bundle`` is touched unless it is ``out``.

    Only the files that the bundle lists are copied. What they were verified to compute stays true: golden values
    are logits, which no temperature changes. The card's section on the calibration is written anew.

    Raises
    ------
    UsageError
        As :func:`check_out`, or if the copy fails.
    BundleError
        If a file of ``bundle`` was altered meanwhile; there is no new bundle then.
    """
    from .calibration_text import with_section

    check_out(out, force)
    try:
        with publishing(out, force) as folder:
            copy_bundle(bundle, folder)
            if CARD_NAME in bundle.manifest["files"]:
                card = folder / CARD_NAME
                write_text(card, with_section(card.read_text(encoding="utf-8"), calibration))
            manifest = {**bundle.manifest, "calibration": calibration.to_dict(), "files": list_files(folder)}
            write_json(folder / MANIFEST_NAME, manifest)
            load_bundle(folder)
    except OSError as error:
        raise UsageError(f"--out {out}: the bundle cannot be copied there ({error.strerror or error})") from error
    return load_bundle(out)
