"""Manifests, class folders and the one report about them, against plain re-computations."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magsd.data import (
    Manifest,
    Record,
    check_manifest,
    load_standardized,
    prepare,
    read_manifest,
)
from magsd.data_checks import DataReport, Issue, difference_hash, near_duplicates
from magsd.folds import Folds
from magsd_runtime.errors import DataError
from magsd_runtime.images import read_radiograph
from magsd_runtime.manifest_csv import read_lines
from magsd_runtime.preprocessing import PreprocessingSpec, standardize

SPEC = PreprocessingSpec(size=64)


def film(seed: int, height: int = 96, width: int = 80) -> np.ndarray:
    """A smooth random picture: any two differ in about half of their difference hash."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (9, 8)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def table(folder: Path, *lines: str, name: str = "m.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def codes(report: DataReport) -> tuple[set[str], set[str]]:
    return {issue.code for issue in report.errors}, {issue.code for issue in report.warnings}


def good_data(folder: Path, patients: int = 12) -> list[str]:
    lines = ["path,label,patient,source,x,y,w,h,mask"]
    for index in range(patients):
        write(folder / f"{index:02d}.png", film(index))
        lines.append(f"{index:02d}.png,{'ab'[index % 2]},p{index:02d},s,,,,,")
    return lines


# --- the text -----------------------------------------------------------------------------------


