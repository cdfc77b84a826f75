"""`magsd data compose`: so many images a class, by patient, each film and each person once."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collection_trees import image, refused
from magsd.cli import main
from magsd.confounds import told_by_source
from magsd.data import read_manifest
from magsd.datasets.composing import TABLE_1, compose
from magsd.datasets.rows import COLUMNS, Row, read_rows, write_manifest
from magsd.folds import make_folds
from magsd_runtime.errors import DataError


def pool(folder: Path) -> list[Row]:
    """120 images: patients of three, and of each label; one source a label."""
    rows = []
    for number in range(120):
        label = ("covid19", "pneumonia", "healthy", "viral_pneumonia")[number % 4]
        path = image(folder / f"{number:03}.png", number, 16)
        rows.append(Row(path, label, f"{label}:{number // 12}", label[:3]))
    return rows


def test_a_data_set_is_so_many_images_a_class_by_patient(tmp_path: Path) -> None:
    rows = pool(tmp_path)
    made = compose("B", rows, seed=3, limit=14)
    assert made.counts() == {"covid19": 14, "pneumonia": 14, "healthy": 14}
    assert made.found == {"covid19": 30, "pneumonia": 60, "healthy": 30}
    # whole patients but for the last: at most one patient of a class is there in part
    for label in made.counts():
        taken = Counter(row.patient for row in made.rows if row.label == label)
        assert sum(count < 3 for count in taken.values()) <= 1
    assert made.rows == compose("B", list(reversed(rows)), seed=3, limit=14).rows
    assert made.rows != compose("B", rows, seed=4, limit=14).rows
    small = compose("B", rows, seed=3, limit=5).rows
    assert set(small) <= set(made.rows)


def test_what_is_missing_and_what_gives_the_class_away_is_said(tmp_path: Path) -> None:
    made = compose("A", [row for row in pool(tmp_path) if row.label in ("covid19", "pneumonia")])
    assert made.wanted == {"covid19": 90, "pneumonia": 168}
    assert any("covid19: 30 of 90 images" in line for line in made.warnings)
    assert any("source of a film gives its class away" in line for line in made.warnings)
    mixed = [*made.rows, Row(image(tmp_path / "x.png", 500), "covid19", "covid19:0", "pne")]
    mixed.append(Row(image(tmp_path / "y.png", 501), "pneumonia", "covid19:0", "cov"))
    warnings = compose("A", mixed).warnings
    assert not any("gives its class away" in line for line in warnings)
    assert any("1 patients are in two classes" in line for line in warnings)


def test_identical_files_come_once(tmp_path: Path) -> None:
    rows = pool(tmp_path)
    copy = tmp_path / "zz.png"
    shutil.copy(rows[0].path, copy)
    made = compose("B", [*rows, Row(copy, "covid19", "another", "elsewhere")])
    assert made.same == 1
    assert copy not in {row.path for row in made.rows}
    with pytest.raises(DataError, match="none of the manifests has an image of bacterial_pneumonia"):
        compose("C", rows)
    with pytest.raises(DataError, match="cannot be read"):
        compose("B", [*rows, Row(tmp_path / "gone.png", "covid19", "p", "s")])


def test_compose_from_the_command_line_and_into_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pool(tmp_path / "films")
    for label in ("covid19", "pneumonia"):
        boxes = ((1.0, 2.0, 5.0, 6.0), (3.0, 4.0, 5.0, 6.0))
        mine = [Row(r.path, r.label, r.patient, r.source, boxes) for r in rows if r.label == label]
        write_manifest(tmp_path / f"{label}.csv", mine)
    out = tmp_path / "sets" / "a.csv"
    command = [
        "data",
        "compose",
        "A",
        str(tmp_path / "covid19.csv"),
        str(tmp_path / "pneumonia.csv"),
        "--out",
        str(out),
    ]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "covid19                    30     30      90        10  cov 30" in captured.out
    assert "gives its class away" in captured.err
    manifest = read_manifest(out)
    assert len(manifest.records) == 60
    assert {record.boxes for record in manifest.records} == {boxes}
    folds = make_folds(manifest, 5, seed=0)
    assert set(folds.assignment) == {record.patient for record in manifest.records}
    assert len(folds.assignment) == 20
    again = read_rows(out)
    assert {row.path.resolve() for row in again} == {record.path.resolve() for record in manifest.records}


def test_table_1_is_the_papers() -> None:
    totals = {name: sum(count for count, _ in classes.values()) for name, classes in TABLE_1.items()}
    assert totals == {"A": 258, "B": 3631, "C": 6329, "localization": 131}


def films(folder: Path, source: str, label: str, count: int, start: int = 0) -> list[Row]:
    return [
        Row(image(folder / f"{source}-{label}-{number}.png", start + number, 16), label, f"{source}:{number}", source)
        for number in range(count)
    ]


def test_the_same_film_makes_two_patients_one(tmp_path: Path) -> None:
    """cohen:0 = figure1:x through one copied film, figure1:x = actualmed:y through another."""
    (a, b, c, d) = films(tmp_path, "cohen", "covid19", 4)
    b = Row(b.path, "covid19", "figure1:x", "figure1")
    d = Row(d.path, "covid19", "actualmed:y", "actualmed")
    copy_of_a, copy_of_b = tmp_path / "copy-a.png", tmp_path / "copy-b.png"
    shutil.copy(a.path, copy_of_a)
    shutil.copy(b.path, copy_of_b)
    rows = [a, b, c, d, *films(tmp_path, "nih", "pneumonia", 3, 50)]
    rows.append(Row(copy_of_a, "covid19", "figure1:x", "figure1"))
    rows.append(Row(copy_of_b, "covid19", "actualmed:y", "actualmed"))
    made = compose("A", rows)
    assert made.same == 2
    assert made.joined == 2
    patients = {row.path: row.patient for row in made.rows if row.label == "covid19"}
    assert patients[a.path if a.path in patients else copy_of_a] == "actualmed:y"
    assert Counter(patients.values()) == {"actualmed:y": 3, "cohen:2": 1}
    assert any("2 patients had the same film as another one" in line for line in made.warnings)


def test_a_film_with_two_classes_is_in_none(tmp_path: Path) -> None:
    covid, sick, well = (films(tmp_path, "a", label, 3, 10 * n) for n, label in enumerate(
        ("covid19", "pneumonia", "healthy")))  # fmt: skip
    copy = tmp_path / "copy.png"
    shutil.copy(covid[0].path, copy)
    made = compose("B", [*covid, *sick, *well, Row(copy, "healthy", "b:0", "b")])
    assert made.counts() == {"covid19": 2, "pneumonia": 3, "healthy": 3}
    assert made.contradicting == 2
    assert any("2 of them because the same film had two classes" in line for line in made.warnings)


def test_of_copies_the_one_with_most_to_say_stays(tmp_path: Path) -> None:
    """A film whose cause one collection knows, and on which another one drew a box."""
    viral, bacterial, covid, well = (films(tmp_path, "k", label, 1, 10 * n) for n, label in enumerate(
        ("viral_pneumonia", "bacterial_pneumonia", "covid19", "healthy")))  # fmt: skip
    copy = tmp_path / "zz.png"
    shutil.copy(viral[0].path, copy)
    boxed = Row(copy, "pneumonia", "rsna:1", "rsna", boxes=((1.0, 2.0, 3.0, 4.0),))
    made = compose("C", [*viral, *bacterial, *covid, *well, boxed])
    (row,) = [row for row in made.rows if row.label == "viral_pneumonia"]
    assert row.boxes == boxed.boxes
    assert row.path == copy
    assert made.same == 1
    assert made.contradicting == 0


def test_a_manifest_given_twice_is_one(tmp_path: Path) -> None:
    rows = [*films(tmp_path, "cohen", "covid19", 3), *films(tmp_path, "nih", "pneumonia", 3, 50)]
    assert compose("A", [*rows, *rows]).rows == compose("A", rows).rows


COPIES, CONTENTS = 4, 6
LABELS = ("covid19", "viral_pneumonia", "bacterial_pneumonia", "pneumonia", "healthy")


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six contents of one size, each under four names; and two that no drawn row has."""
    folder = tmp_path_factory.mktemp("copied")
    for content in range(CONTENTS + 2):
        for number in range(COPIES):
            (folder / f"{content}-{number}.png").write_bytes(bytes([content]) * 10)
    return folder


