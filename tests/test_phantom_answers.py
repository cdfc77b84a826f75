"""What is counted of a bundle's answers to phantoms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phantom_answers
import tiny_bundle
from magsd.phantoms import Phantom, draw_phantom
from magsd_runtime.prediction import Box, Finding, Prediction


def answer(label: str | None, probability: float = 0.5, status: Any = "ok", *boxes: Box) -> Prediction:
    found = tuple(Finding(box, 0.9, 0.1) for box in boxes)
    if label is None:
        return Prediction("x", "rejected")
    return Prediction("x", status, label=label, probability=probability, probabilities={label: probability},
                      findings=found)  # fmt: skip


def test_counts() -> None:
    phantom = Phantom(np.zeros((100, 100), np.uint8), ((10, 20, 30, 40),))
    rows = [
        (phantom, answer("healthy", 0.95, "ok", Box(20, 30, 24, 34))),  # its middle lies inside
        (phantom, answer("healthy", 0.9, "review", Box(60, 60, 90, 90), Box(20, 30, 24, 34))),  # the second one's
        (phantom, answer("covid19", 0.99, "ok", Box(0, 0, 20, 40))),  # on the corner that belongs to the box
        (phantom, answer("covid19", 0.99, "ok", Box(30, 30, 50, 40))),  # on the edge that does not
        (phantom, answer(None)),
    ]
    found = phantom_answers.counts(rows, with_boxes=True)
    assert found == {"phantoms": 5, "labels": {"covid19": 2, "healthy": 2}, "sure": 1, "flagged": 2, "box": 2}
    assert phantom_answers.counts(rows, with_boxes=False)["box"] is None


def test_changes_change_what_they_say() -> None:
    film = draw_phantom("focal", seed=1, patient=1, size=256).pixels
    before = film.copy()
    changed = {name: change(film) for name, change in phantom_answers.CHANGES.items()}
    np.testing.assert_array_equal(film, before)
    np.testing.assert_array_equal(changed["as drawn"], film)
    np.testing.assert_array_equal(changed["mirrored"], np.fliplr(film))
    np.testing.assert_array_equal(changed["left half only"], film[:, : film.shape[1] // 2])
    grey = np.full((200, 200), 128, np.uint8)
    noise = phantom_answers.noisy(grey).astype(float) - 128
    assert 39 < noise.std() < 41
    assert abs(noise.mean()) < 1
    spot = np.zeros((101, 101), np.uint8)
    spot[48:53, 85:90] = 255  # to the right of the middle, which stays where it is: anticlockwise, it goes up
    rows, columns = np.nonzero(phantom_answers.turned(spot, 90.0) > 127)
    assert (rows.mean().round(), columns.mean().round()) == (13, 50)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tiny_bundle.build(tmp_path / "bundle")
    report = tmp_path / "report.json"
    assert phantom_answers.main([str(bundle), "--count", "2", "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "| no opacity, as drawn | 2 | " in printed
    assert "Research use only" in printed
    rows = json.loads(report.read_text())["rows"]
    assert len(rows) == 2 * len(phantom_answers.CHANGES)
    assert all(sum(row["labels"].values()) == 2 for row in rows.values())  # a bundle without statistics refuses none
    assert [name for name, row in rows.items() if row["box"] is not None] == ["an opacity, as drawn"]
    assert phantom_answers.main([str(tmp_path / "nothing")]) == 4
