"""Chest-like synthetic films with known opacities: data for demonstrations and tests that show no patient.

A film is a sum of attenuations (body, lungs, heart, bones, vessels) through a tone curve, with noise.
Anatomy, pose, exposure, marks and noise are drawn without knowing the class, each from its own random
stream; the class decides only what lies in the lungs. So a film with an opacity and the same film without
differ in the opacity's pixels and in nothing else, and a network can learn nothing else from them.

Anatomical coordinates: 1 is the height of the chest, x from the midline to the image's right (the patient's
left), y downward from the base of the neck.
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

Image = NDArray[np.float32]
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
            temporary.write_bytes(cv2.imencode(".png", phantom.pixels, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1].data)
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
    view = _View.draw(pose, size)
    attenuation, lungs = _chest(view, anatomy)
    added = _opacities(view, lungs, opacity, kind)
    gamma, gain, offset = pose.uniform(0.85, 1.3), pose.uniform(0.92, 1.06), pose.uniform(0.0, 0.05)
    film = np.clip(attenuation + added, 0, None) ** np.float32(gamma) * np.float32(gain) + np.float32(offset)
    film += _film_noise(view, noise) * np.sqrt(np.clip(attenuation, 0.05, 1))
    _mark(film, marks)
    pixels = np.clip(film * 255 + 0.5, 0, 255).astype(np.uint8)
    return Phantom(pixels, _boxes(added))


@dataclass(frozen=True)
class _View:
    """The film's pixels and where the body lies on them."""

    width: int
    height: int
    scale: float  # pixels of one anatomical unit
    matrix: NDArray[np.float64]  # (2, 3): anatomical -> pixels

    @classmethod
    def draw(cls, rng: np.random.Generator, size: int) -> _View:
        aspect = rng.uniform(0.84, 1.22)  # width / height
        side = size * rng.uniform(0.88, 1.12)
        width, height = round(side * aspect**0.5), round(side / aspect**0.5)
        scale = min(height / 0.96, width / 0.86) * rng.uniform(0.94, 1.06)
        angle = np.deg2rad(rng.normal(0, 2.0))
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        centre = np.array([width, height]) * (0.5 + rng.normal(0, 0.012, 2))
        return cls(width, height, scale, np.column_stack([turn, centre - turn @ [0.0, 0.47]]))

    def to_pixels(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        return points @ self.matrix[:, :2].T + self.matrix[:, 2]

    def grid(self) -> tuple[Image, Image]:
        """Anatomical x and y of every pixel's centre."""
        inverse = np.linalg.inv(self.matrix[:, :2])
        rows, columns = np.ogrid[0 : self.height, 0 : self.width]
        dx, dy = columns - self.matrix[0, 2], rows - self.matrix[1, 2]
        x, y = (inverse[i, 0] * dx + inverse[i, 1] * dy for i in (0, 1))
        return x.astype(np.float32), y.astype(np.float32)

    def area(self, outline: NDArray[np.float64]) -> NDArray[np.uint8]:
        """A closed curve through the points (P, 2), filled: 0 or 255."""
        mask = np.zeros((self.height, self.width), np.uint8)
        curve = np.round(self.to_pixels(_smooth(outline, closed=True)) * 16).astype(np.int32)
        return np.asarray(cv2.fillPoly(mask, [curve], 255, cv2.LINE_AA, 4), np.uint8)

    def line(self, mask: NDArray[np.uint8], points: NDArray[np.float64], width: float, value: int = 255) -> None:
        """Draw a curve through anatomical points (P, 2), ``width`` in anatomical units."""
        curve = np.round(self.to_pixels(points) * 16).astype(np.int32)
        cv2.polylines(mask, [curve], False, value, max(1, round(width * self.scale)), cv2.LINE_AA, 4)

    def soft(self, mask: NDArray[np.uint8] | Image, radius: float) -> Image:
        """``mask`` (0 to 255, or float) blurred by ``radius`` anatomical units; 0 to 1 where it was uint8."""
        image = mask.astype(np.float32) / np.float32(255) if mask.dtype == np.uint8 else mask
        sigma = radius * self.scale
        return np.asarray(cv2.GaussianBlur(image, (0, 0), max(sigma, 0.3)), np.float32)

    def add_blob(self, image: Image, grid: tuple[Image, Image], centre: NDArray[np.float64], radii: Sequence[float],
                 strength: float = 1.0) -> None:  # fmt: skip
        """Add a Gaussian with ``radii`` as standard deviations, ``strength`` in the centre, cut at four of them."""
        reach = 4 * max(radii) * self.scale
        (left, top), (right, bottom) = (np.round(self.to_pixels(centre) + sign * reach).astype(int) for sign in (-1, 1))
        window = slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0))
        x, y = ((grid[i][window] - np.float32(centre[i])) / np.float32(radii[i]) for i in (0, 1))
        image[window] += np.float32(strength) * np.exp(np.float32(-0.5) * (x * x + y * y))


