"""benchmarks/uncertainty.py: nobody is judged by what was fitted on them, and its figures are those of the runtime."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import uncertainty as benchmark
from magsd_runtime.calibrating import Cases, calibrate
from magsd_runtime.calibration import probabilities

CLASSES = ("covid19", "healthy", "pneumonia")


def write(folder: Path, count: int = 600, *, seed: int = 0, first: int = 0, shift: float = 0.0) -> Path:
    """Films of patients with two films each; labels drawn from softmax(logits / 2), ``shift`` moves covid19's logit."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (count, 3))
    labels = (rng.random((count, 1)) > probabilities(logits, 2.0).cumsum(axis=1)[:, :-1]).sum(axis=1)
    logits[:, 0] += shift
    with open(folder / "predictions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "patient", "source", "label", *(f"logit_{name}" for name in CLASSES)])
        for number in range(count):
            patient, source = f"p{first + number // 2}", "ab"[number % 2]
            table.writerow([number, patient, source, CLASSES[labels[number]], *(f"{x:.8f}" for x in logits[number])])
    return folder


def test_coverage_is_that_of_the_calibration_and_near_what_was_asked(tmp_path: Path) -> None:
    folder = write(tmp_path / "eval")
    assert benchmark.main([str(folder), "--coverage", "0.8,0.9", "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    films = benchmark.read_films(folder)
    for one in result["coverages"]:
        known, _ = calibrate(
            Cases(films.classes, films.logits, films.labels, tuple(films.patients), "d" * 64),
            model_sha256="a" * 64, source="drawn", coverage=one["asked"],
        )  # fmt: skip
        assert known.sets is not None
        scores = known.sets.cross_validated
        assert scores is not None
        assert one["coverage"]["value"] == pytest.approx(scores.coverage)
        assert {name: part["value"] for name, part in one["per_class"].items()} == pytest.approx(
            dict(scores.coverage_per_class)
        )
        assert one["unsure"] == pytest.approx(1 - scores.alone)
        assert one["coverage"]["value"] == pytest.approx(one["asked"], abs=0.04)
        assert sum(one["sizes"]) == pytest.approx(1)
        assert one["label_right"]["ok"] > one["label_right"]["all"] > one["label_right"]["review"]
    lac = next(row for row in result["scores"] if row["score"] == "LAC" and row["by_class"])
    assert lac["coverage"] == pytest.approx(result["coverages"][1]["coverage"]["value"])
    assert result["curve"][-1]["accuracy"] == pytest.approx(result["coverages"][0]["label_right"]["all"])


def test_a_patient_elsewhere_takes_no_part_in_the_fit(tmp_path: Path) -> None:
    folder = write(tmp_path / "eval")
    test = write(tmp_path / "test", 200, seed=1, first=250, shift=-3)  # p250 to p349, 50 of them in eval
    found = benchmark.elsewhere(benchmark.read_films(folder), [benchmark.read_films(test)], 0.9, "covid19")
    assert found["fitted_on"] == [500]
    assert found["films"] == 200
    assert found["per_class"]["covid19"]["value"] < 0.8  # another hospital's logits: the coverage is gone


def test_sums_of_probabilities_by_hand() -> None:
    values = np.array([[0.2, 0.5, 0.3]])
    assert benchmark.conformity(values, "LAC").tolist() == [[0.2, 0.5, 0.3]]
    assert benchmark.conformity(values, "APS")[0] == pytest.approx([-1.0, -0.5, -0.8])
    assert benchmark.conformity(values, "RAPS")[0] == pytest.approx([-1.2, -0.5, -0.9])


def test_the_simulation_shows_what_counting_films_does(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {(row["patients"], row["rule"]): row["mean"] for row in benchmark.simulate(60)}
    assert rows[50, "films"] < 0.8 < 0.88 < rows[50, "patients"] < 0.93
    assert benchmark.main(["--simulate", "--draws", "3"]) == 0
    assert capsys.readouterr().out.count("|") == 7 * 5 + 5


def test_no_predictions_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("uncertainty: ")
    with pytest.raises(SystemExit):
        benchmark.main([])
