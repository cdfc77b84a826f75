"""The choice of map, threshold and minimum score never sees the patient it is judged on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import choose_regions
from magsd.data import Record
from magsd.ground_truth import Truth, boxes_mask
from magsd.localization_metrics import THRESHOLDS, Case
from magsd_runtime.localization import findings, square_heat
from magsd_runtime.prediction import Box
from magsd_runtime.preprocessing import Framing, PreprocessingSpec, Region

SPEC = PreprocessingSpec(size=64)


def make_case(number: int, patient: str, rng: np.random.Generator) -> Case:
    """A film of 64 x 64 whose box is where the map 'evidence' is hot; 'attention' is noise."""
    x, y = (int(value) for value in rng.integers(4, 36, 2))
    mask = boxes_mask([(x, y, 20, 20)], 64, 64)
    truth = Truth(mask, Box(x, y, x + 20, y + 20), "box", Framing(64, 64, Region(0, 0, 64, 64)))
    hot = np.zeros((64, 64), np.float32)
    hot[y : y + 20, x : x + 20] = 1
    hot[0, 0] = 0.7  # faint, and far away
    heats = {"attention": rng.random((4, 4)).astype(np.float32), "evidence": hot}
    return Case(Record(Path(f"{number}.png"), "ill", patient), number % 2, truth, heats)


def test_the_best_combination_is_found_and_its_estimate_is_left_out() -> None:
    rng = np.random.default_rng(0)
    cases = [make_case(number, f"p{number // 2}", rng) for number in range(8)]
    result = choose_regions.choose(cases, SPEC)
    assert (result["films"], result["models"], result["patients"]) == (8, 2, 4)
    best = result["best"]
    assert best["map"] == "evidence"
    # what faint corner there is must be dropped by one of the two
    assert max(best["minimum_score"], best["threshold"]) >= 0.7
    assert result["chosen"]["iou"] == pytest.approx(1)
    of = {(row["map"], row["minimum_score"]): row["iou"] for row in result["rows"]}
    assert len(of) == 2 * len(choose_regions.MINIMUM_SCORES)
    assert of["attention", 0.8] < 0.5
    # and the point of care shows just that
    heat = square_heat("evidence", cases[0].heats["evidence"], cases[0].truth.framing, SPEC)
    (shown,) = findings(heat, best["threshold"], 64, 64, SPEC, minimum_score=best["minimum_score"])
    assert shown.box == cases[0].truth.box
    assert "evidence" in choose_regions.table(result)


def test_leaving_a_patient_out_against_loops() -> None:
    rng = np.random.default_rng(1)
    iou = rng.random((3, 7, len(THRESHOLDS)))
    patients = np.array(["a", "b", "a", "c", "d", "d", "e"], dtype=object)
    expected = []
    for case, patient in enumerate(patients):
        best, found = -1.0, 0.0
        for combination in range(3):
            for threshold in range(len(THRESHOLDS)):
                others = [iou[combination, other, threshold] for other in range(7) if patients[other] != patient]
                if sum(others) / len(others) > best:
                    best, found = sum(others) / len(others), iou[combination, case, threshold]
        expected.append(found)
    np.testing.assert_allclose(choose_regions._left_out(iou, patients), expected)


def test_the_choice_is_written_for_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cases = [make_case(number, f"p{number}", rng) for number in range(4)]

    class FakeRun:
        preprocessing = SPEC

    class FakeJudged:
        pass

    judged = FakeJudged()
    judged.cases = cases  # type: ignore[attr-defined]
    monkeypatch.setattr(choose_regions, "Run", FakeRun)
    monkeypatch.setattr(choose_regions, "open_target", lambda path: FakeRun())
    monkeypatch.setattr(choose_regions, "read_manifest", lambda path: None)
    monkeypatch.setattr(choose_regions, "judge_run", lambda *arguments: judged)
    assert choose_regions.main([str(tmp_path), "--data", "boxes.csv", "--write"]) == 0
    written = json.loads((tmp_path / "localization.json").read_text())
    assert set(written) == {"map", "threshold", "minimum_score", "chosen_on"}
    assert written["map"] == "evidence"
    cases.clear()
    assert choose_regions.main([str(tmp_path), "--data", "boxes.csv"]) == 2
