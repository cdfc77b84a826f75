"""Finding the lung fields, cropping to them, and where everything lies afterwards."""

from __future__ import annotations

import csv
import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from magsd_runtime import lungs
from magsd_runtime.errors import ArtefactError, UsageError
from magsd_runtime.images import read_radiograph
from magsd_runtime.localization import IN_LUNGS, findings, square_heat, to_original
from magsd_runtime.lungs import LUNG_SIZE, find_lungs, largest_fields, packaged_sha256, register
from magsd_runtime.preprocessing import (
    Fit,
    Framing,
    PreprocessingSpec,
    Region,
    frame,
    lung_region,
    lungs_in_square,
    placement,
    preprocess,
    standardize,
)

CROPPED = PreprocessingSpec(size=64, crop="lungs", crop_margin=0.06, lungs_sha256=packaged_sha256())

masks = st.integers(0, 2**32 - 1).flatmap(
    lambda seed: st.sampled_from([0.1, 0.3, 0.45, 0.6]).map(
        lambda share: np.random.default_rng(seed).random((16, 16)) < share
    )
)


def slow_fields(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Flood fill in eight directions, then the rules of the description."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    fields: list[set[tuple[int, int]]] = []
    while left:
        todo = [min(left)]
        left.discard(todo[0])
        field = set(todo)
        while todo:
            y, x = todo.pop()
            for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if near in left:
                    left.discard(near)
                    field.add(near)
                    todo.append(near)
        fields.append(field)
    fields.sort(key=lambda field: -len(field))
    kept: NDArray[np.bool_] = np.zeros_like(mask)
    for field in fields[:2]:
        if len(field) * 4 >= len(fields[0]):
            for place in field:
                kept[place] = True
    return kept if kept.sum() >= 0.05 * mask.size else np.zeros_like(mask)


@settings(max_examples=60, deadline=None)
@given(mask=masks)
def test_the_two_largest_fields_are_kept(mask: NDArray[np.bool_]) -> None:
    found, expected = largest_fields(mask), slow_fields(mask)
    # of fields of equal size either may be kept: their number of cells is the same
    assert found.sum() == expected.sum()
    assert not (found & ~mask).any()


def test_nothing_is_found_where_there_is_next_to_nothing() -> None:
    mask = np.zeros((128, 128), bool)
    mask[:20, :20] = True
    assert not largest_fields(mask).any()
    assert not largest_fields(np.zeros((128, 128), bool)).any()


@settings(max_examples=80, deadline=None)
@given(
    mask=masks,
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    margin=st.sampled_from([0.0, 0.06, 0.5, 1.0]),
)
def test_the_region_encloses_the_fields_and_lies_in_the_film(
    mask: NDArray[np.bool_], width: int, height: int, margin: float
) -> None:
    region = lung_region(mask, width, height, margin)
    assert 0 <= region.x0 < region.x1 <= width
    assert 0 <= region.y0 < region.y1 <= height
    if not mask.any():
        assert region == (0, 0, width, height)
        return
    rows, columns = np.nonzero(mask)
    for first, last, low, high, length in (
        (columns.min(), columns.max(), region.x0, region.x1, width),
        (rows.min(), rows.max(), region.y0, region.y1, height),
    ):
        extra = margin * (last + 1 - first)
        assert low == max(0, math.floor((first - extra) * length / 16))
        assert high == min(length, math.ceil((last + 1 + extra) * length / 16))


def test_version_2_and_what_it_needs() -> None:
    assert CROPPED.version == 2
    again = PreprocessingSpec.from_dict(CROPPED.to_dict())
    assert (again, again.sha256()) == (CROPPED, CROPPED.sha256())
    assert replace(CROPPED, crop_margin=0.1).sha256() != CROPPED.sha256()
    with pytest.raises(UsageError, match="need crop lungs"):
        PreprocessingSpec(crop_margin=0.1)
    with pytest.raises(UsageError, match="not a SHA-256"):
        PreprocessingSpec(crop="lungs", lungs_sha256="abc")
    with pytest.raises(ArtefactError, match="version 1 with crop lungs"):
        replace(CROPPED, version=1)
    plain = PreprocessingSpec().to_dict()
    with pytest.raises(ArtefactError, match="expected exactly"):
        PreprocessingSpec.from_dict({**plain, "crop": "lungs", "crop_margin": 0.0, "lungs_sha256": "0" * 64})


def slow_square(framing: Framing, spec: PreprocessingSpec) -> NDArray[np.float64]:
    """Each pixel's centre traced to the film, and from there bilinearly into the 128 x 128 mask."""
    assert framing.lungs is not None
    where, cells = placement(framing.region, spec), framing.lungs.shape[0]
    expected = np.zeros((spec.size, spec.size))
    for v in range(spec.size):
        for u in range(spec.size):
            x, y = where.left + (u + 0.5) * where.scale_x, where.top + (v + 0.5) * where.scale_y
            if not (0 <= x <= framing.width and 0 <= y <= framing.height):
                continue
            column = min(max(x * cells / framing.width - 0.5, 0), cells - 1)
            row = min(max(y * cells / framing.height - 0.5, 0), cells - 1)
            for i in (math.floor(row), math.floor(row) + 1):
                for j in (math.floor(column), math.floor(column) + 1):
                    if i < cells and j < cells and framing.lungs[i, j]:
                        expected[v, u] += (1 - abs(row - i)) * (1 - abs(column - j))
    return expected


@settings(max_examples=25, deadline=None)
@given(
    mask=masks,
    width=st.integers(8, 300),
    height=st.integers(8, 300),
    fit=st.sampled_from(["stretch", "letterbox", "crop"]),
)
def test_lungs_in_the_square(mask: NDArray[np.bool_], width: int, height: int, fit: Fit) -> None:
    spec = replace(CROPPED, size=32, fit=fit)
    framing = Framing(width, height, lung_region(mask, width, height, spec.crop_margin), mask)
    np.testing.assert_allclose(lungs_in_square(framing, spec), slow_square(framing, spec), atol=1e-4)


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
def test_a_cropped_film_is_standardized_as_the_part_alone(fit: Fit) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (170, 130), dtype=np.uint8)
    region = Region(20, 30, 101, 150)
    framing = Framing(130, 170, region, np.ones((128, 128), bool))
    spec = replace(CROPPED, fit=fit)
    alone = PreprocessingSpec(size=64, fit=fit)
    part = pixels[30:150, 20:101]
    np.testing.assert_array_equal(standardize(pixels, spec, framing), standardize(part, alone))
    # and what is found in it lies where the part lies
    heat = np.zeros((64, 64), np.float32)
    heat[20:30, 12:44] = 1
    moved, still = findings(heat, 0.5, 130, 170, spec, region), findings(heat, 0.5, 81, 120, alone)
    assert [[x + 20, y + 30, z + 20, w + 30] for x, y, z, w in (one.box.to_list() for one in still)] == [
        one.box.to_list() for one in moved
    ]
    whole = to_original(heat, 130, 170, spec, region)
    np.testing.assert_array_equal(whole[30:150, 20:101], to_original(heat, 81, 120, alone))
    whole[30:150, 20:101] = 0
    assert not whole.any()


