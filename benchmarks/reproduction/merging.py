"""Taking over finished cells that were made elsewhere: on another machine, in another folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magsd_runtime.errors import DataError, UsageError
from magsd_runtime.files import sha256_file

from .cells import Cell, check_folds, check_settings, held, holder, read_result, unique, write_result

_RESULT = ("key", "folds_sha256", "manifest_sha256", "classes", "scores", "confusion", "images", "chosen_epoch")
"""What must agree in two results of one key; seconds, machine and date may differ."""


def merge(cells: Sequence[Cell], out: Path, sources: Sequence[Path]) -> list[str]:
    """Copy the plan's finished cells of ``sources`` to ``out``; one line for each, and one for each source.

    Everything is checked before anything is copied, and nothing that is finished in ``out`` is replaced. Results come
    with their evaluation, and with the weights that were kept.

    Raises
    ------
    UsageError
        If a source is no folder of cells.
    DataError
        If two results of one key contradict each other, or patients were dealt to other folds.
    """
    lines: list[str] = []
    chosen: dict[str, tuple[Cell, Path, dict[str, Any]]] = {}
    planned = unique(list(cells))
    there = {cell.key: (cell.folder(out), found) for cell in planned if (found := read_result(cell.folder(out)))}
    for source in sources:
        if not (source / "cells").is_dir():
            raise UsageError(f"{source} holds no cells of `reproduce.py run`")
        if source.resolve() == out.resolve():
            raise UsageError(f"{source} is --out itself")
        taken = same = 0
        for cell in planned:
            folder = cell.folder(source)
            result = read_result(folder)
            if result is None:
                continue
            check_settings(cell, result["settings"], folder)
            known = there.get(cell.key) or (chosen[cell.key][1:] if cell.key in chosen else None)
            if known is not None:
                _check_same(folder, result, *known)
                same += 1
                continue
            _check_folds_file(cell, folder, out)
            chosen[cell.key] = cell, folder, result
            taken += 1
        beside = sum(1 for _ in (source / "cells").glob("*/result.json")) - taken - same
        others = f", {beside} not of this plan left" if beside else ""
        lines.append(f"{source}: {taken} cells taken, {same} the same as had already{others}")
    check_folds({key: found for key, (_, found) in there.items()} | {key: each[2] for key, each in chosen.items()})
    for cell, folder, result in chosen.values():
        target = cell.folder(out)
        with held(target) as lock:
            if lock is None:
                raise DataError(f"{target} is in the hands of {holder(target)}: stop it, or merge later")
            _copy(cell, folder, target, out)
            write_result(target, {**result, "merged_from": str(folder)})
        lines.append(f"{cell.title}: from {folder}")
    return lines


def _check_same(folder: Path, result: dict[str, Any], other: Path, known: dict[str, Any]) -> None:
    for name in _RESULT:
        if result[name] != known[name]:
            raise DataError(
                f"{folder} and {other} are the same cell with different {name.replace('_', ' ')}: "
                "remove the one that is not to count"
            )


def _check_folds_file(cell: Cell, folder: Path, out: Path) -> None:
    folds, theirs = cell.folds_file(out), folder / "run" / "folds.json"
    try:
        same = not folds.is_file() or sha256_file(folds) == sha256_file(theirs)
    except OSError as error:
        raise DataError(f"{theirs} cannot be read ({error.strerror}): {folder} is not whole") from error
    if not same:
        raise DataError(f"{folder} was made with other folds than {folds}")


def _copy(cell: Cell, folder: Path, target: Path, out: Path) -> None:
    """Evaluation, run, and the folds where ``out`` has none; the unfinished work in ``target`` goes."""
    folds = cell.folds_file(out)
    if not folds.is_file():
        folds.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "run" / "folds.json", folds)
    for name in ("evaluation", "run"):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(folder / name, target / name, ignore=shutil.ignore_patterns(".lock"))
