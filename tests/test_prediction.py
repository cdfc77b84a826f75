from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magsd_runtime.prediction import Box, Decision, Finding, Prediction, PredictionSet, Reason

NUMBER = st.floats(-1e6, 1e6)


@given(NUMBER, NUMBER, NUMBER, NUMBER)
def test_a_box_is_empty_or_has_its_area(x0: float, y0: float, x1: float, y1: float) -> None:
    if x0 < x1 and y0 < y1:
        box = Box(x0, y0, x1, y1)
        assert box.to_list() == [x0, y0, x1, y1]
        assert box.area == (x1 - x0) * (y1 - y0)
    else:
        with pytest.raises(ValueError, match="is empty"):
            Box(x0, y0, x1, y1)


def test_a_box_refuses_nan() -> None:
    with pytest.raises(ValueError, match="is empty"):
        Box(0, 0, float("nan"), 1)


def test_the_record_of_an_image_that_was_judged() -> None:
    prediction = Prediction(
        path="a.png",
        status="ok",
        label="normal",
        probability=0.75,
        probabilities={"covid-19": 0.25, "normal": 0.75},
        findings=(Finding(Box(1, 2, 30, 40), 0.9, 0.125),),
        image={"width": 100, "height": 200},
        model={"name": "m", "version": "1", "sha256": "ab"},
        preprocessing_sha256="cd",
        rules_sha256="ef",
        backend={"name": "cpu", "device": "cpu", "precision": "fp32"},
        timings_ms={"total": 1.5},
        files={"overlay": "o.png"},
        decision=Decision("covid-19", 0.25, "sensitivity_90", 0.2, True),
        prediction_set=PredictionSet(0.9, ("normal", "covid-19")),
    )
    assert json.loads(json.dumps(prediction.to_dict(), allow_nan=False)) == {
        "schema": "magsd.prediction/1",
        "path": "a.png",
        "status": "ok",
        "reasons": [],
        "label": "normal",
        "probability": 0.75,
        "probabilities": {"covid-19": 0.25, "normal": 0.75},
        "decision": {
            "positive_class": "covid-19", "probability": 0.25, "operating_point": "sensitivity_90", "threshold": 0.2,
            "positive": True,
        },
        "prediction_set": {"coverage": 0.9, "classes": ["normal", "covid-19"]},
        "findings": [{"box": [1, 2, 30, 40], "score": 0.9, "area_fraction": 0.125}],
        "image": {"width": 100, "height": 200},
        "model": {"name": "m", "version": "1", "sha256": "ab"},
        "preprocessing_sha256": "cd",
        "rules_sha256": "ef",
        "backend": {"name": "cpu", "device": "cpu", "precision": "fp32"},
        "acceptance": None,
        "timings_ms": {"total": 1.5},
        "files": {"overlay": "o.png"},
        "research_use_only": True,
    }  # fmt: skip


def test_the_record_of_an_image_that_was_not_judged_has_nulls() -> None:
    record = Prediction("a.png", "rejected", (Reason("no_contrast", "flat"),)).to_dict()
    assert (record["label"], record["probability"], record["probabilities"]) == (None, None, None)
    assert record["decision"] is None
    assert record["prediction_set"] is None
    assert record["reasons"] == [{"code": "no_contrast", "message": "flat"}]
    assert record["research_use_only"] is True


def test_a_rejected_image_cannot_carry_probabilities_and_a_judged_one_must() -> None:
    with pytest.raises(ValueError, match="all None"):
        Prediction("a.png", "rejected", label="x", probability=1.0, probabilities={"x": 1.0})
    with pytest.raises(ValueError, match="allows no decision"):
        Prediction("a.png", "error", decision=Decision("x", 1.0, "sensitivity_90", 0.2, True))
    with pytest.raises(ValueError, match="allows no prediction set"):
        Prediction("a.png", "error", prediction_set=PredictionSet(0.9, ("x",)))
    with pytest.raises(ValueError, match="all set"):
        Prediction("a.png", "ok", label="x")
    with pytest.raises(ValueError, match="expected one of ok, review"):
        Prediction("a.png", "maybe")  # type: ignore[arg-type]
