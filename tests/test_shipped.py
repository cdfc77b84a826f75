"""The model in the box: there, small, proven, calibrated, and found without being named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from magsd.cli import main
from magsd.phantoms import write_phantoms
from magsd_runtime.bundle import load_bundle
from magsd_runtime.shipped import SHIPPED, choose_bundle

ROOT = Path(__file__).resolve().parents[1]
MEBIBYTE = 1 << 20


def test_it_is_small_and_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAGSD_BUNDLE", raising=False)
    assert choose_bundle(None) == str(SHIPPED)
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * MEBIBYTE
    bundle = load_bundle(SHIPPED)
    assert bundle.classes == ("covid19", "healthy", "pneumonia")
    assert bundle.preprocessing.crop == "lungs"
    assert "Research use only" in (SHIPPED / "MODEL_CARD.md").read_text(encoding="utf-8")
    for word in (str(Path.home()), "/work", "/tmp"):
        assert word not in (SHIPPED / "bundle.json").read_text(encoding="utf-8")


def test_its_probabilities_are_calibrated_on_held_out_folds() -> None:
    calibration = load_bundle(SHIPPED).calibration
    assert calibration.fitted
    assert "held-out" in calibration.source
    assert calibration.ece_cross_validated is not None
    assert calibration.ece_cross_validated <= 0.05
    assert calibration.positive_class == "covid19"
    assert [point.target for point in calibration.operating_points] == [0.9, 0.95]
    assert all(point.threshold_ci95 is not None for point in calibration.operating_points)
    assert calibration.sets is not None
    assert calibration.sets.coverage == 0.9
    scores = calibration.sets.cross_validated
    assert scores is not None
    assert all(abs(value - 0.9) < 0.02 for value in (scores.coverage, *scores.coverage_per_class.values()))
    assert scores.accuracy_alone is not None
    assert scores.accuracy_alone > 0.85  # what is not for review; of all films it is 0.74


def test_it_proves_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAGSD_BUNDLE", raising=False)
    assert main(["verify"]) == 0
    assert "PASSED" in capsys.readouterr().out


def test_the_first_command_of_the_readme_answers(tmp_path: Path) -> None:
    """In a process of its own, in which torch cannot be imported."""
    write_phantoms(tmp_path / "phantoms", n_per_class=1)
    code = "import sys; sys.modules['torch'] = None; from magsd.cli import main; sys.exit(main(sys.argv[1:]))"
    path = os.pathsep.join(map(str, [ROOT, ROOT / "export", ROOT / "runtime"]))
    environment = {name: value for name, value in os.environ.items() if name != "MAGSD_BUNDLE"}
    done = subprocess.run(
        [sys.executable, "-c", code, "infer", "phantoms/images", "--out", "results", "--json"],
        cwd=tmp_path, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers
    for answer in answers:
        assert answer["model"]["name"] == load_bundle(SHIPPED).name
        assert answer["research_use_only"] is True
        assert Path(tmp_path / answer["files"]["overlay"]).is_file()
        if answer["status"] in ("ok", "review"):
            assert abs(sum(answer["probabilities"].values()) - 1) < 1e-5
