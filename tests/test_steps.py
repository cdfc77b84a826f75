"""The ladder of recipes against shortcuts."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import elsewhere
import steps
import tiny_bundle
from magsd.commands import evaluate
from magsd.config import read_config, resolve
from magsd.options import add_config_options, given_options
from magsd_runtime.errors import DataError, UsageError
from magsd_runtime.preprocessing import PreprocessingSpec

RECIPE = Path(__file__).parents[1] / "configs" / "covid-cxr.yaml"
CLASSES = ("covid19", "healthy", "pneumonia")


def test_the_ladder_ends_at_the_recipe_of_the_shipped_model() -> None:
    recipe = resolve(read_config(RECIPE))
    assert [name for name in steps.STEPS if resolve(steps.settings_of(name)) == recipe] == ["magsd"]
    assert list(steps.STEPS)[:7] == ["plain", "strong", "lungs", "frozen", "spectrum", "attention", "magsd"]
    assert all(steps.STEPS[name].after == "magsd" for name in ("untaught", "l2", "epochs12", "size288"))


def test_the_ladder_begins_without_a_defence() -> None:
    plain = resolve(steps.settings_of("plain"))
    assert (plain.pooling, plain.loss, plain.attention_augmentation) == ("attention", "cross-entropy", ())
    assert (plain.backbone, plain.weights, plain.backbone_rate) == ("tf_efficientnet_lite0", "imagenet", 1.0)
    assert (plain.crop, plain.clahe_clip, plain.clahe_grid) == ("none", 4.0, 4)
    assert (plain.epochs, plain.batch_size, plain.learning_rate, plain.gradient_clip) == (6, 16, 0.003, 5.0)
    assert (plain.sampling, plain.select, plain.rotation, plain.average) == ("uniform", "last", 15.0, 0.0)
    assert not any((plain.tone, plain.blur, plain.noise, plain.erasing, plain.spectrum, plain.lung_attention))


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
        (["--out", str(tmp_path), "--sides", "0,b"], "--sides 0,b"),
        (["--out", str(tmp_path), "--data-root", str(tmp_path / "none")], "--data-root"),
    ):
        assert steps.main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert steps.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[::2]] == list(steps.STEPS)
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    for step, options in zip(steps.LADDER, listed[1::2]):  # as printed, they can be typed
        before = steps.settings_of(step.after) if step.after else {}
        typed = given_options(parser.parse_args(options.split()))
        assert typed.keys() == step.settings.keys()
        assert resolve({**before, **typed}) == resolve(steps.settings_of(step.name))


def write_table(path: Path, columns: str, rows: Sequence[tuple[object, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as text:
        csv.writer(text).writerows([columns.split(","), *rows])


def tiny_root(root: Path) -> Path:
    """Films of all three sources, boxes on two patients' films of their own, lung masks of cohen's films."""
    rng = np.random.default_rng(3)

    def film(name: str) -> str:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (72, 80)).astype(np.uint8)).save(root / name)
        return name

    cohen = [(film(f"cohen/{n}.png"), ("covid19", "pneumonia")[n % 3 == 0], f"cohen:{n}", "cohen") for n in range(10)]
    nih = [(film(f"nih/{n}.png"), CLASSES[1 + n % 2], f"nih:{n}", "nih") for n in range(30)]
    children = [(film(f"kermany/{n}.png"), CLASSES[1 + n % 2], f"kermany:{n}", "kermany") for n in range(18)]
    boxed = [(film(f"boxed/{n}.png"), "pneumonia", f"boxed:{n}", "nih", 8 + n, 9, 30, 40) for n in range(3)]
    lungs = np.zeros((72, 80), np.uint8)
    lungs[10:60, 10:70] = 255
    Image.fromarray(lungs).save(root / "lungs.png")
    write_table(root / "dataset_b.csv", "path,label,patient,source", [*cohen, *nih])
    write_table(root / "dataset_c.csv", "path,label,patient,source", children)
    write_table(root / "localization.csv", "path,label,patient,source,x,y,w,h", boxed)
    write_table(root / "lung_masks.csv", "path,mask", [(row[0], "lungs.png") for row in cohen])
    domains = ("radiopaedia.org", "www.eurorad.org")
    urls = [(row[0], f"https://{domains[number % 4 > 1]}/{number}") for number, row in enumerate(cohen)]
    write_table(root / "cohen_licences.csv", "path,url", urls)
    return root


def in_process(asked: list[str]) -> Any:
    """The commands of a step: `evaluate` as it is, on a bundle of a few hundred weights instead of a training."""

    def command(*arguments: object) -> None:
        typed = [str(argument) for argument in arguments]
        asked.append(" ".join(typed))
        if typed[0] == "export":
            tiny_bundle.build(Path(typed[typed.index("--out") + 1]), classes=CLASSES, spec=PreprocessingSpec(size=64))
        elif typed[0] == "evaluate":
            assert evaluate([*typed[1:], "--bootstrap", "10"]) == 0

    return command


def test_a_step_is_measured_once_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out, asked = tiny_root(tmp_path / "root"), tmp_path / "out", list[str]()
    monkeypatch.setattr(steps, "magsd", in_process(asked))
    written = tmp_path / "steps.json"
    arguments = ["--out", out, "--steps", "plain,frozen", "--data-root", root, "--bootstrap", "10", "--json", written]

    def run(sides: str) -> list[str]:
        asked.clear()
        assert steps.main([*map(str, arguments), "--sides", sides]) == 0
        return [line.replace(str(out), "OUT") for line in asked]

    first = run("1")
    assert [line.partition(" ")[0] for line in first] == ["train", "export", "evaluate", "evaluate", "evaluate"] * 2
    trained = "train --config OUT/frozen-1/config.yaml --data OUT/elsewhere/train-1.csv --out OUT/frozen-1/run"
    assert first[5].startswith(f"{trained} --final --resume")
    assert "OUT/frozen-1/bundle --data OUT/elsewhere/test-1.csv" in first[7]
    assert resolve(read_config(out / "frozen-1" / "config.yaml")) == resolve(steps.settings_of("frozen"))
    assert run("1") == []

    # killed between two evaluations: the training is kept
    (out / "frozen-1" / "boxes-shown" / "metrics.json").unlink()
    (out / "frozen-1" / "boxes-shown").rename(tmp_path / "aside")
    capsys.readouterr()
    assert run("") == []
    assert f"| frozen |{' - |' * len(steps.COLUMNS)}" in capsys.readouterr().out
    assert [line.partition(" ")[0] for line in run("1")] == ["evaluate"]

    row = json.loads(written.read_text())["plain"]
    assert set(steps.COLUMNS) <= set(row)
    assert row["sides"] == 1
    # macro AUC and accuracy again, from the table of predictions
    with open(out / "plain-1" / "test" / "predictions.csv") as text:
        films = list(csv.DictReader(text))
    guesses = np.array([[float(film[f"probability_{name}"]) for name in CLASSES] for film in films])
    truth = np.array([CLASSES.index(film["label"]) for film in films])
    areas = [roc_auc_score(truth == index, guesses[:, index]) for index in range(3)]
    assert row["auc"] == pytest.approx(np.mean(areas), abs=1e-3)
    assert row["accuracy"] == pytest.approx((guesses.argmax(1) == truth).mean())
    # with a lung mask everywhere the same, the chance is its share of the film
    assert row["chance"] == pytest.approx(50 * 60 / (72 * 80), abs=0.01)
    # no threshold is the bundle's own, on which no step would be compared with another
    for boxes, minimum in (("boxes-all", 0.0), ("boxes-shown", 0.9)):
        found = json.loads((out / "plain-1" / boxes / "metrics.json").read_text())["localization"]
        assert found["minimum_score"] == minimum
        assert "leave one patient out" in found["maps"]["attention"]["chosen_on"]
        assert row[{"boxes-all": "box_iou", "boxes-shown": "box_shown"}[boxes]] == pytest.approx(
            found["maps"]["attention"]["iou_mean"]
        )


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "frozen-0" / "config.yaml"
    config.parent.mkdir()
    config.write_text(json.dumps(steps.settings_of("frozen")))
    steps.check_settings(config.parent, "frozen")
    config.write_text(json.dumps({**steps.settings_of("frozen"), "epochs": 7}))
    with pytest.raises(UsageError, match="other settings than step frozen"):
        steps.measure(steps.STEPS["frozen"], 0, tmp_path, tmp_path, 1)


def test_a_failed_command_is_named() -> None:
    with pytest.raises(DataError, match="magsd evaluate ended with exit code 2"):
        steps.magsd("evaluate")


def test_the_table_says_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"value": 0.75, "ci95": [0.7, 0.8], "positive": 1, "negative": 1, "std": None}
    scores = {**dict.fromkeys(elsewhere.QUESTIONS, entry), "elsewhere": entry}
    monkeypatch.setattr(steps, "read_predictions", lambda folder: folder)
    monkeypatch.setattr(elsewhere, "score", lambda named, resamples: {"evaluations": {}, "mean": scores})

    def write(path: Path, value: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    for side, accuracy in ((0, 0.5), (1, 0.7)):
        folder = tmp_path / f"lungs-{side}"
        classification = {"auc": {"value": None if side else 0.8}, "accuracy": {"value": accuracy}}
        test = {"classification": classification, "calibration": {"ece": 0.1 * side}}
        write(folder / "test" / "metrics.json", test)
        for boxes, own, cut in (("boxes-all", 0.2, 0.25), ("boxes-shown", 0.21, 0.3 + 0.1 * side)):
            maps = {"attention": {"iou_mean": own, "pointing": 0.5}, "attention-lungs": {"iou_mean": cut}}
            write(folder / boxes / "metrics.json", {"localization": {"maps": maps}})
        write(folder / "attention.json", {"films": 3, "attention": {"value": 0.6}, "chance": 0.4 + 0.1 * side})
    result = steps.collect(tmp_path, ["plain", "lungs"], 10)
    assert result["plain"] is None
    row = result["lungs"]
    expected = {"sides": 2, "auc": None, "accuracy": 0.6, "ece": 0.05, "box_iou": 0.2, "box_shown": 0.35,
                "pointing": 0.5, "in_lungs": 0.6, "chance": 0.45}  # fmt: skip
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    shown = steps.table(result).splitlines()
    assert len({line.count("|") for line in shown}) == 1
    assert shown[2] == "| plain |" + " - |" * len(steps.COLUMNS)
    named = dict(zip(steps.COLUMNS, shown[3].split(" | ")[1:]))
    assert (named["elsewhere"], named["auc"], named["box_shown"]) == ("0.750 (0.700 to 0.800)", "-", "0.350")
