"""Images that are no chest films, made the same way every time: what the acceptance statistics should refuse.

    for kind, name, pixels in non_films("report"):    # uint8 (H, W), 0 black to 255 white

Two halves that share nothing: ``development`` and ``report`` have other seeds and other photographs. What is chosen by
looking at such images is chosen on the first; figures come from the second.

Photographs are those that scikit-image brings; everything else is drawn here. :func:`changed` makes non-films of real
films: inverted, turned, upside down. A mirrored film is made too, but nobody can know it from the pixels of the lungs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Half = Literal["development", "report"]

PHOTOGRAPHS: dict[Half, tuple[str, ...]] = {
    "development": (
        "astronaut.png", "brick.png", "camera.png", "clock_motion.png", "grass.png", "ihc.png", "moon.png",
        "motorcycle_left.png", "page.png", "microaneurysms.png",
    ),
    "report": (
        "cell.png", "chelsea.png", "coffee.png", "coins.png", "gravel.png", "hubble_deep_field.jpg", "logo.png",
        "retina.jpg", "rocket.jpg", "text.png",
    ),
}  # fmt: skip
CROPS = 4
DRAWN = 8
"""Images of each drawn kind in each half."""

_SEEDS = {"development": 1000, "report": 2000}
_WORDS = (
    "patient", "report", "date", "of", "birth", "chest", "clinic", "findings", "no", "acute", "the", "with", "and",
    "in", "study", "normal", "page", "invoice",
)  # fmt: skip

CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "film inverted": lambda film: 255 - film,
    "film turned by 90": lambda film: np.ascontiguousarray(np.rot90(film, 1)),
    "film turned by 180": lambda film: np.ascontiguousarray(np.rot90(film, 2)),
    "film turned by 270": lambda film: np.ascontiguousarray(np.rot90(film, 3)),
    "film upside down": lambda film: np.ascontiguousarray(film[::-1]),
}


def mirrored(film: Pixels) -> Pixels:
    """Left and right exchanged."""
    return np.ascontiguousarray(film[:, ::-1])


def non_films(half: Half) -> Iterator[tuple[str, str, Pixels]]:
    """Every image of a half as (kind, name, pixels); the same in every run under the same scikit-image and OpenCV.

    Raises
    ------
    FileNotFoundError
        If the installed scikit-image lacks one of the photographs.
    """
    yield from _photographs(half)
    for number, (kind, draw) in enumerate(DRAWINGS.items()):
        for index in range(DRAWN):
            rng = np.random.default_rng([_SEEDS[half], number, index])
            yield kind, f"{kind} {index}", draw(rng, index)


def _photographs(half: Half) -> Iterator[tuple[str, str, Pixels]]:
    """Each photograph whole and in random crops, grey: every second colour picture by its green channel alone."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    for number, name in enumerate(PHOTOGRAPHS[half]):
        picture = cv2.imread(str(folder / name), cv2.IMREAD_COLOR)
        if picture is None:
            raise FileNotFoundError(f"{folder / name}: this scikit-image has no such photograph")
        grey = picture[:, :, 1] if number % 2 else cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        grey = np.ascontiguousarray(grey, np.uint8)
        yield "photograph", name, grey
        rng = np.random.default_rng([_SEEDS[half], 99, number])
        for crop in range(CROPS - 1):
            height = int(grey.shape[0] * rng.uniform(0.4, 0.8))
            width = int(grey.shape[1] * rng.uniform(0.4, 0.8))
            top = int(rng.integers(0, grey.shape[0] - height + 1))
            left = int(rng.integers(0, grey.shape[1] - width + 1))
            part = np.ascontiguousarray(grey[top : top + height, left : left + width], np.uint8)
            if min(part.shape) < 96:  # smaller than any film: the reader would refuse it for its size
                part = cv2.resize(part, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC).astype(np.uint8)
            yield "photograph", f"{name} crop {crop}", part


def _text_page(rng: np.random.Generator, index: int) -> Pixels:
    """Lines of words, dark on white; every fourth page is white on black."""
    page = np.full((1100, 800), 250, np.uint8)
    size = float(rng.uniform(0.6, 1.6))
    for y in range(80, 1040, int(36 * size + 6)):
        if rng.random() < 0.12:
            continue
        line = " ".join(str(word) for word in rng.choice(_WORDS, int(14 / size)))
        cv2.putText(page, line, (50, y), cv2.FONT_HERSHEY_SIMPLEX, size, 20, int(1 + size), cv2.LINE_AA)
    page[:, 760:] = 250
    return 255 - page if index % 4 == 3 else page


