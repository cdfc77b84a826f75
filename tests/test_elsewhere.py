"""The stand-in for an unseen hospital: who is on which side, and the scores against counting pairs."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score

import elsewhere
import scores
from magsd.data import Record, read_manifest
from magsd.evaluation_output import predictions_csv
from magsd.metrics import patient_weights
from magsd.predictors import BUNDLE_FOLD, Predictions
from magsd_runtime.errors import DataError

DOMAINS = ("radiopaedia.org", "www.eurorad.org", "www.sirm.org", "link.springer.com", "a.org", "b.org", "c.org")
COLUMNS = ["path", "label", "patient", "source", "view", "age"]
CLASSES = ("covid19", "healthy", "pneumonia")


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as text:
        table = csv.DictWriter(text, COLUMNS if "label" in rows[0] else list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def data_root(folder: Path, seed: int = 0) -> Path:
    """Tables as the real ones, of made-up patients; cohen patient 0 has films of two groups."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    b, c, licences = [], [], []
    for number in range(60):
        patient = f"cohen:{number // 2}"
        path = f"images/cohen/{number:03d}.jpg"
        domain = DOMAINS[int(rng.integers(len(DOMAINS)))] if number > 1 else DOMAINS[number]
        row = {"path": path, "label": ("covid19", "pneumonia")[number % 3 == 0], "patient": patient, "source": "cohen"}
        b.append({**row, "view": "PA", "age": "50"})
        licences.append({"path": path, "url": f"https://{domain.upper()}/case/{number},x", "doi": ""})
        c.append({**row, "label": row["label"].replace("pneumonia", "viral_pneumonia"), "view": "PA", "age": "50"})
    for number in range(80):
        row = {"path": f"images/nih/{number:03d}.jpg", "label": ("healthy", "pneumonia")[number % 2], "source": "nih"}
        b.append({**row, "patient": f"nih:{number // 3}", "view": "AP", "age": ""})
    for number in range(60):
        label = ("healthy", "viral_pneumonia", "bacterial_pneumonia")[number % 3]
        row = {"path": f"images/kermany/{number:03d}.jpg", "label": label, "source": "kermany"}
        c.append({**row, "patient": f"kermany:{number // 2}", "view": "AP", "age": ""})
    order = rng.permutation(len(b))
    write_table(folder / "dataset_b.csv", [b[index] for index in order])
    write_table(folder / "dataset_c.csv", c)
    write_table(folder / "cohen_licences.csv", licences)
    return folder


def number_of(text: str) -> int:
    return int(hashlib.sha256(text.encode("utf-8")).hexdigest(), 16)


def made(root: Path, out: Path) -> dict[str, list[dict[str, str]]]:
    elsewhere.make(root, out)
    return {name: list(csv.DictReader(open(out / f"{name}.csv", newline=""))) for name in NAMES}


NAMES = ("train-0", "test-0", "train-1", "test-1")


def check_sides(parts: dict[str, list[dict[str, str]]]) -> None:
    """What must be true of any data."""
    for side in (0, 1):
        train, test = parts[f"train-{side}"], parts[f"test-{side}"]
        assert not {row["patient"] for row in train} & {row["patient"] for row in test}
        assert {row["source"] for row in train} == {"cohen", "nih"}
        assert {row["source"] for row in test} == {"cohen", "nih", "kermany"}
        assert {row["label"] for row in train + test} <= set(CLASSES)
        for row in train + test:
            held = number_of(row["patient"]) % {"nih": 5, "kermany": 3}.get(row["source"], 1)
            if row["source"] != "cohen":
                assert (row in test) == (held == (side if row["source"] == "nih" else 0))
    cohen = [[row["path"] for row in parts[name] if row["source"] == "cohen"] for name in NAMES]
    assert sorted(cohen[0]) == sorted(cohen[3])
    assert sorted(cohen[1]) == sorted(cohen[2])
    assert len(set(cohen[0] + cohen[1])) == len(cohen[0] + cohen[1])


def test_sides_are_disjoint_by_patient_and_complete(tmp_path: Path) -> None:
    parts = made(data_root(tmp_path / "data"), tmp_path / "out")
    check_sides(parts)
    assert len(parts["train-0"] + parts["test-0"]) == 60 + 80 + sum(
        number_of(f"kermany:{number // 2}") % 3 == 0 for number in range(60)
    )
    manifest = read_manifest(tmp_path / "out" / "test-1.csv")
    assert all(record.path.is_absolute() for record in manifest.records)
    assert manifest.records[0].path.is_relative_to(tmp_path / "data" / "images")
    assert list(parts["train-0"][0]) == [*COLUMNS, "domain"]


