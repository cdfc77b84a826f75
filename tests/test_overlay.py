"""overlay.py: untouched film where it is cold, boxes where the findings are, every word in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from magsd_runtime import overlay
from magsd_runtime.errors import RESEARCH_USE
from magsd_runtime.images import Radiograph
from magsd_runtime.overlay import FOOTER_HEIGHT, MARGIN, PANEL_WIDTH, draw_overlay, save_overlay
from magsd_runtime.prediction import Box, Finding, Prediction, Reason

CLASSES = {"pneumonia": 0.1766, "covid19": 0.823, "healthy": 0.0004}
CYAN = np.array(overlay._BOX)


def film(width: int, height: int, level: int | None = None) -> Radiograph:
    if level is not None:
        return Radiograph(np.full((height, width), level, np.uint8), {})
    y, x = np.mgrid[0:height, 0:width]
    return Radiograph(((x * 3 + y * 5) % 200 + 20).astype(np.uint8), {})


def prediction(status: str = "ok", **changes: Any) -> Prediction:
    judged = status in ("ok", "review")
    fields: dict[str, Any] = {
        "path": "folder/film.png",
        "status": status,
        "label": "covid19" if judged else None,
        "probability": 0.823 if judged else None,
        "probabilities": CLASSES if judged else None,
        "model": {"name": "small", "version": "1.2.0", "sha256": "ab" * 32},
    }
    return Prediction(**{**fields, **changes})


def region(*edges: float) -> Finding:
    return Finding(Box(*edges), score=0.9, area_fraction=0.04)


def film_area(canvas: np.ndarray, width: int, height: int) -> np.ndarray:
    """The film within the overlay: centred in what the panel and the footer leave."""
    rows, columns = canvas.shape[0] - FOOTER_HEIGHT, canvas.shape[1] - PANEL_WIDTH
    top, left = (rows - height) // 2, (columns - width) // 2
    return canvas[top : top + height, left : left + width]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written on the overlay, line by line."""
    drawn: list[str] = []
    overlay._written.cache_clear()
    overlay._draw_footer.cache_clear()
    draw_text = ImageDraw.ImageDraw.text

    def record(self: Any, xy: Any, text: str, *args: Any, **options: Any) -> None:
        drawn.append(text)
        draw_text(self, xy, text, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return drawn


# ---------------------------------------------------------------- heat


def test_cold_film_is_untouched() -> None:
    radiograph = film(1024, 800)
    for heat in (None, np.zeros((800, 1024), np.float32), np.full((800, 1024), np.nan, np.float32)):
        shown = film_area(draw_overlay(radiograph, heat, prediction()), 1024, 800)
        np.testing.assert_array_equal(shown, np.repeat(radiograph.pixels[..., None], 3, axis=2))


@pytest.mark.parametrize("level", [0, 90, 200, 255])
def test_heat_is_a_blend_whose_opacity_rises(level: int) -> None:
    ramp = np.tile(np.linspace(0, 1, 1024, dtype=np.float32), (768, 1))
    shown = film_area(draw_overlay(film(1024, 768, level), ramp, prediction()), 1024, 768)[100].astype(float)
    # Blended by hand, in floating point
    heat = np.rint(ramp[0].astype(float) * 255) / 255
    warmth = np.clip((heat - overlay.COLD) / (1 - overlay.COLD), 0, 1)
    opacity = overlay.OPACITY * (1 - (1 - warmth) ** 2)
    inferno = cv2.applyColorMap((70 + warmth * 165).astype(np.uint8)[None], cv2.COLORMAP_INFERNO)[0, :, ::-1]
    expected = (1 - opacity)[:, None] * level + opacity[:, None] * inferno
    assert np.abs(shown - expected).max() <= 2.0
    assert np.abs(shown[heat < overlay.COLD - 0.01] - level).max() == 0
    assert (np.diff(opacity) >= 0).all()
    assert opacity[-1] < 0.75, "the film must show through the hottest place"


def test_heat_outside_0_to_1_is_clipped() -> None:
    heat = np.zeros((768, 1024), np.float32)
    heat[:, :300], heat[:, 300:600], heat[:, 600:] = -7.0, 1.0, 80.0
    shown = film_area(draw_overlay(film(1024, 768, 100), heat, prediction()), 1024, 768)
    assert (shown[400, 100] == 100).all()
    np.testing.assert_array_equal(shown[400, 450], shown[400, 800])


def test_the_legend_shows_the_colours_of_the_film() -> None:
    ramp = np.tile(np.linspace(0, 1, PANEL_WIDTH - 2 * MARGIN, dtype=np.float32), (1024, 1))
    expected = np.empty((1, ramp.shape[1], 3), np.uint8)
    overlay._colour_film(np.full((1, ramp.shape[1]), 110, np.uint8), ramp[:1], expected)
    canvas = draw_overlay(film(1024, 1024), np.zeros((1024, 1024), np.float32), prediction())
    bar = canvas[:, -PANEL_WIDTH + MARGIN : -MARGIN]
    assert (bar == expected).all(axis=(1, 2)).sum() == 16


def test_heat_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the same"):
        draw_overlay(film(100, 90), np.zeros((100, 90), np.float32), prediction())


# ---------------------------------------------------------------- boxes and size


@pytest.mark.parametrize(("width", "height"), [(64, 64), (300, 200), (1024, 1024), (2000, 1500), (500, 4000)])
def test_boxes_scale_along(width: int, height: int) -> None:
    box = (0.25 * width, 0.5 * height, 0.75 * width, 0.875 * height)
    canvas = draw_overlay(film(width, height), None, prediction(findings=(region(*box),)))
    long_side = min(max(width, height, 720), 1024)
    scale = long_side / max(width, height)
    shown = film_area(canvas, round(width * scale), round(height * scale))
    marked = (shown == CYAN).all(axis=2)
    tag_rows = 24
    lower = marked[round(box[1] * scale) + tag_rows :]
    columns = np.flatnonzero(lower.any(axis=0))
    assert abs(columns[0] - box[0] * scale) <= 3
    assert abs(columns[-1] + 1 - box[2] * scale) <= 3
    rows = np.flatnonzero(marked.any(axis=1))
    assert abs(rows[-1] + 1 - box[3] * scale) <= 3
    assert abs(rows[0] + tag_rows - box[1] * scale) <= 3, "the number stands on the box"
    middle = marked[round(0.7 * height * scale), round(0.3 * width * scale) + 5 : round(0.7 * width * scale)]
    assert not middle.any(), "the box hides nothing inside"


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(64, 1500), st.integers(64, 1500)),
    corners=st.lists(st.floats(-50, 2000), min_size=4, max_size=4),
)
def test_any_shape_and_box_is_drawn(shape: tuple[int, int], corners: list[float]) -> None:
    (x0, x1), (y0, y1) = sorted(corners[:2]), sorted(corners[2:])
    found = (region(x0, y0, x1 + 1e-3, y1 + 1e-3), region(0, 0, shape[1], shape[0]))
    canvas = draw_overlay(film(shape[1], shape[0]), None, prediction(findings=found))
    scale = min(max(*shape, 720), 1024) / max(shape)
    assert canvas.dtype == np.uint8
    assert canvas.shape[1] == max(round(shape[1] * scale), 200) + PANEL_WIDTH
    assert canvas.shape[0] >= round(shape[0] * scale) + FOOTER_HEIGHT


