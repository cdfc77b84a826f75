"""When an answer is for review because it is not sure: both sides of every limit, the record, the command."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_bundle
from magsd.cli import main
from magsd_runtime.backends import open_backend
from magsd_runtime.bundle import load_bundle
from magsd_runtime.calibrating import Cases, calibrate, set_scores
from magsd_runtime.calibration import effective_patients, operating_points, wilson_interval
from magsd_runtime.calibration_record import Calibration
from magsd_runtime.calibration_text import calibration_section, format_calibration
from magsd_runtime.errors import ArtefactError, UsageError
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.prediction import Decision, PredictionSet
from magsd_runtime.prediction_sets import PredictionSets, SetScores
from magsd_runtime.site_rules import SiteRules
from magsd_runtime.uncertainty import UncertaintyRules, judge

CLASSES = ("covid", "normal", "other")
MODEL = "a" * 64
BOTH = UncertaintyRules()


def cases(each: int = 40, *, films: int = 2, seed: int = 0) -> Cases:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), each).repeat(films)
    logits = rng.normal(0, 1, (len(labels), 3))
    logits[np.arange(len(labels)), labels] += 1
    patients = tuple(f"p{number // films}" for number in range(len(labels)))
    return Cases(CLASSES, 2 * logits, labels, patients, "d" * 64)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(cases(), model_sha256=MODEL, source="a test", positive="covid")[0]


def of(calibration: Calibration, rules: UncertaintyRules = BOTH, **probability: float) -> list[str]:
    """The messages for these probabilities."""
    found = judge(
        calibration,
        rules,
        label=max(probability, key=lambda name: probability[name]),
        decision=calibration.decide(probability),
        prediction_set=calibration.set_of(probability),
    )
    assert found.status == ("review" if found.reasons else "ok")
    return [f"{reason.code}: {reason.message}" for reason in found.reasons]


def with_sets(calibration: Calibration, **minimum: float) -> Calibration:
    assert calibration.operating_points[0].threshold_ci95 is not None
    point = replace(calibration.operating_points[0], threshold=0.3, threshold_ci95=(0.25, 0.4))
    return replace(calibration, sets=PredictionSets(0.9, minimum), operating_points=(point,))


def test_the_label_alone_is_sure_and_all_else_is_not(calibration: Calibration) -> None:
    known = with_sets(calibration, covid=0.2, normal=0.3, other=0.45)
    assert of(known, covid=0.1, normal=0.8, other=0.1) == []
    assert of(known, covid=0.05, normal=0.5, other=0.449) == []
    like = "such a set is right for 90 % of films like the calibration's"
    assert of(known, covid=0.05, normal=0.5, other=0.45) == [f"unsure: not sure: normal or other ({like})"]
    assert of(known, covid=0.45, normal=0.3, other=0.25) == [f"unsure: not sure: covid or normal ({like})"]
    every = with_sets(calibration, covid=0.2, normal=0.3, other=0.3)
    assert of(every, covid=0.2, normal=0.45, other=0.35) == [f"unsure: not sure: normal, other or covid ({like})"]
    none = with_sets(calibration, covid=0.6, normal=0.6, other=0.6)
    assert of(none, covid=0.2, normal=0.59, other=0.21) == [
        "unsure: not sure: no class is as probable as it is in 90 % of the films that have it"
    ]


def test_a_set_without_the_label_is_not_sure_even_with_one_class(calibration: Calibration) -> None:
    known = with_sets(calibration, covid=0.15, normal=0.6, other=0.6)
    assert of(known, covid=0.2, normal=0.5, other=0.3) == [
        "unsure: not sure: normal is less probable than in 90 % of the films that have it, covid is not"
    ]


@pytest.mark.parametrize(("probability", "close"), [(0.2499, False), (0.25, True), (0.3999, True), (0.4, False)])
def test_a_probability_is_near_the_threshold_where_another_threshold_would_decide_otherwise(
    calibration: Calibration, probability: float, close: bool
) -> None:
    known = with_sets(calibration, covid=0.9, normal=0.1, other=0.9)
    messages = of(known, covid=probability, normal=0.99 - probability, other=0.01)
    answer = "positive" if probability >= 0.3 else "negative"
    assert messages == (
        [
            f"near_threshold: close call: {answer} for covid with probability {probability:.3f}, and the threshold, "
            "0.300, may as well be anywhere from 0.250 to 0.400"
        ]
        if close
        else []
    )
    without = replace(known, operating_points=(replace(known.operating_points[0], threshold_ci95=None),))
    assert of(without, covid=probability, normal=0.99 - probability, other=0.01) == []


def test_a_site_switches_each_off(calibration: Calibration) -> None:
    known = with_sets(calibration, covid=0.2, normal=0.3, other=0.3)
    assert [line.split(":")[0] for line in of(known, covid=0.3, normal=0.4, other=0.3)] == ["unsure", "near_threshold"]
    assert [
        line.split(":")[0] for line in of(known, UncertaintyRules(unsure="ok"), covid=0.3, normal=0.4, other=0.3)
    ] == ["near_threshold"]
    assert [
        line.split(":")[0]
        for line in of(known, UncertaintyRules(near_threshold="ok"), covid=0.3, normal=0.4, other=0.3)
    ] == ["unsure"]
    assert of(known, UncertaintyRules("ok", "ok"), covid=0.3, normal=0.4, other=0.3) == []


def test_a_calibration_without_sets_flags_nothing() -> None:
    assert of(Calibration(), covid=0.3, normal=0.4, other=0.3) == []


def test_the_rules_of_a_site() -> None:
    rules = SiteRules.from_dict({"schema": "magsd.rules/1", "uncertainty": {"unsure": "ok"}})
    assert rules.uncertainty == UncertaintyRules("review", "ok")
    assert SiteRules.from_dict(rules.to_dict()) == rules
    assert rules.sha256() != SiteRules().sha256()
    for wrong, message in (
        ({"unsure": "rejected"}, "unsure is 'rejected', expected ok or review"),
        ({"sure": "ok"}, "'sure' is no code, expected one of near_threshold, unsure"),
        ([], "uncertainty is no object"),
        ({"unsure": None}, "expected ok or review"),
        ({"unsure": []}, "expected ok or review"),
    ):
        with pytest.raises(UsageError, match=message):
            SiteRules.from_dict({"schema": "magsd.rules/1", "uncertainty": wrong})


# ---------------------------------------------------------------- what is fitted


@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.8, 0.9, 0.95]), st.booleans())
def test_the_interval_of_a_threshold_against_a_slow_reference(seed: int, target: float, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    positive = rng.random(60) < 0.5
    positive[:2] = [True, False]
    values = rng.integers(0, 8, 60) / 8 if ties else rng.random(60)
    patients = [str(number) for number in rng.integers(0, 30, 60)]
    point = operating_points(positive=positive, probability=values, patients=patients, sensitivities=[target])[0]

    def highest(share: float) -> float:
        mine = values[positive]
        return max(value for value in mine if (mine >= value).sum() / len(mine) >= share)

    assert point.threshold == highest(target)
    own = [name for name, one in zip(patients, positive) if one]
    low, high = wilson_interval(float((values[positive] >= point.threshold).mean()), effective_patients(own))
    assert point.threshold_ci95 is not None
    # with ties, a share between two values is reached by the one below
    assert point.threshold_ci95 == (highest(high), highest(low))
    assert point.threshold_ci95[0] <= point.threshold <= point.threshold_ci95[1]


def test_the_interval_of_a_threshold_is_about_that_of_a_bootstrap_by_patient() -> None:
    rng = np.random.default_rng(3)
    each = 4
    own = np.repeat(rng.normal(0.6, 0.15, 100), each)
    positive = np.repeat([True, False], [400, 400])
    values = np.concatenate([np.clip(own + rng.normal(0, 0.03, 400), 0, 1), rng.random(400)])
    patients = [str(number // each) for number in range(800)]
    point = operating_points(positive=positive, probability=values, patients=patients, sensitivities=[0.9])[0]
    films = values[:400].reshape(100, each)
    drawn = [
        np.sort(films[rng.integers(0, 100, 100)].ravel())[::-1][359]  # 360 of 400 are 0.9
        for _ in range(1000)
    ]
    expected = np.percentile(drawn, [2.5, 97.5])
    assert point.threshold_ci95 is not None
    assert np.abs(np.array(point.threshold_ci95) - expected).max() < 0.25 * (expected[1] - expected[0])


def test_the_scores_of_the_sets_are_of_patients_outside_the_fit(calibration: Calibration) -> None:
    assert calibration.sets is not None
    scores = calibration.sets.cross_validated
    assert scores is not None
    assert scores.images == 240
    assert 0.8 < scores.coverage < 1
    mean = sum(scores.coverage_per_class.values()) / 3  # as many images of each
    assert scores.coverage == pytest.approx(mean)
    assert scores.accuracy_alone is not None
    assert scores.accuracy_others is not None
    assert scores.accuracy_alone > scores.accuracy_others


def test_scores_of_sets_by_hand() -> None:
    values = np.array([[0.6, 0.4], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    inside = np.array([[1, 1], [1, 0], [1, 0], [0, 0]], bool)
    found = set_scores(("a", "b"), np.array([1, 0, 1, 1]), values, inside)
    # the third: one class, but not the label; the fourth: none
    assert found == SetScores(4, 0.5, {"a": 1.0, "b": 1 / 3}, 0.25, 1.0, 2 / 3)
    sure = set_scores(("a", "b"), np.array([0, 1]), values[[1, 2]], np.array([[1, 0], [0, 1]], bool))
    assert (sure.alone, sure.accuracy_others) == (1.0, None)


def test_too_few_patients_for_a_coverage_leave_the_temperature_and_a_line() -> None:
    found, notes = calibrate(cases(25), model_sha256=MODEL, source="a test", coverage=0.98)
    assert found.sets is None
    assert found.fitted
    assert notes[-1] == (
        "no prediction sets at coverage 0.98: 49 patients of every class are needed, "
        "and covid has 25, normal has 25, other has 25"
    )
    assert "prediction_sets" not in found.to_dict()
    found, notes = calibrate(cases(20), model_sha256=MODEL, source="a test", coverage=0.95)
    assert found.sets is not None  # 19 are enough in all, and too few in a part of the folds
    assert found.sets.cross_validated is None
    assert "too few patients for folds" in notes[-1]


@pytest.mark.parametrize("coverage", [0.49, 1.0, 0.0, -1.0, float("nan"), 1.5])
def test_a_coverage_that_is_none_is_refused(coverage: float) -> None:
    with pytest.raises(UsageError, match="--coverage is"):
        calibrate(cases(), model_sha256=MODEL, source="a test", coverage=coverage)


# ---------------------------------------------------------------- the record


def test_the_record_comes_back_and_one_without_sets_too(calibration: Calibration) -> None:
    record = json.loads(json.dumps(calibration.to_dict(), allow_nan=False))
    assert Calibration.from_dict(record, classes=CLASSES, model_sha256=MODEL) == calibration
    old = copy.deepcopy(record)
    del old["prediction_sets"]
    for point in old["operating_points"].values():
        del point["threshold_ci95"]
    found = Calibration.from_dict(old, classes=CLASSES, model_sha256=MODEL)
    assert found.sets is None
    assert found.to_dict() == old
    assert of(found, covid=0.3, normal=0.4, other=0.3) == []


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("prediction_sets",), [], "prediction_sets is a list"),
        (("prediction_sets", "method"), "adaptive", "a newer magsd is needed"),
        (("prediction_sets", "by_source"), True, "by_source is unknown to this version"),
        (("prediction_sets", "coverage"), 1.0, "coverage is 1, expected 0.5 or more and less than 1"),
        (("prediction_sets", "coverage"), "0.9", "coverage is a str"),
        (("prediction_sets", "coverage"), None, "coverage is a NoneType"),
        (("prediction_sets", "minimum_probability"), {"covid": 0.1}, "names other classes than the bundle"),
        (("prediction_sets", "minimum_probability", "covid"), 1.2, "covid is 1.2, expected 0 to 1"),
        (("prediction_sets", "minimum_probability", "covid"), float("nan"), "expected a finite number"),
        (("prediction_sets", "cross_validated"), 3, "cross_validated is a int"),
        (("prediction_sets", "cross_validated", "images"), -1, "expected a whole number"),
        (("prediction_sets", "cross_validated", "alone"), 2, "alone is 2, expected 0 to 1"),
        (("prediction_sets", "cross_validated", "coverage_per_class"), {}, "names other classes"),
        (("operating_points", "sensitivity_90", "threshold_ci95"), [0.99, 1.0], "without the threshold in it"),
        (("operating_points", "sensitivity_90", "threshold_ci95"), [0.5, 0.1], "the first must not exceed"),
        (("operating_points", "sensitivity_90", "threshold_ci95"), [-0.5, 1.1], "without the threshold in it"),
    ],
)
def test_senseless_and_unknown_fields_are_refused(
    calibration: Calibration, place: tuple[str, ...], value: Any, message: str
) -> None:
    record = copy.deepcopy(calibration.to_dict())
    holder = record
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    with pytest.raises(ArtefactError, match=message):
        Calibration.from_dict(record, classes=CLASSES, model_sha256=MODEL)


def test_sets_without_a_fit_or_without_a_field_are_refused(calibration: Calibration) -> None:
    record = calibration.to_dict()
    with pytest.raises(ArtefactError, match="without a fitted temperature"):
        Calibration.from_dict(
            {"temperature": 1.0, "fitted": False, "prediction_sets": record["prediction_sets"]},
            classes=CLASSES, model_sha256=MODEL,
        )  # fmt: skip
    for name in ("method", "coverage", "minimum_probability"):
        sets = {key: value for key, value in record["prediction_sets"].items() if key != name}
        with pytest.raises(ArtefactError, match=f"{name} is missing"):
            Calibration.from_dict({**record, "prediction_sets": sets}, classes=CLASSES, model_sha256=MODEL)


def test_people_are_told(calibration: Calibration) -> None:
    assert calibration.sets is not None
    low, high = calibration.operating_points[0].threshold_ci95 or (0, 0)
    for text in (format_calibration(calibration), calibration_section(calibration)):
        assert f"probability of covid from {low:.4f} to {high:.4f} is near the default threshold: review" in text
        assert "possible, at 90 % coverage, where its probability is at least: covid 0." in text
        assert "each patient outside the fit: the right class was possible on " in text
        assert "unsure, and so for review, were " in text
    bare = replace(calibration, sets=PredictionSets(0.9, calibration.sets.minimum_probability))
    assert "cross-validated, each" not in calibration_section(bare)


# ---------------------------------------------------------------- pipeline and commands


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.png"
    cv2.imwrite(str(path), tiny_bundle.golden_pixels("ramp"))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "tiny")


def calibrated(plain: Path, out: Path, film: Path, *, unsure: bool, close: bool) -> Path:
    """A copy of the bundle whose calibration makes ``film`` unsure, a close call, both or neither."""
    from magsd_runtime.bundle_writing import write_calibrated

    bundle = load_bundle(plain)
    with Pipeline.open(plain, "cpu", threads=1, rules=RULES) as pipeline:
        seen = pipeline.predict(film).prediction
    assert seen.probabilities is not None
    assert seen.label is not None
    known, _ = calibrate(
        replace(cases(), classes=bundle.classes), model_sha256=bundle.model_sha256, source="a test",
        positive=bundle.classes[0],
    )  # fmt: skip
    first = seen.probabilities[bundle.classes[0]]
    low, high = (first, min(1.0, first + 0.1)) if close else (min(1.0, first + 1e-6), min(1.0, first + 0.1))
    point = replace(known.operating_points[0], threshold=low, threshold_ci95=(low, high))
    minimums = {name: 0.0 if unsure or name == seen.label else 1.0 for name in bundle.classes}
    changed = replace(
        known, temperature=1.0, operating_points=(point,), sets=PredictionSets(0.9, minimums),
    )  # fmt: skip
    return write_calibrated(bundle, changed, out).path


# What tiny films are like is not what is asked here
RULES = SiteRules.from_dict(
    {
        "schema": "magsd.rules/1",
        "pixels": {"severity": dict.fromkeys(SiteRules().pixels.severity, "ok")},
    }
)


@pytest.mark.parametrize(
    ("unsure", "close", "codes"),
    [(False, False, []), (True, False, ["unsure"]), (False, True, ["near_threshold"]),
     (True, True, ["unsure", "near_threshold"])],
)  # fmt: skip
def test_the_pipeline_flags_what_is_not_sure(
    plain: Path, film: Path, tmp_path: Path, unsure: bool, close: bool, codes: list[str]
) -> None:
    path = calibrated(plain, tmp_path / "new", film, unsure=unsure, close=close)
    with Pipeline.open(path, "cpu", threads=1, rules=RULES) as pipeline:
        found = pipeline.predict(film).prediction
        assert [reason.code for reason in found.reasons] == codes
        assert found.status == ("review" if codes else "ok")
        assert found.prediction_set is not None
        assert (len(found.prediction_set.classes) > 1) == unsure
        assert found.prediction_set.classes[0] == found.label
        record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert record["prediction_set"] == {"coverage": 0.9, "classes": list(found.prediction_set.classes)}
        off = replace(RULES, uncertainty=UncertaintyRules("ok", "ok"))
        silent = Pipeline(pipeline.bundle, open_backend(pipeline.bundle, "cpu", threads=1), rules=off)
        quiet = silent.predict(film).prediction
        assert (quiet.status, quiet.reasons, quiet.prediction_set) == ("ok", (), found.prediction_set)


def test_infer_says_it_in_words(plain: Path, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = calibrated(plain, tmp_path / "new", film, unsure=True, close=False)
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps(RULES.to_dict()))
    assert main(["infer", str(film), "--bundle", str(path), "--rules", str(rules), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "not sure: names all classes that are possible at 90 % coverage" in out
    last = out.splitlines()[-1]
    assert "review: not sure: " in last
    assert all(name in last for name in tiny_bundle.CLASSES)
    assert main(["infer", str(film), "--bundle", str(plain), "--rules", str(rules), "--threads", "1"]) == 0
    assert "not sure" not in capsys.readouterr().out


def test_what_the_calibration_does_not_know_is_not_flagged() -> None:
    calibration = calibrate(cases(), model_sha256=MODEL, source="a test")[0]
    found = judge(
        calibration, BOTH, label="covid", decision=None, prediction_set=PredictionSet(0.9, ("covid",))
    )  # fmt: skip
    assert found.status == "ok"
    decision = Decision("covid", 0.3, "sensitivity_90", 0.3, True)  # without a point in the calibration: no interval
    assert judge(calibration, BOTH, label="covid", decision=decision, prediction_set=None).reasons == ()