def test_a_crop_without_its_region_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="needs the region"):
        to_original(np.zeros((64, 64), np.float32), 100, 100, CROPPED)


def test_heat_in_the_lungs_only() -> None:
    mask = np.zeros((128, 128), bool)
    mask[:, :64] = True
    framing = Framing(100, 100, Region(0, 0, 100, 100), mask)
    coarse = np.array([[0.2, 1.0], [0.5, 0.9]], np.float32)
    heat = square_heat("attention" + IN_LUNGS, coarse, framing, CROPPED)
    assert not heat[:, 34:].any()
    assert float(heat.max()) == 1.0
    none = replace(framing, lungs=np.zeros((128, 128), bool))
    np.testing.assert_array_equal(
        square_heat("attention" + IN_LUNGS, coarse, none, CROPPED), square_heat("attention", coarse, none, CROPPED)
    )


def test_an_unknown_or_damaged_network_is_refused(tmp_path: Path) -> None:
    film = np.zeros((50, 50), np.uint8)
    with pytest.raises(ArtefactError, match="is not here"):
        find_lungs(film, "0" * 64)
    broken = tmp_path / "lungs.onnx"
    broken.write_bytes(b"not a network")
    with pytest.raises(ArtefactError, match="cannot load the lung network"):
        find_lungs(film, register(broken))
    with pytest.raises(ArtefactError, match="cannot be read"):
        register(tmp_path / "missing.onnx")


