"""What the pixels say against judging a film: cheap measures -> ok, review or rejected, with reasons.

    facts = measure(radiograph, framing)      numbers, the same for every site
    judge(facts, PixelRules())                limits and severities, which a site may change

Layout: the film is shrunk to 16 x 16, its greys are replaced by their ranks, and a template gives a score to each of
the 16 ways in which it may lie: turned by quarters, each mirrored or not, positive or negative. Where another way
than upright has the best score, by a margin, the film is upside down, on its side or a negative. Left and right are
not told apart: mirrored films do not score lower by enough (docs/rules.md has the figures).

The template is linear, so turning the film and turning the template are the same, and a negative has minus the score.
``benchmarks/layout_template.py`` makes it. Limits were chosen on the same patients' films; docs/rules.md has the false
alarms on other patients' films. What other scores already say is not said again: no rule asks whether the film
is one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .acceptance import Judgement, Severity, worst
from .errors import UsageError
from .fields import Unusable, number
from .images import Radiograph
from .prediction import Reason
from .preprocessing import Framing
from .rule_choices import SEVERITIES, read_choices

DEFAULT_SEVERITIES: Mapping[str, Severity] = MappingProxyType(
    {
        "blank": "rejected",
        "tiny": "review",
        "colour_photograph": "rejected",
        "cropped": "review",
        "low_contrast": "review",
        "saturated": "review",
        "inverted": "rejected",
        "polarity_contradicts_tag": "rejected",
        "upside_down": "rejected",
        "turned": "rejected",
    }
)

LAYOUT_CODES = ("inverted", "polarity_contradicts_tag", "upside_down", "turned")
"""Codes that say how the film lies; they are also why it looks unlike the films of the training."""

LAYOUT_PATH = Path(__file__).parent / "assets" / "layout.npy"
LAYOUT_SIDE = 16
_MIDDLE = 128
"""Side of the square that the layout's border is trimmed on."""

_FLAT = 24  # rows and columns with a smaller range of greys are no part of a film: borders, collimation
_ENOUGH = 16  # of _MIDDLE: what must be left after trimming
_SAMPLES = 1 << 18
_EDGE = 2  # cells of the lung mask that count as its border


@dataclass(frozen=True)
class PixelLimits:
    """Limits of the rules; which code each belongs to is in :func:`judge`.

    ``blank_spread``, ``contrast_spread``: grey levels of 255 from percentile 5 to 95 of the part that is judged.
    ``tiny_side``: pixels of its shorter side. ``aspect_low``, ``aspect_high``: width by height of the film.
    ``lungs_at_side``, ``lungs_at_end``: share of the left or right, and of the upper or lower border of the film that
    is lung. ``colour_share``: share of coloured pixels. ``saturated_share``: share of the part that is judged within 2
    levels of black or white. ``layout_score``: score of the best way to lay the film; ``layout_margin``: by how much
    it exceeds the upright one, twice that on a film of another aspect.
    """

    blank_spread: float = 10.0
    contrast_spread: float = 40.0
    tiny_side: float = 120.0
    aspect_low: float = 0.72
    aspect_high: float = 2.0
    lungs_at_side: float = 0.62
    lungs_at_end: float = 0.46
    colour_share: float = 0.1
    saturated_share: float = 0.2
    layout_score: float = 10.0
    layout_margin: float = 4.0


@dataclass(frozen=True)
class PixelRules:
    """``severity`` of each code of :data:`DEFAULT_SEVERITIES` (``ok`` switches it off), and the ``limits``."""

    severity: Mapping[str, Severity] = field(default_factory=lambda: dict(DEFAULT_SEVERITIES))
    limits: PixelLimits = PixelLimits()

    @classmethod
    def from_dict(cls, record: Any) -> PixelRules:
        """``{"severity": {code: ok, review or rejected}, "limits": {name: number}}``, each part optional.

        Raises
        ------
        UsageError
            If a field, code, severity or limit is unknown, or a limit senseless.
        """
        if not isinstance(record, dict) or set(record) - {"severity", "limits"}:
            raise UsageError("rules: pixels: expected an object with severity and limits")
        severity, limits = record.get("severity", {}), record.get("limits", {})
        chosen = read_choices(severity, dict.fromkeys(DEFAULT_SEVERITIES, SEVERITIES), "pixels.severity")
        if not isinstance(limits, dict):
            raise UsageError("rules: pixels.limits is no object of name and number")
        known = [one.name for one in fields(PixelLimits)]
        if unknown := set(limits) - set(known):
            raise UsageError(f"rules: {min(unknown)} is no limit, expected one of {', '.join(known)}")
        try:
            values = {name: number(limits, name) for name in limits}
        except Unusable as error:
            raise UsageError(f"rules: {error}") from error
        for name, value in values.items():
            if value < 0:
                raise UsageError(f"rules: {name} is {value:g}, expected 0 or more")
        return cls({**DEFAULT_SEVERITIES, **chosen}, PixelLimits(**values))

    def to_dict(self) -> dict[str, Any]:
        return {"severity": dict(self.severity), "limits": asdict(self.limits)}


