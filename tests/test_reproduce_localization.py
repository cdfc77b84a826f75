"""`reproduce.py localization`: models with weights, side by side on films with masks and with boxes; Figure 7."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import magsd_runtime
import reproduce
from magsd.cli import main as magsd
from magsd.data import Record, read_manifest
from magsd.ground_truth import Truth
from magsd.localization_evaluation import evaluate_localization
from magsd.localization_metrics import Case
from magsd_runtime.errors import UsageError
from magsd_runtime.prediction import Box
from magsd_runtime.preprocessing import Framing, PreprocessingSpec, Region
from reproduction import localizing
from reproduction.cells import Cell, expand, read_data, write_result
from reproduction.localizing import Compared, Judgement, compare, grid_of, judged, models_of, notes_of, to_markdown
from reproduction.plan import Plan, parse_plan
from reproduction.running import ensure_folds
from test_reproduce_plan import GOOD
from tiny_run import TINY, write_tiny_manifest

PREDICTIONS = """path,patient,source,fold,label,predicted,probability_blob,probability_plain
a.png,a,,0,blob,blob,0.9,0.1
b.png,b,,0,plain,plain,0.2,0.8
c.png,c,,0,blob,plain,0.4,0.6
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Plan, list[Cell]]:
    """Films, a folder of cells and its plan: MAG-SD of both folds with weights, `gap` of one fold without."""
    root = tmp_path_factory.mktemp("localization")
    films = write_tiny_manifest(root / "films").parent
    settings = {name: value for name, value in TINY.items() if name not in ("epochs", "folds")}
    content = {
        **GOOD, "folds": 2, "settings": settings, "positive": {"A": "blob"}, "epochs": 1,
        "localization": {"data": "drawn.csv", "trained_on": "A"},
        "stages": [{"data": ["A"], "models": ["magsd"], "ablations": ["gap"]}],
    }  # fmt: skip
    (root / "plan.yaml").write_text(json.dumps(content))
    plan = replace(parse_plan(content), path=root / "plan.yaml")
    cells = expand(plan, read_data(plan, films))
    out = root / "out"
    for cell in cells:
        if cell.variant == "gap" and cell.fold == 1:
            continue
        run = cell.folder(out) / "run"
        if cell.variant == "magsd":
            options = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
            command = ["train", "--data", str(cell.manifest), "--out", str(run), "--epochs", "1", "--folds", "2"]
            folds = str(ensure_folds(cell, out)) if cell.fold == 0 else str(cell.folds_file(out))
            assert magsd([*command, *options, "--folds-file", folds, "--fold", str(cell.fold), "--quiet"]) == 0
        write_result(cell.folder(out), fake_result(cell))
        (cell.folder(out) / "evaluation").mkdir()
        (cell.folder(out) / "evaluation" / "predictions.csv").write_text(PREDICTIONS)
    write_drawn(films)
    return films, out, plan, cells


def fake_result(cell: Cell) -> dict[str, Any]:
    from reproduction.cells import SCHEMA, SCORES, settings_of

    return {
        "schema": SCHEMA, "key": cell.key, "title": cell.title, "data": cell.data, "variant": cell.variant,
        "fold": cell.fold, "folds": [2, 0], "seed": 0, "classes": ["blob", "plain"], "confusion": [[3, 1], [2, 4]],
        "scores": dict.fromkeys(SCORES, 0.5), "manifest_sha256": cell.digest, "folds_sha256": "0",
        "settings": settings_of(cell.config), "notes": [], "images": {"test": 10},
    }  # fmt: skip


def write_drawn(films: Path) -> None:
    """Eight films of patients who trained nothing: four with a mask, four with two boxes, one class unknown."""
    rng = np.random.default_rng(5)
    lines = ["path,label,patient,source,x,y,w,h,mask"]
    for number in range(8):
        image, mask = rng.normal(90, 25, (80, 72)), np.zeros((80, 72), np.uint8)
        for x, y in ((6 + number, 8), (40, 30 + 2 * number)):
            image[y : y + 18, x : x + 18] += 90
            mask[y : y + 18, x : x + 18] = 255
        cv2.imwrite(str(films / f"d{number}.png"), np.clip(image, 0, 255).astype(np.uint8))
        label, patient = "lesion" if number == 7 else "blob", f"new{number // 2}"
        if number < 4:
            cv2.imwrite(str(films / f"m{number}.png"), mask)
            lines.append(f"d{number}.png,{label},{patient},here,,,,,m{number}.png")
        else:
            for x, y in ((6 + number, 8), (40, 30 + 2 * number)):
                lines.append(f"d{number}.png,{label},{patient},here,{x},{y},18,18,")
    (films / "drawn.csv").write_text("\n".join(lines) + "\n")


