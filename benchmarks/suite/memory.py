"""Peak of memory of every command, each as a process of its own."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magsd_runtime.bundle import load_bundle
from magsd_runtime.errors import DataError

from .context import Context
from .films import folder_of
from .processes import Job, magsd, run
from .report import Bars, Goal, Report, Table

EDGE_MB = 1200.0
"""What one command may take on a device of 2 GB: the rest is the system's, and the files' that it keeps at hand."""


@dataclass(frozen=True)
class Command:
    """``device``: whether it is one for the point of care; training is not. ``job`` is None where a part is missing,
    and ``missing`` then says which."""

    name: str
    job: Job | None
    device: bool = True
    missing: str = ""


def run_part(context: Context) -> Report:
    rows, data, skipped = [], {}, {}
    for command in commands(context):
        if command.job is None:
            skipped[command.name] = command.missing
            continue
        context.say(f"memory: {command.name}")
        try:
            done = run(command.job, context.work)
        except DataError as error:
            skipped[command.name] = str(error)
            continue
        fits = done.peak_mb <= EDGE_MB
        where = ("fits" if fits else "does not fit") if command.device else "not meant for it"
        rows.append((command.name, done.peak_mb, where, done.seconds, done.processor))
        data[command.name] = {
            "peak_mb": done.peak_mb, "seconds": done.seconds, "processor_seconds": done.processor, "code": done.code,
            "for_devices": command.device,
        }  # fmt: skip
    columns = ("command", "peak MB", f"2 GB device ({EDGE_MB:,.0f} MB)", "s", "processor s")
    bars = Bars("peak of memory", "MB", tuple((row[0], row[1], row[1]) for row in rows))
    note = (
        "Resident memory of a command's largest process: `train` and `benchmark` start others, which are not added up. "
        "The files of models and graphs are mapped, and count as far as they were read."
    )
    largest = max((name for name in data if data[name]["for_devices"]), key=lambda name: data[name]["peak_mb"])
    goal = Goal(f"the most of a command for the point of care ({largest})", EDGE_MB, "MB", data[largest]["peak_mb"])
    return Report((Table("One run each.", columns, tuple(rows)),), (goal,), (bars,), skipped=skipped,
                  notes=(note,), data=data)  # fmt: skip


def commands(context: Context) -> Iterator[Command]:
    """In an order in which each finds what those before it made."""
    quick, work = context.quick, context.work
    side, large, many = (128, 256, 4) if quick else (1024, 8000, 20)
    png, box = context.film(side), context.shipped
    may_reject = (0, 3)
    folder = folder_of(work / "films", many, side)
    big = folder_of(work / "films", 4, large)

    def device(name: str, *arguments: Any, allowed: tuple[int, ...] = (0,), **changes: str) -> Command:
        return Command(name, Job(magsd(*arguments), changes, allowed))

    yield device("magsd --help", "--help")
    yield device("doctor", "doctor")
    yield device("verify", "verify", box, MAGSD_CACHE=str(work / "graphs"))
    yield device(f"infer, PNG of {side}", "infer", png, "--json", allowed=may_reject)
    yield device(f"infer, PNG of {side}, kept graph", "infer", png, "--json", allowed=may_reject,
                 MAGSD_CACHE=str(work / "graphs"))  # fmt: skip
    yield device(f"infer, PNG of {side}, with overlay", "infer", png, "--out", work / "out-1", allowed=may_reject)
    yield device(f"infer, JPEG of {side}", "infer", context.film(side, "jpg"), "--json", allowed=may_reject)
    if importlib.util.find_spec("pydicom"):
        dicom = context.film(2 * side, "dcm")
        yield device(f"infer, DICOM of {2 * side}", "infer", dicom, "--json", allowed=may_reject)
        if importlib.util.find_spec("highdicom"):
            yield device(f"infer, DICOM of {2 * side}, --dicom-out", "infer", dicom, "--dicom-out", work / "dicom",
                         allowed=may_reject)  # fmt: skip
        else:
            yield Command("infer --dicom-out", None, missing="highdicom is not installed: pip install 'magsd[dicom]'")
    yield device(f"infer, PNG of {large}", "infer", context.film(large), "--json", allowed=may_reject)
    yield device(f"infer, PNG of {large}, with overlay", "infer", context.film(large), "--out", work / "out-2",
                 allowed=may_reject)  # fmt: skip
    yield device(f"infer, 4 PNG of {large}", "infer", big, "--json", allowed=may_reject)
    yield device(f"infer, 4 PNG of {large}, --jobs 1", "infer", big, "--json", "--jobs", 1, allowed=may_reject)
    yield device(f"infer, 4 PNG of {large}, with overlays", "infer", big, "--out", work / "out-4", allowed=may_reject)
    yield device(f"infer, {many} PNG of {side}, with overlays", "infer", folder, "--out", work / "out-3",
                 allowed=may_reject)  # fmt: skip
    for name, bundle in list(context.bundles.items())[1:]:
        yield device(f"infer, PNG of {side}, {name}", "infer", png, "--bundle", bundle, "--json", allowed=may_reject)
    yield device(f"watch --once, {many} PNG of {side}", "watch", folder, "--out", work / "watched", "--once",
                 "--settle", 0, allowed=may_reject)  # fmt: skip
    yield device("infer --audit", "infer", png, "--audit", work / "log", "--json", allowed=may_reject)
    yield device("audit verify", "audit", "verify", work / "log")
    yield device("replay", "replay", work / "log", "--input", png)
    yield device("benchmark", "benchmark", box, "--rounds", 1, "--starts", 1, "--batch", "1,8", "--backend", "cpu")
    yield device("phantoms", "phantoms", "--out", work / "phantoms", "--count", 8 if quick else 60, "--size", 256)
    yield from of_training(work, box, quick)


def of_training(work: Path, box: Path, quick: bool) -> Iterator[Command]:
    """On the phantoms that are there by now."""
    manifest, trained, bundle = work / "phantoms" / "manifest.csv", work / "trained", work / "exported"
    renamed = work / "phantoms" / "as-the-bundle-says.csv"
    if not manifest.exists():
        yield Command("calibrate, train, evaluate, export", None, missing="magsd phantoms failed, see above")
        return
    classes = load_bundle(box).classes
    write_renamed(manifest, renamed, classes)
    site = ("calibrate", box, "--data", renamed, "--out", work / "calibrated", "--positive", classes[0])
    # exit code 2: no temperature is the best for labels that mean nothing, after all films were judged
    yield Command("calibrate", Job(magsd(*site), allowed=(0, 2, 3)))
    if not importlib.util.find_spec("torch"):
        yield Command("train, evaluate, export", None, False, "torch is not installed: pip install 'magsd[train]'")
        return
    small = ("--backbone", "test_efficientnet", "--size", 64) if quick else ("--backbone", "tf_efficientnet_lite0")
    settings = ("--weights", "none", "--epochs", 1, "--folds", 2, "--fold", 0, "--batch-size", 8 if quick else 16)
    train = ("train", "--data", manifest, "--out", trained, *small, *settings, "--quiet")
    backbone = "the smallest network" if quick else "lite0, batch 16"
    yield Command(f"train, {backbone}", Job(magsd(*train)), False)
    if quick:
        return  # what is left needs torch twice more, which is half a minute
    evaluate = ("evaluate", trained, "--data", manifest, "--out", work / "report", "--quiet", "--bootstrap", 200)
    yield Command("evaluate", Job(magsd(*evaluate)), False)
    yield Command("export", Job(magsd("export", trained, "--out", bundle, "--images", 8)), False)


def write_renamed(manifest: Path, to: Path, classes: Sequence[str]) -> None:
    """The manifest of the phantoms with the model's classes instead, a patient's all the same: enough of each for
    `magsd calibrate` to do its work, of which nothing is kept."""
    with manifest.open(encoding="utf-8", newline="") as file, to.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("path", "label", "patient"))
        of_patient: dict[str, str] = {}
        for row in csv.DictReader(file):
            label = of_patient.setdefault(row["patient"], classes[len(of_patient) % len(classes)])
            writer.writerow((row["path"], label, row["patient"]))
