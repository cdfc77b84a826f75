"""The ladder of recipes against shortcuts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import elsewhere
import steps
from magsd.config import resolve


def test_the_ladder_ends_at_the_recipe_of_the_shipped_model() -> None:
    assert steps.is_the_recipe("magsd")
    assert not any(steps.is_the_recipe(name) for name in steps.STEPS if name != "magsd")


def test_a_step_is_the_one_before_and_what_it_names() -> None:
    for step in steps.LADDER:
        config = resolve(steps.settings_of(step.name))
        if step.after:
            before = resolve(steps.settings_of(step.after))
            changed = {name for name, value in config.to_dict().items() if value != before.to_dict()[name]}
            assert changed >= set(step.settings) - {"model"}
            # a named model stands for these
            assert changed <= {*step.settings, "attention_augmentation", "loss"}


def test_what_is_wrong_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, words in (
        ([], "--out"),
        (["--out", str(tmp_path), "--steps", "plain,plane"], "plane"),
        (["--out", str(tmp_path), "--sides", "2"], "--sides 2"),
        (["--out", str(tmp_path), "--data-root", str(tmp_path / "none")], "--data-root"),
    ):
        assert steps.main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert steps.main(["--list"]) == 0
    assert "--spectrum 1.0" in capsys.readouterr().out


def write_test_films(path: Path) -> None:
    with open(path, "w", newline="") as text:
        table = csv.writer(text)
        table.writerow(["path", "label", "patient", "source"])
        for number, source in enumerate(("cohen", "nih", "kermany") * 2):
            table.writerow([f"{source}{number}.png", ("covid19", "healthy")[number < 3], f"{source}:{number}", source])


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def command(*arguments: Any) -> None:
        asked.append(" ".join(str(argument).replace(str(tmp_path), "DIR") for argument in arguments))
        if arguments[0] == "evaluate":
            out = Path(arguments[arguments.index("--out") + 1])
            out.mkdir()
            (out / "metrics.json").write_text("{}")

    shares = {"lungs of the mask files": {"attention": {"value": 0.5}}}
    monkeypatch.setattr(steps, "_magsd", command)
    monkeypatch.setattr(steps, "load_bundle", lambda path: path)
    monkeypatch.setattr(steps, "read_lung_masks", lambda path: {})
    monkeypatch.setattr(steps, "attention_in_lungs", lambda *arguments, **options: shares)
    (tmp_path / "elsewhere").mkdir()
    write_test_films(tmp_path / "elsewhere" / "test-1.csv")
    for _ in range(2):
        steps.measure(steps.STEPS["frozen"], 1, tmp_path, tmp_path, 1)
    assert [line.partition(" ")[0] for line in asked] == ["train", "export", "evaluate", "evaluate"]
    assert "--data DIR/elsewhere/train-1.csv" in asked[0]
    assert asked[0].endswith("--final --resume --quiet --threads 1")
    assert "--data DIR/elsewhere/test-1.csv" in asked[2]
    assert "--data DIR/localization.csv" in asked[3]
    written = json.loads((tmp_path / "frozen-1" / "config.yaml").read_text())
    assert resolve(written) == resolve(steps.settings_of("frozen"))


def test_the_table_says_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"value": 0.75, "ci95": [0.7, 0.8], "positive": 1, "negative": 1, "std": None}
    scores = {**dict.fromkeys(elsewhere.QUESTIONS, entry), "elsewhere": entry}
    monkeypatch.setattr(steps, "read_predictions", lambda folder: folder)
    monkeypatch.setattr(elsewhere, "score", lambda named, resamples: {"evaluations": {}, "mean": scores})
    for side, in_map, iou in ((0, "attention", 0.2), (1, "attention-lungs", 0.4)):
        folder = tmp_path / f"lungs-{side}"
        for part in ("test", "boxes"):
            (folder / part).mkdir(parents=True)
        (folder / "test" / "metrics.json").write_text(json.dumps({"calibration": {"ece": 0.1 * side}}))
        maps = {"attention": {"iou_mean": 0.2, "pointing": 0.5}, in_map: {"iou_mean": iou, "pointing": 0.5}}
        (folder / "boxes" / "metrics.json").write_text(json.dumps({"localization": {"maps": maps}}))
        (folder / "attention.json").write_text(json.dumps({"attention": {"value": 0.6}}))
    result = steps.collect(tmp_path, ["plain", "lungs"], 10)
    assert result["plain"] is None
    row = result["lungs"]
    assert (row["sides"], row["pointing"], row["in_lungs"]) == (2, 0.5, 0.6)
    assert row["box_iou"] == pytest.approx(0.3)
    assert row["ece"] == pytest.approx(0.05)
    shown = steps.table(result).splitlines()
    assert len({line.count("|") for line in shown}) == 1
    assert shown[2].count(" - |") == 10
    assert "0.300" in shown[3]