def test_every_model_with_weights_judges_every_film_once_a_fold(world: tuple[Path, Path, Plan, list[Cell]]) -> None:
    films, out, plan, cells = world
    models, lost = models_of(plan, cells, out)
    assert [model.title for model in models] == ["MAG-SD (Proposed), A"]
    assert lost == ["gap of A"]
    assert [fold for _, fold in models[0].sources] == [0, 1]
    found = judged(models[0], read_manifest(films / "drawn.csv"), resamples=20)
    assert sorted((case.record.path.name, case.fold) for case in found.cases) == sorted(
        (f"d{number}.png", fold) for number in range(8) for fold in (0, 1)
    )
    assert found.found.summary["ground_truth"] == {"box": 8, "mask": 8}
    first = {case.record.path: case.heats["attention"] for case in found.cases if case.fold == 0}
    assert any(
        not np.array_equal(first[case.record.path], case.heats["attention"]) for case in found.cases if case.fold
    )
    # alone, a fold says the same
    alone = judged(Compared("one", models[0].sources[1:]), read_manifest(films / "drawn.csv"), resamples=20)
    for case in alone.cases:
        other = next(each for each in found.cases if each.record == case.record and each.fold == 1)
        np.testing.assert_array_equal(case.heats["evidence"], other.heats["evidence"])


def test_a_bundle_is_one_more_model(world: tuple[Path, Path, Plan, list[Cell]]) -> None:
    films, out, plan, cells = world
    shipped = Path(magsd_runtime.__file__).parent / "shipped" / "covid-cxr"
    models, _ = models_of(plan, cells, out, [f"in the box={shipped}"])
    assert [(model.title, model.asked) for model in models] == [("MAG-SD (Proposed), A", False), ("in the box", True)]
    found = judged(models[1], read_manifest(films / "drawn.csv"), device="cpu", resamples=20)
    assert sorted(case.record.path.name for case in found.cases) == [f"d{number}.png" for number in range(8)]
    assert {case.fold for case in found.cases} == {0}
    # as for the others the threshold is chosen on other patients, not the bundle's
    assert "leave one patient out" in found.found.summary["chosen_on"]
    assert {"attention-lungs", "evidence-lungs"} < set(found.found.summary["maps"])