def components(edges: list[tuple[str, str]], nodes: set[str]) -> list[set[str]]:
    """Which nodes hang together, by merging until nothing changes."""
    groups = [{node} for node in nodes]
    while True:
        pair = next(
            ((one, other) for one, other in combinations(groups, 2)
             if any((a in one and b in other) or (b in one and a in other) for a, b in edges)), None)  # fmt: skip
        if pair is None:
            return groups
        groups = [group for group in groups if group not in pair] + [pair[0] | pair[1]]


@settings(max_examples=80, deadline=None)
@given(st.lists(
    st.tuples(st.integers(0, CONTENTS - 1), st.integers(0, COPIES - 1), st.integers(0, 4), st.sampled_from(LABELS)),
    max_size=14, unique_by=lambda each: each[:2]))  # fmt: skip
def test_no_film_and_no_patient_is_ever_on_two_sides(copied: Path, drawn: list[tuple[int, int, int, str]]) -> None:
    """Against connected components: people who share a film are one, films with one class stay, others do not."""
    rows = [Row(copied / f"{content}-{copy}.png", label, f"p{who}", "s") for content, copy, who, label in drawn]
    # so that both classes of A have one
    rows += [Row(copied / f"{CONTENTS}-0.png", "covid19", "q1", "s")]
    rows += [Row(copied / f"{CONTENTS + 1}-0.png", "pneumonia", "q2", "s")]
    made = compose("A", rows)
    content = {row.path: row.path.name.split("-")[0] for row in rows}
    by_content: dict[str, list[Row]] = {}
    for row in rows:
        by_content.setdefault(content[row.path], []).append(row)
    edges = [(a.patient, b.patient) for same in by_content.values() for a, b in combinations(same, 2)]
    groups = components(edges, {row.patient for row in rows})
    classes = {
        name: {{"covid19": "covid19", "healthy": "healthy"}.get(row.label, "pneumonia") for row in same
               if not (row.label == "pneumonia" and {other.label for other in same} != {"pneumonia"})}
        for name, same in by_content.items()
    }  # fmt: skip
    expected = {name: next(iter(found)) for name, found in classes.items() if len(found) == 1 and found != {"healthy"}}
    assert {content[row.path]: row.label for row in made.rows} == expected
    assert len(made.rows) == len(expected)
    for row in made.rows:
        (group,) = [group for group in groups if by_content[content[row.path]][0].patient in group]
        assert row.patient == min(group)


