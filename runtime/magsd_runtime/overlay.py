"""One picture that a clinician can read: the film, where the network looked, and what it says.

    film with heat and numbered boxes | panel: result, probabilities, regions, legend, model
    ------------------------------------------------------------------------------------
    Research use only.

The film keeps its greys where the attention is low: the heat's opacity rises from 0 with the heat.
The text is drawn in Pillow's built-in font, so that no machine lacks it; that font holds ASCII, and
other letters are written without their accents, or as a question mark.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .errors import RESEARCH_USE, MagsdError
from .files import replacing
from .images import Radiograph
from .prediction import Finding, Prediction

# Lengths in pixels of the overlay
LONG_SIDE = (720, 1024)  # smaller films are enlarged, larger ones shrunk, so that the text fits them
PANEL_WIDTH = 380
MARGIN = 22
FOOTER_HEIGHT = 38
MAX_REGIONS = 8
_STRIP = 128
# Colour as fine as grey: thin cyan boxes would smear
_JPEG = [
    cv2.IMWRITE_JPEG_QUALITY, 92,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
]  # fmt: skip

OPACITY = 0.62  # of the hottest place
COLD = 0.15  # heat below this leaves the film untouched
NOT_FINDINGS = "Colours and boxes mark regions the network attended to, not findings of a radiologist."

_Colour = tuple[int, int, int]
_BACKGROUND: _Colour = (18, 20, 24)
_TEXT: _Colour = (236, 238, 241)
_MUTED: _Colour = (158, 165, 176)
_TRACK: _Colour = (52, 57, 66)
_BAR: _Colour = (120, 170, 215)
_BOX: _Colour = (90, 225, 255)  # cyan: neither a grey of the film nor a colour of the heat
_AMBER: _Colour = (255, 190, 70)
_RED: _Colour = (255, 105, 95)

_STATUS = {
    "review": ("NEEDS REVIEW", "Do not rely on this result without a second look.", _AMBER),
    "rejected": ("REJECTED", "The network did not judge this image. There is no result.", _RED),
    "error": ("ERROR", "This image could not be judged. There is no result.", _RED),
}


def draw_overlay(radiograph: Radiograph, heat: NDArray[np.float32] | None, prediction: Prediction) -> NDArray[np.uint8]:
    """Draw film, heat, boxes and result: uint8 (h, w, 3), RGB.

    ``heat`` is (H, W) in 0 to 1, in the radiograph's pixels, or None to draw none. The film's long
    side becomes 720 to 1024 pixels, whatever the radiograph's size; boxes scale along.

    Raises
    ------
    ValueError
        If ``heat`` has another shape than the radiograph.
    """
    if heat is not None and heat.shape != radiograph.pixels.shape:
        raise ValueError(f"heat is {heat.shape}, the radiograph {radiograph.pixels.shape}: expected the same")
    long_side = max(radiograph.width, radiograph.height)
    scale = min(max(long_side, LONG_SIDE[0]), LONG_SIDE[1]) / long_side
    width, height = max(1, round(radiograph.width * scale)), max(1, round(radiograph.height * scale))
    panel = _draw_panel(radiograph, prediction, has_heat=heat is not None, least_height=height)
    canvas = np.zeros((panel.shape[0] + FOOTER_HEIGHT, max(width, 200) + PANEL_WIDTH, 3), np.uint8)
    top, left = (panel.shape[0] - height) // 2, (canvas.shape[1] - PANEL_WIDTH - width) // 2
    film = canvas[top : top + height, left : left + width]
    _colour_film(
        _resize(radiograph.pixels, width, height),
        None if heat is None else _resize(heat, width, height),
        film,
    )
    # Weakest first, so that the strongest region's number lies on top
    for number, finding in reversed(list(enumerate(prediction.findings, 1))):
        _draw_box(film, finding, number, width / radiograph.width, height / radiograph.height)
    if prediction.status in _STATUS:
        corner = (canvas.shape[1] - PANEL_WIDTH - 2, panel.shape[0] - 2)
        cv2.rectangle(canvas, (1, 1), corner, _STATUS[prediction.status][2], 3)
    canvas[: panel.shape[0], -PANEL_WIDTH:] = panel
    canvas[-FOOTER_HEIGHT:] = _draw_footer(canvas.shape[1])
    return canvas


def save_overlay(
    path: str | os.PathLike[str],
    radiograph: Radiograph,
    heat: NDArray[np.float32] | None,
    prediction: Prediction,
) -> None:
    """Write :func:`draw_overlay` as a JPEG file, whatever the suffix, in one step.

    A PNG takes three times the processor time and five times the space (docs/folders.md); the film is not read from it.
    """
    overlay = draw_overlay(radiograph, heat, prediction)
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(overlay, cv2.COLOR_RGB2BGR), _JPEG)
    if not done:
        raise MagsdError(f"OpenCV could not encode an overlay of shape {overlay.shape}")
    with replacing(path) as temporary:
        temporary.write_bytes(encoded.tobytes())


# ---------------------------------------------------------------- the film


def _resize(image: NDArray[Any], width: int, height: int) -> NDArray[Any]:
    if image.shape == (height, width):
        return image
    shrinks = width < image.shape[1]
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR))


def _colour_film(film: NDArray[np.uint8], heat: NDArray[np.float32] | None, out: NDArray[np.uint8]) -> None:
    """Blend the heat over the film: uint8 (h, w), float32 (h, w) in 0 to 1 -> ``out`` uint8 (h, w, 3)."""
    transparency, colours = _heat_tables()
    # In strips: fresh memory for whole images would take longer than the arithmetic
    for top in range(0, film.shape[0], _STRIP):
        rows = slice(top, top + _STRIP)
        if heat is None:
            out[rows] = cv2.cvtColor(film[rows], cv2.COLOR_GRAY2RGB)
            continue
        strip = np.array(heat[rows], np.float32)
        cv2.patchNaNs(strip, 0)  # no colour could show that there is no value
        np.clip(strip, 0, 1, out=strip)
        levels = cv2.convertScaleAbs(strip, alpha=255)
        dimmed = cv2.multiply(film[rows], cv2.LUT(levels, transparency), scale=1 / 255)
        hot = cv2.applyColorMap(levels, colours)
        out[rows] = cv2.add(cv2.cvtColor(dimmed, cv2.COLOR_GRAY2RGB), hot)


@lru_cache(maxsize=1)
def _heat_tables() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """By heat level: the film's share uint8 (256,), and the heat's RGB times its own share (256, 1, 3)."""
    level = np.clip((np.linspace(0, 1, 256) - COLD) / (1 - COLD), 0, 1)
    opacity = OPACITY * level * (2 - level)  # quick at first, so that a change of heat shows early
    # Inferno without its black and its pale end, which film has already
    index = (70 + level * 165).astype(np.uint8)
    inferno = np.asarray(cv2.applyColorMap(index.reshape(256, 1), cv2.COLORMAP_INFERNO))[..., ::-1]
    colours = np.rint(inferno * opacity[:, None, None]).astype(np.uint8)
    return np.rint(255 * (1 - opacity)).astype(np.uint8), colours


def _draw_box(film: NDArray[np.uint8], finding: Finding, number: int, scale_x: float, scale_y: float) -> None:
    height, width = film.shape[:2]
    box = finding.box
    x0, x1 = sorted(min(max(round(x * scale_x), 0), width - 1) for x in (box.x0, box.x1 - 1 / scale_x))
    y0, y1 = sorted(min(max(round(y * scale_y), 0), height - 1) for y in (box.y0, box.y1 - 1 / scale_y))
    cv2.rectangle(film, (x0, y0), (x1, y1), (0, 0, 0), 5)  # a dark rim, for bright film
    cv2.rectangle(film, (x0, y0), (x1, y1), _BOX, 2)
    tag = _tag(number)
    tag = tag[: min(tag.shape[0], height), : min(tag.shape[1], width)]
    # On top of the box if there is room above it, else inside its corner
    y = y0 - tag.shape[0] if y0 >= tag.shape[0] else min(y0, height - tag.shape[0])
    x = min(x0, width - tag.shape[1])
    film[y : y + tag.shape[0], x : x + tag.shape[1]] = tag


@lru_cache(maxsize=64)
def _tag(number: int) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw

    font = _font(18)
    image = Image.new("RGB", (max(24, math.ceil(font.getlength(str(number))) + 12), 24), _BOX)
    ImageDraw.Draw(image).text((image.width / 2, 12), str(number), (0, 0, 0), font, anchor="mm")
    return np.asarray(image)


# ---------------------------------------------------------------- the panel


@dataclass(frozen=True)
class _Row:
    """A strip of the panel: its height, how to draw it at a given top, and a picture that lies under that."""

    height: int
    draw: Callable[[Any, int], None]
    picture: Any = None


def _draw_panel(
    radiograph: Radiograph, prediction: Prediction, *, has_heat: bool, least_height: int
) -> NDArray[np.uint8]:
    """uint8 (h, PANEL_WIDTH, 3): the result from the top, legend and origin at the bottom."""
    from PIL import Image, ImageDraw

    result = [*_status_rows(prediction), *_result_rows(prediction)]
    if has_heat:
        result += _region_rows(prediction)
    origin = [*(_legend_rows() if has_heat else ()), *_origin_rows(radiograph, prediction)]
    needed = sum(row.height for row in result + origin) + 2 * MARGIN
    height = max(least_height, needed)
    image = Image.new("RGB", (PANEL_WIDTH, height), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    y = MARGIN
    for row in [*result, _space(height - needed), *origin]:
        if row.picture is not None:
            image.paste(row.picture, (MARGIN, y))
        row.draw(draw, y)
        y += row.height
    return np.asarray(image)


def _status_rows(prediction: Prediction) -> list[_Row]:
    if prediction.status not in _STATUS:
        return []
    title, sentence, colour = _STATUS[prediction.status]

    def draw_chip(draw: Any, y: int) -> None:
        draw.rounded_rectangle((MARGIN, y, PANEL_WIDTH - MARGIN, y + 38), 5, fill=colour)
        _write(draw, PANEL_WIDTH / 2, y + 19, title, (0, 0, 0), 22, "mm")

    rows = [_Row(50, draw_chip), *_text_rows(sentence, 16, colour, 3)]
    for reason in prediction.reasons:
        rows += _text_rows(f"- {reason.message}", 16, _TEXT, 4)
    return [*rows, _space(18)]


def _result_rows(prediction: Prediction) -> list[_Row]:
    if prediction.label is None or prediction.probability is None or prediction.probabilities is None:
        return []
    rows = _text_rows("RESULT OF THE NETWORK", 14, _MUTED, 1)
    one_line = _fitting(_drawable(prediction.label), 32, PANEL_WIDTH - 2 * MARGIN) >= len(prediction.label)
    rows += _text_rows(prediction.label, 32, _TEXT, 1) if one_line else _text_rows(prediction.label, 22, _TEXT, 4)
    rows += [*_text_rows(f"probability {_percent(prediction.probability)}", 20, _TEXT, 1), _space(16)]
    by_probability = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    for name, probability in by_probability:
        rows.append(_probability_row(name, probability, name == prediction.label))
    return [*rows, _space(12)]


def _probability_row(name: str, probability: float, is_label: bool) -> _Row:
    left, right = MARGIN, PANEL_WIDTH - MARGIN

    def draw_bar(draw: Any, y: int) -> None:
        colour = _TEXT if is_label else _MUTED
        percent = _percent(probability)
        room = right - left - _length(percent, 17) - 16
        _write(draw, left, y, _shorten(_drawable(name), 17, room), colour, 17)
        _write(draw, right, y, percent, colour, 17, "ra")
        draw.rectangle((left, y + 24, right, y + 30), fill=_TRACK)
        if probability > 0:
            end = left + max(1, round((right - left) * min(probability, 1.0)))
            draw.rectangle((left, y + 24, end, y + 30), fill=_BAR if is_label else _MUTED)

    return _Row(42, draw_bar)


def _region_rows(prediction: Prediction) -> list[_Row]:
    rows = [*_text_rows("REGIONS ATTENDED TO", 14, _MUTED, 1), _space(5)]
    findings = prediction.findings
    for number, finding in enumerate(findings[:MAX_REGIONS], 1):

        def draw_region(draw: Any, y: int, number: int = number, finding: Finding = finding) -> None:
            tag = _tag(number)
            draw.rectangle((MARGIN, y, MARGIN + tag.shape[1] - 1, y + 21), fill=_BOX)
            _write(draw, MARGIN + tag.shape[1] / 2, y + 11, str(number), (0, 0, 0), 16, "mm")
            text = f"{100 * finding.area_fraction:.1f} % of the image, peak {finding.score:.2f}"
            _write(draw, MARGIN + tag.shape[1] + 12, y + 11, text, _TEXT, 16, "lm")

        rows.append(_Row(28, draw_region))
    if len(findings) > MAX_REGIONS:
        rows += _text_rows(f"and {len(findings) - MAX_REGIONS} more", 16, _MUTED, 1)
    if not findings:
        rows += _text_rows("none above the threshold", 16, _TEXT, 1)
    return [*rows, _space(14)]


def _legend_rows() -> list[_Row]:
    def name_ends(draw: Any, y: int) -> None:
        _write(draw, MARGIN, y + 21, "less attention", _TEXT, 15)
        _write(draw, PANEL_WIDTH - MARGIN, y + 21, "more attention", _TEXT, 15, "ra")

    bar = _legend_bar(PANEL_WIDTH - 2 * MARGIN, 16)
    return [_Row(48, name_ends, bar), *_text_rows(NOT_FINDINGS, 15, _TEXT, 4), _space(14)]


@lru_cache(maxsize=1)
def _legend_bar(width: int, height: int) -> Any:
    """The heat's colours over film of a middle grey, so that they can be compared with the picture: Pillow's "RGB"."""
    from PIL import Image

    colours = np.empty((1, width, 3), np.uint8)
    _colour_film(np.full((1, width), 110, np.uint8), np.linspace(0, 1, width, dtype=np.float32)[None], colours)
    return Image.fromarray(np.repeat(colours, height, axis=0))


def _origin_rows(radiograph: Radiograph, prediction: Prediction) -> list[_Row]:
    room = PANEL_WIDTH - 2 * MARGIN
    rows = _text_rows(f"{radiograph.width} x {radiograph.height} pixels", 14, _MUTED, 1)
    model = " ".join(str(prediction.model[key]) for key in ("name", "version") if prediction.model.get(key))
    digest = str(prediction.model.get("sha256") or "")[:12]
    if model or digest:
        text = ", ".join(part for part in (f"model {model}" if model else "model", digest) if part)
        rows += _text_rows(_shorten(_drawable(text), 14, room, middle=True), 14, _MUTED, 1)
    return rows


@lru_cache(maxsize=16)
def _draw_footer(width: int) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, FOOTER_HEIGHT), (44, 36, 14))
    draw = ImageDraw.Draw(image)
    draw.text((width / 2, FOOTER_HEIGHT / 2), RESEARCH_USE, _AMBER, _font(20), anchor="mm")
    return np.asarray(image)


# ---------------------------------------------------------------- text


@lru_cache(maxsize=16)
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _space(height: int) -> _Row:
    return _Row(height, lambda draw, y: None)


def _text_rows(text: str, size: int, colour: _Colour, max_lines: int) -> list[_Row]:
    """``text`` broken into at most ``max_lines`` lines of the panel's width; the rest is an ellipsis."""

    def row(line: str) -> _Row:
        return _Row(round(size * 1.35), lambda draw, y: _write(draw, MARGIN, y, line, colour, size))

    return [row(line) for line in _wrap(_drawable(text), size, PANEL_WIDTH - 2 * MARGIN, max_lines)]