@pytest.mark.parametrize(("width", "height"), [(64, 8000), (8000, 64), (8000, 6000)])
def test_extreme_films(width: int, height: int) -> None:
    heat = np.zeros((height, width), np.float32)
    heat[height // 2 :, width // 2 :] = 1
    found = (region(0, 0, width, height),)
    canvas = draw_overlay(film(width, height, 90), heat, prediction(findings=found))
    assert canvas.shape[1] <= 1024 + PANEL_WIDTH
    assert canvas.shape[0] <= 1100


# ---------------------------------------------------------------- words


def test_everything_is_said(words: list[str]) -> None:
    found = (region(10, 10, 60, 60), region(70, 70, 90, 90))
    draw_overlay(film(200, 200), np.zeros((200, 200), np.float32), prediction(findings=found))
    text = " ".join(words)
    for expected in (
        "probability 82.3 %",
        "less attention",
        "more attention",
        "not findings of a radiologist",
        "1",
        "2",
        "4.0 % of the image, peak 0.90",
        "200 x 200 pixels",
        "model small 1.2.0, abababababab",
        RESEARCH_USE,
    ):
        assert expected in text
    rows = [line for line in words if line in CLASSES or (line.endswith("%") and " " not in line[:-2])]
    assert rows == ["covid19", "covid19", "82.3 %", "pneumonia", "17.7 %", "healthy", "<0.1 %"]
    assert "folder" not in text
    assert "REVIEW" not in text


def test_no_region_and_many_regions(words: list[str]) -> None:
    heat = np.zeros((100, 100), np.float32)
    draw_overlay(film(100, 100), heat, prediction())
    assert "none above the threshold" in words
    words.clear()
    draw_overlay(film(100, 100), heat, prediction(findings=(region(0, 0, 50, 50),) * 11))
    assert "and 3 more" in words


@pytest.mark.parametrize(
    ("status", "title", "colour"),
    [
        ("review", "NEEDS REVIEW", overlay._AMBER),
        ("rejected", "REJECTED", overlay._RED),
        ("error", "ERROR", overlay._RED),
    ],
)
def test_status_is_shown_plainly(words: list[str], status: str, title: str, colour: tuple[int, ...]) -> None:
    reasons = (Reason("no_contrast", "all pixels have one value"),)
    canvas = draw_overlay(film(800, 800), None, prediction(status, reasons=reasons))
    assert title in words
    assert "- all pixels have one value" in words
    assert (canvas[1, 5] == colour).all()
    assert (canvas[400, 1] == colour).all()
    said = any(line.startswith("probability") for line in words)
    assert said == (status == "review"), "no result is shown where there is none"
    assert "less attention" not in words, "no legend without heat"
    assert RESEARCH_USE in words


def test_ok_has_no_frame() -> None:
    canvas = draw_overlay(film(800, 800, 77), None, prediction())
    assert (canvas[:800, :800] == 77).all()


LONG = st.text(min_size=1, max_size=120)


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(LONG, min_size=1, max_size=14, unique=True),
    path=LONG,
    message=st.text(max_size=400),
    version=LONG,
    status=st.sampled_from(["ok", "review"]),
)
def test_any_text_fits_the_panel(names: list[str], path: str, message: str, version: str, status: str) -> None:
    made = prediction(
        status,
        label=names[0],
        probability=1.0,
        probabilities=dict.fromkeys(names, 1 / len(names)),
        path=path,
        reasons=(Reason("x", message),),
        model={"name": "m", "version": version, "sha256": "f" * 64},
        findings=tuple(region(0, 0, 9, 9) for _ in range(12)),
    )
    canvas = draw_overlay(film(64, 64), np.zeros((64, 64), np.float32), made)
    panel = canvas[:-FOOTER_HEIGHT, -PANEL_WIDTH:]
    # Serifs may lean out by a pixel or two
    for edge in (panel[:, : MARGIN - 3], panel[:, -MARGIN + 3 :], panel[: MARGIN - 4], panel[-MARGIN + 8 :]):
        assert (edge == overlay._BACKGROUND).all()