def test_a_label_nobody_knows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*films(tmp_path, "cohen", "covid19", 1), *films(tmp_path, "nih", "Pneumonia", 1, 50)]
    write_manifest(tmp_path / "m.csv", rows)
    error = refused(capsys, tmp_path, "compose", "A", str(tmp_path / "m.csv"))
    assert "label 'Pneumonia' is not known here; known are covid19, viral_pneumonia" in error
    assert "is a folder" in refused(capsys, tmp_path, "compose", "A", str(tmp_path))
    assert "gone.csv" in refused(capsys, tmp_path, "compose", "A", str(tmp_path / "gone.csv"))


def test_only_the_papers_sources(tmp_path: Path) -> None:
    rows = [*films(tmp_path, "cohen", "covid19", 3), *films(tmp_path, "cohen", "pneumonia", 3, 20),
            *films(tmp_path, "nih", "pneumonia", 3, 40), *films(tmp_path, "figure1", "covid19", 3, 60)]  # fmt: skip
    made = compose("A", rows, paper_sources=True)
    assert Counter((row.label, row.source) for row in made.rows) == {("covid19", "cohen"): 3, ("pneumonia", "nih"): 3}
    assert any("gives its class away" in line for line in made.warnings)
    assert compose("A", rows).counts() == {"covid19": 6, "pneumonia": 6}
    with pytest.raises(DataError, match="the paper names no source"):
        compose("C", rows, paper_sources=True)
    with pytest.raises(DataError, match=r"none .* has an image of healthy from v7-cohen or v7-kermany or nih"):
        compose("B", [*films(tmp_path, "v7-cohen", "covid19", 2, 80), *rows], paper_sources=True)


def lines_of(*counts: tuple[str, str, int], patients: int = 10**6) -> list[Row]:
    """Rows without files: so many of a source and label, of at most so many patients."""
    return [
        Row(Path(f"{source}-{label}-{number}.png"), label, f"{source}:{number % patients}", source)
        for source, label, count in counts
        for number in range(count)
    ]


def test_what_the_source_tells_of_each_class() -> None:
    """By hand: of A's films 20 of 20 covid19 and 5 of 100 others are of cohen; (1 + 0.95) / 2 = 0.975."""
    told = told_by_source(lines_of(("cohen", "covid19", 20), ("nih", "pneumonia", 95), ("cohen", "pneumonia", 5)))
    assert told == {"covid19": pytest.approx(0.975), "pneumonia": pytest.approx(0.975)}
    even = lines_of(*((source, label, 20) for source in ("cohen", "nih") for label in ("covid19", "pneumonia")))
    assert told_by_source(even) == {"covid19": 0.5, "pneumonia": 0.5}
    # three classes: covid19 has all of cohen; each of the others is half of what is not covid19
    three = lines_of(("cohen", "covid19", 30), ("nih", "pneumonia", 40), ("nih", "healthy", 40))
    assert told_by_source(three) == {
        "covid19": 1.0, "pneumonia": pytest.approx((1 + 3 / 7) / 2), "healthy": pytest.approx((1 + 3 / 7) / 2),
    }  # fmt: skip
    # hospitals of one patient each tell nothing, although each has one class
    own = [Row(Path(f"{n}.png"), ("covid19", "healthy")[n % 2], f"p{n}", f"hospital {n}") for n in range(40)]
    assert told_by_source(own) == {"covid19": 0.5, "healthy": 0.5}
    assert told_by_source(lines_of(("cohen", "covid19", 9))) == {}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(5, 9)), min_size=1, max_size=6))
