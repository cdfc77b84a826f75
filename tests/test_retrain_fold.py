"""One fold retrained, held against the record."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import retrain_fold
from magsd_runtime.errors import ArtefactError

RECORDED: dict[str, Any] = {
    "images": 10,
    "patients": 9,
    **{name: {"value": 0.5, "ci95": [0.4, 0.6]} for name in retrain_fold.FIGURES},
}


def test_the_record_in_the_repository_is_of_five_folds() -> None:
    rows = retrain_fold.read_record(retrain_fold.RECORD)
    assert len(rows) == 5
    assert sum(row["images"] for row in rows) == 2406
    for row in rows:
        text, inside = retrain_fold.compared(row, row)
        assert inside
        assert "OUTSIDE" not in text


@pytest.mark.parametrize(
    ("name", "value", "inside"),
    [("accuracy", 0.4, True), ("auc", 0.6, True), ("auc", 0.601, False), ("f1", 0.399, False), ("f1", np.nan, False)],
)
def test_every_figure_must_lie_in_its_interval(name: str, value: float, inside: bool) -> None:
    found = copy.deepcopy(RECORDED)
    found[name]["value"] = value
    text, is_inside = retrain_fold.compared(found, RECORDED)
    assert is_inside == inside
    assert ("OUTSIDE" in text) != inside


def test_other_films_are_no_confirmation() -> None:
    text, inside = retrain_fold.compared({**RECORDED, "images": 11}, RECORDED)
    assert not inside
    assert "OTHER FILMS" in text


def test_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert retrain_fold.main(["--out", str(tmp_path / "out"), "--data-root", str(tmp_path)]) == 2
    assert "dataset_b.csv" in capsys.readouterr().err
    (tmp_path / "record.json").write_text('{"folds": [{}]}')
    with pytest.raises(ArtefactError, match=r"record\.json: no record"):
        retrain_fold.read_record(tmp_path / "record.json")


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cxr: Path) -> None:
    rows = retrain_fold.read_record(retrain_fold.RECORD)
    arguments = ["--out", str(tmp_path / "out"), "--data-root", str(cxr), "--fold"]
    monkeypatch.setattr(retrain_fold, "retrained", lambda out, fold, threads: rows[fold])
    assert retrain_fold.main([*arguments, "1"]) == 0
    assert (tmp_path / "out" / "train.csv").read_text().count("\n") == 2407
    monkeypatch.setattr(retrain_fold, "retrained", lambda out, fold, threads: rows[1 - fold])
    assert retrain_fold.main([*arguments, "0"]) == 1  # another fold has other patients
    assert retrain_fold.main([*arguments, "5"]) == 2