def _smooth(points: NDArray[np.float64], *, closed: bool) -> NDArray[np.float64]:
    """A Catmull-Rom curve through ``points`` (P, 2), eight pieces between neighbours."""
    if closed:
        p = np.concatenate([points[-1:], points, points[:2]])
    else:
        p = np.concatenate([points[:1], points, points[-1:]])
    t = np.linspace(0, 1, 8, endpoint=False)[:, None, None]
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    pieces = curve.transpose(1, 0, 2).reshape(-1, 2)
    return pieces if closed else np.concatenate([pieces, points[-1:]])


_LUNG = np.array([
    (0.060, 0.150), (0.085, 0.085), (0.140, 0.062), (0.200, 0.100), (0.258, 0.200), (0.302, 0.330),
    (0.335, 0.480), (0.354, 0.640), (0.362, 0.745), (0.364, 0.800), (0.352, 0.792), (0.300, 0.738),
    (0.230, 0.706), (0.155, 0.708), (0.095, 0.745), (0.078, 0.700), (0.074, 0.560), (0.066, 0.420), (0.060, 0.280),
])  # fmt: skip
_THORAX = np.array([(0.08, 0.20), (0.15, 0.25), (0.25, 0.30), (0.4, 0.345), (0.55, 0.37), (0.9, 0.39)])
_BODY = np.array([
    (-0.4, 0.13), (-0.06, 0.14), (0.0, 0.19), (0.05, 0.34), (0.11, 0.55), (0.2, 0.66), (0.3, 0.66), (0.42, 0.56),
    (0.54, 0.49), (0.66, 0.455), (0.8, 0.445), (1.3, 0.46),
])  # fmt: skip


def _chest(view: _View, rng: np.random.Generator) -> tuple[Image, Image]:
    """Attenuation (H, W), 0 air to about 0.95, and the free lung fields (H, W), 0 to 1."""
    grid = x, y = view.grid()
    broad, tall = rng.uniform(0.93, 1.07), rng.uniform(0.94, 1.05)
    fat = rng.uniform(0.97, 1.12)
    knots = np.linspace(-0.5, 1.5, 256)
    half = np.interp(knots, _BODY[:, 0], _BODY[:, 1] * broad * fat)
    half = np.convolve(np.pad(half, 12, "edge"), np.hanning(27)[1:-1] / np.hanning(27).sum(), "valid")
    half = np.interp(y, knots, half[: len(knots)]).astype(np.float32)
    depth = np.sqrt(np.clip(1 - (x / half) ** 2, 0, 1))
    film = np.float32(rng.uniform(0.74, 0.82)) * depth ** np.float32(0.62)
    film *= 1 + 0.10 * np.clip(y - 0.55, -0.6, 0.5)  # the belly is thicker than the shoulders

    heart = _heart(view, rng, broad)
    middle = _mediastinum(view, rng, broad)
    lungs = np.zeros_like(film)
    for side in (-1, 1):
        outline = _LUNG * [broad, tall] + rng.normal(0, 0.0035, _LUNG.shape)
        outline[8:15, 1] += (0.022 if side > 0 else -0.004) + rng.normal(0, 0.015)  # the left dome is lower
        if side > 0:
            outline[14] = outline[13] * [0.7, 1]  # the heart's apex fills the left corner
        mask = view.area(outline * [side, 1])
        inside = np.asarray(cv2.distanceTransform(mask, cv2.DIST_L2, 3), np.float32) / np.float32(view.scale)
        lungs += (1 - np.exp(-inside / np.float32(0.028))) * view.soft(mask, 0.002)
    free = lungs * (1 - 0.9 * heart) * (1 - 0.85 * middle)
    film -= np.float32(rng.uniform(0.46, 0.54)) * free
    film += 0.03 * heart + 0.02 * middle

    film += _bones(view, grid, rng, broad, tall) * np.clip(depth * 3, 0, 1)
    film += free * _vessels(view, rng, broad)
    for side in (-1, 1):
        hilum = np.array([side * 0.095, 0.42])
        view.add_blob(film, grid, hilum, (0.024, 0.045), rng.uniform(0.06, 0.11))
    if rng.random() < 0.5:
        droop = rng.uniform(0.62, 0.70)
        for side in (-1, 1):
            film += view.soft(view.area(_ellipse((side * 0.21, droop), (0.15, 0.115))), 0.012) * np.float32(0.05)
    if rng.random() < 0.6:
        bubble = _ellipse((rng.uniform(0.13, 0.2), rng.uniform(0.80, 0.83)), (rng.uniform(0.03, 0.065), 0.028))
        film -= view.soft(view.area(bubble), 0.006) * np.float32(rng.uniform(0.12, 0.22))
    return np.clip(film, 0, 1.1), free