def test_a_patient_goes_with_the_group_of_its_first_film(tmp_path: Path) -> None:
    parts = made(data_root(tmp_path / "data"), tmp_path / "out")
    # film 0 of patient 0 is of radiopaedia (group 0), film 1 of eurorad (group 1)
    of_patient = [row for row in parts["test-0"] if row["patient"] == "cohen:0"]
    assert {row["domain"] for row in of_patient} == {"radiopaedia.org", "www.eurorad.org"}
    first: dict[str, str] = {}
    for row in sorted((row for part in parts.values() for row in part), key=lambda row: row["path"]):
        first.setdefault(row["patient"], row["domain"])
    for side in (0, 1):
        for row in parts[f"test-{side}"]:
            if row["source"] == "cohen":
                domain = first[row["patient"]]
                named = [domain in group for group in elsewhere.GROUPS]
                assert side == (named.index(True) if any(named) else number_of(domain) % 2)


def test_domains_of_the_brief_are_in_their_groups() -> None:
    for domain in ["radiopaedia.org", "www.sciencedirect.com", "link.springer.com", "www.nejm.org"]:
        assert elsewhere.domain_group(domain) == 0
    for domain in ["www.eurorad.org", "pubs.rsna.org", "www.sirm.org", "github.com", "www.ncbi.nlm.nih.gov"]:
        assert elsewhere.domain_group(domain) == 1
    assert {elsewhere.domain_group(f"{number}.org") for number in range(20)} == {0, 1}


