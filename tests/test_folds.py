"""Folds and splits: every promise re-checked by plain counting over random manifests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from magsd.data import Manifest, Record, read_manifest
from magsd.folds import Folds, load_folds, make_folds
from magsd_runtime.errors import DataError, UsageError


def manifest_of(rows: list[tuple[str, str, int]]) -> Manifest:
    """A manifest from (patient, label, number of images)."""
    records = [
        Record(Path(f"{patient}_{label}_{n}.png"), label, patient)
        for patient, label, count in rows
        for n in range(count)
    ]
    return Manifest(Path("."), tuple(records), Path("m.csv"))


@st.composite
def manifests(draw: st.DrawFn, two_labels: bool = True) -> Manifest:
    rows = []
    for label in "abcd"[: draw(st.integers(2, 4))]:
        counts = draw(st.lists(st.integers(1, 9), min_size=2, max_size=25))
        rows += [(f"{label}{index}", label, count) for index, count in enumerate(counts)]
    if two_labels:
        for name in draw(st.lists(st.sampled_from([row[0] for row in rows]), max_size=5, unique=True)):
            other = draw(st.sampled_from(sorted({label for _, label, _ in rows})))
            if name[0] != other:
                rows.append((name, other, draw(st.integers(1, 4))))
    return manifest_of(draw(st.permutations(rows)))


def patients_of(manifest: Manifest) -> dict[str, set[str]]:
    """Patients of each class."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in manifest.records:
        found[record.label].add(record.patient)
    return found


@settings(deadline=None, max_examples=150)
@given(manifests(), st.integers(2, 6), st.integers(0, 5))
def test_each_class_is_in_each_fold_and_evenly(manifest: Manifest, n_folds: int, seed: int) -> None:
    classes = patients_of(manifest)
    single = {
        k: {p for p in names if sum(p in other for other in classes.values()) == 1} for k, names in classes.items()
    }
    assume(all(len(names) >= n_folds for names in single.values()))
    folds = make_folds(manifest, n_folds, seed)
    assert folds.assignment.keys() == {record.patient for record in manifest.records}
    assert set(folds.assignment.values()) <= set(range(n_folds))
    largest = {
        label: max(Counter(r.patient for r in manifest.records if r.label == label).values()) for label in classes
    }
    mixed = max(len(names - single[label]) for label, names in classes.items())
    for label, names in classes.items():
        patients = Counter(folds.assignment[name] for name in names)
        images = Counter(folds.assignment[r.patient] for r in manifest.records if r.label == label)
        counts = [patients[fold] for fold in range(n_folds)]
        assert min(counts) >= 1
        if mixed == 0:  # without two-class patients the deal is exactly even
            assert max(counts) - min(counts) <= 1
            assert max(images.values()) - min(images.values()) <= 2 * largest[label]


def test_single_class_patients_even_out_what_the_others_leave() -> None:
    rows = [(f"{label}{n}", label, 1) for label in "abc" for n in range(2)]
    rows += [(f"{pair}", label, 1) for pair in ("ab", "ac", "bc") for label in pair]
    manifest = manifest_of(rows)
    for seed in range(10):
        folds = make_folds(manifest, 2, seed)
        for names in patients_of(manifest).values():
            assert sum(folds.assignment[name] for name in names) == 2


def test_validation_never_takes_a_class_from_training() -> None:
    chain = [(name, label, 1) for name, labels in (("p", "ac"), ("q", "ab"), ("r", "bc")) for label in labels]
    manifest = manifest_of([*chain, *((f"t{label}", label, 1) for label in "abc")])
    folds = Folds(0, 2, {"p": 0, "q": 0, "r": 0, "ta": 1, "tb": 1, "tc": 1})
    for seed in range(20):
        split = folds.split(manifest, 1, validation_fraction=0.5, seed=seed)
        assert {manifest.records[index].label for index in split.train} == {"a", "b", "c"}
        assert len(split.validation)


