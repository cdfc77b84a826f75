"""The report: one file without links or scripts, escaped, with alternative texts, honest about what is missing."""

from __future__ import annotations

import copy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magsd.data import Record
from magsd.evaluation import evaluate_predictions
from magsd.figures import confusion_figure
from magsd.predictors import Predictions
from magsd.report import render_report

NASTY = '<script>alert("x")&'


class Page(HTMLParser):
    """Tags, attributes and text; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def metrics(classes: tuple[str, ...] = ("covid19", NASTY)) -> dict[str, Any]:
    records = tuple(
        Record(Path(f"{number}{NASTY}.png"), classes[number % 2], f"p{number}", source="a" if number < 6 else "b")
        for number in range(12)
    )
    positive = np.linspace(0.05, 0.95, 12)
    predictions = Predictions(
        classes, records, np.arange(12) % 3, np.stack([positive, 1 - positive], axis=1)
    )  # fmt: skip
    return {
        "schema": "magsd.metrics/1",
        "magsd_version": "0",
        "created": "2026-01-02T03:04:05+00:00",
        "research_use_only": True,
        "target": {"kind": "run", "name": NASTY, "path": NASTY, "classes": list(classes)},
        "data": {
            "manifest": f"/x/{NASTY}.csv", "evaluated_images": 12, "evaluated_patients": 12,
            "source_confound": None,
        },
        **evaluate_predictions(predictions, resamples=50),
        "localization": None,
        "notes": [{"level": "note", "text": "later"}, {"level": "warning", "text": NASTY}],
        "versions": {"python": "3"},
    }  # fmt: skip


def localization(iou: float, low: float = 0.01) -> dict[str, Any]:
    row = {
        "iou_mean": iou, "iou_mean_ci95": [0.1, 0.5], "iou_at_25": 0.5, "mask_iou_mean": 0.2, "box_iou_mean": iou,
        "pointing": 0.7, "energy_inside": 0.3, "regions_iou_mean": 0.2,
    }  # fmt: skip
    other = {**row, "iou_mean": 0.25}
    beyond = {"iou_mean": iou - 0.25, "iou_mean_ci95": [low, low + 0.2]}
    of_map = {
        **row, "threshold": 0.4, "threshold_range": [0.4, 0.4], "chosen_on": "chosen on training-side images",
        "beyond": dict.fromkeys(("central_box", "central_box_fitted", "random_map"), beyond),
    }  # fmt: skip
    groups = {"label": {NASTY: {"images": 2, "patients": 2, "methods": {"attention": row, "central_box": other}}}}
    return {
        **of_map, "map": "attention", "images": 4, "predictions": 4, "patients": 4, "ground_truth": {"box": 4},
        "minimum_score": 0.0, "drawn_share": 0.1, "drawn_and_seen": 1.0, "groups": groups,
        "tuning_part": "validation", "maps": {"attention": of_map, "evidence": of_map},
        "baselines": {
            "central_box": {**other, "side": 0.5}, "central_box_fitted": other, "random_map": {**other, "draws": 10},
        },
    }  # fmt: skip


@pytest.fixture
def figures(tmp_path: Path) -> dict[str, Path]:
    path = tmp_path / "confusion.png"
    confusion_figure(path, confusion=np.eye(2, dtype=np.int64), classes=["a", "b"])
    return dict.fromkeys(("confusion", "roc", "reliability", "localization", "localization_curves", "training"), path)


def test_nothing_is_loaded_and_nothing_runs(figures: dict[str, Path]) -> None:
    page = Page(render_report(metrics(), figures))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "a", "object", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert "http" not in (value or "")[:30]
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/png;base64,")
    assert sum(tag == "img" for tag, _ in page.tags) == 4  # no localization in these metrics


def test_names_are_text_never_markup(figures: dict[str, Path]) -> None:
    content = metrics()
    content["localization"] = {**localization(0.4), "chosen_on": NASTY, "tuning_part": NASTY}
    text = render_report(content, figures)
    assert "<script" not in text
    page = Page(text)
    assert f"{Path(content['worst'][0]['path']).name}" in page.text
    assert f"Evaluation of {NASTY}" in page.text


def test_every_picture_has_a_text_that_says_what_it_shows(figures: dict[str, Path]) -> None:
    content = metrics(("covid19", "healthy"))
    content["localization"] = localization(0.4)
    texts = [attributes["alt"] or "" for tag, attributes in Page(render_report(content, figures)).tags if tag == "img"]
    assert len(texts) == 6
    counts = content["confusion"]["counts"]
    assert f"covid19: {counts[0][0]} as covid19, {counts[0][1]} as healthy" in texts[0]
    assert f"{content['calibration']['ece']:.3f}" in texts[2]


def test_research_use_comes_first_and_warnings_before_notes(figures: dict[str, Path]) -> None:
    page = Page(render_report(metrics(), figures))
    body = page.text[page.text.index("Research use only") :]
    assert body.startswith("Research use only. Not for clinical use.")
    assert page.text.index(f"Warning. {NASTY}") < page.text.index("later")


def test_values_are_those_of_the_metrics(figures: dict[str, Path]) -> None:
    content = metrics()
    page = Page(render_report(content, figures))
    for name in ("accuracy", "auc"):
        score = content["classification"][name]
        assert f"{score['value']:.3f} ± {score['std']:.3f}" in page.text
        assert f"{score['ci95'][0]:.3f} to {score['ci95'][1]:.3f}" in page.text
    wrong = sum(content["confusion"]["counts"][row][1 - row] for row in (0, 1))
    assert f"{wrong} wrong predictions" in page.text


def test_what_is_undefined_is_a_dash(figures: dict[str, Path]) -> None:
    content = copy.deepcopy(metrics())
    content["classification"]["auc"] = {"value": None, "std": None, "ci95": None}
    content["folds"][0]["auc"] = None
    page = Page(render_report(content, {}))
    assert "ROC AUC –" in page.text
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "Not evaluated: no evaluated image has a box or a mask" in page.text


@pytest.mark.parametrize(("iou", "warned"), [(0.4, False), (0.2, True), (0.25, True)])
def test_a_map_that_does_not_beat_the_baselines_is_called_that(iou: float, warned: bool) -> None:
    content = metrics()
    content["localization"] = localization(iou)
    assert ("no better than the baseline" in Page(render_report(content, {})).text) == warned


@pytest.mark.parametrize(("low", "warned"), [(-0.01, True), (0.0, True), (0.01, False)])
def test_a_map_that_may_beat_them_by_chance_is_called_that(low: float, warned: bool) -> None:
    content = metrics()
    content["localization"] = localization(0.4, low)
    text = Page(render_report(content, {})).text
    assert ("by no more than another choice of patients" in text) == warned
    assert f"fixed central box 0.150 ({low:.3f} to {low + 0.2:.3f})" in text
    assert "By kind of ground truth, and by class" in text


@pytest.mark.parametrize("minimum", [0.0, 0.75])
def test_a_minimum_score_is_said_where_there_is_one(minimum: float) -> None:
    content = metrics()
    content["localization"] = {**localization(0.4), "minimum_score": minimum}
    assert ("reaches 0.75" in Page(render_report(content, {})).text) == bool(minimum)


def test_a_bundle_has_no_folds() -> None:
    content = metrics()
    content["target"]["kind"] = "bundle"
    content["folds"] = [{**content["folds"][0], "fold": None}]
    page = Page(render_report(content, {}))
    assert ("h2", {}) in page.tags
    assert "Folds" not in page.text
    assert "One model." in page.text