def _write(draw: Any, x: float, y: int, text: str, colour: _Colour, size: int, anchor: str = "la") -> None:
    """As ``draw.text`` does it, to the pixel, but each text is rendered once: most are on every film."""
    left = math.floor(x)
    ink, offset_x, offset_y = _written(text, size, anchor, x - left)
    draw.bitmap((left + offset_x, y + offset_y), ink, colour)


@lru_cache(maxsize=512)
def _written(text: str, size: int, anchor: str, part: float) -> tuple[Any, int, int]:
    """The ink of ``text`` at ``part`` of a pixel from the left, Pillow's "L", and where its corner lies."""
    from PIL import Image, ImageDraw

    font = _font(size)
    left, top, right, bottom = font.getbbox(text, anchor=anchor)
    left, top = math.floor(left) - 1, math.floor(top) - 1
    image = Image.new("L", (math.ceil(right) + 2 - left, math.ceil(bottom) + 2 - top))
    ImageDraw.Draw(image).text((part - left, -top), text, 255, font, anchor=anchor)
    return image, left, top


@lru_cache(maxsize=4096)
def _length(text: str, size: int) -> float:
    return _font(size).getlength(text)


def _wrap(text: str, size: int, room: float, max_lines: int) -> list[str]:
    lines: list[str] = []
    rest = text
    while rest and len(lines) < max_lines - 1:
        count = _fitting(rest, size, room)
        if count < len(rest):
            # Between words if there are any in this line, else within the word
            count = max(rest.rfind(" ", 0, count + 1), rest.rfind("_", 0, count) + 1, 0) or count
        lines.append(rest[:count].rstrip())
        rest = rest[count:].lstrip()
    return [*lines, _shorten(rest, size, room)] if rest else lines