@dataclass(frozen=True)
class PixelFacts:
    """What :func:`measure` finds of one film; the part that is judged is the region of its framing.

    ``spread``: grey levels from percentile 5 to 95 of that part; ``clipped``: share of it within 2 levels of black or
    white; ``side``: its shorter side in pixels. ``aspect``: width by height of the film. ``lung_fields``: 1 or 2; None
    where none were found, or nobody looked. ``at_side``, ``at_end``: share of the film's left or right, and of its
    upper or lower border, that is lung: the larger. ``colour``: share of coloured pixels. ``layout``: scores of the 16
    ways to lay it, see :func:`layout_scores`. ``tagged``: whether the file's header says which end is black.
    """

    spread: float
    clipped: float
    side: int
    aspect: float
    lung_fields: int | None
    at_side: float
    at_end: float
    colour: float
    layout: tuple[float, ...]
    tagged: bool


def measure(radiograph: Radiograph, framing: Framing) -> PixelFacts:
    """Measure a film: uint8 (H, W), any H, W >= 1, and the framing of these pixels. Nothing is raised."""
    region = framing.region
    part = radiograph.pixels[region.y0 : region.y1, region.x0 : region.x1]
    step = max(1, int(np.sqrt(part.size / _SAMPLES)))
    counts = np.bincount(part[::step, ::step].ravel(), minlength=256)
    shares = np.cumsum(counts) / counts.sum()
    low, high = np.searchsorted(shares, (0.05, 0.95))
    count, at_side, at_end = _lung_facts(framing.lungs)
    dicom = radiograph.source.get("dicom") or {}
    return PixelFacts(
        spread=float(high - low),
        clipped=float((counts[:3].sum() + counts[-3:].sum()) / counts.sum()),
        side=min(region.width, region.height),
        aspect=radiograph.width / radiograph.height,
        lung_fields=count,
        at_side=at_side,
        at_end=at_end,
        colour=float(radiograph.source.get("colour", 0.0)),
        layout=tuple(map(float, layout_scores(layout_thumbnail(radiograph.pixels), layout_template()))),
        tagged=str(dicom.get("photometric_interpretation")).startswith("MONOCHROME")
        or bool(radiograph.source.get("inverted")),
    )


def judge(facts: PixelFacts, rules: PixelRules | None = None) -> Judgement:
    """Judge a film by its facts; the reasons in the order of :data:`DEFAULT_SEVERITIES`, none of a code that is ok.

    A film that is blank has no other reason: nothing more can be said of it. Nor are lung fields counted on a film
    that lies wrongly: their network knows them upright.
    """
    rules = rules or PixelRules()
    found = [
        Reason(code, message)
        for check in _CHECKS
        for code, message in check(facts, rules.limits)
        if rules.severity[code] != "ok"
    ]
    if found and found[0].code == "blank":
        found = found[:1]
    elif any(reason.code in LAYOUT_CODES for reason in found) and _usual_aspect(facts, rules.limits):
        found = [reason for reason in found if reason.code != "cropped"]
    return Judgement(worst(rules.severity[reason.code] for reason in found), {}, tuple(found))


# ---------------------------------------------------------------- measures


def layout_thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 (H, W) -> float32 (16, 16): the film without its flat border, greys replaced by their ranks, z-scored.

    Equal greys have equal ranks; a constant film gives zeros. Of a negative it is minus that of the positive.
    """
    # Large films are thinned first: an average of every third pixel says the same in a tenth of the time
    step = max(1, min(pixels.shape) // 512)
    thinned = np.ascontiguousarray(pixels[::step, ::step])
    middle = _trimmed(np.asarray(cv2.resize(thinned, (_MIDDLE, _MIDDLE), interpolation=cv2.INTER_AREA), np.uint8))
    small = cv2.resize(middle.astype(np.float32), (LAYOUT_SIDE, LAYOUT_SIDE), interpolation=cv2.INTER_AREA).ravel()
    ordered = np.sort(small)
    ranks = np.searchsorted(ordered, small, "left") + np.searchsorted(ordered, small, "right")
    ranks = ranks - float(ranks.mean())
    scaled = ranks / max(float(ranks.std()), 1e-6)
    return scaled.reshape(LAYOUT_SIDE, LAYOUT_SIDE).astype(np.float32)


def layout_scores(thumbnail: NDArray[np.float32], template: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores float32 (16,) of a thumbnail (16, 16): how well the template (16, 16) fits when the film is turned by
    0, 90, 180, 270 degrees (counter-clockwise), then so after it was mirrored upside down; then all of the negative."""
    ways = [np.rot90(one, turns) for one in (thumbnail, thumbnail[::-1]) for turns in range(4)]
    scores = np.array([float((way * template).sum()) for way in ways], np.float32)
    return np.concatenate([scores, -scores])