def _noise(rng: np.random.Generator, index: int) -> Pixels:
    """Noise whose amplitude falls with frequency to the power 0, 0.5, 1, 1.5, 2, 2.5, 3, 4."""
    side = 320
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    power = (0, 0.5, 1, 1.5, 2, 2.5, 3, 4)[index % 8]
    spectrum = np.fft.rfft2(rng.normal(size=(side, side))) / frequency**power
    spectrum[0, 0] = 0
    return _to_bytes(np.fft.irfft2(spectrum, s=(side, side)))


def _gradient(rng: np.random.Generator, index: int) -> Pixels:
    """A ramp at some angle, every second one radial, with a little noise."""
    y, x = np.mgrid[-1:1:300j, -1:1:260j]
    angle = rng.uniform(0, 2 * np.pi)
    field = np.hypot(x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)) if index % 2 else (
        x * np.cos(angle) + y * np.sin(angle)
    )  # fmt: skip
    return _to_bytes(field + rng.normal(0, 0.01, field.shape))


def _screenshot(rng: np.random.Generator, index: int) -> Pixels:
    """A window with bars, boxes, a plot and words."""
    screen = np.full((768, 1200), 235 if index % 2 else 35, np.uint8)
    ink = 30 if index % 2 else 225
    cv2.rectangle(screen, (0, 0), (1200, 40), 120, -1)
    cv2.rectangle(screen, (0, 40), (int(rng.integers(120, 300)), 768), 160, -1)
    for _ in range(14):
        x, y = int(rng.integers(0, 1000)), int(rng.integers(50, 700))
        w, h = int(rng.integers(60, 400)), int(rng.integers(20, 200))
        cv2.rectangle(screen, (x, y), (x + w, y + h), int(rng.integers(0, 256)), int(rng.choice([-1, 2])))
        cv2.putText(screen, str(rng.choice(_WORDS)), (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.7, ink, 1, cv2.LINE_AA)
    points = np.stack([np.linspace(350, 1100, 60), 400 + np.cumsum(rng.normal(0, 15, 60))], axis=1)
    cv2.polylines(screen, [points.astype(np.int32)], False, ink, 2)
    return screen


def _hand(rng: np.random.Generator, _: int) -> Pixels:
    """A hand film: five rows of bright bones in soft tissue on black."""
    image = np.full((640, 512), 12.0)
    cv2.ellipse(image, (256, 460), (110, 130), 0, 0, 360, 90, -1)
    for finger in range(5):
        angle = np.deg2rad(-40 + 20 * finger + rng.uniform(-4, 4))
        direction = np.array([np.sin(angle), -np.cos(angle)])
        start = np.array([256.0, 470.0]) + 60 * direction
        lengths = rng.uniform(0.85, 1.1) * np.array([110, 85, 60, 45]) * (0.75 if finger in (0, 4) else 1)
        tip = start + direction * lengths.sum()
        cv2.line(image, _point(start), _point(tip), 90, 48)
        for length in lengths:
            cv2.line(image, _point(start + 6 * direction), _point(start + (length - 6) * direction), 190, 20)
            start = start + length * direction
    cv2.ellipse(image, (256, 600), (70, 90), 0, 0, 360, 90, -1)
    cv2.rectangle(image, (205, 560), (235, 640), 195, -1)
    cv2.rectangle(image, (265, 560), (305, 640), 195, -1)
    return _film(image, rng)


def _abdomen(rng: np.random.Generator, _: int) -> Pixels:
    """An abdomen film: soft tissue, spine, pelvis, a few gas bubbles."""
    image = np.full((640, 512), 20.0)
    cv2.ellipse(image, (256, 330), (230, 420), 0, 0, 360, 120, -1)
    for y in range(0, 460, 46):
        cv2.rectangle(image, (228, y), (284, y + 36), 185, -1)
    for side in (-1, 1):
        cv2.ellipse(image, (256 + side * 105, 500), (85, 70), 20 * side, 0, 360, 190, 26)
    for _ in range(int(rng.integers(5, 12))):
        centre = (int(rng.integers(90, 420)), int(rng.integers(120, 460)))
        cv2.ellipse(image, centre, (int(rng.integers(12, 40)), int(rng.integers(10, 26))), 0, 0, 360, 55, -1)
    return _film(image, rng)


def _ct_slice(rng: np.random.Generator, index: int) -> Pixels:
    """A slice on black: an oval body with a bone ring; every second one of the chest, with two dark lungs."""
    image = np.zeros((512, 512))
    wide, high = int(rng.integers(190, 235)), int(rng.integers(130, 170))
    cv2.ellipse(image, (256, 256), (wide, high), 0, 0, 360, 140, -1)
    cv2.ellipse(image, (256, 256), (wide - 14, high - 14), 0, 0, 360, 165, 6)
    if index % 2:
        for side in (-1, 1):
            cv2.ellipse(image, (256 + side * wide // 2, 250), (wide // 3, int(high * 0.65)), 0, 0, 360, 25, -1)
        cv2.circle(image, (270, 225), 48, 175, -1)
    else:
        cv2.ellipse(image, (190, 235), (85, 75), 0, 0, 360, 170, -1)
        cv2.ellipse(image, (335, 250), (45, 40), 0, 0, 360, 60, -1)
    cv2.ellipse(image, (256, 256 + high - 50), (26, 22), 0, 0, 360, 235, -1)
    cv2.ellipse(image, (256, 470), (250, 60), 0, 200, 340, 60, 4)
    return _film(image, rng)


def _skull(rng: np.random.Generator, index: int) -> Pixels:
    """A skull from the front, or a head slice: a bright ring, with orbits or with ventricles."""
    image = np.full((600, 500), 8.0)
    axes = (int(rng.integers(150, 190)), int(rng.integers(200, 240)))
    cv2.ellipse(image, (250, 290), axes, 0, 0, 360, 110, -1)
    cv2.ellipse(image, (250, 290), axes, 0, 0, 360, 215, 18)
    if index % 2:
        for side in (-1, 1):
            cv2.ellipse(image, (250 + side * 70, 310), (42, 36), 0, 0, 360, 60, -1)
        cv2.ellipse(image, (250, 390), (22, 42), 0, 0, 360, 60, -1)
        cv2.rectangle(image, (190, 455), (310, 490), 205, -1)
    else:
        for side in (-1, 1):
            cv2.ellipse(image, (250 + side * 28, 280), (12, 60), 12 * side, 0, 360, 50, -1)
    return _film(image, rng)


def _knee(rng: np.random.Generator, _: int) -> Pixels:
    """A long bone above and one below, with a joint between, in soft tissue."""
    image = np.full((640, 400), 10.0)
    cv2.rectangle(image, (90, 0), (310, 640), 85, -1)
    shift = int(rng.integers(-20, 20))
    cv2.rectangle(image, (160 + shift, 0), (240 + shift, 260), 170, -1)
    cv2.ellipse(image, (200 + shift, 265), (85, 50), 0, 0, 360, 185, -1)
    cv2.ellipse(image, (200 + shift, 365), (88, 40), 0, 0, 360, 185, -1)
    cv2.rectangle(image, (158 + shift, 370), (238 + shift, 640), 170, -1)
    cv2.rectangle(image, (262 + shift, 400), (288 + shift, 640), 160, -1)
    return _film(image, rng)


DRAWINGS: dict[str, Callable[[np.random.Generator, int], Pixels]] = {
    "text page": _text_page,
    "noise": _noise,
    "gradient": _gradient,
    "screenshot": _screenshot,
    "drawn hand": _hand,
    "drawn abdomen": _abdomen,
    "drawn CT slice": _ct_slice,
    "drawn head": _skull,
    "drawn knee": _knee,
}


def _film(image: NDArray[np.float64], rng: np.random.Generator) -> Pixels:
    """Blurred edges, grain, and a random gamma, as a film has them."""
    smooth = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(3, 7)))
    grain = cv2.GaussianBlur(rng.normal(0, 1, image.shape), (0, 0), 1.2) * 6
    level = np.clip(smooth + grain, 0, 255) / 255
    return np.rint(255 * level ** float(rng.uniform(0.8, 1.25))).astype(np.uint8)


def _to_bytes(field: NDArray[np.float64]) -> Pixels:
    low, high = float(field.min()), float(field.max())
    return np.rint(255 * (field - low) / (high - low)).astype(np.uint8)


def _point(position: NDArray[np.float64]) -> tuple[int, int]:
    return round(float(position[0])), round(float(position[1]))
