"""Chest-like synthetic films with known opacities: data for demonstrations and tests that show no patient.

A film is a sum of attenuations (body, lungs, heart, bones, vessels) through a tone curve, with noise.
Anatomy, pose, exposure, marks and noise are drawn without knowing the class, each from its own random
stream; the class decides only what lies in the lungs. So a film with an opacity and the same film without
differ in the opacity's pixels and in nothing else, and a network can learn nothing else from them.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd_runtime.errors import UsageError
from magsd_runtime.files import replacing, write_text

from .phantom_anatomy import Image, View, draw_chest

Kind = Literal["healthy", "focal", "diffuse"]

CLASSES: dict[str, Kind] = {
    "healthy": "healthy",
    "opacity": "focal",
    "focal": "focal",
    "diffuse": "diffuse",
}
"""What each class shows: nothing; one or two consolidations; patches at the periphery of both lungs."""


@dataclass(frozen=True, eq=False)
class Phantom:
    """``pixels`` uint8 (H, W); ``boxes`` (x, y, w, h) in pixels around each opacity."""

    pixels: NDArray[np.uint8]
    boxes: tuple[tuple[int, int, int, int], ...]


def write_phantoms(
    folder: str | os.PathLike[str],
    *,
    n_per_class: int = 100,
    size: int = 512,
    seed: int = 0,
    classes: Sequence[str] = ("healthy", "opacity"),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write PNG films and ``manifest.csv`` (path, label, patient, source, x, y, w, h) to ``folder``.

    ``n_per_class`` images of each class of ``CLASSES``, about ``size`` pixels high and wide; three in ten
    patients have two or three images. The same arguments give the same bytes. Returns the manifest's path,
    which is written last.

    Raises
    ------
    UsageError
        If ``folder`` holds a manifest already, or an argument is out of range.
    """
    folder = Path(folder)
    unknown = [name for name in classes if name not in CLASSES]
    if unknown or len(set(classes)) < len(classes) or not classes:
        raise UsageError(f"classes are {', '.join(classes)}: expected different ones of {', '.join(CLASSES)}")
    if n_per_class < 1 or not 128 <= size <= 4096:
        raise UsageError(f"n_per_class is {n_per_class} and size {size}: expected 1 or more, and 128 to 4096")
    manifest = folder / "manifest.csv"
    if manifest.exists():
        raise UsageError(f"{folder} holds a manifest already: choose another folder, or remove it")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    plan = _plan(n_per_class, seed, classes)

    def draw(entry: tuple[int, int, str]) -> list[list[object]]:
        patient, number, label = entry
        phantom = draw_phantom(CLASSES[label], seed=seed, patient=patient, number=number, size=size)
        name = f"images/p{patient:05d}_{number}.png"
        with replacing(folder / name) as temporary:
            temporary.write_bytes(cv2.imencode(".png", phantom.pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].data)
        return [[name, label, f"p{patient:05d}", "phantom", *box] for box in phantom.boxes or [("",) * 4]]

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "label", "patient", "source", "x", "y", "w", "h"])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for done, rows in enumerate(pool.map(draw, plan), start=1):
            table.writerows(rows)
            if progress is not None:
                progress(done, len(plan))
    write_text(manifest, text.getvalue())
    return manifest


def _plan(n_per_class: int, seed: int, classes: Sequence[str]) -> list[tuple[int, int, str]]:
    """Patient, image number and class of each film; the patient numbers say nothing about the class."""
    rng = np.random.default_rng([seed, 0])
    groups = []
    for label in classes:
        left = n_per_class
        while left:
            images = min(left, int(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])))
            groups.append((label, images))
            left -= images
    order = rng.permutation(len(groups))
    return [(patient, n, groups[at][0]) for patient, at in enumerate(order) for n in range(groups[at][1])]


def draw_phantom(kind: Kind, *, seed: int, patient: int, number: int = 0, size: int = 512) -> Phantom:
    """Image ``number`` of ``patient``; the same arguments give the same pixels, whatever was drawn before."""
    anatomy, pose, marks, noise, opacity = (
        np.random.default_rng([seed, 1, patient, *more])
        for more in ([0], [1, number], [2, number], [3, number], [4, number])
    )
    view = View.draw(pose, size)
    attenuation, lungs = draw_chest(view, anatomy, turn=pose.normal(0, 0.012))
    x, y = view.grid()
    # the beam is weaker on one side of the tube (heel effect), and no detector is even
    attenuation *= 1 + np.float32(pose.normal(0, 0.16)) * x + np.float32(pose.normal(0, 0.10)) * (y - 0.5)
    attenuation *= 1 + np.float32(0.05) * view.clouds(pose, 0.25)
    added = _opacities(view, lungs, opacity, kind)
    gamma, gain, offset = pose.uniform(0.85, 1.3), pose.uniform(0.92, 1.06), pose.uniform(0.0, 0.05)
    film = np.clip(attenuation + added, 0, None) ** np.float32(gamma) * np.float32(gain) + np.float32(offset)
    film += _film_noise(view, noise) * np.sqrt(np.clip(attenuation, 0.05, 1))
    _mark(film, marks)
    pixels = np.clip(film * 255 + 0.5, 0, 255).astype(np.uint8)
    return Phantom(pixels, _boxes(added))