@functools.lru_cache(maxsize=1)
def layout_template() -> NDArray[np.float32]:
    """The template in this package, float32 (16, 16)."""
    return np.asarray(np.load(LAYOUT_PATH, allow_pickle=False), np.float32)


def _trimmed(square: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Without the flat rows and columns at its border, twice: the second time the corners are gone as well."""
    part = square
    for _ in range(2):
        rows, columns = (np.flatnonzero(part.max(axis) - part.min(axis) > _FLAT) for axis in (1, 0))
        if len(rows) < _ENOUGH or len(columns) < _ENOUGH:
            return square
        part = np.ascontiguousarray(part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return part


def _lung_facts(lungs: NDArray[np.bool_] | None) -> tuple[int | None, float, float]:
    """Number of lung fields, and how much of the border at the sides and at the ends they take."""
    if lungs is None or not lungs.any():
        return None, 0.0, 0.0
    count = cv2.connectedComponents(lungs.astype(np.uint8), connectivity=8)[0] - 1
    left, right = lungs[:, :_EDGE].any(axis=1), lungs[:, -_EDGE:].any(axis=1)
    top, bottom = lungs[:_EDGE].any(axis=0), lungs[-_EDGE:].any(axis=0)
    return count, max(float(left.mean()), float(right.mean())), max(float(top.mean()), float(bottom.mean()))


# ---------------------------------------------------------------- rules

Found = Iterator[tuple[str, str]]


def _contrast(facts: PixelFacts, limits: PixelLimits) -> Found:
    if facts.spread < limits.blank_spread:
        yield "blank", "the image is nearly blank: there is next to nothing to judge"


def _size(facts: PixelFacts, limits: PixelLimits) -> Found:
    if facts.side < limits.tiny_side:
        yield "tiny", f"what is judged is only {facts.side} pixels wide or high: send the film at its full size"


def _colour(facts: PixelFacts, limits: PixelLimits) -> Found:
    if facts.colour > limits.colour_share:
        yield "colour_photograph", "the image is in colour, a film is grey: is it a photograph?"


def _cropped(facts: PixelFacts, limits: PixelLimits) -> Found:
    if not _usual_aspect(facts, limits):
        yield "cropped", f"the image is {facts.aspect:.2f} times as wide as high: is a part of the chest missing?"
    elif facts.lung_fields == 1:
        yield "cropped", "only one lung field was found: is one side of the chest missing, or one lung all white?"
    elif facts.at_side > limits.lungs_at_side or facts.at_end > limits.lungs_at_end:
        yield "cropped", "the lungs reach the edge of the image: is a part of the chest missing?"


def _greys(facts: PixelFacts, limits: PixelLimits) -> Found:
    if facts.spread < limits.contrast_spread:
        yield "low_contrast", f"the contrast is low: nearly all greys lie within {facts.spread:.0f} of 255 levels"
    if facts.clipped > limits.saturated_share:
        share = f"{100 * facts.clipped:.0f} %"
        yield "saturated", f"{share} of the chest is plain black or white: detail may be lost, check the window"


def _usual_aspect(facts: PixelFacts, limits: PixelLimits) -> bool:
    return limits.aspect_low <= facts.aspect <= limits.aspect_high


def _layout(facts: PixelFacts, limits: PixelLimits) -> Found:
    best = max(range(16), key=lambda way: facts.layout[way])
    # Mirrored or not: of each way the better of both, and the same for upright
    upright = max(facts.layout[0], facts.layout[6])
    # A part of a chest may look like a whole one that lies otherwise, though not by as much
    margin = limits.layout_margin if _usual_aspect(facts, limits) else 2 * limits.layout_margin
    if facts.layout[best] < limits.layout_score or facts.layout[best] - upright < margin:
        return
    if best >= 8:
        if facts.tagged:
            yield (
                "polarity_contradicts_tag",
                "it looks like a negative, with dark bone, although the header says which end of the greys is black",
            )
        else:
            yield (
                "inverted",
                "if it is a whole chest film, it is a negative, with bright lungs and dark bone: invert it",
            )
    quarters = best % 4
    if quarters % 2:
        yield "turned", "if it is a whole chest film, it is turned by 90 degrees: turn it upright"
    elif best % 8 in (2, 4):  # half a turn, or mirrored upside down
        yield "upside_down", "if it is a whole chest film, it is upside down: turn it upright"


_CHECKS: tuple[Callable[[PixelFacts, PixelLimits], Found], ...] = (
    _contrast, _size, _colour, _cropped, _greys, _layout,
)  # fmt: skip