def test_a_manifest_as_spreadsheets_write_it(tmp_path: Path) -> None:
    text = (
        "\ufeffAge, Patient ,PATH,label,note,x,y,w,h,mask,source\r\n"
        '61,p 1,"b, with comma.png", sick ,"two\r\nlines",1.5,2,3,4,m/b.png,s1\r\n'
        "\r\n,,,,,,,,,,\r\n"
        "7,p2,a.png,well  ,,,,,,,\r\n"
    )
    path = tmp_path / "m.csv"
    path.write_bytes(text.encode())
    manifest = read_manifest(path)
    assert manifest.records == (
        Record(tmp_path / "a.png", "well", "p2"),
        Record(tmp_path / "b, with comma.png", "sick", "p 1", "s1", ((1.5, 2.0, 3.0, 4.0),), tmp_path / "m" / "b.png"),
    )
    assert manifest.classes == ("sick", "well")
    assert manifest.label_indices().tolist() == [1, 0]
    assert manifest.label_indices().dtype == np.int64
    assert manifest.issues == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, expected a header path,label,patient"),
        (b"\n , \r\n", "is empty"),
        (b"path,label,patient\n", "a header and no line of data"),
        (b"path,label,patient\n\n , ,\n", "a header and no line of data"),
        (b"file,label,x\n1,2,3\n", "lacks path, patient: found file, label, x; expected path, label, patient and"),
        (b"path;label;patient\n1;2;3\n", "found path;label;patient; expected .* with commas"),
        (b"path,label,patient,Label\n1,2,3,4\n", "names label twice"),
        (b"path,label,patient,x,w\n1,2,3,4,5\n", "has x, w of the box only"),
        (b"path,label,patient\na.png,m\xfcde,p\n", "not UTF-8 text .byte 0xfc in line 2.*save it as CSV UTF-8"),
        ("path,label,patient\na,b,c\n".encode("utf-16"), "not UTF-8 text"),
        (b'path,label,patient\n"a.png,b,c\nd,e,f\n', "no CSV .*check its quotes"),
        (b"path,label,patient\n,b,c\n", "1 line that cannot be used, first: line 2: no path"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: cannot be read \(No such file"):
        read_manifest(tmp_path / "none.csv")


def test_all_unusable_lines_are_told_at_once_and_left_out_when_lenient(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "path,label,patient,x,y,w,h",
        "a.png,sick,p1,,,,",
        "b.png,,p2,,,,",
        "c.png,well,",
        "d.png,well,p4,1,2,three,4",
        "e.png,well,p5,1,2,,4",
        "f.png,well,p6,1,2,0,4",
        "g.png,well,p7,1,nan,3,4",
        "h.png,well,with,comma,p8,1,2,3,4",
        "i\0.png,well,p9,,,,",
        "k.png,well,p9,1,2,3,4,,",
    )
    with pytest.raises(DataError, match="8 lines that cannot be used, first: line 3: no label"):
        read_manifest(path)
    manifest = read_manifest(path, lenient=True)
    assert [record.path.name for record in manifest.records] == ["a.png", "k.png"]
    assert [text.split(":", 1)[0] for text in manifest.issues[0].items] == [f"line {n}" for n in range(3, 11)]
    assert manifest.issues[0].items[1:3] == ("line 4: no patient", "line 5: box 1,2,three,4 is not four numbers")
    assert "9 cells, the header has 7: quote cells" in manifest.issues[0].items[6]
    assert "control character" in manifest.issues[0].items[7]


def test_lines_of_one_image_are_one_record_with_all_its_boxes(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "path,label,patient,source,x,y,w,h,mask",
        "b.png,sick,p1,,1,2,3,4,",
        "a.png,well,p2,s,,,,,",
        "./b.png,sick,p1,s2,5,6,7,8,",
        "sub/../b.png,sick,p1,,9,9,9,9,m.png",
    )
    manifest = read_manifest(path)
    assert manifest.records[1] == Record(
        tmp_path / "b.png", "sick", "p1", "s2", ((1, 2, 3, 4), (5, 6, 7, 8), (9, 9, 9, 9)), tmp_path / "m.png"
    )
    assert len(manifest.records) == 2


def test_lines_that_repeat_or_contradict_each_other_are_errors(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "path,label,patient,source,x,y,w,h,mask",
        "a.png,sick,p1,s,1,2,3,4,",
        "b.png,well,p2,s,,,,,m.png",
        "a.png,sick,p1,s,1,2,3,4,",
        "b.png,well,p2,s,,,,,m.png",
        "./a.png,well,p1,s,,,,,",
        "b.png,well,p3,s,,,,,",
        "b.png,well,p2,t,,,,,",
        "b.png,well,p2,s,,,,,other.png",
        "a.png,sick,p1,s,9,2,3,4,",
    )
    with pytest.raises(
        DataError,
        match=r"1 line giving an image a second label, first: line 6: \./a\.png is well, line 2 said sick; "
        r"3 lines contradicting an earlier one, first: line 7: .*another patient, p2 instead of p3; "
        r"2 lines given twice, first: line 4: a\.png as in line 2",
    ):
        read_manifest(path)
    manifest = read_manifest(path, lenient=True)
    assert manifest.records == (
        Record(tmp_path / "a.png", "sick", "p1", "s", ((1, 2, 3, 4), (9, 2, 3, 4))),
        Record(tmp_path / "b.png", "well", "p2", "s", (), tmp_path / "m.png"),
    )
    report = check_manifest(manifest, n_folds=None)
    assert {"two-labels", "contradiction", "duplicate-line", "missing"} == codes(report)[0]


CELL = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=8)
BOX = st.tuples(st.integers(-9, 99), st.integers(-9, 99), st.integers(1, 99), st.integers(1, 99))
ROW = st.fixed_dictionaries({
    "label": st.sampled_from(["sick", "well", "älter, als"]), "patient": CELL, "source": st.just("") | CELL,
    "boxes": st.lists(BOX, max_size=3, unique=True), "extra": CELL, "blank": st.booleans(),
})  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(rows=st.dictionaries(CELL.filter(lambda name: name.strip(".")), ROW, min_size=1, max_size=8), data=st.data())
def test_any_table_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, rows: dict, data) -> None:
    folder = tmp_path_factory.mktemp("csv")
    columns = data.draw(st.permutations(["path", "label", "patient", "source", "x", "y", "w", "h", "view", "age"]))
    lines = [
        {"path": f"d/{name}", "label": row["label"], "patient": row["patient"], "source": row["source"],
         "view": row["extra"], "age": "", **dict(zip("xywh", box or ("",) * 4))}
        for name, row in rows.items()
        for box in row["boxes"] or [None]
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator=data.draw(st.sampled_from(["\n", "\r\n"])))
    writer.writeheader()
    for line in data.draw(st.permutations(lines)):
        writer.writerow(line)
        if data.draw(st.booleans()):
            text.write("\n")
    (folder / "m.csv").write_bytes(data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.getvalue().encode())
    manifest = read_manifest(folder / "m.csv")
    expected = {
        folder / "d" / name: (row["label"], row["patient"], row["source"], sorted(row["boxes"]))
        for name, row in rows.items()
        if "/" not in name
    }
    found = {r.path: (r.label, r.patient, r.source, sorted(r.boxes)) for r in manifest.records}
    assert expected.items() <= found.items()
    assert len(found) == len({Path("/d", name) for name in rows})
    assert manifest.records == tuple(sorted(manifest.records, key=lambda record: record.path.as_posix()))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60) | st.text('path,label,patient\n\r";x \ufeff12', max_size=60).map(str.encode))
