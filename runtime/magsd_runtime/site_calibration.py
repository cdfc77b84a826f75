"""The cases of a site: a manifest's images through a bundle's pipeline, for its calibration.

Nothing of the images is kept but their logits.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import Bundle
from .bundle_writing import check_out, write_calibrated
from .calibrating import SENSITIVITIES, Cases, calibrate, check_wanted, patients_per_class, require_enough
from .calibration_record import Calibration
from .calibration_text import format_calibration
from .errors import RESEARCH_USE, CalibrationError, DataError, MagsdError
from .manifest_csv import Line, digest, read_lines
from .pipeline import Pipeline
from .prediction import Prediction
from .prediction_sets import COVERAGE
from .uncertainty import CODES as UNCERTAIN

FAULTS = ("fault", "out_of_memory", "not_finite")
"""Reasons that lie with magsd or the machine: what is left would be no fair choice of the cases."""


@dataclass(frozen=True)
class SiteImage:
    """One image of the manifest: its name as written there, its file, label and patient."""

    name: str
    path: Path
    label: str
    patient: str


@dataclass(frozen=True)
class Site:
    """The images of a manifest, each once, and the manifest's digest."""

    images: tuple[SiteImage, ...]
    digest: str


@dataclass(frozen=True)
class Judged:
    """The cases to calibrate on, and what did not become one.

    ``refused``: name and prediction of each image that was not judged. ``unknown``: images by label, for labels that
    the model does not have. ``review``: how many images among the cases were flagged.
    """

    cases: Cases
    refused: tuple[tuple[str, Prediction], ...]
    unknown: dict[str, int]
    review: int


def read_site(path: Path) -> Site:
    """The images of the manifest CSV ``path``; several lines of one image, with a box each, count once.

    Raises
    ------
    DataError
        If it is no manifest, or lines cannot be used or contradict each other.
    """
    if path.is_dir():
        raise DataError(
            f"--data {path} is a folder, which knows no patients: expected a CSV with path,label,patient, "
            "since all counts and intervals of a calibration are by patient"
        )
    wrong: list[str] = []
    lines: dict[str, list[Line]] = {}
    for line in read_lines(path):
        if isinstance(line, str):
            wrong.append(line)
            continue
        same = lines.setdefault(os.path.abspath(path.parent / line.path), [])
        if same and (same[0].label, same[0].patient) != (line.label, line.patient):
            wrong.append(f"line {line.number}: {line.path} has another label or patient in line {same[0].number}")
        else:
            same.append(line)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(f"{path}: {'; '.join(wrong[:3])}{more}")
    if not lines:
        raise DataError(f"{path}: has a header and no line of data")
    images = tuple(
        SiteImage(same[0].path, path.parent / same[0].path, same[0].label, same[0].patient) for same in lines.values()
    )
    return Site(images, digest(path.parent, lines.values()))


def check_site(bundle: Bundle, site: Site) -> None:
    """Refuse, before any image is judged, a manifest that cannot do.

    Raises
    ------
    CalibrationError
        If the model was trained on this very manifest, or there are too few cases of a class.
    """
    training = bundle.manifest.get("training")
    data = training.get("data") if isinstance(training, dict) else None
    if isinstance(data, dict) and data.get("digest") == site.digest:
        raise CalibrationError(
            "the model was trained on this very manifest, and is surer of these images than of new ones: "
            "give cases that it has not seen (magsd export --evaluation calibrates on a run's held-out folds)"
        )
    require_enough(
        patients_per_class(
            bundle.classes, [image.label for image in site.images], [image.patient for image in site.images]
        )
    )


def judge_site(pipeline: Pipeline, site: Site, step: Callable[[], None] = lambda: None) -> Judged:
    """Run every image whose label the model has; ``step`` is called after each image.

    Raises
    ------
    MagsdError
        If the network or the machine failed on an image.
    """
    classes = pipeline.bundle.classes
    kept: list[SiteImage] = []
    logits, refused, review = [], [], 0
    for image in site.images:
        if image.label in classes:
            result = pipeline.predict(image.path, with_heat=False)
            prediction = result.prediction
            for reason in prediction.reasons:
                if reason.code in FAULTS:
                    raise MagsdError(f"{image.name}: {reason.message}: nothing was calibrated")
            if result.logits is None:
                refused.append((image.name, prediction))
            else:
                kept.append(image)
                logits.append(result.logits)
                # how sure the old calibration was of it is no fault of the image
                review += any(reason.code not in UNCERTAIN for reason in prediction.reasons)
        step()
    unknown = Counter(image.label for image in site.images if image.label not in classes)
    cases = Cases(
        classes,
        np.array(logits).reshape(-1, len(classes)),
        np.array([classes.index(image.label) for image in kept], np.int64),
        tuple(image.patient for image in kept),
        site.digest,
    )
    return Judged(cases, tuple(refused), dict(sorted(unknown.items())), review)