def test_a_film_without_lungs_is_seen_whole() -> None:
    film = np.full((90, 70), 128, np.uint8)
    framing = frame(film, CROPPED)
    if framing.lungs_found:
        pytest.fail("lungs were found in an even grey")
    assert framing.region == (0, 0, 70, 90)
    assert preprocess(film, CROPPED).shape == (1, 64, 64)


@pytest.mark.data
def test_real_films(cxr: Path) -> None:
    """Films with masks (the network has seen nine in ten of them), and films of hospitals that have none."""
    with open(cxr / "lung_masks.csv", newline="") as file:
        rows = list(csv.DictReader(file))[::4]
    scores = []
    for row in rows:
        film = read_radiograph(cxr / row["path"]).pixels
        mask = cv2.resize(
            (read_radiograph(cxr / row["mask"]).pixels > 0).astype(np.uint8), (LUNG_SIZE, LUNG_SIZE),
            interpolation=cv2.INTER_NEAREST,
        ).astype(bool)  # fmt: skip
        found = find_lungs(film, packaged_sha256())
        scores.append(2 * (found & mask).sum() / (found.sum() + mask.sum()))
    assert np.mean(scores) > 0.91
    others = (
        sorted((cxr / "images" / "nih").glob("*.jpg"))[:20] + sorted((cxr / "images" / "kermany").glob("*.jpg"))[:20]
    )
    films = [read_radiograph(path).pixels for path in others]
    alone = [find_lungs(film, packaged_sha256()) for film in films]
    # OpenCV 4.10, 4.13 and 5.0 agree: a crop that differs means other pixels than the network was trained on
    regions = [tuple(lung_region(one, film.shape[1], film.shape[0], 0.06)) for one, film in zip(alone, films)]
    assert hashlib.sha256(repr(regions).encode()).hexdigest()[:16] == "5a6b3f9408faecc9"
    shares = [float(fields.mean()) for fields in alone]
    assert min(shares) > 0.08
    assert max(shares) < 0.75
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda film: find_lungs(film, packaged_sha256()), films))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together))


def test_it_is_found_by_its_hash_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = packaged_sha256()
    monkeypatch.setattr(lungs, "_known", {})
    assert lungs.network_bytes(sha256) == lungs.PACKAGED_LUNGS.read_bytes()


def test_a_network_stays_known_when_its_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle is proven in a temporary folder and then renamed; its network must still run, in any thread."""
    copy = tmp_path / "lungs.onnx"
    copy.write_bytes(lungs.PACKAGED_LUNGS.read_bytes())
    monkeypatch.setattr(lungs, "_known", {})
    sha256 = register(copy)
    copy.unlink()
    film = np.random.default_rng(0).integers(0, 256, (80, 80), dtype=np.uint8)
    with ThreadPoolExecutor(1) as pool:  # a thread that has not loaded it yet
        assert pool.submit(find_lungs, film, sha256).result().shape == (LUNG_SIZE, LUNG_SIZE)