def test_a_long_models_name_keeps_both_ends(words: list[str]) -> None:
    model = {"name": "study_" + "x" * 200, "version": "0001", "sha256": "f" * 64}
    draw_overlay(film(64, 64), None, prediction(model=model))
    (name,) = [line for line in words if line.startswith("model ")]
    assert name.startswith("model study_xxx")
    assert name.endswith(", ffffffffffff")
    assert "..." in name


def test_no_files_name_is_drawn(words: list[str]) -> None:
    draw_overlay(film(64, 64), None, prediction(path="ward/DOE^JOHN.dcm"))
    assert not [line for line in words if "DOE" in line or "ward" in line]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Größe", "Grosse"),
        ("pneumonía  x\ny", "pneumonia x y"),
        ("肺炎", "??"),
        ("a\x1b[0m", "a?[0m"),
        ("\udcff", "?"),
    ],
)
def test_letters_that_the_font_lacks(text: str, expected: str) -> None:
    assert overlay._drawable(text) == expected


@pytest.mark.parametrize(
    ("probability", "expected"),
    [
        (0.0, "0.0 %"),
        (1e-9, "<0.1 %"),
        (0.001, "0.1 %"),
        (0.5, "50.0 %"),
        (0.9989, "99.9 %"),
        (0.99999, ">99.9 %"),
        (1.0, "100.0 %"),
    ],
)
def test_percentages_never_claim_certainty(probability: float, expected: str) -> None:
    assert overlay._percent(probability) == expected


