"""Doing the cells of a plan: `magsd train` and `magsd evaluate` as children, one cell after the other.

A child for each command: its memory goes back to the machine, and it may be killed at any time, since a training goes
on from its checkpoint. The child has the cell's lock open, so that a second run leaves the cell alone for as long as
either of them lives.
"""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from magsd.config import read_config, resolve, write_config
from magsd.data import prepare, read_manifest
from magsd.folds import load_folds, make_folds
from magsd_runtime._version import __version__
from magsd_runtime.errors import DataError
from magsd_runtime.files import sha256_file, write_json
from magsd_runtime.preprocessing import PreprocessingSpec

from .cells import (
    SCHEMA,
    SCORES,
    Cell,
    check_settings,
    held,
    holder,
    result_of,
    settings_of,
    unique,
    with_places,
    write_result,
)
from .variants import REFERENCE

MAGSD = (sys.executable, "-m", "magsd.cli")
STOP_SECONDS = 30.0
"""A child that was asked to end is killed after this long."""
FAILURES = 3
"""Cells that fail one after the other: then something is wrong with all of them."""


@dataclass(frozen=True)
class Options:
    """How to run. ``deadline``: time.monotonic() at which to end, or None; ``keep``: as in the plan."""

    out: Path
    keep: str
    threads: int | None = None
    device: str = "auto"
    batch: int = 32
    deadline: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run did. ``left``: unfinished cells, failed ones among them."""

    done: int
    failed: int
    left: int
    stopped: bool


class _OutOfTime(Exception):
    pass


def run(
    cells: Sequence[Cell],
    options: Options,
    say: Callable[[str], None],
    *,
    seconds: Callable[[Cell], float] = lambda cell: 0.0,
    left: Callable[[Sequence[Cell]], str] = lambda cells: "",
) -> Outcome:
    """Do what is not done, in order; come back to cells that another process held and left.

    ``seconds`` is about the least that a cell needs to get anywhere: with less time it is not begun.
    ``left`` says how long the given cells will take.

    Raises
    ------
    DataError
        If ``FAILURES`` cells fail in a row.
    """
    todo = [cell for cell in unique(list(cells)) if result_of(cell, options.out) is None]
    done = failed = in_a_row = 0
    begun: set[str] = set()
    with _terminated():
        progress = True
        while progress and todo:
            progress = False
            for cell in list(todo):
                if cell.key in begun:
                    continue
                if options.deadline is not None and time.monotonic() + seconds(cell) > options.deadline:
                    return Outcome(done, failed, len(todo), True)
                with held(cell.folder(options.out)) as lock:
                    if lock is None:
                        continue
                    if result_of(cell, options.out) is not None:  # by another process, meanwhile
                        todo.remove(cell)
                        continue
                    begun.add(cell.key)
                    progress = True
                    say(f"{cell.title}: begins; {len(todo)} cells left{left(todo)}")
                    started = time.monotonic()
                    try:
                        result = do_cell(cell, options, lock)
                    except _OutOfTime:
                        return Outcome(done, failed, len(todo), True)
                    except DataError as error:
                        write_json(cell.folder(options.out) / "failed.json", {"error": str(error), "time": _now()})
                        say(f"{cell.title}: FAILED: {error}")
                        failed, in_a_row = failed + 1, in_a_row + 1
                        if in_a_row >= FAILURES:
                            raise DataError(
                                f"{FAILURES} cells failed one after the other; the last: {error}"
                            ) from error
                        continue
                    todo.remove(cell)
                    done, in_a_row = done + 1, 0
                    scores = "  ".join(
                        f"{name} {value:.3f}" for name, value in result["scores"].items() if value is not None
                    )
                    say(f"{cell.title}: {scores}  ({time.monotonic() - started:.0f} s)")
    elsewhere = [cell for cell in todo if cell.key not in begun]
    for cell in elsewhere:
        say(f"{cell.title}: in the hands of {holder(cell.folder(options.out))}")
    return Outcome(done, failed, len(todo), False)


def do_cell(cell: Cell, options: Options, lock: int) -> dict[str, Any]:
    """Train and evaluate one cell, from wherever it stands; write and return its result.

    Raises
    ------
    DataError
        If a command fails; its last line is in the message, all of it in log.txt.
    UsageError
        If the folder holds a training of other settings.
    """
    folder = cell.folder(options.out)
    training, evaluation = folder / "run", folder / "evaluation"
    folds = ensure_folds(cell, options.out)
    how = ["--device", options.device, "--quiet"]
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    common = ["--data", cell.manifest.absolute(), "--fold", cell.fold, *how]
    # a training that is gone on with has its settings; the folder of the folds may have moved
    settings: list[object] = []
    resumed = (training / "config.yaml").is_file()
    if resumed:
        check_settings(cell, settings_of(resolve(read_config(training / "config.yaml"))), training)
    else:
        write_config(with_places(cell, options.out), folder / "config.yaml")
        settings = ["--config", folder / "config.yaml"]
    trained = _child(["train", "--out", training, "--resume", *common, *threads, *settings], folder, options, lock)
    if sha256_file(training / "folds.json") != sha256_file(folds):
        raise DataError(f"{training} was trained with other folds than {folds}: remove {folder}")
    evaluate = ["evaluate", training, "--out", evaluation, "--force", "--batch", options.batch, *common]
    evaluated = _child([*evaluate, "--bootstrap", 0], folder, options, lock)
    metrics = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    fold = metrics["folds"][0]
    epochs = _rows(training / f"fold{cell.fold}" / "log.csv")
    split = load_folds(folds).split(
        read_manifest(cell.manifest), cell.fold,
        validation_fraction=cell.config.validation_fraction, seed=cell.config.seed,
    )  # fmt: skip
    epochs_seconds = sum(float(row["seconds"]) for row in epochs)
    environment = json.loads((training / "environment.json").read_text(encoding="utf-8"))
    result = {
        "schema": SCHEMA, "key": cell.key, "title": cell.title, "data": cell.data, "variant": cell.variant,
        "fold": cell.fold, "seed": cell.config.seed, "folds": [cell.config.folds, cell.fold_seed],
        "folds_sha256": sha256_file(folds), "manifest_sha256": cell.digest, "settings": settings_of(cell.config),
        "classes": metrics["confusion"]["classes"],
        "scores": {name: fold[name] for name in SCORES}, "confusion": fold["confusion"],
        "images": {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)},
        "chosen_epoch": max((int(row["epoch"]) for row in epochs if int(row["best"])), default=None),
        "seconds": {
            "epochs": epochs_seconds, "evaluation": evaluated,
            # start, reading, checkpoints: known where the training was not gone on with
            "start": None if resumed else max(0.0, trained - epochs_seconds),
        },
        "notes": [note["text"] for note in metrics["notes"] if note["level"] == "warning"],
        "magsd_version": __version__, "commit": _commit(), "environment": environment, "created": _now(),
    }  # fmt: skip
    write_result(folder, result)
    _tidy(cell, options.keep, training / f"fold{cell.fold}")
    return result


def ensure_folds(cell: Cell, out: Path) -> Path:
    """The folds of the cell's data set: made by the first cell, in the same way on every machine.

    As `magsd train` makes them: near duplicates under two patient names share a fold.
    """
    path = cell.folds_file(out)
    if not path.is_file():
        manifest = read_manifest(cell.manifest)
        prepared = prepare(manifest, PreprocessingSpec())
        records, pairs = manifest.records, prepared.pairs
        together = [(records[i].patient, records[j].patient) for i, j in zip(pairs.first, pairs.second)]
        make_folds(manifest, cell.config.folds, cell.fold_seed, together=together).save(path)
    return path


def _child(arguments: Sequence[object], folder: Path, options: Options, lock: int) -> float:
    """Run one command of magsd; return its seconds. It ends with this process, or at the deadline."""
    command = [*MAGSD, *map(str, arguments)]
    started = time.monotonic()
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"{_now()} magsd {' '.join(command[len(MAGSD) :])}\n")
        log.flush()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, pass_fds=(lock,))
        try:
            limit = None if options.deadline is None else max(0.0, options.deadline - time.monotonic())
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            raise _OutOfTime from None
        finally:
            _end(child)
    if code:
        said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise DataError(f"magsd {arguments[0]} ended with exit code {code}: {said[-1][:300]} ({folder / 'log.txt'})")
    return time.monotonic() - started


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def _terminated() -> Iterator[None]:
    """A plain kill ends the child too: it becomes an exception, as Ctrl-C is one."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tidy(cell: Cell, keep: str, folder: Path) -> None:
    """Drop what is no longer needed: a checkpoint of VGG16 and its optimizer is a gigabyte."""
    if keep == "all":
        return
    (folder / "last.pt").unlink(missing_ok=True)
    (folder / "best.safetensors").unlink(missing_ok=True)
    if keep == "none" or (keep == "reference" and cell.variant != REFERENCE):
        (folder / "best.pt").unlink(missing_ok=True)


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _commit() -> str | None:
    """The commit of this checkout, ``+`` after it where files differ; None without git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return None if commit.returncode else commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
