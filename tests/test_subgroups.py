"""Figures of subgroups and of folds, against counting film by film and pair by pair."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import subgroups
from magsd.data import Record
from magsd.evaluation_output import predictions_csv
from magsd.metrics import patient_weights
from magsd.predictors import BUNDLE_FOLD, Predictions
from magsd_runtime.errors import DataError, UsageError
from scores import log_odds
from subgroups import Facts, age_group, group_figures, group_names, read_evaluations, read_facts, sex_group, view_group
from table_3 import TABLE_3, folds_table, over_folds

CLASSES = ("covid19", "healthy", "pneumonia")
COLUMNS = ["path", "label", "patient", "source", "view", "age", "sex"]


def made_up(folder: Path, *, films: int = 90, patients: int = 40, models: int = 2, seed: int = 0) -> Predictions:
    """Random films; probabilities of one digit, so that many are equal, and labels that they tell something of."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, films)
    probabilities = rng.dirichlet([1, 1, 1], films) + 0.7 * np.eye(3)[labels]
    probabilities = np.round(probabilities / probabilities.sum(axis=1, keepdims=True), 1) + 0.01
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    records = tuple(
        Record(folder / f"{n}.png", CLASSES[label], f"p{rng.integers(patients)}", ("cohen", "nih")[n % 3 == 0])
        for n, label in enumerate(labels)
    )
    return Predictions(CLASSES, records, rng.integers(0, models, films), probabilities)


def plain(rows: Sequence[tuple[str, int, np.ndarray]], positive: int) -> dict[str, float]:
    """Every figure of (label, model, probabilities) lines, from its words; those not defined are left out."""
    true = [CLASSES.index(label) for label, _, _ in rows]
    called = [int(np.argmax(row)) for _, _, row in rows]
    found: dict[str, float] = {"accuracy": sum(t == c for t, c in zip(true, called)) / len(rows)}
    with_it = [c == positive for t, c in zip(true, called) if t == positive]
    without = [c != positive for t, c in zip(true, called) if t != positive]
    if with_it:
        found["sensitivity"] = sum(with_it) / len(with_it)
    if without:
        found["specificity"] = sum(without) / len(without)
    areas = {}
    for index in range(3):
        # once for all: of one row alone the log odds are those of the row among others
        scores = log_odds(np.stack([row for _, _, row in rows]), index)
        wins = pairs = 0.0
        for one in range(len(rows)):
            for other in range(len(rows)):
                if true[one] == index and true[other] != index and rows[one][1] == rows[other][1]:
                    pairs += 1
                    wins += 1.0 if scores[one] > scores[other] else 0.5 if scores[one] == scores[other] else 0.0
        if pairs:
            areas[index] = wins / pairs
    if positive in areas:
        found["auc"] = areas[positive]
    if len(areas) == 3:
        found["macro_auc"] = sum(areas.values()) / 3
    return found


@pytest.mark.parametrize(("seed", "models"), [(0, 1), (1, 2), (2, 4)])
def test_figures_are_counted(tmp_path: Path, seed: int, models: int) -> None:
    part, resamples = made_up(tmp_path, seed=seed, models=models), 12
    lines = [
        (record.patient, (record.label, int(model), row))
        for record, model, row in zip(part.records, part.folds, part.probabilities)
    ]
    people = sorted({patient for patient, _ in lines})
    drawn: dict[str, list[float]] = {}
    for weights in np.concatenate(list(patient_weights(len(people), len(lines), resamples=resamples, seed=3))):
        often = dict(zip(people, weights))
        resample = [row for patient, row in lines for _ in range(int(often[patient]))]
        for name, value in plain(resample, 0).items():
            drawn.setdefault(name, []).append(value)
    found = group_figures(part, "covid19", resamples=resamples, seed=3)
    expected = plain([row for _, row in lines], 0)
    assert set(found) == set(expected) == set(subgroups.FIGURES)
    for name, figure in found.items():
        assert figure is not None
        assert figure["value"] == pytest.approx(expected[name])
        assert figure["ci95"] == pytest.approx(np.percentile(drawn[name], [2.5, 97.5]))


def counted(tmp_path: Path, films_of: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any] | None]:
    """Figures of (patient, label) films of one model, every third of them wrong."""
    records = tuple(Record(tmp_path / f"{n}.png", label, who) for n, (who, label) in enumerate(films_of))
    wrong = [(CLASSES.index(record.label) + (n % 3 == 0)) % 3 for n, record in enumerate(records)]
    rows = np.eye(3)[wrong] * 0.7 + 0.1
    part = Predictions(CLASSES, records, np.zeros(len(records), np.int64), rows)
    return group_figures(part, "covid19", resamples=20, seed=0)


