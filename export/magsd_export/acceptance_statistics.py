"""What the training films look like, for the runtime to hold others against: see :mod:`magsd_runtime.acceptance`.

The statistics are of all films of the run; the limits come from films that are not in the statistics. Patients are
dealt into groups by the hash of their names, each group is scored by the statistics of the other groups, and the
limits let :data:`TARGET` of all these films pass both scores. An embedding is that of a network which was trained on
the film, and so lies closer to the others than that of a new film will: only a tenth of the films that may be flagged
are flagged by the embedding, the rest by the image, which no training has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magsd.checkpoint import CheckpointInfo
from magsd.data import Record, read_manifest
from magsd_runtime.acceptance import (
    SCORES,
    Acceptance,
    Chosen,
    Limits,
    Subspace,
    embedding_descriptor,
    image_descriptor,
)
from magsd_runtime.errors import DataError, ImageError
from magsd_runtime.images import has_contrast, read_radiograph
from magsd_runtime.preprocessing import PreprocessingSpec, frame, normalize, standardize

from .sources import Source

TARGET = 0.99
GROUPS = 5
COMPONENTS = 20
FARTHER = 1.5
"""The limit ``rejected`` is the highest score of any film times this."""

EMBEDDINGS_SHARE = 10
"""One of so many flagged films is flagged by the embedding."""

MINIMUM_FILMS, MINIMUM_PATIENTS = 100, 20

Network = Callable[[NDArray[np.float32]], Mapping[str, NDArray[np.floating]]]


@dataclass(frozen=True, eq=False)
class Films:
    """Descriptors by the names of ``SCORES``, float32 (N, D), and the patient of each film. ``without_lungs``: films
    beside these in which no lungs were found. ``digest``: of the manifest."""

    descriptors: Mapping[str, NDArray[np.float32]]
    patients: tuple[str, ...]
    without_lungs: int = 0
    digest: str = ""


def acceptance_of_run(
    source: Source,
    info: CheckpointInfo,
    network: Network,
    model_sha256: str,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Acceptance | None, str]:
    """The statistics of a run's own films, or None where there are none; and in one line what came of it.

    ``network``: images float32 (N, 1, S, S) to outputs by name, with ``embedding`` (N, D).
    """
    if source.run is None or not info.config.data:
        return None, "none: the checkpoint lies in no run folder, so its films are not known"
    try:
        manifest = read_manifest(Path(info.config.data), lenient=True)
    except DataError:
        return None, "none: the run's manifest is not there"
    if manifest.digest() != info.data.get("digest"):
        return None, "none: the run's manifest has changed"
    report(f"acceptance  statistics of {len(manifest.records)} films of the run")
    films = describe_films(manifest.records, info.preprocessing, network, digest=manifest.digest())
    try:
        found = fit_acceptance(films, model_sha256)
    except DataError as error:
        return None, f"none: {error}"
    return found, in_words(found.chosen)


def in_words(chosen: Chosen) -> str:
    """One line on statistics: how many films were held against the others', and how many passed."""
    return (
        f"{chosen.accepted} of {chosen.films} films ({chosen.patients} patients) are like the others "
        f"({100 * chosen.accepted / chosen.films:.1f} %)"
    )


def describe_films(
    records: tuple[Record, ...], spec: PreprocessingSpec, network: Network, *, digest: str = ""
) -> Films:
    """Read, standardize and run each film, as the runtime will. What it cannot read or calls blank is left out."""
    images, embeddings, patients, without = [], [], [], 0
    for record in records:
        try:
            radiograph = read_radiograph(record.path)
        except ImageError:
            continue
        framing = frame(radiograph.pixels, spec)
        standardized = standardize(radiograph.pixels, spec, framing)
        if not has_contrast(radiograph) or standardized.min() == standardized.max():
            continue
        if framing.lungs_found is False:
            without += 1
            continue
        embedding = network(normalize(standardized)[np.newaxis])["embedding"][0]
        if not np.isfinite(embedding).all():
            continue
        images.append(image_descriptor(standardized, framing.lungs))
        embeddings.append(embedding_descriptor(embedding))
        patients.append(record.patient)
    stacked = {
        name: np.array(rows, np.float32).reshape(len(rows), -1) for name, rows in zip(SCORES, (images, embeddings))
    }
    return Films(stacked, tuple(patients), without, digest)