def _opacities(view: View, lungs: Image, rng: np.random.Generator, kind: Kind) -> Image:
    """What the opacities add (H, W): 0 outside of them and outside of the lungs, at most about 0.32."""
    total = np.zeros_like(lungs)
    if kind == "healthy":
        return total
    grid = view.grid()
    deep = cv2.distanceTransform((lungs > 0.5).astype(np.uint8), cv2.DIST_L2, 3) / view.scale
    if kind == "focal":
        places = deep > 0.05
        count, radius, strength = int(rng.choice([1, 2], p=[0.7, 0.3])), (0.026, 0.052), (0.16, 0.32)
    else:
        places = (deep > 0.015) & (deep < 0.06) & (np.abs(grid[0]) > 0.19) & (grid[1] > 0.3)
        count, radius, strength = int(rng.integers(6, 11)), (0.018, 0.032), (0.14, 0.26)
    rows, columns = np.nonzero(places)
    right = grid[0][rows, columns] > 0
    texture = 0.84 + 0.16 * view.clouds(rng, 0.018)
    for number in range(count):
        # patches of a diffuse disease alternate between the lungs
        eligible = np.flatnonzero(right == bool(number % 2)) if kind == "diffuse" else np.arange(len(rows))
        at = rng.choice(eligible)
        centre = np.array([grid[i][rows[at], columns[at]] for i in (0, 1)])
        cloud = np.zeros_like(lungs)
        for _ in range(5):
            spread = rng.uniform(*radius) * rng.uniform(0.7, 1.3, 2)
            view.add_blob(cloud, grid, centre + rng.normal(0, 0.6, 2) * spread, spread.tolist())
        np.maximum(total, np.float32(rng.uniform(*strength)) * (1 - np.exp(-1.4 * cloud)), out=total)
    total *= texture * np.clip(lungs * 1.3, 0, 1)
    return np.where(total < 0.02, 0, total).astype(np.float32)


def _boxes(added: Image, share: float = 0.35) -> tuple[tuple[int, int, int, int], ...]:
    """A box around each connected region with more than ``share`` of the strongest opacity."""
    if not added.any():
        return ()
    region = (added > share * added.max()).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(region, connectivity=8)
    least = max(20, 0.04 * stats[1:, cv2.CC_STAT_AREA].max())
    found = [tuple(int(value) for value in row[:4]) for row in stats[1:] if row[cv2.CC_STAT_AREA] >= least]
    return tuple((x, y, w, h) for x, y, w, h in found)


def _film_noise(view: View, rng: np.random.Generator) -> Image:
    grain = rng.standard_normal((view.height, view.width), np.float32)
    grain = np.asarray(cv2.GaussianBlur(grain, (0, 0), rng.uniform(0.5, 0.9)), np.float32)
    noise = np.float32(rng.uniform(0.025, 0.055)) * grain + np.float32(0.012) * view.clouds(rng, 0.12)
    return noise + np.float32(0.006) * view.clouds(rng, 0.02)


def _mark(film: Image, rng: np.random.Generator) -> None:
    """Side letter and collimator edges, as some films have them."""
    height, width = film.shape
    if rng.random() < 0.3:
        for axis, length in ((0, height), (1, width)):
            edge = rng.integers(0, max(2, length // 40), 2)
            rows = np.arange(length)
            dark = (rows < edge[0]) | (rows >= length - edge[1])
            film[(dark, slice(None)) if axis == 0 else (slice(None), dark)] = 0.015
    if rng.random() < 0.6:
        letter = str(rng.choice(["R", "L"]))
        share = rng.uniform(0.05, 0.09) if letter == "R" else rng.uniform(0.88, 0.92)
        place = (int(width * share), int(height * rng.uniform(0.10, 0.2)))
        size, strength = height / 512 * rng.uniform(0.8, 1.2), np.float32(rng.uniform(0.85, 1.0))
        mask = np.zeros(film.shape, np.uint8)
        cv2.putText(mask, letter, place, cv2.FONT_HERSHEY_SIMPLEX, size, 255, max(1, round(2 * size)), cv2.LINE_AA)
        lead = mask.astype(np.float32) / 255
        film += lead * (strength - film)