def by_the_rule(rows: Sequence[dict[str, str]]) -> set[str]:
    """The figures that a group of manifest lines may have."""

    def enough(label: str, among: bool) -> bool:
        return len({row["patient"] for row in rows if (row["label"] == label) == among}) >= 10

    if len(rows) < 20 or len({row["patient"] for row in rows}) < 10:
        return set()
    with_it, without = enough("covid19", True), enough("covid19", False)
    asked = {"accuracy": True, "sensitivity": with_it, "specificity": without, "auc": with_it and without}
    asked["macro_auc"] = all(enough(label, among) for label in CLASSES for among in (True, False))
    return {name for name, may in asked.items() if may}


def given_figures(figures: dict[str, dict[str, Any] | None]) -> set[str]:
    return {name for name, figure in figures.items() if figure is not None}


def test_few_films_or_patients_give_no_figure(tmp_path: Path) -> None:
    def films(count: int, patients: int, label: str = "covid19") -> list[tuple[str, str]]:
        return [(f"{label}{n % patients}", label) for n in range(count)]

    assert given_figures(counted(tmp_path, films(19, 19))) == set()
    assert given_figures(counted(tmp_path, films(20, 9))) == set()
    assert given_figures(counted(tmp_path, films(20, 10))) == {"accuracy", "sensitivity"}
    nine, ten = films(12, 9, "healthy"), films(12, 10, "healthy")
    assert given_figures(counted(tmp_path, films(20, 10) + nine)) == {"accuracy", "sensitivity"}
    assert given_figures(counted(tmp_path, films(20, 10) + ten)) == {"accuracy", "sensitivity", "specificity", "auc"}
    assert given_figures(counted(tmp_path, films(30, 30, "healthy"))) == {"accuracy", "specificity"}
    all_three = films(20, 10) + ten + films(10, 10, "pneumonia")
    assert given_figures(counted(tmp_path, all_three)) == set(subgroups.FIGURES)


def test_films_of_different_models_are_no_pair(tmp_path: Path) -> None:
    records = tuple(Record(tmp_path / f"{n}.png", CLASSES[n % 2], f"p{n}") for n in range(24))
    rows = np.tile([0.5, 0.3, 0.2], (24, 1))
    apart = Predictions(CLASSES, records, np.arange(24) % 2, rows)
    assert group_figures(apart, "covid19", resamples=20, seed=0)["auc"] is None
    # a model that is surer of everything takes nothing from one that ranks its own films well
    shift = np.arange(24) // 2 % 2
    rows = np.stack([np.where(np.arange(24) % 2, 0.1, 0.2) + 0.5 * shift, np.full(24, 0.1), np.full(24, 0.1)], axis=1)
    figure = group_figures(Predictions(CLASSES, records, shift, rows), "covid19", resamples=20, seed=0)["auc"]
    assert figure == {"value": 1.0, "ci95": [1.0, 1.0]}


@given(st.floats(0, 120, allow_nan=False), st.sampled_from(["", "Y", " y"]))
@settings(max_examples=60, deadline=None)
def test_age_group(years: float, unit: str) -> None:
    years = round(years, 2)
    expected = "under 18" if years < 18 else "18-39" if years < 40 else "40-64" if years < 65 else "65 and over"
    assert age_group(f"{years}{unit}") == expected


def test_groups_of_words() -> None:
    ages = {"058Y": "40-64", "011M": "under 18", "480M": "40-64", "100W": "under 18", "003D": "under 18"}
    ages |= {"17.9": "under 18", "18": "18-39", "39.9": "18-39", "40": "40-64", "64": "40-64", "65": "65 and over"}
    nothing = ["", " ", "414", "121", "-3", "nan", "inf", "20s", "18-39", "Y", "5X"]
    assert {text: age_group(text) for text in ages} == ages
    assert {age_group(text) for text in nothing} == {"unknown"}
    views = {"PA": "PA", "AP Supine": "AP", "ap erect": "AP", "L": "other", "APX": "other", " ": "unknown"}
    assert {text: view_group(text) for text in views} == views
    sexes = {"F": "female", "male": "male", " m ": "male", "": "unknown", "O": "unknown"}
    assert {text: sex_group(text) for text in sexes} == sexes