@settings(deadline=None, max_examples=150)
@given(manifests(), st.integers(2, 5), st.integers(0, 3), st.sampled_from([0.1, 0.2, 0.5, 0.9]))
def test_a_split_keeps_patients_whole_and_every_class_everywhere(
    manifest: Manifest, n_folds: int, seed: int, fraction: float
) -> None:
    assume(all(len(names) >= n_folds for names in patients_of(manifest).values()))
    folds = make_folds(manifest, n_folds, seed)
    tested: list[int] = []
    for fold in range(n_folds):
        split = folds.split(manifest, fold, validation_fraction=fraction, seed=seed)
        parts = [split.train, split.validation, split.test]
        assert all(part.dtype == np.int64 for part in parts)
        assert all((np.diff(part) > 0).all() for part in parts)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(manifest.records)))
        names = [{manifest.records[index].patient for index in part} for part in parts]
        assert not names[0] & names[1]
        assert not names[0] & names[2]
        assert not names[1] & names[2]
        tested += split.test.tolist()
        assert {folds.assignment[name] for name in names[2]} <= {fold}
        rest = names[0] | names[1]
        of_class = {label: members & rest for label, members in patients_of(manifest).items()}
        for members in of_class.values():
            assert not members or members & names[0], "training never loses a class"
            own = {name for name in members if sum(name in other for other in of_class.values()) == 1}
            if len(own) >= 2 and own == members:
                assert members & names[1], "validation has every class with two patients"
                wanted = min(max(1, int(fraction * len(members) + 0.5)), len(members) - 1)
                assert len(members & names[1]) == wanted
    assert sorted(tested) == list(range(len(manifest.records)))


@settings(deadline=None, max_examples=40)
@given(manifests(), st.integers(0, 9), st.randoms())
def test_neither_order_nor_file_names_change_the_folds(manifest: Manifest, seed: int, random) -> None:
    assume(all(len(names) >= 2 for names in patients_of(manifest).values()))
    shuffled = list(manifest.records)
    random.shuffle(shuffled)
    other = Manifest(Path("elsewhere"), tuple(Record(Path("x") / r.path, r.label, r.patient) for r in shuffled))
    one, two = make_folds(manifest, 2, seed), make_folds(other, 2, seed)
    assert one == two
    for fold in (0, 1):
        a = one.split(manifest, fold, validation_fraction=0.3, seed=seed)
        b = two.split(other, fold, validation_fraction=0.3, seed=seed)
        for part in ("train", "validation", "test"):
            names = {manifest.records[index].path.name for index in getattr(a, part)}
            assert names == {other.records[index].path.name for index in getattr(b, part)}


EXAMPLE = [(f"{'ab'[n % 3 == 0]}{n:02d}", "ab"[n % 3 == 0], 1 + n % 4) for n in range(40)] + [("a01", "b", 2)]


def test_the_same_in_every_process_and_other_with_another_seed() -> None:
    code = (
        "import json, sys; sys.path[:0] = json.loads(sys.argv[1]);"
        "from test_folds import EXAMPLE, manifest_of; from magsd.folds import make_folds;"
        "m = manifest_of(EXAMPLE); f = make_folds(m, 5, 3); s = f.split(m, 1, validation_fraction=0.2, seed=3);"
        "print(json.dumps([f.assignment, s.train.tolist(), s.validation.tolist()]))"
    )
    results = [
        subprocess.run(
            [sys.executable, "-c", code, json.dumps([str(Path(__file__).parent), *sys.path])],
            capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"},
        ).stdout
        for seed in ("0", "77")
    ]  # fmt: skip
    assert results[0] == results[1]
    manifest = manifest_of(EXAMPLE)
    assert json.loads(results[0])[0] == make_folds(manifest, 5, 3).assignment
    assert make_folds(manifest, 5, 3) != make_folds(manifest, 5, 4)
    folds = make_folds(manifest, 5, 3)
    parts = {tuple(folds.split(manifest, 1, validation_fraction=0.2, seed=seed).validation) for seed in range(6)}
    assert len(parts) > 1


def test_the_folds_are_frozen() -> None:
    """Published runs name their seed: the same seed must give the same folds in later versions too."""
    folds = make_folds(manifest_of([(f"p{n}", "ab"[n % 2], 1) for n in range(12)]), 3, 7)
    assert "".join(str(folds.assignment[f"p{n}"]) for n in range(12)) == "221200011120"


@settings(deadline=None, max_examples=30)
@given(manifests(two_labels=False), st.data())
def test_patients_named_together_share_a_fold(manifest: Manifest, data) -> None:
    names = sorted({record.patient for record in manifest.records})
    assume(all(len(members) >= 2 for members in patients_of(manifest).values()))
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(names)), max_size=12))
    folds = make_folds(manifest, 2, 0, together=pairs)
    groups = {name: {name} for name in names}
    for one, other in pairs:
        joined = groups[one] | groups[other]
        for name in joined:
            groups[name] = joined
    for group in groups.values():
        assert len({folds.assignment[name] for name in group}) == 1
    assert folds.assignment.keys() == set(names)