def test_no_content_gives_anything_but_a_manifest_or_a_data_error(tail: bytes) -> None:
    for head in (b"", b"path,label,patient\n", b"path,label,patient,x,y,w,h\na,b,c,1,1,1,1\n"):
        said = ""
        try:
            for line in read_lines(SimpleNamespace(read_bytes=lambda content=head + tail: content)):  # type: ignore[arg-type]
                if isinstance(line, str):
                    said += line
                else:
                    assert line.path
                    assert line.label
                    assert line.patient
        except DataError as error:
            said += str(error)
        assert "\n" not in said
        assert "\r" not in said


def test_the_digest_is_of_the_content_not_of_the_place_or_order(tmp_path: Path) -> None:
    lines = ["b.png,sick,p1,s,1,2,3,4,m.png", "a.png,well,p2,,,,,,"]
    header = "path,label,patient,source,x,y,w,h,mask"
    (tmp_path / "other").mkdir()
    one = read_manifest(table(tmp_path, header, *lines))
    two = read_manifest(table(tmp_path / "other", header, *reversed(lines), name="n.csv"))
    assert one.digest() == two.digest()
    assert replace(one, records=one.records[::-1]).digest() == one.digest()
    seen = {one.digest()}
    changes = {"label": "x", "patient": "x", "source": "x", "boxes": ((1.0, 2.0, 3.0, 5.0),), "mask": None}
    for name, value in {**changes, "path": tmp_path / "c.png"}.items():
        changed = replace(one, records=(one.records[0], replace(one.records[1], **{name: value})))
        seen.add(changed.digest())
    assert len(seen) == 7
    assert len(one.digest()) == 64


def test_a_class_folder(tmp_path: Path) -> None:
    for name in ("sick/1.png", "sick/deep/1.png", "well/1.png", ".hidden/9.png", "well/notes.txt", "top.png"):
        write(tmp_path / name, film(1)) if name.endswith("png") else (tmp_path / name).write_text("no image")
    (tmp_path / "empty").mkdir()
    manifest = read_manifest(tmp_path)
    assert [(r.path.relative_to(tmp_path).as_posix(), r.label, r.patient) for r in manifest.records] == [
        ("sick/1.png", "sick", "sick/1.png"),
        ("sick/deep/1.png", "sick", "sick/deep/1.png"),
        ("well/1.png", "well", "well/1.png"),
    ]
    assert [(issue.code, issue.severity) for issue in manifest.issues] == [
        ("no-patients", "warning"),
        ("empty-class", "warning"),
    ]
    with pytest.raises(DataError, match="no subfolder with images"):
        read_manifest(tmp_path / "empty")


# --- the images ---------------------------------------------------------------------------------


def test_prepare_is_reading_and_standardizing_one_by_one(tmp_path: Path) -> None:
    manifest = read_manifest(table(tmp_path, *good_data(tmp_path)))
    steps: list[tuple[int, int]] = []
    prepared = prepare(manifest, SPEC, workers=3, progress=lambda done, total: steps.append((done, total)))
    expected = np.stack([standardize(read_radiograph(record.path).pixels, SPEC) for record in manifest.records])
    np.testing.assert_array_equal(prepared.images, expected)
    assert steps == [(n, 12) for n in range(1, 13)]
    np.testing.assert_array_equal(load_standardized(manifest.records, SPEC), expected)
    np.testing.assert_array_equal(load_standardized(manifest.records[::-1], SPEC, workers=2), expected[::-1])
    assert load_standardized([], SPEC).shape == (0, 64, 64)
    assert codes(prepared.check(n_folds=5)) == codes(check_manifest(manifest)) == (set(), set())


