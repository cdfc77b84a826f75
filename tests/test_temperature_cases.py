"""The simulation behind the minimum number of cases for a temperature."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from temperature_cases import draw, main


def test_every_class_has_its_cases_and_labels_follow_the_softmax() -> None:
    logits, labels = draw(np.random.default_rng(0), 4.0, 2000)
    assert np.bincount(labels).tolist() == [2000, 2000, 2000]
    # among cases whose probability of class 0 is near 0.8, four in five are of it
    chance = np.exp(logits[:, 0] / 2) / np.exp(logits / 2).sum(1)
    near = (chance > 0.75) & (chance < 0.85)
    assert abs(float((labels[near] == 0).mean()) - 0.8) < 0.06


def test_more_cases_narrow_the_interval(tmp_path: Path) -> None:
    assert main(["--draws", "60", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    few, more = ({row["each"]: row for row in rows[:3]}[each] for each in (10, 40))
    assert few["low"] < more["low"] < 1 < more["high"] < few["high"]