def test_the_command_prints_and_places_the_table_and_draws_figure_7(
    world: tuple[Path, Path, Plan, list[Cell]], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    films, out, plan, cells = world
    monkeypatch.setattr(localizing, "evaluate_localization", quick)
    common = [str(plan.path), "--out", str(out), "--data-root", str(films)]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- localization: test -->\nold\n<!-- end -->\nafter\n".replace("test", plan.name))
    run = cells[0].folder(out) / "run"
    command = ["localization", *common, "--markdown", str(page), "--json", str(tmp_path / "l.json")]
    assert reproduce.main([*command, "--also", f"another={run}"]) == 0
    shown = capsys.readouterr().out
    assert "Research use only" in shown
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    named = [(row[0].removeprefix("| "), row[1], row[2], row[4]) for row in rows[2:]]
    assert named == [
        ("MAG-SD (Proposed), A", "attention", "8", "2"), ("MAG-SD (Proposed), A", "evidence", "8", "2"),
        ("another", "attention", "8", "1"), ("another", "evidence", "8", "1"),
        # fold 1 has other training-side films to choose a size on, and draws of its own
        ("baseline: central box of fitted size (for MAG-SD (Proposed), A)", "-", "8", "-"),
        ("baseline: central box of fitted size (for another)", "-", "8", "-"),
        ("baseline: fixed central box, half of each side", "-", "8", "-"),
        ("baseline: random map, 2 x 2 (for MAG-SD (Proposed), A)", "-", "8", "-"),
        ("baseline: random map, 2 x 2 (for another)", "-", "8", "-"),
    ]  # fmt: skip
    assert "weights were not kept (--keep all): gap of A" in shown
    assert "of films whose class a model does not know" in shown
    text = page.read_text()
    assert text.startswith("before\n<!-- localization:")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text.split("-->")[1].splitlines()
    report = json.loads((tmp_path / "l.json").read_text())
    assert [model["models"] for model in report["models"]] == [2, 1]
    assert to_markdown(report) == shown

    assert reproduce.main(["figures", *common, "--to", str(tmp_path / "figures")]) == 0
    drawn = capsys.readouterr().out.split()
    assert [Path(name).name for name in drawn][-1] == "figure-7-localization.png"
    image = cv2.imread(drawn[-1])
    assert image is not None
    green = (image[..., 1].astype(int) > 190) & (image[..., 2] < 110)
    assert green.sum() > 2000  # masks and boxes, on every picture of six films


def quick(*arguments: Any, **options: Any) -> Any:
    return evaluate_localization(*arguments, **{**options, "resamples": 20})


def test_without_weights_or_films_it_says_so(world: tuple[Path, Path, Plan, list[Cell]], tmp_path: Path) -> None:
    films, out, plan, cells = world
    with pytest.raises(UsageError, match="has no line 'localization'"):
        compare(replace(plan, localization=None), cells, out, films, print)
    with pytest.raises(UsageError, match=r"--minimum-score is 1\.5"):
        compare(plan, cells, out, films, print, minimum_score=1.5)
    with pytest.raises(UsageError, match="has its weights: keep them"):
        compare(plan, cells, tmp_path, films, print)
    with pytest.raises(UsageError, match="is no folder; expected NAME=RUN"):
        models_of(plan, cells, out, ["x=nowhere"])
    page = tmp_path / "page.md"
    page.write_text("mine")
    shutil.copytree(out, tmp_path / "out")
    command = ["localization", str(plan.path), "--out", str(tmp_path / "out"), "--data-root", str(films)]
    assert reproduce.main([*command, "--markdown", str(page)]) == 2
    assert page.read_text() == "mine"


def judgement(title: str, good: bool, classes: tuple[str, ...] = ("covid19",)) -> Judgement:
    """Twelve films whose map is hot in what was drawn, or in the other corner."""
    spec = PreprocessingSpec(size=64)
    cases = []
    for number in range(12):
        mask = np.zeros((64, 64), np.bool_)
        x, y = 4 * (number % 4), 4 * (number // 4)
        mask[y : y + 16, x : x + 16] = True
        heat = cv2.resize(mask.astype(np.float32), (16, 16), interpolation=cv2.INTER_AREA)
        heat = heat if good else heat[::-1, ::-1]
        truth = Truth(mask, Box(x, y, x + 16, y + 16), "box", Framing(64, 64, Region(0, 0, 64, 64)))
        record = Record(Path(f"{number}.png"), "covid19", f"p{number}", source="here")
        cases.append(Case(record, 0, truth, {"attention": heat, "evidence": heat}))
    found = evaluate_localization(cases, {}, spec, resamples=200)
    return Judgement(Compared(title, ()), tuple(cases), spec, classes, found)


def test_notes_name_what_is_beyond_the_baselines_and_what_is_not() -> None:
    judgements = [judgement("good", True), judgement("bad", False, ("other",))]
    report: dict[str, Any] = {
        "manifest": "m.csv", "without_weights": [], "minimum_score": 0.9,
        "models": [
            {"title": each.model.title, "models": 1, "grid": [16, 16], "localization": each.found.summary}
            for each in judgements
        ],
    }  # fmt: skip
    notes = "\n".join(notes_of(report, judgements))
    assert "interval above 0: good (attention), good (evidence). Of 4 rows" in notes
    assert "those count that reach 0.9" in notes
    assert "12 films of 12 patients, ground truth: box, all of one source (here)" in notes
    assert "class a model does not know (bad)" in notes
    bad = {**report, "models": report["models"][1:]}
    assert "none: these films do not show any map to be better" in "\n".join(notes_of(bad, judgements[1:]))
    grid = grid_of(report)
    assert all(len(row) == len(grid.head) for row in grid.rows)
    # both judge the same films on the same grid: each baseline is there once
    assert [row[0] for row in grid.rows[4:]] == [
        "baseline: central box of fitted size", "baseline: fixed central box, half of each side",
        "baseline: random map, 16 x 16",
    ]  # fmt: skip