def test_load_standardized_names_what_cannot_be_read(tmp_path: Path) -> None:
    manifest = read_manifest(table(tmp_path, *good_data(tmp_path)))
    (tmp_path / "03.png").write_bytes(b"no image")
    (tmp_path / "05.png").unlink()
    with pytest.raises(DataError, match=r"2 images cannot be read: .*03\.png.*05\.png") as caught:
        load_standardized(manifest.records, SPEC)
    assert "\n" not in str(caught.value)


def test_one_report_of_everything_that_is_wrong(tmp_path: Path) -> None:
    lines = good_data(tmp_path, 8)
    (tmp_path / "02.png").unlink()
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes()[:90])
    write(tmp_path / "04.png", np.full((80, 80), 77, np.uint8))
    write(tmp_path / "small_mask.png", np.full((70, 70), 255, np.uint8))
    write(tmp_path / "empty_mask.png", np.zeros((96, 80), np.uint8))
    write(tmp_path / "mask.png", np.full((96, 80), 255, np.uint8))
    for index, extra in enumerate(["80,5,9,9,", "70,5,30,9,small_mask.png", ",,,,none.png", ",,,,empty_mask.png",
                                   "79.5,0,5,5,", "-9,0,89,96,mask.png"]):  # fmt: skip
        write(tmp_path / f"x{index}.png", film(100 + index))
        lines.append(f"x{index}.png,A,q{index},s,{extra}")
    lines += ["00.png,b,p00,s,,,,,", "01.png,b,p01,s,,,,,", "y.png,,p,s,,,,,"]
    manifest = read_manifest(table(tmp_path, *lines), lenient=True)
    prepared = prepare(manifest, SPEC)
    report = prepared.check(n_folds=5)
    errors = {issue.code: issue for issue in report.errors}
    warnings = {issue.code: issue for issue in report.warnings}
    assert set(errors) == {
        "line", "two-labels", "duplicate-line", "missing", "unreadable", "mask", "box-outside", "too-few-patients",
    }  # fmt: skip
    assert errors["missing"].items == ("02.png",)
    assert "03.png" in errors["unreadable"].items[0]
    assert len(errors["mask"].items) == 3
    assert [text.split(":")[0] for text in errors["box-outside"].items] == ["x0.png", "x4.png"]
    assert errors["too-few-patients"].items == ("a has 4 patients", "b has 4 patients")
    assert set(warnings) == {"blank", "box-partly-outside", "similar-labels"}
    assert warnings["blank"].items == ("04.png",)
    assert warnings["similar-labels"].items == ("A and a",)
    assert not prepared.images[[r.path.name == "02.png" for r in manifest.records]].any()
    text = report.format()
    assert all(f"[{code}]" in text for code in {**errors, **warnings})
    with pytest.raises(DataError) as caught:
        report.raise_if_errors()
    assert "\n" not in str(caught.value)
    assert "1 image missing" in str(caught.value)
    strict = prepared.check(n_folds=5, strict=True)
    assert codes(strict) == ({*errors, *warnings}, set())


def test_classes_and_patients(tmp_path: Path) -> None:
    lines = good_data(tmp_path)
    lines[2] = lines[2].replace("p01", "p00")  # 00.png is a, 01.png is b
    report = check_manifest(read_manifest(table(tmp_path, *lines)), n_folds=6)
    assert codes(report) == (set(), {"patient-with-two-labels"})
    assert report.warnings[0].items == ("p00: 1 a, 1 b",)
    report = check_manifest(read_manifest(table(tmp_path, *(line.replace(",b,", ",a,") for line in lines))))
    assert codes(report)[0] == {"one-class"}


def test_the_text_of_a_report_shows_the_first_places() -> None:
    report = DataReport("m.csv", (Issue("missing", "error", "3 images missing", ("a", "b", "c")),), ())
    assert report.format(limit=2).splitlines() == [
        "m.csv: 1 kind of error, 0 kinds of warning", "error: 3 images missing [missing]", "    a", "    b", "    ...",
    ]  # fmt: skip
    DataReport("m.csv", (), (Issue("blank", "warning", "1 image"),)).raise_if_errors()


# --- near duplicates ----------------------------------------------------------------------------