def _ellipse(centre: Sequence[float], radii: Sequence[float], tilt: float = 0.0) -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = np.column_stack([np.cos(angle), np.sin(angle)]) * radii
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    return points @ turn.T + centre


def _heart(view: _View, rng: np.random.Generator, broad: float) -> Image:
    radii = np.array([0.165, 0.122]) * rng.uniform(0.86, 1.14)
    body = _ellipse((0.052 * broad, rng.uniform(0.60, 0.63)), radii, rng.uniform(0.35, 0.6))
    atrium = _ellipse((-0.045, 0.60), (0.055 * rng.uniform(0.85, 1.15), 0.10))
    return view.soft(np.maximum(view.area(body), view.area(atrium)), 0.006)


def _mediastinum(view: _View, rng: np.random.Generator, broad: float) -> Image:
    """Great vessels and spine between the lungs, with the aortic knob on the image's right."""
    width = rng.uniform(0.048, 0.066) * broad
    column = [(-width, -0.3), (-width, 0.12), (-width * 1.15, 0.26), (-width * 1.05, 0.36), (-width * 1.3, 0.46)]
    other = [(0.07, 0.55), (width * 1.5, 0.44), (width * 1.35, 0.385), (width * 0.9, 0.33), (width * 0.85, 0.15)]
    points = np.array([*column, (-0.06, 0.6), (-0.05, 0.95), (0.05, 0.95), *other, (width, -0.3)])
    area = view.area(points + rng.normal(0, 0.004, points.shape))
    radius = rng.uniform(0.032, 0.046)
    knob = view.area(_ellipse((width * 0.75, rng.uniform(0.25, 0.285)), (radius, radius * 1.15)))
    return view.soft(np.maximum(area, knob), 0.008)


def _bones(view: _View, grid: tuple[Image, Image], rng: np.random.Generator, broad: float, tall: float) -> Image:
    x, y = grid
    shape = (view.height, view.width)
    outer, inner = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    front = np.zeros(shape, np.uint8)
    first, spacing = rng.uniform(0.075, 0.105), rng.uniform(0.066, 0.076) * tall
    width, drop = rng.uniform(0.020, 0.027), rng.uniform(0.06, 0.11)
    for side in (-1, 1):
        for rib in range(11):
            top = first + spacing * rib + rng.normal(0, 0.003)
            s = np.linspace(0, 1, 24)
            fall = drop + 0.008 * rib + rng.normal(0, 0.004)
            bend = top - 0.022 * np.sin(np.pi * np.clip(s * 1.5, 0, 1)) + fall * s**2
            reach = np.interp(top + fall, _THORAX[:, 0], _THORAX[:, 1]) * broad
            across = 0.035 + (reach - 0.035) * np.sin(0.5 * np.pi * s) ** 0.9
            curve = np.column_stack([side * across, bend])
            view.line(outer, curve, width)
            view.line(inner, curve, width * 0.55)
            if 1 <= rib <= 7:
                tip = rng.uniform(0.14, 0.19) + 0.008 * rib
                back = reach - (reach - tip) * s
                low = top + fall + (0.10 + 0.008 * rib) * np.sin(0.5 * np.pi * s) + 0.01 * np.sin(np.pi * s)
                view.line(front, np.column_stack([side * back, low]), width * 1.25)
    bones = 0.055 * view.soft(outer, 0.0025) + 0.035 * view.soft(cv2.subtract(outer, inner), 0.0015)
    bones += 0.038 * view.soft(front, 0.004)
    bones *= 0.35 + 0.65 * np.clip((np.abs(x) - 0.03) / 0.08, 0, 1)  # hidden by the mediastinum
    bones *= 1 - 0.75 / (1 + np.exp((0.80 - y) / 0.02))  # and by the belly

    tilt = rng.normal(0, 0.012)
    collar, core = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for side in (-1, 1):
        level = rng.uniform(0.115, 0.14) + side * tilt
        points = [(0.032, 0.02), (0.10, 0.0), (0.19, -0.035), (0.29, -0.07), (0.40, -0.075), (0.47, -0.06)]
        curve = _smooth(np.array(points) * [side * broad, 1] + [0, level], closed=False)
        view.line(collar, curve, 0.030)
        view.line(core, curve, 0.018)
    bones += 0.055 * view.soft(collar, 0.003) + 0.035 * view.soft(cv2.subtract(collar, core), 0.002)

    for side in (-1, 1):
        blade = [(0.32, 0.14), (0.45, 0.12), (0.50, 0.20), (0.42, 0.36), (0.37, 0.43), (0.335, 0.30)]
        spread = rng.uniform(0.0, 0.03)
        scapula = view.area(np.array(blade) * [side * broad, 1] + [side * spread, 0])
        bones += 0.05 * view.soft(scapula, 0.003)
        joint = view.area(_ellipse((side * 0.515 * broad, 0.125), (0.062, 0.062)))
        bones += 0.10 * view.soft(joint, 0.004)

    bodies = 0.5 + 0.5 * np.tanh(4 * np.cos(2 * np.pi * (y - first) / np.float32(spacing)) + 2.5)
    spine = np.exp(-(((x / 0.038) ** 2) ** 2))
    bones += spine * (0.02 + np.float32(0.045) * bodies)
    airway = np.exp(-(((x - 0.004) / 0.017) ** 2)) / (1 + np.exp((y - 0.31) / 0.015))
    return bones - 0.13 * airway