@dataclass(frozen=True)
class SiteCalibration:
    """What was found, and the new bundle; ``bundle`` is None where none was to be written. ``notes`` are for stderr."""

    origin: Bundle
    bundle: Bundle | None
    calibration: Calibration
    judged: Judged
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        origin = self.origin
        return {
            "bundle": None if self.bundle is None else str(self.bundle.path),
            "from": str(origin.path),
            "model": {"name": origin.name, "version": origin.version, "sha256": origin.model_sha256},
            "calibration": self.calibration.to_dict(),
            "images": len(self.judged.cases.labels),
            "refused": [
                {"path": name, "status": prediction.status, "reasons": [one.to_dict() for one in prediction.reasons]}
                for name, prediction in self.judged.refused
            ],
            "unknown_labels": self.judged.unknown,
            "review": self.judged.review,
            "notes": list(self.notes),
            "research_use_only": True,
        }

    def format(self) -> str:
        """Several lines for people."""
        written = "nothing written (--dry-run)" if self.bundle is None else f"written to {self.bundle.path}"
        head = f"{self.origin.name} {self.origin.version}, model {self.origin.model_sha256[:12]}..."
        return "\n".join([head, format_calibration(self.calibration), "", written, RESEARCH_USE])


def calibrate_site(
    pipeline: Pipeline,
    site: Site,
    out: Path | None,
    *,
    positive: str | None = None,
    sensitivities: Sequence[float] = SENSITIVITIES,
    coverage: float = COVERAGE,
    note: str = "",
    force: bool = False,
    step: Callable[[], None] = lambda: None,
) -> SiteCalibration:
    """Judge the site's images, calibrate on them, and write the bundle with the new calibration to ``out``.

    ``positive``: by default that of the bundle's calibration. ``note`` says in words where the cases are from.
    What can be refused is refused before the first image is judged.

    Raises
    ------
    CalibrationError, UsageError
        If the cases are too few, or ``out`` or another argument cannot be used. Nothing is written then.
    MagsdError
        If the network or the machine failed on an image.
    """
    bundle = pipeline.bundle
    positive = positive or bundle.calibration.positive_class
    check_wanted(bundle.classes, positive, sensitivities, coverage)
    check_site(bundle, site)
    if out is not None:
        check_out(out, force)
    judged = judge_site(pipeline, site, step)
    calibration, notes = calibrate(
        judged.cases,
        model_sha256=bundle.model_sha256,
        source="cases given to magsd calibrate" + (f": {note}" if note else ""),
        start=bundle.temperature,
        positive=positive,
        sensitivities=sensitivities,
        coverage=coverage,
    )
    written = None if out is None else write_calibrated(bundle, calibration, out, force=force)
    return SiteCalibration(bundle, written, calibration, judged, (*_left_out(judged), *notes))


def _left_out(judged: Judged) -> list[str]:
    """What did not take part and why, a line each, for stderr."""
    lines = [
        f"{name}: {prediction.status}: {'; '.join(reason.message for reason in prediction.reasons)}"
        for name, prediction in judged.refused
    ]
    if judged.refused:
        lines.append(f"{_images(len(judged.refused))} could not be judged and took no part")
    if judged.unknown:
        labels = ", ".join(f"{name} {number}" for name, number in judged.unknown.items())
        count = _images(sum(judged.unknown.values()))
        lines.append(f"{count} took no part, since the model does not have their class: {labels}")
    if judged.review:
        lines.append(f"{_images(judged.review)} flagged for review took part")
    return lines


def default_out(bundle_path: Path) -> Path:
    """``BUNDLE-calibrated``, beside the bundle: nobody's bundle changes unless its folder is named."""
    path = bundle_path.resolve()
    return path.with_name(f"{path.name}-calibrated")


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"