def fit_acceptance(films: Films, model_sha256: str, *, target: float = TARGET) -> Acceptance:
    """Statistics of all ``films``, and limits that let ``target`` of them pass while other patients' judge them.

    Raises
    ------
    DataError
        If there are too few films or patients, or all are alike.
    """
    count, patients = len(films.patients), len(set(films.patients))
    if count < MINIMUM_FILMS or patients < MINIMUM_PATIENTS:
        raise DataError(
            f"{count} films of {patients} patients that can be judged, expected {MINIMUM_FILMS} of {MINIMUM_PATIENTS}"
        )
    groups = patient_groups(films.patients)
    scores = {name: held_out_scores(films.descriptors[name], groups) for name in SCORES}
    limits = choose_limits(scores, films.without_lungs, target)
    passed = np.all([scores[name] <= limits[name].review for name in SCORES], axis=0)
    chosen = Chosen(
        target=target,
        films=count + films.without_lungs,
        patients=patients,
        accepted=int(passed.sum()),
        without_lungs=films.without_lungs,
        groups=GROUPS,
        digest=films.digest,
        rule=f"review: {100 * target:g} % of the run's films, each scored by the statistics of other patients' films, "
        f"pass both scores; rejected: {FARTHER:g} times the highest score of any of them",
    )
    subspaces = {name: fit_subspace(films.descriptors[name]) for name in SCORES}
    return Acceptance(subspaces, limits, chosen, model_sha256)


def patient_groups(patients: tuple[str, ...]) -> NDArray[np.int64]:
    """Group of each film, 0 to ``GROUPS - 1``, by the hash of its patient's name: int64 (N,)."""

    def group(patient: str) -> int:
        return int.from_bytes(hashlib.sha256(patient.encode("utf-8", "surrogateescape")).digest()[:8], "big") % GROUPS

    return np.array([group(patient) for patient in patients], np.int64)


def held_out_scores(descriptors: NDArray[np.float32], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each film's score by the statistics of all other groups: (N, D), (N,) -> float64 (N,)."""
    scores = np.zeros(len(descriptors))
    for group in np.unique(groups):
        own = groups == group
        if own.all():
            raise DataError("all patients fall into one group")
        space = fit_subspace(descriptors[~own])
        scores[own] = [space.score(row) for row in descriptors[own]]
    return scores


def fit_subspace(descriptors: NDArray[np.float32], components: int = COMPONENTS) -> Subspace:
    """Principal components of (N, D): at most ``components``, and no more than a fifth of the films.

    Raises
    ------
    DataError
        If the films do not differ.
    """
    values = descriptors.astype(np.float64)
    mean = values.mean(axis=0)
    _, singular, axes = np.linalg.svd(values - mean, full_matrices=False)
    variances = singular**2 / len(values)
    total = float(variances.sum())
    # directions of rounding errors would count as deviations
    kept = min(components, max(1, len(values) // 5), int((variances > 1e-9 * total).sum()))
    if kept < 1 or total < 1e-12:
        raise DataError("the films do not differ: there is nothing to measure a distance in")
    rest = max(float(variances[kept:].sum()), 1e-6 * total)
    # np.float32 first: what is scored here must be what the file will hold
    return Subspace(
        mean.astype(np.float32),
        axes[:kept].astype(np.float32),
        variances[:kept].astype(np.float32),
        float(np.float32(rest)),
    )


def choose_limits(scores: Mapping[str, NDArray[np.float64]], without_lungs: int, target: float) -> dict[str, Limits]:
    """Limits from held-out scores (N,) each; at most ``1 - target`` of all films are above any review limit.

    Films ``without_lungs`` are refused anyway and use up their part of what may be flagged.
    """
    count = len(scores["image"]) + without_lungs
    flagged = max(0, int((1 - target) * count + 1e-9) - without_lungs)
    by_embedding = flagged // EMBEDDINGS_SHARE
    limits = {}
    for name, above in (("image", flagged - by_embedding), ("embedding", by_embedding)):
        ordered = np.sort(scores[name])[::-1]
        limits[name] = Limits(float(ordered[above]), FARTHER * float(ordered[0]))
    return limits