@settings(max_examples=100, deadline=None)
@given(text=LONG, room=st.integers(40, 400), size=st.sampled_from([14, 22, 32]), lines=st.integers(1, 4))
def test_wrapped_lines_fit_and_lose_nothing(text: str, room: int, size: int, lines: int) -> None:
    text = overlay._drawable(text)
    wrapped = overlay._wrap(text, size, room, lines)
    font = overlay._font(size)
    assert len(wrapped) <= lines
    assert all(font.getlength(line) <= room or len(line) <= 4 for line in wrapped)
    if wrapped and not wrapped[-1].endswith("..."):
        assert "".join(wrapped).replace(" ", "") == text.replace(" ", "")


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="abfgjyAW_.,%<>0189 ", min_size=1, max_size=14),
    size=st.sampled_from([14, 16, 17, 22, 32]),
    anchor=st.sampled_from(["la", "ra", "lm", "mm"]),
    x=st.sampled_from([150.0, 150.5]),
)
def test_what_is_rendered_once_looks_as_if_it_were_drawn_each_time(text: str, size: int, anchor: str, x: float) -> None:
    pictures = [Image.new("RGB", (500, 90), (18, 20, 24)) for _ in range(2)]
    ImageDraw.Draw(pictures[0]).text((x, 40), text, (1, 200, 90), overlay._font(size), anchor=anchor)
    overlay._write(ImageDraw.Draw(pictures[1]), x, 40, text, (1, 200, 90), size, anchor)
    np.testing.assert_array_equal(*map(np.asarray, pictures))


# ---------------------------------------------------------------- the file


def test_save_overlay_writes_what_is_drawn(tmp_path: Path) -> None:
    radiograph = film(300, 200)
    heat = np.tile(np.linspace(0, 1, 300, dtype=np.float32), (200, 1))
    made = prediction("review", findings=(region(30, 20, 100, 90),))
    save_overlay(tmp_path / "new" / "film_overlay.jpg", radiograph, heat, made)
    with Image.open(tmp_path / "new" / "film_overlay.jpg") as image:
        assert image.format == "JPEG"
        written, drawn = np.asarray(image).astype(float), draw_overlay(radiograph, heat, made).astype(float)
    assert written.shape == drawn.shape
    assert np.sqrt(np.mean((written - drawn) ** 2)) < 4
    # the boxes' colour stays where it was drawn: no chroma is smeared over its neighbours
    cyan = (drawn == CYAN).all(axis=-1)
    assert cyan.sum() > 200
    assert np.abs(written[cyan] - CYAN).mean() < 12
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["film_overlay.jpg"]
