"""What pixels say against judging a film: each rule on both of its sides, measures against slow references."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from drawn_film import drawn_film
from magsd.phantoms import write_phantoms
from magsd_runtime import images, pixel_rules
from magsd_runtime.errors import UsageError
from magsd_runtime.images import Radiograph, read_radiograph
from magsd_runtime.lungs import packaged_sha256
from magsd_runtime.pixel_rules import DEFAULT_SEVERITIES, PixelFacts, PixelLimits, PixelRules, judge, measure
from magsd_runtime.preprocessing import Framing, PreprocessingSpec, Region, frame

Pixels = np.ndarray
WITH_LUNGS = PreprocessingSpec(crop="lungs", crop_margin=0.06, lungs_sha256=packaged_sha256())


def whole(pixels: Pixels, lungs: Pixels | None = None) -> Framing:
    height, width = pixels.shape
    return Framing(width, height, Region(0, 0, width, height), lungs)


def codes(pixels: Pixels, source: dict | None = None, rules: PixelRules | None = None, **limits: float) -> list[str]:
    facts = measure(Radiograph(pixels, source or {}), whole(pixels))
    rules = rules or PixelRules(limits=PixelLimits(**limits))
    return [reason.code for reason in judge(facts, rules).reasons]


def real_films(cxr: Path, count: int = 24) -> list[Pixels]:
    """Every so-manieth film of the table, of all its sources."""
    with open(cxr / "dataset_b.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [read_radiograph(cxr / row["path"]).pixels for row in rows[:: len(rows) // count][:count]]


# ---------------------------------------------------------------- nothing against a good film


@pytest.mark.parametrize("seed", range(8))
def test_a_drawn_film_passes(seed: int) -> None:
    assert codes(drawn_film(seed)) == []


def test_phantoms_pass(tmp_path: Path) -> None:
    write_phantoms(tmp_path, n_per_class=8, size=256, seed=3)
    films = sorted(tmp_path.rglob("*.png"))
    assert len(films) == 16
    assert [codes(read_radiograph(film).pixels) for film in films] == [[]] * 16


def test_real_films_pass_and_the_same_spoiled_are_named(cxr: Path) -> None:
    spoiled: dict[str, Callable[[Pixels], Pixels]] = {
        "inverted": lambda film: 255 - film,
        "turned": lambda film: np.ascontiguousarray(np.rot90(film)),
        "upside_down": lambda film: np.ascontiguousarray(film[::-1]),
        "low_contrast": lambda film: (110 + film.astype(int) * 20 // 255).astype(np.uint8),
    }
    films = real_films(cxr)
    assert sum(bool(codes(film)) for film in films) <= 1
    for code, change in spoiled.items():
        assert sum(code in codes(change(film)) for film in films) >= 22, code


def test_lungs_at_the_edge_and_half_a_chest(cxr: Path) -> None:
    films = real_films(cxr, 12)

    def cropped(film: Pixels) -> bool:
        found = judge(measure(Radiograph(film, {}), frame(film, WITH_LUNGS)))
        return any(reason.code == "cropped" for reason in found.reasons)

    assert sum(map(cropped, films)) <= 1
    halves = [np.ascontiguousarray(film[:, : film.shape[1] // 2]) for film in films]
    assert sum(map(cropped, halves)) == 12
    middles = [
        np.ascontiguousarray(film[film.shape[0] // 4 : -film.shape[0] // 4, film.shape[1] // 4 : -film.shape[1] // 4])
        for film in films
    ]
    assert sum(map(cropped, middles)) >= 10


def test_the_negative_of_the_real_dicom_is_named_and_the_film_is_not(cxr: Path) -> None:
    pytest.importorskip("pydicom")
    positive = read_radiograph(cxr / "originals/1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm")
    negative = read_radiograph(cxr / "originals/Fake_MONOHR1.dcm")
    assert codes(positive.pixels, positive.source) == []
    assert codes(negative.pixels, negative.source) == ["polarity_contradicts_tag"]


# ---------------------------------------------------------------- each rule, both sides


def facts_of(**changed: object) -> PixelFacts:
    film = drawn_film()
    return replace(measure(Radiograph(film, {}), whole(film)), **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "field", "good", "bad"),
    [
        ("blank", "spread", 41.0, 9.0),
        ("low_contrast", "spread", 40.0, 39.0),
        ("tiny", "side", 120, 119),
        ("colour_photograph", "colour", 0.1, 0.11),
        ("cropped", "aspect", 0.72, 0.71),
        ("cropped", "aspect", 2.0, 2.01),
        ("cropped", "lung_fields", 2, 1),
        ("cropped", "lung_fields", None, 1),
        ("cropped", "at_side", 0.62, 0.63),
        ("cropped", "at_end", 0.46, 0.47),
        ("saturated", "clipped", 0.2, 0.21),
    ],
)
def test_the_limit_is_where_it_says(code: str, field: str, good: object, bad: object) -> None:
    assert judge(facts_of(**{field: good})).reasons == ()
    found = judge(facts_of(**{field: bad}))
    assert [reason.code for reason in found.reasons] == [code]
    assert found.status == DEFAULT_SEVERITIES[code]
    assert found.reasons[0].message.isprintable()
    switched_off = PixelRules({**DEFAULT_SEVERITIES, "blank": "ok", "low_contrast": "ok", code: "ok"})
    assert judge(facts_of(**{field: bad}), switched_off).reasons == ()


def layout(way: int, best: float, upright: float) -> tuple[float, ...]:
    scores = [0.0] * 16
    scores[0], scores[way] = upright, best
    return tuple(scores)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (1, ["turned"]), (2, ["upside_down"]), (3, ["turned"]), (4, ["upside_down"]), (5, ["turned"]), (6, []),
        (7, ["turned"]), (8, ["inverted"]), (9, ["inverted", "turned"]), (10, ["inverted", "upside_down"]),
        (12, ["inverted", "upside_down"]), (14, ["inverted"]), (15, ["inverted", "turned"]),
    ],
)  # fmt: skip
def test_each_way_to_lie_has_its_name(way: int, expected: list[str]) -> None:
    def named(best: float, upright: float, *, tagged: bool = False) -> list[str]:
        found = judge(facts_of(layout=layout(way, best, upright), tagged=tagged))
        return [reason.code for reason in found.reasons]

    assert named(14.0, 5.0) == expected
    assert named(9.9, -20.0) == []  # like a chest no way
    assert named(14.0, 10.1) == []  # hardly better than upright
    with_tag = ["polarity_contradicts_tag" if code == "inverted" else code for code in expected]
    assert named(14.0, 5.0, tagged=True) == with_tag


def test_lung_fields_are_not_counted_on_a_film_that_lies_wrongly() -> None:
    wrong = layout(2, 14.0, 5.0)
    assert [r.code for r in judge(facts_of(layout=wrong, lung_fields=1)).reasons] == ["upside_down"]
    off = PixelRules({**DEFAULT_SEVERITIES, "upside_down": "ok"})
    assert [r.code for r in judge(facts_of(layout=wrong, lung_fields=1), off).reasons] == ["cropped"]
    # half a chest may look like a whole one that lies otherwise: twice the margin is asked for
    far = layout(2, 14.0, 6.1)
    assert [r.code for r in judge(facts_of(layout=far)).reasons] == ["upside_down"]
    assert [r.code for r in judge(facts_of(layout=far, aspect=0.5)).reasons] == ["cropped"]
    assert [r.code for r in judge(facts_of(layout=wrong, aspect=0.5)).reasons] == ["cropped", "upside_down"]


def test_a_drawn_film_that_is_turned_or_inverted_is_named() -> None:
    film = drawn_film()
    assert codes(255 - film) == ["inverted"]
    assert codes(255 - film, {"inverted": True}) == ["polarity_contradicts_tag"]
    assert codes(255 - film, {"dicom": {"photometric_interpretation": "MONOCHROME2"}}) == ["polarity_contradicts_tag"]
    assert codes(255 - film, {"dicom": {"photometric_interpretation": "RGB"}}) == ["inverted"]
    assert codes(np.rot90(film)) == codes(np.rot90(film, 3)) == ["turned"]
    assert codes(np.rot90(film, 2)) == codes(film[::-1]) == ["upside_down"]
    assert codes(film[:, ::-1]) == []  # nobody can know


def test_blank_says_nothing_else() -> None:
    assert codes(np.full((70, 300), 9, np.uint8)) == ["blank"]


def test_colour_is_of_the_file(tmp_path: Path) -> None:
    film = drawn_film()
    grey = np.dstack([film] * 3)
    painted = np.asarray(cv2.applyColorMap(film, cv2.COLORMAP_JET))
    marked = grey.copy()
    marked[:12, :40] = (0, 0, 255)  # a coloured mark in a corner
    for name, pixels, expected in (
        ("film.png", film, None), ("grey.png", grey, 0.0), ("grey.jpg", grey, 0.0), ("painted.png", painted, 0.9),
        ("marked.png", marked, 0.019),
    ):  # fmt: skip
        cv2.imwrite(str(tmp_path / name), pixels)
        read = read_radiograph(tmp_path / name)
        assert read.source.get("colour") == (expected if not expected else pytest.approx(expected, abs=0.1))
        assert codes(read.pixels, read.source).count("colour_photograph") == (name == "painted.png")
    see_through = np.dstack([painted, np.zeros(film.shape, np.uint8)])
    cv2.imwrite(str(tmp_path / "clear.png"), see_through)
    assert read_radiograph(tmp_path / "clear.png").source["colour"] == 0


def test_colour_of_dicom(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    import dicom_film

    film = drawn_film()
    painted = np.asarray(cv2.applyColorMap(film, cv2.COLORMAP_JET))
    for pixels, coloured in ((painted, True), (np.dstack([film] * 3), False)):
        dataset = dicom_film.film(
            SOPClassUID="1.2.840.10008.5.1.4.1.1.7", Modality="OT", SamplesPerPixel=3, PlanarConfiguration=0,
            PhotometricInterpretation="RGB", BitsAllocated=8, BitsStored=8, HighBit=7, Rows=film.shape[0],
            Columns=film.shape[1],
        )  # fmt: skip
        dataset.PixelData = pixels.tobytes()
        path = tmp_path / "colour.dcm"
        dataset.save_as(path)
        read = read_radiograph(path)
        assert (read.source["colour"] > 0.5) == coloured
        assert ("colour_photograph" in codes(read.pixels, read.source)) == coloured


# ---------------------------------------------------------------- measures against slow references


def test_spread_and_clipped_against_a_slow_count() -> None:
    rng = np.random.default_rng(2)
    film = np.clip(rng.normal(120, 70, (90, 110)), 0, 255).astype(np.uint8)
    framing = Framing(110, 90, Region(10, 20, 100, 80), None)
    facts = measure(Radiograph(film, {}), framing)
    values = sorted(int(value) for row in film[20:80] for value in row[10:100])
    low, high = (values[math.ceil(share * len(values)) - 1] for share in (0.05, 0.95))
    assert facts.spread == high - low
    assert facts.clipped == sum(value <= 2 or value >= 253 for value in values) / len(values)
    assert facts.side == 60
    assert facts.aspect == 110 / 90


def test_lung_fields_against_hand_made_masks() -> None:
    film = drawn_film()

    def found(*boxes: tuple[int, int, int, int]) -> tuple[int | None, float, float]:
        lungs = np.zeros((128, 128), bool)
        for top, bottom, left, right in boxes:
            lungs[top:bottom, left:right] = True
        facts = measure(Radiograph(film, {}), whole(film, lungs))
        return facts.lung_fields, facts.at_side, facts.at_end

    assert found() == (None, 0, 0)
    assert found((20, 100, 20, 50), (20, 100, 70, 100)) == (2, 0, 0)
    assert found((20, 84, 0, 50), (20, 100, 70, 127)) == (2, 80 / 128, 0)  # the outermost two columns count
    assert found((1, 100, 20, 50)) == (1, 0, 30 / 128)
    assert found((20, 128, 20, 60)) == (1, 0, 40 / 128)


def test_layout_scores_against_a_loop() -> None:
    rng = np.random.default_rng(4)
    film, template = rng.normal(0, 1, (2, 16, 16)).astype(np.float32)
    expected = []
    for sign in (1, -1):
        for mirrored in (False, True):
            for turns in range(4):
                total = 0.0
                for row in range(16):
                    for column in range(16):
                        y, x = row, column
                        for _ in range(turns):  # where a quarter turn counter-clockwise takes the grey from
                            y, x = x, 15 - y
                        total += sign * float(film[15 - y if mirrored else y, x]) * float(template[row, column])
                expected.append(total)
    assert pixel_rules.layout_scores(film, template) == pytest.approx(expected, abs=1e-3)


def test_the_thumbnail_is_of_ranks_and_of_what_is_within_the_border() -> None:
    film = drawn_film(height=320, width=320)
    thumbnail = pixel_rules.layout_thumbnail(film)
    assert thumbnail.mean() == pytest.approx(0, abs=1e-5)
    assert thumbnail.std() == pytest.approx(1, abs=1e-5)
    darker = (film.astype(float) / 255) ** 2 * 200  # any window that keeps the order of the greys
    assert np.corrcoef(pixel_rules.layout_thumbnail(darker.astype(np.uint8)).ravel(), thumbnail.ravel())[0, 1] > 0.98
    assert np.corrcoef(pixel_rules.layout_thumbnail(255 - film).ravel(), thumbnail.ravel())[0, 1] < -0.999
    framed = np.asarray(cv2.copyMakeBorder(film, 120, 10, 60, 200, cv2.BORDER_CONSTANT, value=0), np.uint8)
    assert np.corrcoef(pixel_rules.layout_thumbnail(framed).ravel(), thumbnail.ravel())[0, 1] > 0.95


def test_a_large_film_is_measured_like_a_small_one() -> None:
    film = drawn_film(height=400, width=400)
    large = np.asarray(cv2.resize(film, (3000, 3000), interpolation=cv2.INTER_CUBIC), np.uint8)
    small, big = (measure(Radiograph(pixels, {}), whole(pixels)) for pixels in (film, large))
    assert big.spread == pytest.approx(small.spread, abs=4)
    assert big.layout == pytest.approx(small.layout, abs=1)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_no_picture_makes_it_raise(data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70))
    wide = data.draw(st.booleans())
    kind = np.uint16 if wide else np.uint8
    pixels = data.draw(hnp.arrays(kind, shape, elements=st.integers(0, 65535 if wide else 255), fill=st.just(7)))
    grey = images._to_8_bits(pixels, "film")[0] if wide else pixels
    lungs = data.draw(st.none() | hnp.arrays(bool, (128, 128), elements=st.booleans(), fill=st.booleans()))
    facts = measure(Radiograph(grey, {}), whole(grey, lungs))
    values = (facts.spread, facts.clipped, facts.aspect, facts.at_side, facts.at_end, *facts.layout)
    assert np.isfinite(values).all()
    assert 0 <= facts.clipped <= 1
    assert 0 <= facts.spread <= 255
    found = judge(facts)
    assert {reason.code for reason in found.reasons} <= set(DEFAULT_SEVERITIES)
    assert (found.status == "ok") == (not found.reasons)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1, 1, ["blank"]),
        (1, 5000, ["tiny", "cropped"]),
        (5000, 1, ["tiny", "cropped"]),
        (64, 32000, ["tiny", "cropped"]),
    ],
)
def test_odd_shapes(height: int, width: int, expected: list[str]) -> None:
    pixels = (np.arange(height * width) * 37 % 251).astype(np.uint8).reshape(height, width)
    assert codes(pixels) == expected


# ---------------------------------------------------------------- what a site may set


def test_rules_of_a_site() -> None:
    rules = PixelRules.from_dict({"severity": {"tiny": "rejected", "cropped": "ok"}, "limits": {"tiny_side": 300}})
    assert codes(drawn_film(), rules=rules) == ["tiny"]
    assert judge(facts_of(), rules).status == "rejected"
    assert judge(facts_of(side=300, aspect=9.0), rules).status == "ok"
    assert PixelRules.from_dict(rules.to_dict()) == rules
    assert PixelRules.from_dict({}) == PixelRules()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([], "expected an object"),
        ({"severities": {}}, "expected an object"),
        ({"severity": []}, "pixels.severity is no object"),
        ({"limits": []}, "pixels.limits is no object"),
        ({"severity": {"crooked": "ok"}}, "'crooked' is no code, expected one of blank"),
        ({"severity": {"tiny": "never"}}, "tiny is 'never', expected ok, review or rejected"),
        ({"severity": {"tiny": ["ok"]}}, "expected ok, review or rejected"),
        ({"limits": {"tiny": 3}}, "tiny is no limit, expected one of blank_spread"),
        ({"limits": {"tiny_side": "3"}}, "tiny_side is a str"),
        ({"limits": {"tiny_side": True}}, "tiny_side is True"),
        ({"limits": {"tiny_side": float("nan")}}, "tiny_side is nan"),
        ({"limits": {"tiny_side": -1}}, "tiny_side is -1, expected 0 or more"),
    ],
)
def test_what_a_site_may_not_set(record: object, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        PixelRules.from_dict(record)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