def slow_hash(pixels: np.ndarray) -> tuple[list[bool], list[float]]:
    """Area averages on 16 rows x 17 columns by exact overlaps, and each neighbour's difference."""
    height, width = pixels.shape

    def overlaps(n: int, size: int) -> np.ndarray:
        edges = np.linspace(0, size, n + 1)
        return np.array([
            [max(0.0, min(edges[i + 1], j + 1) - max(edges[i], j)) for j in range(size)] for i in range(n)
        ]) * n / size  # fmt: skip

    small = overlaps(16, height) @ pixels.astype(float) @ overlaps(17, width).T
    steps = [small[i, j + 1] - small[i, j] for i in range(16) for j in range(16)]
    return [step > 0 for step in steps], steps


def bits_of(words: np.ndarray) -> list[bool]:
    return [bool(int(word) >> (63 - k) & 1) for word in words for k in range(64)]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (160, 170), (97, 233), (300, 71)])
def test_the_difference_hash_is_its_definition(height: int, width: int) -> None:
    pixels = film(height, height, width)
    plain, mirrored = difference_hash(pixels)
    assert plain.dtype == np.uint64
    assert plain.shape == mirrored.shape == (4,)
    for words, image in ((plain, pixels), (mirrored, pixels[:, ::-1])):
        expected, steps = slow_hash(image)
        clear = [abs(step) > 1.01 for step in steps]  # the small image is rounded to whole grey values
        assert sum(clear) > 200
        assert [b for b, c in zip(bits_of(words), clear) if c] == [b for b, c in zip(expected, clear) if c]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(0, 40), st.integers(1, 50), st.integers(0, 12))
