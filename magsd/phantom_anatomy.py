"""The anatomy of :mod:`magsd.phantoms`: a frontal chest as a sum of attenuations.

Anatomical coordinates: 1 is the height of the chest, x from the midline to the image's right (the patient's
left), y downward from the base of the neck.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]


@dataclass(frozen=True)
class View:
    """The film's pixels and where the body lies on them."""

    width: int
    height: int
    scale: float  # pixels of one anatomical unit
    matrix: NDArray[np.float64]  # (2, 3): anatomical -> pixels

    @classmethod
    def draw(cls, rng: np.random.Generator, size: int) -> View:
        aspect = rng.uniform(0.84, 1.22)  # width / height
        side = size * rng.uniform(0.88, 1.12)
        width, height = round(side * aspect**0.5), round(side / aspect**0.5)
        scale = min(height / 0.96, width / 0.90) * rng.uniform(0.92, 1.08)
        angle = np.deg2rad(rng.normal(0, 2.5))
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        centre = np.array([width, height]) * (0.5 + rng.normal(0, 0.02, 2))
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

    def tapered_line(
        self, mask: NDArray[np.uint8], points: NDArray[np.float64], parts: Sequence[tuple[float, int]]
    ) -> None:
        """Draw a line through anatomical points (P, 2), each of its P - 1 parts with its own width and value."""
        ends = np.round(self.to_pixels(points) * 16).astype(np.int32)
        for one, other, (width, value) in zip(ends[:-1].tolist(), ends[1:].tolist(), parts):
            cv2.line(mask, one, other, value, max(1, round(width * self.scale)), cv2.LINE_AA, 4)

    def line(self, mask: NDArray[np.uint8], points: NDArray[np.float64], width: float, value: int = 255) -> None:
        """Draw a curve through anatomical points (P, 2), ``width`` in anatomical units."""
        curve = np.round(self.to_pixels(points) * 16).astype(np.int32)
        cv2.polylines(mask, [curve], False, value, max(1, round(width * self.scale)), cv2.LINE_AA, 4)

    def clouds(self, rng: np.random.Generator, grain: float) -> Image:
        """Smooth noise (H, W), -1 to 1, with features of ``grain`` anatomical units."""
        cells = max(2, round(self.height / (grain * self.scale))), max(2, round(self.width / (grain * self.scale)))
        field = rng.standard_normal(cells, np.float32) * np.float32(0.6)
        smooth = cv2.resize(field, (self.width, self.height), interpolation=cv2.INTER_CUBIC)
        return np.clip(np.asarray(smooth, np.float32), -1, 1)

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


def draw_chest(view: View, rng: np.random.Generator, *, turn: float) -> tuple[Image, Image]:
    """Attenuation (H, W), 0 air to about 1, and the free lung fields (H, W), 0 to 1.

    ``turn`` is how far the patient's turning moves the heart to the image's right.
    """
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

    heart = _heart(view, rng, broad, turn)
    middle = _mediastinum(view, rng, broad, turn)
    lungs = np.zeros_like(film)
    for side in (-1, 1):
        breadth = broad * (1 - 2.5 * side * turn) * rng.uniform(0.97, 1.03)
        outline = _LUNG * [breadth, tall] + rng.normal(0, 0.0035, _LUNG.shape)
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


def _ellipse(
    centre: Sequence[float], radii: Sequence[float] | NDArray[np.float64], tilt: float = 0.0
) -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = np.column_stack([np.cos(angle), np.sin(angle)]) * radii
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    return points @ turn.T + centre


def _heart(view: View, rng: np.random.Generator, broad: float, turn: float) -> Image:
    radii = np.array([0.165, 0.122]) * rng.uniform(0.86, 1.14)
    body = _ellipse((0.052 * broad + turn, rng.uniform(0.60, 0.63)), radii, rng.uniform(0.35, 0.6))
    atrium = _ellipse((-0.045 + turn, 0.60), (0.055 * rng.uniform(0.85, 1.15), 0.10))
    return view.soft(np.maximum(view.area(body), view.area(atrium)), 0.006)


def _mediastinum(view: View, rng: np.random.Generator, broad: float, turn: float) -> Image:
    """Great vessels and spine between the lungs, with the aortic knob on the image's right."""
    width = rng.uniform(0.048, 0.066) * broad
    column = [(-width, -0.3), (-width, 0.12), (-width * 1.15, 0.26), (-width * 1.05, 0.36), (-width * 1.3, 0.46)]
    other = [(0.07, 0.55), (width * 1.5, 0.44), (width * 1.35, 0.385), (width * 0.9, 0.33), (width * 0.85, 0.15)]
    points = np.array([*column, (-0.06, 0.6), (-0.05, 0.95), (0.05, 0.95), *other, (width, -0.3)])
    area = view.area(points + rng.normal(0, 0.004, points.shape) + [0.5 * turn, 0])
    radius = rng.uniform(0.032, 0.046)
    knob = view.area(_ellipse((width * 0.75 + turn, rng.uniform(0.25, 0.285)), (radius, radius * 1.15)))
    return view.soft(np.maximum(area, knob), 0.008)


def _bones(view: View, grid: tuple[Image, Image], rng: np.random.Generator, broad: float, tall: float) -> Image:
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
    bones = 0.055 * view.soft(outer, 0.0025) + 0.035 * view.soft(outer - np.minimum(inner, outer), 0.0015)
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
    bones += 0.055 * view.soft(collar, 0.003) + 0.035 * view.soft(collar - np.minimum(core, collar), 0.002)

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


def _vessels(view: View, rng: np.random.Generator, broad: float) -> Image:
    """Branches that leave each hilum and thin out: (H, W), 0 to about 0.2."""
    mask = np.zeros((view.height, view.width), np.uint8)
    for side in (-1, 1):
        branches = [
            ((side * 0.085 * broad, rng.uniform(0.38, 0.47)), angle + rng.normal(0, 0.12), 0.0105)
            for angle in np.linspace(-1.35, 1.45, 10)
        ]
        while branches:
            (x, y), angle, width = branches.pop()
            points, strengths = [(x, y)], []
            while width > 0.0012:
                angle += rng.normal(0, 0.19)
                x, y = x + 0.027 * side * math.cos(angle), y + 0.027 * math.sin(angle)
                points.append((x, y))
                strengths.append((width, int(60 + 160 * min(1.0, width / 0.009))))
                width *= rng.uniform(0.80, 0.88)
                if rng.random() < 0.26:
                    branches.append(((x, y), angle + rng.choice([-1, 1]) * rng.uniform(0.3, 0.8), width * 0.75))
            view.tapered_line(mask, np.array(points), strengths)
    return np.float32(rng.uniform(0.13, 0.20)) * view.soft(mask, 0.0018)