def _shorten(text: str, size: int, room: float, *, middle: bool = False) -> str:
    """``text``, or as much of it as fits in ``room`` pixels with an ellipsis at the end or the middle."""
    if _fitting(text, size, room) == len(text):
        return text
    keep = _fitting(text, size, room - _font(size).getlength("..."))
    if not middle:
        return text[:keep].rstrip() + "..."
    while keep > 2 and _font(size).getlength(_without_middle(text, keep)) > room:
        keep -= 1
    return _without_middle(text, keep)


def _without_middle(text: str, keep: int) -> str:
    tail = keep // 2
    return text[: keep - tail] + "..." + text[len(text) - tail :]


def _fitting(text: str, size: int, room: float) -> int:
    """How many characters of ``text`` fit in ``room`` pixels, at least 1 of a text that has any."""
    low, high = min(1, len(text)), min(len(text), 400)  # no line is that long
    if len(text) == high and _length(text, size) <= room:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _length(text[:middle], size) <= room else (low, middle - 1)
    return low


@lru_cache(maxsize=512)
def _drawable(text: str) -> str:
    """``text`` in the letters of the built-in font, on one line."""
    decomposed = unicodedata.normalize("NFKD", " ".join(text.split()).replace("ß", "ss"))
    bare = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    return "".join(letter if " " <= letter <= "~" else "?" for letter in bare)


def _percent(probability: float) -> str:
    """One decimal, without the false certainty of a rounded 0 or 100."""
    if 0 < probability < 0.001:
        return "<0.1 %"
    if 0.999 < probability < 1:
        return ">99.9 %"
    return f"{100 * probability:.1f} %"