def test_saved_folds_serve_another_manifest_of_the_same_patients(tmp_path: Path) -> None:
    manifest = manifest_of([*EXAMPLE, ("müller, ä", "a", 1)])
    folds = make_folds(manifest, 4, 1)
    folds.save(tmp_path / "folds.json")
    assert load_folds(tmp_path / "folds.json") == folds == Folds.load(tmp_path / "folds.json")
    fewer = Manifest(Path("."), tuple(r for r in manifest.records if r.label == "a" or r.patient == "b03"))
    again = load_folds(tmp_path / "folds.json", fewer)
    test = again.split(fewer, 2, validation_fraction=0.2, seed=0).test
    assert {fewer.records[i].patient for i in test} == {
        r.patient for r in fewer.records if folds.assignment[r.patient] == 2
    }
    more = manifest_of([*EXAMPLE, ("stranger", "a", 1), ("unknown", "b", 1)])
    with pytest.raises(DataError, match=r"2 patients of the manifest in no fold \(first: stranger\)"):
        load_folds(tmp_path / "folds.json", more)
    with pytest.raises(DataError, match="in no fold"):
        folds.split(more, 0, validation_fraction=0.2, seed=0)


GOOD = {"schema": "magsd.folds/1", "seed": 0, "n_folds": 2, "patients": {"p": 0, "q": 1}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no folds.json"),
        ("[]", "no folds.json"),
        ("null", "no folds.json"),
        ("{}", "no folds.json.*schema"),
        ("[" * 100_000, "no folds.json"),
        (json.dumps({**GOOD, "schema": "magsd.folds/2"}), "schema is 'magsd.folds/2', expected 'magsd.folds/1'"),
        (json.dumps({**GOOD, "patients": {"p": 2}}), r"1 patient beyond fold 1 \(first: p\)"),
        (json.dumps({**GOOD, "patients": {"p": -1}}), "1 patient beyond fold 1"),
        (json.dumps({**GOOD, "patients": {"p": 0.5}}), "not whole numbers"),
        (json.dumps({**GOOD, "patients": {"p": True}}), "not whole numbers"),
        (json.dumps({**GOOD, "patients": {"p": [0]}}), "no folds.json"),
        (json.dumps({**GOOD, "patients": ["p"]}), "no folds.json"),
        (json.dumps({**GOOD, "n_folds": 1, "patients": {}}), "n_folds is less than 2"),
        (json.dumps(GOOD).replace('"q"', '"p"'), r"given twice \(first: p\): a patient has one fold"),
        (json.dumps(GOOD).encode("utf-16"), "no folds.json"),
    ],
)
def test_a_fold_file_that_cannot_be_used(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "folds.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        load_folds(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fold_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_folds(tmp_path / "folds.json")


def test_too_few_patients_and_wrong_numbers() -> None:
    manifest = manifest_of([("p0", "a", 9), ("p1", "a", 1), *((f"q{n}", "b", 1) for n in range(5))])
    with pytest.raises(DataError, match=r"m\.csv: too few patients for 5 folds \(a has 2 patients\)"):
        make_folds(manifest, 5, 0)
    with pytest.raises(DataError, match="one class only"):
        make_folds(manifest_of([("p0", "a", 9)]), 2, 0)
    with pytest.raises(UsageError, match="n_folds is 1"):
        make_folds(manifest, 1, 0)
    folds = make_folds(manifest, 2, 0)
    with pytest.raises(UsageError, match="fold is 2: expected 0 to 1"):
        folds.split(manifest, 2)
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(UsageError, match="validation_fraction"):
            folds.split(manifest, 0, validation_fraction=fraction)


@pytest.mark.data
@pytest.mark.parametrize("name", ["dataset_a", "dataset_b", "dataset_c"])
def test_the_real_data_sets_are_dealt_evenly(cxr: Path, name: str) -> None:
    manifest = read_manifest(cxr / f"{name}.csv")
    labels = manifest.label_indices()
    whole = np.bincount(labels) / len(labels)
    folds = make_folds(manifest, 5, 0)
    for fold in range(5):
        split = folds.split(manifest, fold, validation_fraction=0.2, seed=0)
        for part, tolerance in ((split.test, 0.03), (split.train, 0.03), (split.validation, 0.07)):
            share = np.bincount(labels[part], minlength=len(whole)) / len(part)
            np.testing.assert_allclose(share, whole, atol=tolerance)
        assert abs(len(split.test) / len(labels) - 0.2) < 0.015