def test_an_image_without_url_is_an_error(tmp_path: Path) -> None:
    root = data_root(tmp_path / "data")
    lines = (root / "cohen_licences.csv").read_text().splitlines()
    (root / "cohen_licences.csv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(DataError, match=r"has no url for images/cohen/059\.jpg"):
        elsewhere.make(root, tmp_path / "out")
    assert elsewhere.main(["make", "--out", str(tmp_path / "out"), "--data-root", str(tmp_path / "none")]) == 2


def by_pairs(positive: list[float], negative: list[float]) -> float | None:
    """AUC as the share of pairs in the right order; a tie is half."""
    wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    return sum(wins) / len(wins) if wins else None


def predictions(
    seed: int = 0, models: tuple[int, ...] = (BUNDLE_FOLD,), classes: tuple[str, ...] = CLASSES
) -> Predictions:
    """Of films of all three sources; probabilities are sixteenths, so that scores tie exactly."""
    rng = np.random.default_rng(seed)
    plan = [("cohen", label) for label in ("covid19", "covid19", "pneumonia", "healthy")] * 6
    plan += [("nih", label) for label in ("pneumonia", "healthy")] * 9
    plan += [("kermany", label) for label in ("pneumonia", "healthy")] * 8
    records = [
        Record(Path(f"{number:03d}.png"), label, f"{source}:{number // 2}", source)
        for number, (source, label) in enumerate(plan)
    ]
    count = len(classes)
    sixteenths = rng.multinomial(16 - count, [1 / count] * count, len(models) * len(records)) + 1
    folds = np.repeat(np.array(models, np.int64), len(records))
    return Predictions(classes, tuple(records) * len(models), folds, sixteenths / 16)


def expected(data: Predictions, question: str) -> float:
    """The question's AUC by counting pairs, the mean over the models."""

    def use(record: Record) -> tuple[bool, bool]:
        """Whether the film is asked about, and whether the answer is yes."""
        source, covid = record.source, record.label == "covid19"
        match question:
            case "o1":
                return source == "cohen", covid
            case "o2":
                return source == "kermany" or (source == "cohen" and covid), covid
            case "o4":
                return source == "nih" or (source == "cohen" and covid), covid
            case "o3":
                return source == "kermany", record.label == "pneumonia"
        return source == "nih", record.label == "pneumonia"

    areas = []
    for model in sorted(set(data.folds.tolist())):
        sides: dict[bool, list[float]] = {True: [], False: []}
        for record, fold, row in zip(data.records, data.folds, data.probabilities):
            used, positive = use(record)
            if used and fold == model:
                sides[positive].append(1 - row[1] if question in ("o3", "o5") else row[0])
        area = by_pairs(sides[True], sides[False])
        assert area is not None
        areas.append(area)
    return sum(areas) / len(areas)


@pytest.mark.parametrize("models", [(BUNDLE_FOLD,), (0, 2)])
def test_scores_count_pairs(models: tuple[int, ...]) -> None:
    data = predictions(3, models)
    found = elsewhere.score({"side 0": data}, resamples=40)
    result = found["evaluations"]["side 0"]
    for question in elsewhere.QUESTIONS:
        assert result[question]["value"] == pytest.approx(expected(data, question)), question
        low, high = result[question]["ci95"]
        assert low <= result[question]["value"] <= high
    mean = np.mean([result[question]["value"] for question in ("o1", "o2", "o3")])
    assert result["elsewhere"]["value"] == pytest.approx(mean)
    assert "mean" not in found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_questions_equal_an_independent_selection(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = predictions(seed)
    data = Predictions(data.classes, data.records, data.folds, rng.dirichlet(np.ones(3), len(data.records)))
    tasks = elsewhere.questions(data)
    for question in elsewhere.QUESTIONS:
        task = tasks[question]
        assert task is not None
        assert scores.auc(task, resamples=0)["value"] == pytest.approx(expected(data, question))


def test_the_mean_over_sides_draws_a_patient_once_for_all() -> None:
    """The interval of elsewhere equals one where patients are resampled over both sides and all three questions."""
    sides = {"0": predictions(1), "1": predictions(2)}
    found = elsewhere.score(sides, resamples=200)
    asked = [elsewhere.questions(data) for data in sides.values()]
    parts = [task for tasks in asked for name in ("o1", "o2", "o3") if (task := tasks[name]) is not None]
    means = [found["evaluations"][side]["elsewhere"]["value"] for side in sides]
    assert found["mean"]["elsewhere"]["value"] == pytest.approx(np.mean(means))

    names = sorted({name for task in parts for name in task.patients})
    rows = sum(len(task.positive) for task in parts)
    values = []
    for weights in np.concatenate(list(patient_weights(len(names), rows, resamples=200, seed=0))):
        of = dict(zip(names, weights))
        areas = []
        for task in parts:
            drawn = np.array([of[name] for name in task.patients])
            if drawn[task.positive].sum() and drawn[~task.positive].sum():
                areas.append(roc_auc_score(task.positive, task.scores, sample_weight=drawn))
        values.append(np.mean(areas))
    assert found["mean"]["elsewhere"]["ci95"] == pytest.approx(np.percentile(values, [2.5, 97.5]))


def test_what_cannot_be_asked_has_no_value() -> None:
    two_classes = predictions(classes=("covid19", "pneumonia"))
    without_healthy = elsewhere.score({"x": two_classes}, resamples=10)["evaluations"]["x"]
    assert [without_healthy[name] for name in ("o3", "o5", "elsewhere")] == [None] * 3
    assert without_healthy["o1"]["value"] is not None
    data = predictions()
    inside = data.select(np.array([record.source != "kermany" for record in data.records]))
    result = elsewhere.score({"x": inside}, resamples=10)
    assert result["evaluations"]["x"]["o2"]["value"] is None
    assert result["evaluations"]["x"]["elsewhere"] is None
    assert "-" in elsewhere.scores_table(result)
    json.dumps(result, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=30))
def test_auc_is_the_mean_over_the_models(rows: list[tuple[bool, int, int]]) -> None:
    task = scores.Task(
        np.array([row[0] for row in rows]), np.array([row[1] for row in rows], float),
        tuple(f"p{n // 2}" for n in range(len(rows))), np.array([row[2] for row in rows], np.int64),
    )  # fmt: skip
    sides: dict[int, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for positive, score, model in rows:
        sides[model][0 if positive else 1].append(score)
    areas = [by_pairs(*pair) for pair in sides.values()]
    found = scores.auc(task, resamples=5)["value"]
    if None in areas:
        assert found is None
    else:
        assert found == pytest.approx(np.mean([area for area in areas if area is not None]))
    # the mean over the models of two tasks: those of the first and those of the second
    both = scores.auc(scores.join([task, task]), resamples=0)["value"]
    assert both == (None if found is None else pytest.approx(found))


def test_log_odds_keep_the_order_that_six_digits_lose() -> None:
    logits = np.stack([np.linspace(-40, 40, 81), np.zeros(81)], axis=1)
    exact = np.exp(logits - logits.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    written = np.array([[float(f"{value:.6g}") for value in row] for row in exact])
    assert len(np.unique(written[:, 0])) < 81
    found = scores.log_odds(written, 0)
    assert (np.diff(found) > 0).all()
    assert found == pytest.approx(logits[:, 0], abs=1e-5)
    assert np.isfinite(scores.log_odds(np.array([[0.0, 1.0], [1.0, 0.0]]), 1)).all()


@pytest.mark.parametrize("models", [(BUNDLE_FOLD,), (0, 1)])
def test_predictions_are_read_as_they_were_written(tmp_path: Path, models: tuple[int, ...]) -> None:
    data = predictions(5, models)
    (tmp_path / "predictions.csv").write_text(predictions_csv(data))
    for path in (tmp_path, tmp_path / "predictions.csv"):
        found = scores.read_predictions(path)
        assert (found.classes, found.records) == (data.classes, data.records)
        np.testing.assert_array_equal(found.folds, data.folds)
        assert found.probabilities == pytest.approx(data.probabilities, rel=1e-5)


HEADER = "path,patient,source,fold,label,predicted,probability_a\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no predictions"),
        (HEADER, "holds no predictions"),
        ("a,b\n1,2\n", "is no predictions.csv"),
        (HEADER + "x,p,s,zero,a,a,1\n", "is no predictions.csv"),
        (HEADER + "x,p,s,0,a,a\n", "is no predictions.csv"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "predictions.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        scores.read_predictions(tmp_path)


def test_the_command_makes_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_root(tmp_path / "data")
    assert elsewhere.main(["make", "--out", str(tmp_path / "out"), "--data-root", str(root)]) == 0
    assert "kermany pneumonia" in capsys.readouterr().out
    folders = [tmp_path / "eval0", tmp_path / "eval1"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "predictions.csv").write_text(predictions_csv(predictions(number)))
    json_file = tmp_path / "scores.json"
    arguments: list[Any] = ["score", *folders, "--bootstrap", 20, "--json", json_file]
    assert elsewhere.main([str(value) for value in arguments]) == 0
    out = capsys.readouterr().out
    assert "mean of 2" in out
    assert "Research use only" in out
    result = json.loads(json_file.read_text())
    assert set(result["mean"]) == {*elsewhere.QUESTIONS, "elsewhere"}
    assert elsewhere.main(["score", str(tmp_path)]) == 2


def test_the_control_is_fitted_on_training_films_and_asked_about_test_films(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wide cohen films and square nih films in training: the control knows nih, and has no idea within cohen."""
    root = data_root(tmp_path / "data")
    rng = np.random.default_rng(9)
    for film in elsewhere.read_films(root):
        width = {"cohen": 96, "nih": 64, "kermany": 80}[film["source"]]
        Path(film["path"]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, width)).astype(np.uint8)).save(film["path"])
    assert elsewhere.main(["make", "--out", str(tmp_path / "out"), "--data-root", str(root)]) == 0
    found = elsewhere.control_predictions(tmp_path / "out")
    assert set(found) == {"logistic regression", "gradient boosting"}
    for sides in found.values():
        for side, data in sides.items():
            test = read_manifest(tmp_path / "out" / f"test-{side[-1]}.csv")
            assert data.records == test.records
            assert data.probabilities.sum(axis=1) == pytest.approx(1)
        scored = elsewhere.score(sides, resamples=10)["mean"]
        assert scored["o4"]["value"] > 0.95
        assert 0.2 < scored["o1"]["value"] < 0.8
    json_file = tmp_path / "control.json"
    assert elsewhere.main(["control", str(tmp_path / "out"), "--bootstrap", "5", "--json", str(json_file)]) == 0
    assert capsys.readouterr().out.count("mean of 2") == 2
    assert set(json.loads(json_file.read_text())) == set(found)
    assert elsewhere.main(["control", str(tmp_path)]) == 2


@pytest.mark.data
def test_real_films(cxr: Path, tmp_path: Path) -> None:
    parts = made(cxr, tmp_path)
    check_sides(parts)
    cohen = [row["path"] for row in parts["train-0"] + parts["test-0"] if row["source"] == "cohen"]
    assert len(cohen) == 526
    for rows in parts.values():
        assert {row["label"] for row in rows} == set(CLASSES)
        assert all(Path(row["path"]).is_file() for row in rows)