def _vessels(view: _View, rng: np.random.Generator, broad: float) -> Image:
    """Branches that leave each hilum and thin out: (H, W), 0 to about 0.2."""
    mask = np.zeros((view.height, view.width), np.uint8)
    for side in (-1, 1):
        branches = [
            (np.array([side * 0.085 * broad, rng.uniform(0.38, 0.47)]), angle + rng.normal(0, 0.12), 0.0105)
            for angle in np.linspace(-1.35, 1.45, 10)
        ]
        while branches:
            at, angle, width = branches.pop()
            while width > 0.0012:
                angle += rng.normal(0, 0.19)
                end = at + 0.027 * np.array([side * np.cos(angle), np.sin(angle)])
                view.line(mask, np.array([at, end]), width, int(60 + 160 * min(1.0, width / 0.009)))
                at, width = end, width * rng.uniform(0.80, 0.88)
                if rng.random() < 0.26:
                    branches.append((at, angle + rng.choice([-1, 1]) * rng.uniform(0.3, 0.8), width * 0.75))
    return np.float32(rng.uniform(0.13, 0.20)) * view.soft(mask, 0.0018)


def _opacities(view: _View, lungs: Image, rng: np.random.Generator, kind: Kind) -> Image:
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
    texture = 0.84 + 0.16 * _clouds(view, rng, 0.018)
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


def _clouds(view: _View, rng: np.random.Generator, grain: float) -> Image:
    """Smooth noise (H, W), about -1 to 1, with features of ``grain`` anatomical units."""
    coarse = (max(2, round(view.width / (grain * view.scale))), max(2, round(view.height / (grain * view.scale))))
    field = rng.standard_normal((coarse[1], coarse[0]), np.float32) * np.float32(0.6)
    size = (view.width, view.height)
    return np.clip(np.asarray(cv2.resize(field, size, interpolation=cv2.INTER_CUBIC), np.float32), -1, 1)


def _boxes(added: Image, share: float = 0.35) -> tuple[tuple[int, int, int, int], ...]:
    """A box around each connected region with more than ``share`` of the strongest opacity."""
    if not added.any():
        return ()
    region = (added > share * added.max()).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(region, connectivity=8)
    least = max(20, 0.04 * stats[1:, cv2.CC_STAT_AREA].max())
    found = [tuple(int(value) for value in row[:4]) for row in stats[1:] if row[cv2.CC_STAT_AREA] >= least]
    return tuple((x, y, w, h) for x, y, w, h in found)


def _film_noise(view: _View, rng: np.random.Generator) -> Image:
    grain = rng.standard_normal((view.height, view.width), np.float32)
    grain = np.asarray(cv2.GaussianBlur(grain, (0, 0), rng.uniform(0.5, 0.9)), np.float32)
    noise = np.float32(rng.uniform(0.025, 0.055)) * grain + np.float32(0.012) * _clouds(view, rng, 0.12)
    return noise + np.float32(0.006) * _clouds(view, rng, 0.02)


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