def written(folder: Path, predictions: Predictions, seed: int = 5) -> tuple[Path, list[dict[str, str]]]:
    """Two evaluation folders, a and b, and manifest.csv with paths relative to it; its path and its rows."""
    rng = np.random.default_rng(seed)
    half = np.arange(len(predictions.records)) < len(predictions.records) // 2
    for name, rows in (("a", half), ("b", ~half)):
        (folder / name).mkdir(parents=True)
        (folder / name / "predictions.csv").write_text(predictions_csv(predictions.select(rows)))
    rows = [
        {
            "path": record.path.relative_to(folder).as_posix(), "label": record.label, "patient": record.patient,
            "source": record.source, "view": str(rng.choice(["PA", "AP", "AP Supine", "L", ""])),
            "age": str(rng.choice(["4", "30", "64", "65", "", "999"])), "sex": str(rng.choice(["M", "F", ""])),
        }
        for record in predictions.records
    ]  # fmt: skip
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8-sig") as text:
        table = csv.DictWriter(text, COLUMNS)
        table.writeheader()
        table.writerows([*rows, rows[0]])  # a second line of a film, as for a second box
    return folder / "manifest.csv", rows


def test_the_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = made_up(tmp_path, films=120, models=1)
    manifest, rows = written(tmp_path, predictions)
    result = tmp_path / "result.json"
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--data", str(manifest), "--bootstrap", "20"]
    assert subgroups.main([*arguments, "--folds", "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(result.read_text())
    read = read_evaluations([tmp_path / "a", tmp_path / "b"])
    groups = {(row["dimension"], row["group"]): row for row in found["groups"]}
    tests: dict[tuple[str, str], Any] = {
        ("overall", "all"): lambda row: True,
        ("source", "cohen"): lambda row: row["source"] == "cohen",
        ("view", "AP"): lambda row: row["view"] in ("AP", "AP Supine"),
        ("view", "other"): lambda row: row["view"] == "L",
        ("age", "under 18"): lambda row: row["age"] == "4",
        ("age", "65 and over"): lambda row: row["age"] == "65",
        ("age", "unknown"): lambda row: row["age"] in ("", "999"),
        ("sex", "female"): lambda row: row["sex"] == "F",
    }
    for name, belongs in tests.items():
        part = [row for row in rows if belongs(row)]
        row = groups[name]
        assert row["films"] == row["predictions"] == len(part)
        assert row["patients"] == len({row["patient"] for row in part})
        assert row["positive_films"] == sum(row["label"] == "covid19" for row in part)
        lines = [(line["label"], int(n >= 60), read.probabilities[n]) for n, line in enumerate(rows) if belongs(line)]
        expected = plain(lines, 0)
        assert given_figures(row["figures"]) == by_the_rule(part)
        for figure in by_the_rule(part):
            assert row["figures"][figure]["value"] == pytest.approx(expected[figure])
    for dimension in ("source", "view", "age", "sex"):
        assert sum(row["films"] for (of, _), row in groups.items() if of == dimension) == 120
    assert len(groups) == 1 + 2 + 4 + 5 + 3
    assert printed.count("\n| source: ") == 2
    assert "| too few |" in printed
    assert "| paper, MAG-SD (Proposed) | 95.85±1.27 | 95.74±1.20 | 97.73±0.45 | 95.54±1.59 |  |  |" in printed
    assert "The data differ" in printed
    assert found["folds"]["models"] == 2

    assert subgroups.main([*arguments, "--source", "nih", "--json", str(result)]) == 0
    only = json.loads(result.read_text())["groups"]
    assert only[0]["films"] == groups["source", "nih"]["films"]
    assert [row["group"] for row in only if row["dimension"] == "source"] == ["nih"]
    assert subgroups.main([*arguments, "--source", "nih", "--source", "cohen", "--json", str(result)]) == 0
    assert json.loads(result.read_text())["groups"] == found["groups"]


def test_over_folds(tmp_path: Path) -> None:
    part = made_up(tmp_path, films=100, models=3)
    found = over_folds(part, resamples=20, seed=0)
    accuracy, sensitivity, errors = [], [], []
    for model in range(3):
        rows = np.flatnonzero(part.folds == model)
        right = [int(part.predicted[n] == part.labels[n]) for n in rows]
        accuracy.append(sum(right) / len(rows))
        of_class = [[good for good, n in zip(right, rows) if part.labels[n] == label] for label in range(3)]
        sensitivity.append(statistics.mean(sum(hits) / len(hits) for hits in of_class))
        confidence = [float(part.probabilities[n].max()) for n in rows]
        error = 0.0
        for number in range(15):
            inside = [k for k, p in enumerate(confidence) if number / 15 < p <= (number + 1) / 15]
            if inside:
                gap = statistics.mean(right[k] for k in inside) - statistics.mean(confidence[k] for k in inside)
                error += len(inside) / len(rows) * abs(gap)
        errors.append(error)
    for name, values in (("accuracy", accuracy), ("sensitivity", sensitivity), ("ece", errors)):
        assert found[name]["value"] == pytest.approx(statistics.mean(values))
        assert found[name]["std"] == pytest.approx(statistics.stdev(values))
    assert [fold["accuracy"] for fold in found["each"]] == pytest.approx(accuracy)
    shown = f"| {100 * statistics.mean(accuracy):.2f}±{100 * statistics.stdev(accuracy):.2f} | "
    table = folds_table(found, "A")
    assert "100 films, 3 models " + shown in table
    assert table.count("\n| paper, ") == len(TABLE_3["A"]) == len(TABLE_3["B"])
    one = folds_table(over_folds(part.select(part.folds == 0), resamples=0, seed=0), "B")
    assert "One model only: no deviation" in one


def test_several_evaluations_are_several_models(tmp_path: Path) -> None:
    whole = made_up(tmp_path, films=30, models=2)
    bundle = Predictions(CLASSES, whole.records, np.full(30, BUNDLE_FOLD), whole.probabilities)
    for name, part in (("run", whole), ("bundle", bundle)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictions.csv").write_text(predictions_csv(part))
    joined = read_evaluations([tmp_path / "run", tmp_path / "bundle"])
    assert joined.folds.tolist() == [*whole.folds.tolist(), *[2] * 30]
    rows = subgroups.subgroups(joined, {"source": [record.source for record in joined.records]}, resamples=5)
    assert (rows[0]["films"], rows[0]["predictions"]) == (30, 60)
    assert "60 predictions in all" in subgroups.groups_table(rows, "covid19")
    other = Predictions(("a", "b", "c"), whole.records, whole.folds, whole.probabilities)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "predictions.csv").write_text(predictions_csv(other))
    with pytest.raises(DataError, match=r"other: classes a, b, c; those of .*run: covid19, healthy, pneumonia"):
        read_evaluations([tmp_path / "run", tmp_path / "other"])


def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = made_up(tmp_path, films=30)
    manifest, _ = written(tmp_path, predictions)
    facts = read_facts(manifest)
    first = predictions.records[0]
    key = str(first.path)
    with pytest.raises(DataError, match=f"lacks 1 of 30 predicted films, the first {key}"):
        group_names(predictions, {name: entry for name, entry in facts.items() if name != key})
    for wrong in (Facts("other", first.patient, "PA", "18-39", "male"), Facts(first.label, "x", "PA", "18-39", "male")):
        with pytest.raises(DataError, match="label or patient differ"):
            group_names(predictions, {**facts, key: wrong})
    with pytest.raises(UsageError, match="--positive is cat: the models know covid19, healthy, pneumonia"):
        subgroups.subgroups(predictions, group_names(predictions, facts), "cat", resamples=5)
    (tmp_path / "short.csv").write_text("path,label\na.png,covid19\n")
    with pytest.raises(DataError, match="the header lacks patient"):
        read_facts(tmp_path / "short.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_facts(tmp_path / "none.csv")
    arguments = [str(tmp_path / "a"), "--data", str(manifest), "--bootstrap", "5"]
    assert subgroups.main([*arguments, "--source", "elsewhere"]) == 2
    assert "subgroups: --source is elsewhere: there are cohen, nih" in capsys.readouterr().err


def test_unknown_labels_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = made_up(tmp_path, films=60)
    records = tuple(Record(r.path, "fracture" if n < 7 else r.label, r.patient, r.source)
                    for n, r in enumerate(predictions.records))  # fmt: skip
    manifest, _ = written(tmp_path, Predictions(CLASSES, records, predictions.folds, predictions.probabilities))
    result = tmp_path / "result.json"
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--data", str(manifest), "--bootstrap", "5"]
    assert subgroups.main([*arguments, "--json", str(result)]) == 0
    assert "7 predictions left out: the model does not know fracture" in capsys.readouterr().out
    assert json.loads(result.read_text())["groups"][0]["films"] == 53