def test_no_rule_by_source_does_better(counts: list[tuple[str, str, int]]) -> None:
    """Against all four rules that two sources allow."""
    rows = lines_of(*counts)
    for label, accuracy in told_by_source(rows).items():
        rules = [{"a": one, "b": other} for one in (False, True) for other in (False, True)]
        scores = [
            np.mean([rule[row.source] for row in rows if row.label == label]) / 2
            + np.mean([not rule[row.source] for row in rows if row.label != label]) / 2
            for rule in rules
        ]
        assert accuracy == pytest.approx(max(scores))


def test_the_localization_set_is_of_films_that_are_drawn_on(tmp_path: Path) -> None:
    covid, sick, plain = (films(tmp_path, source, label, 3, 20 * n) for n, (source, label) in enumerate(
        (("bimcv", "covid19"), ("nih", "pneumonia"), ("nih", "covid19"))))  # fmt: skip
    mask = image(tmp_path / "mask.png", 90, 16)
    covid = [Row(row.path, row.label, row.patient, row.source, mask=mask) for row in covid]
    sick = [Row(row.path, row.label, row.patient, row.source, boxes=((1.0, 2.0, 3.0, 4.0),)) for row in sick]
    write_manifest(tmp_path / "all.csv", [*covid, *sick, *plain])
    out = tmp_path / "sets" / "localization.csv"
    assert main(["data", "compose", "localization", str(tmp_path / "all.csv"), "--out", str(out)]) == 0
    records = read_manifest(out).records
    assert Counter(record.label for record in records) == {"covid19": 3, "pneumonia": 3}
    assert {record.mask and record.mask.resolve() for record in records} == {mask, None}
    assert read_rows(out) == sorted(
        [Row(r.path, r.label, r.patient, r.source, r.boxes, mask=r.mask) for r in records], key=lambda row: row.path
    )
    assert compose("localization", sick).counts() == {"covid19": 0, "pneumonia": 3}
    with pytest.raises(DataError, match="an image with a box or a mask"):
        compose("localization", plain)


def test_a_written_manifest_is_read_back_as_it_was(tmp_path: Path) -> None:
    (plain, drawn) = films(tmp_path, "nih", "pneumonia", 2)
    mask = image(tmp_path / "masks" / "m.png", 5, 16)
    rows = [
        Row(plain.path, "pneumonia", 'nih:"1", 2', "nih", ((1.5, 2.0, 3.25, 4.0), (0.0, 0.0, 1.0, 1.0)), "PA", "50"),
        Row(drawn.path, "healthy", "nih:3", "", (), "AP", "", "F", "No Finding, so to speak", mask),
    ]
    write_manifest(tmp_path / "deep" / "m.csv", reversed(rows))
    header = (tmp_path / "deep" / "m.csv").read_text().splitlines()[0]
    assert header == ",".join(COLUMNS) == "path,label,patient,source,x,y,w,h,mask,view,age,sex,finding"
    again = read_rows(tmp_path / "deep" / "m.csv")
    assert [
        Row(r.path.resolve(), r.label, r.patient, r.source, r.boxes, r.view, r.age, r.sex, r.finding,
            r.mask and r.mask.resolve()) for r in again
    ] == rows  # fmt: skip


def test_data_set_a_of_real_films_has_the_papers_counts(
    cxr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.csv"
    command = ["data", "compose", "A", str(cxr / "dataset_b.csv"), "--paper-sources", "--out", str(out)]
    assert main([*command]) == 0
    said = capsys.readouterr()
    assert "covid19                   426     90      90" in said.out
    assert "pneumonia                 424    168     168" in said.out
    assert "gives its class away" in said.err
    assert "there are no more" not in said.err
    first = out.read_bytes()
    assert main([*command, "--force"]) == 0
    assert out.read_bytes() == first
    assert main([*command, "--force", "--seed", "1"]) == 0
    assert out.read_bytes() != first
    manifest = read_manifest(out)
    assert Counter((r.label, r.source) for r in manifest.records) == {
        ("covid19", "cohen"): 90,
        ("pneumonia", "nih"): 168,
    }
    folds = make_folds(manifest, 5, seed=0)
    sides = {(record.patient, folds.assignment[record.patient]) for record in manifest.records}
    assert len(sides) == len({patient for patient, _ in sides})


def test_data_set_c_of_real_films_says_what_it_lacks(
    cxr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "compose", "C", str(cxr / "dataset_c.csv"), "--out", str(tmp_path / "c.csv")]) == 0
    said = capsys.readouterr()
    for label, (wanted, _) in TABLE_1["C"].items():
        assert f"of {wanted} images, there are no more" in said.err, label
    # of cohen are 426 of 426 covid19 and 71 of 1028 others: (1 + 957 / 1028) / 2
    assert "from the others, with a balanced accuracy of: " in said.err
    assert "covid19 0.97" in said.err