def test_near_duplicates_are_those_of_a_loop_over_all_pairs(seed: int, count: int, block: int, distance: int) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (count, 2, 256)).astype(bool)
    for _ in range(count // 2):  # plant copies with a few flipped bits, some of them of the mirror image
        i, j, way = rng.integers(0, count), rng.integers(0, count), rng.integers(0, 2)
        flips = rng.permutation(256)[: rng.integers(0, 15)]
        bits[j, 0] = bits[i, way]
        bits[j, 0, flips] ^= True
        bits[j, 1] = bits[i, 1 - way]
        bits[j, 1, 255 - flips] ^= True
    words = np.packbits(bits, axis=2).reshape(count, 2, 4, 8)
    hashes = (words.astype(np.uint64) << np.arange(56, -8, -8, dtype=np.uint64)).sum(axis=3, dtype=np.uint64)
    pairs = near_duplicates(hashes[:, 0], hashes[:, 1], distance=distance, block=block)
    numbers = [[int("".join("01"[int(b)] for b in row), 2) for row in both] for both in bits]
    expected = []
    for i in range(count):
        for j in range(i + 1, count):
            plain = bin(numbers[i][0] ^ numbers[j][0]).count("1")
            mirrored = bin(numbers[i][0] ^ numbers[j][1]).count("1")
            if min(plain, mirrored) <= distance:
                expected.append((i, j, min(plain, mirrored), mirrored < plain))
    found = zip(pairs.first.tolist(), pairs.second.tolist(), pairs.distance.tolist(), pairs.mirrored.tolist())
    assert sorted(found) == expected


def test_copies_are_found_and_judged_by_where_they_stand(tmp_path: Path) -> None:
    lines = good_data(tmp_path, 16)
    copies = {
        "c0": (film(0)[:, ::-1], "a", "q0"),  # another patient, same label, mirrored
        "c1": (cv2.resize(film(1), (160, 200)), "a", "q1"),  # another patient, another label, other size
        "c2": (np.clip(film(2) * 0.8 + 20, 0, 255).astype(np.uint8), "a", "p02"),  # one patient, other exposure
        "c3": (film(3), "a", "p03"),  # one patient, another label
    }
    for name, (pixels, label, patient) in copies.items():
        write(tmp_path / f"{name}.jpg", pixels)
        lines.append(f"{name}.jpg,{label},{patient},s,,,,,")
    for name in ("e0", "e1"):  # blank films have no hash to compare
        write(tmp_path / f"{name}.png", np.zeros((64, 64), np.uint8))
        lines.append(f"{name}.png,{'ab'[name == 'e1']},{name},s,,,,,")
    manifest = read_manifest(table(tmp_path, *lines))
    prepared = prepare(manifest, SPEC)
    report = prepared.check(n_folds=5)
    found = {issue.code: issue.items for issue in (*report.errors, *report.warnings)}
    assert codes(report)[0] == {"near-duplicates-two-labels"}
    assert found["near-duplicates-two-labels"][0].startswith("01.png (b, p01) and c1.jpg (a, q1): ")
    assert found["near-duplicates-two-patients"][0].startswith("00.png (a, p00) and c0.jpg (a, q0): ")
    assert found["near-duplicates-two-patients"][0].endswith("mirrored")
    assert found["near-duplicates"][0].startswith("02.png (a, p02) and c2.jpg (a, p02): ")
    assert found["near-duplicates-one-patient-two-labels"][0].startswith("03.png (b, p03) and c3.jpg (a, p03): ")
    assert {len(items) for code, items in found.items() if code.startswith("near")} == {1}

    patients = sorted({record.patient for record in manifest.records})
    together = Folds(0, 2, {name: int(name in ("p04", "p05")) for name in patients})
    assert codes(prepared.check(folds=together))[0] == {"near-duplicates-two-labels"}
    apart = Folds(0, 2, {**together.assignment, "q0": 1})
    errors = {issue.code: issue for issue in prepared.check(folds=apart).errors}
    assert set(errors) == {"near-duplicates-two-labels", "near-duplicates-two-folds"}
    assert "c0.jpg" in errors["near-duplicates-two-folds"].items[0]


def test_folds_that_do_not_fit_the_manifest(tmp_path: Path) -> None:
    manifest = read_manifest(table(tmp_path, *good_data(tmp_path, 6)))
    prepared = prepare(manifest, SPEC)
    folds = Folds(0, 2, {"p00": 0, "p01": 0, "p02": 1, "p04": 1, "stranger": 1})
    report = prepared.check(folds=folds)
    assert codes(report) == ({"patient-in-no-fold"}, {"class-not-in-fold"})
    assert report.errors[0].items == ("p03", "p05")
    assert report.warnings[0].items == ("fold 1 has no b",)


def test_many_copies_of_one_image_do_not_fill_the_memory() -> None:
    hashes = np.full((3000, 4), 12345, np.uint64)
    pairs = near_duplicates(hashes, hashes)
    assert len(pairs.first) == 3000 * 2999 // 2


# --- the real images ----------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "counts", "patients", "two_labels"),
    [
        ("dataset_a", {"covid19": 90, "pneumonia": 168}, 250, set()),
        ("dataset_b", {"covid19": 426, "healthy": 518, "pneumonia": 505}, 954, {"nih": 21}),
    ],
)
def test_the_shared_data_sets(cxr: Path, name: str, counts: dict, patients: int, two_labels: dict) -> None:
    manifest = read_manifest(cxr / f"{name}.csv")
    labels = [record.label for record in manifest.records]
    assert {label: labels.count(label) for label in manifest.classes} == counts
    assert len({record.patient for record in manifest.records}) == patients
    report = check_manifest(manifest)
    assert not report.errors
    found = [item for issue in report.warnings if issue.code == "patient-with-two-labels" for item in issue.items]
    for source, number in dict(two_labels).items():
        assert sum(item.startswith(f"{source}:") for item in found) == number
    assert codes(report)[1] <= {"patient-with-two-labels"}


@pytest.mark.data
def test_localization_boxes_are_read_and_lie_in_their_images(cxr: Path) -> None:
    manifest = read_manifest(cxr / "localization.csv")
    assert len(manifest.records) == 22
    assert all(len(record.boxes) == 1 for record in manifest.records)
    first = next(r for r in manifest.records if r.path.name == "00000150_002.jpg")
    assert first.boxes == ((169.14, 167.62, 60.65, 50.9),)
    assert {issue.code for issue in check_manifest(manifest, n_folds=None).errors} == {"one-class"}


def test_no_heavy_library_is_imported() -> None:
    code = (
        "import sys, json, magsd.data, magsd.folds, magsd.phantoms;"
        "print(json.dumps(sorted({'torch', 'sklearn', 'onnxruntime', 'matplotlib', 'scipy'} & set(sys.modules))))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []


def test_manifest_is_comparable_and_hashable() -> None:
    manifest = Manifest(Path("."), (Record(Path("a.png"), "x", "p"),))
    assert manifest == replace(manifest)
    assert hash(manifest) == hash(replace(manifest))
