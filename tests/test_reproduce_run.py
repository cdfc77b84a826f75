"""Running cells: stopped, killed, failed, shared between processes, merged. A stub stands for `magsd` where it can."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reproduce
import step_costs
from magsd.cli import main as magsd
from magsd.config import read_config
from magsd.data import read_manifest
from magsd_runtime.errors import DataError, UsageError
from reproduction import estimate, running
from reproduction.cells import Cell, collect, expand, held, read_data, read_result, unique, write_result
from reproduction.merging import merge
from reproduction.plan import parse_plan
from reproduction.running import Options, ensure_folds, run
from test_reproduce_plan import GOOD
from tiny_run import TINY, write_tiny_manifest

STUB = '''
"""Writes what `magsd train` and `magsd evaluate` would; STUB says what goes wrong."""
import json, os, shutil, sys, time
from pathlib import Path
from magsd.config import read_config
arguments = sys.argv[1:]
value = lambda name: arguments[arguments.index(name) + 1]
what, fold = os.environ.get("STUB", ""), value("--fold")
if what == f"fail {fold}" or what == "fail all":
    sys.exit("the loss is no longer finite")
if arguments[0] == "train":
    run = Path(value("--out"))
    (run / f"fold{fold}").mkdir(parents=True, exist_ok=True)
    if "--config" in arguments:
        shutil.copyfile(value("--config"), run / "config.yaml")
    settings = read_config(run / "config.yaml")
    shutil.copyfile(settings["folds_file"], run / "folds.json")
    if what == "sleep":
        (run / "begun").touch()
        time.sleep(60)
    (run / "environment.json").write_text("{}")
    (run / f"fold{fold}" / "log.csv").write_text("epoch,best,seconds\\n1,0,2.0\\n2,1,3.0\\n3,1,1.0\\n4,0,1.0\\n")
    for name in ("best.pt", "last.pt", "best.safetensors"):
        (run / f"fold{fold}" / name).touch()
else:
    out = Path(value("--out"))
    out.mkdir(exist_ok=True)
    scores = dict(accuracy=0.5 + int(fold) / 10, sensitivity=0.5, specificity=0.5, f1=0.5, auc=None, ece=0.1)
    metrics = {"folds": [{**scores, "confusion": [[1, 1], [1, 1]]}], "confusion": {"classes": ["blob", "plain"]},
               "notes": [{"level": "warning", "text": "w"}, {"level": "note", "text": "n"}]}
    (out / "metrics.json").write_text(json.dumps(metrics))
    (out / "predictions.csv").write_text("stub")
'''


@pytest.fixture
def films(tmp_path: Path) -> Path:
    return write_tiny_manifest(tmp_path / "films").parent


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(running, "MAGSD", (sys.executable, str(tmp_path / "stub.py")))
    monkeypatch.setattr(running, "STOP_SECONDS", 5.0)
    monkeypatch.delenv("STUB", raising=False)


def make_cells(films: Path, **change: Any) -> list[Cell]:
    plan = parse_plan({**GOOD, **change})
    return expand(plan, read_data(plan, films))


ONE = {"stages": [{"data": ["A"], "models": ["magsd"]}]}


@pytest.mark.usefixtures("stub")
def test_what_is_done_is_not_done_again(films: Path, tmp_path: Path) -> None:
    cells, said = make_cells(films, **ONE), []
    options = Options(tmp_path / "out", "reference")
    outcome = run(cells, options, said.append)
    assert (outcome.done, outcome.failed, outcome.left, outcome.stopped) == (3, 0, 0, False)
    assert run(cells, options, said.append).done == 0
    results = collect(cells, tmp_path / "out")
    assert [results[cell.key]["scores"]["accuracy"] for cell in cells] == [0.5, 0.6, 0.7]
    result = results[cells[1].key]
    assert (result["chosen_epoch"], result["seconds"]["epochs"], result["notes"]) == (3, 7.0, ["w"])
    folds = json.loads((tmp_path / "out").joinpath("cells", cells[1].name, "run", "folds.json").read_text())
    of_fold = sum(folds["patients"][record.patient] == 1 for record in read_manifest(films / "manifest.csv").records)
    assert result["images"]["test"] == of_fold
    assert sum(result["images"].values()) == 24
    # a plan with one thing changed uses nothing of it
    assert collect(make_cells(films, **ONE, epochs=5), tmp_path / "out") == {}


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize(
    ("keep", "of_magsd", "of_plain"),
    [
        ("all", {"best.pt", "last.pt", "best.safetensors"}, {"best.pt", "last.pt", "best.safetensors"}),
        ("reference", {"best.pt"}, set()),
    ],
)
def test_weights_are_kept_as_asked(
    films: Path, tmp_path: Path, keep: str, of_magsd: set[str], of_plain: set[str]
) -> None:
    cells = [
        cell
        for cell in make_cells(films, stages=[{"data": ["A"], "models": ["magsd", "plain"]}])
        if cell.fold == 0
    ]  # fmt: skip
    run(cells, Options(tmp_path, keep), lambda text: None)
    for cell, expected in zip(cells, (of_magsd, of_plain)):
        assert {path.name for path in (cell.folder(tmp_path) / "run" / "fold0").iterdir()} == {"log.csv", *expected}


@pytest.mark.usefixtures("stub")
def test_a_cell_that_fails_is_told_and_tried_again(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, said = make_cells(films, **ONE), []
    monkeypatch.setenv("STUB", "fail 1")
    outcome = run(cells, Options(tmp_path, "none"), said.append)
    assert (outcome.done, outcome.failed, outcome.left) == (2, 1, 1)
    assert any("FAILED: magsd train ended with exit code 1: the loss is no longer finite" in text for text in said)
    failed = cells[1].folder(tmp_path) / "failed.json"
    assert "no longer finite" in json.loads(failed.read_text())["error"]
    monkeypatch.delenv("STUB")
    assert run(cells, Options(tmp_path, "none"), said.append).done == 1
    assert not failed.exists()


@pytest.mark.usefixtures("stub")
def test_when_all_fail_the_run_ends(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB", "fail all")
    with pytest.raises(DataError, match="3 cells failed one after the other; the last: magsd train ended"):
        run(make_cells(films), Options(tmp_path, "none"), lambda text: None)


@pytest.mark.usefixtures("stub")
def test_out_of_time(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = make_cells(films, **ONE)
    # less time left than a cell needs to get anywhere: not begun
    late = Options(tmp_path, "none", deadline=time.monotonic() + 50)
    outcome = run(cells, late, lambda text: None, seconds=lambda cell: 100.0)
    assert (outcome.done, outcome.left, outcome.stopped) == (0, 3, True)
    assert not cells[0].folder(tmp_path).exists()
    # the time ends while it runs: the child is ended, its folder kept, and the next run goes on with it
    monkeypatch.setenv("STUB", "sleep")
    outcome = run(cells, Options(tmp_path, "none", deadline=time.monotonic() + 1.5), lambda text: None)
    assert (outcome.done, outcome.stopped) == (0, True)
    folder = cells[0].folder(tmp_path)
    assert not (folder / "result.json").exists()
    assert not (folder / "failed.json").exists()
    with held(folder) as lock:
        assert lock is not None
    monkeypatch.delenv("STUB")
    (folder / "run").mkdir(exist_ok=True)
    assert run(cells, Options(tmp_path, "none"), lambda text: None).done == 3


@pytest.mark.usefixtures("stub")
def test_a_training_of_other_settings_is_not_gone_on_with(films: Path, tmp_path: Path) -> None:
    cell = make_cells(films, **ONE)[0]
    training = cell.folder(tmp_path) / "run"
    training.mkdir(parents=True)
    saved = {**cell.config.to_dict(), "momentum": 0.5}
    (training / "config.yaml").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match=r"was made with momentum 0\.5 and this plan has 0\.9"):
        run([cell], Options(tmp_path, "none"), lambda text: None)


HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from reproduction.cells import held
with held(Path(sys.argv[2])) as lock:
    assert lock is not None
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.usefixtures("stub")
def test_a_cell_in_other_hands_is_left_alone_and_a_stale_lock_is_none(films: Path, tmp_path: Path) -> None:
    cells, said = make_cells(films, **ONE), []
    folder = cells[0].folder(tmp_path)
    command = [sys.executable, "-c", HOLD, str(Path(reproduce.__file__).parent), str(folder)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        outcome = run(cells, Options(tmp_path, "none"), said.append)
        assert (outcome.done, outcome.left) == (2, 1)
        assert f"in the hands of {os.uname().nodename} {other.pid}" in said[-1]
    finally:
        other.kill()
        other.wait()
        assert other.stdout is not None
        other.stdout.close()
    assert (folder / ".lock").is_file()  # it is still there, and no lock
    assert run(cells, Options(tmp_path, "none"), said.append).done == 1


def fake_result(cell: Cell, folds: Path, **change: Any) -> dict[str, Any]:
    from magsd_runtime.files import sha256_file
    from reproduction.cells import SCHEMA, settings_of

    scores = dict.fromkeys(("accuracy", "sensitivity", "specificity", "f1", "auc", "ece"), 0.5)
    return {
        "schema": SCHEMA, "key": cell.key, "title": cell.title, "data": cell.data, "variant": cell.variant,
        "fold": cell.fold, "seed": cell.config.seed, "folds": [cell.config.folds, cell.fold_seed],
        "folds_sha256": sha256_file(folds), "manifest_sha256": cell.digest, "settings": settings_of(cell.config),
        "classes": ["blob", "plain"], "scores": scores, "confusion": [[1, 1], [1, 1]], "chosen_epoch": 1,
        "images": {"train": 10, "validation": 4, "test": 10}, "notes": [], "magsd_version": "1", "commit": "c",
        "seconds": {"epochs": 1.0, "evaluation": 1.0, "start": 1.0}, "environment": {}, "created": "now", **change,
    }  # fmt: skip


def finish(cell: Cell, out: Path, **change: Any) -> Path:
    """A finished cell without a training."""
    folder, folds = cell.folder(out), ensure_folds(cell, out)
    for name in ("run", "evaluation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folds, folder / "run" / "folds.json")
    (folder / "evaluation" / "metrics.json").write_text(str(out))
    write_result(folder, fake_result(cell, folds, **change))
    return folder


def test_cells_of_several_machines_become_one_folder(films: Path, tmp_path: Path) -> None:
    cells = make_cells(films, **ONE)
    here, there, third = (tmp_path / name for name in ("here", "there", "third"))
    finish(cells[0], here)
    finish(cells[0], there, created="later")  # the same, at another time
    source = finish(cells[1], there)
    finish(cells[2], third)
    finish(make_cells(films, **ONE, epochs=9)[0], third)
    unfinished = cells[1].folder(here) / "run"
    unfinished.mkdir(parents=True)
    (unfinished / "old").touch()
    lines = merge(cells, here, [there, third])
    assert lines == [
        f"{there}: 1 cells taken, 1 the same as had already",
        f"{third}: 1 cells taken, 0 the same as had already, 1 not of this plan left",
        f"{cells[1].title}: from {source}",
        f"{cells[2].title}: from {cells[2].folder(third)}",
    ]
    assert set(collect(cells, here)) == {cell.key for cell in cells}
    assert (cells[1].folder(here) / "evaluation" / "metrics.json").read_text() == str(there)
    assert not (cells[1].folder(here) / "run" / "old").exists()
    assert (read_result(cells[1].folder(here)) or {})["merged_from"] == str(source)
    assert merge(cells, here, [there, third])[0].startswith(f"{there}: 0 cells taken, 2 the same")


def test_a_merge_of_cells_that_contradict_each_other_changes_nothing(films: Path, tmp_path: Path) -> None:
    cells = make_cells(films, **ONE)
    here, there = tmp_path / "here", tmp_path / "there"
    finish(cells[1], here)
    finish(cells[0], there)
    finish(
        cells[1], there, scores={**dict.fromkeys(("accuracy", "sensitivity", "specificity", "f1", "auc", "ece"), 0.6)}
    )
    with pytest.raises(DataError, match="are the same cell with different scores: remove the one"):
        merge(cells, here, [there])
    assert not cells[0].folder(here).exists()
    finish(cells[1], there, folds_sha256="0" * 64)
    with pytest.raises(DataError, match="the same cell with different folds sha256"):
        merge(cells, here, [there])
    finish(cells[1], there)
    finish(cells[2], there, folds_sha256="0" * 64)
    with pytest.raises(DataError, match="have different folds of the same data"):
        merge(cells, here, [there])
    finish(cells[2], there)
    with (cells[2].folder(there) / "run" / "folds.json").open("a") as file:
        file.write(" ")
    with pytest.raises(DataError, match="was made with other folds than"):
        merge(cells, here, [there])
    assert not cells[0].folder(here).exists()
    with pytest.raises(UsageError, match="holds no cells"):
        merge(cells, here, [tmp_path])
    with pytest.raises(UsageError, match="is --out itself"):
        merge(cells, here, [here])


def test_a_damaged_result_is_named(films: Path, tmp_path: Path) -> None:
    cell = make_cells(films, **ONE)[0]
    folder = finish(cell, tmp_path)
    for text in (
        "{",
        "[]",
        json.dumps({"schema": "x"}),
        json.dumps(fake_result(cell, cell.folds_file(tmp_path), key="0")),
    ):
        (folder / "result.json").write_text(text)
        with pytest.raises(DataError, match=r"result\.json is damaged"):
            read_result(folder)


def write_plan(tmp_path: Path, films: Path, variants: dict[str, Any]) -> tuple[Path, list[Cell]]:
    settings = {k: v for k, v in TINY.items() if k not in ("epochs", "folds")}
    content = {
        **GOOD, "folds": 2, "settings": settings, "positive": {"A": "blob"},
        "localization": {"data": "manifest.csv", "trained_on": "A"},
        "epochs": 2, "stages": [{"data": ["A"], **variants}],
    }  # fmt: skip
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(content))
    plan = parse_plan(content)
    return path, expand(plan, read_data(plan, films))


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real training and evaluation, without the start of a process each, which takes longer than the work."""

    def child(arguments: list[object], folder: Path, options: Options, lock: int) -> float:
        assert magsd([str(each) for each in arguments]) == 0
        return 1.0

    monkeypatch.setattr(running, "_child", child)
    monkeypatch.setattr(estimate, "_ask", step_costs.answer)


def test_from_a_plan_to_tables_and_figures(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_this_process(monkeypatch)
    path, cells = write_plan(tmp_path, films, {"models": ["magsd"]})
    out = tmp_path / "out"
    common = [str(path), "--out", str(out), "--data-root", str(films)]
    assert reproduce.main(["run", *common, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "stage 1, A: magsd: " in text
    assert "2 cells, 0 done" in text
    assert "2 cells from one step measured on this machine" in text
    assert not out.exists()
    assert reproduce.main(["run", *common]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "done: 2 cells done, 0 failed, 0 of 2 left"
    results = collect(cells, out)
    assert set(results) == {cell.key for cell in unique(cells)}
    for cell in cells:
        saved = read_config(cell.folder(out) / "run" / "config.yaml")
        assert (saved["pooling"], saved["backbone"], saved["seed"]) == ("attention", "test_efficientnet", 0)
        assert sum(map(sum, results[cell.key]["confusion"])) == results[cell.key]["images"]["test"] == 12
    assert reproduce.main(["run", *common, "--dry-run"]) == 0
    assert "2 cells, 2 done; the others one after the other: 0 s" in capsys.readouterr().out

    files = [str(tmp_path / name) for name in ("t.md", "t.tex", "t.json")]
    assert reproduce.main(["tables", *common, "--markdown", files[0], "--latex", files[1], "--json", files[2]]) == 0
    assert "| GAP | - | - | - | - | - | not planned |" in capsys.readouterr().out
    report = json.loads(Path(files[2]).read_text())
    assert report["cells"] == {"planned": 2, "done": 2}
    assert reproduce.main(["figures", *common, "--to", str(tmp_path / "figures")]) == 0
    drawn = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert [Path(name).name for name in drawn[:2]] == ["figure-6-A.png", "figure-8-A.png"]
    assert any("localization" in name for name in drawn[2:])
    assert all(Path(name).read_bytes()[:4] == b"\x89PNG" for name in drawn)


@pytest.mark.slow
def test_killed_and_gone_on_with_it_ends_as_if_it_had_not_been(films: Path, tmp_path: Path) -> None:
    path, cells = write_plan(tmp_path, films, {"models": ["magsd"]})
    out = tmp_path / "killed"
    command = [sys.executable, reproduce.__file__, "run", str(path), "--out", str(out), "--data-root", str(films)]
    child = subprocess.Popen([*command, "--threads", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder, limit = cells[0].folder(out), time.monotonic() + 300
    while not (folder / "run" / "fold0" / "log.csv").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (folder / "result.json").exists()
    # its training may live on, and holds the cell for as long
    while time.monotonic() < limit:
        with held(folder) as lock:
            if lock is not None:
                break
        time.sleep(0.1)
    assert subprocess.run([*command, "--threads", "1"], stdout=subprocess.DEVNULL).returncode == 0

    # in processes of its own as well: PyTorch in this one rounds differently once its threads have been set
    whole = [str(tmp_path / "whole") if argument == str(out) else argument for argument in command]
    assert subprocess.run([*whole, "--threads", "1"], stdout=subprocess.DEVNULL).returncode == 0
    found = [collect(cells, folder) for folder in (out, tmp_path / "whole")]
    assert len(found[0]) == 2
    assert found[0].keys() == found[1].keys()
    for key, killed in found[0].items():
        assert killed["confusion"] == found[1][key]["confusion"]
        assert killed["scores"] == pytest.approx(found[1][key]["scores"], abs=1e-6)


def test_other_folds_of_the_same_data_are_no_pairs(films: Path, tmp_path: Path) -> None:
    cells = make_cells(films, **ONE)
    finish(cells[0], tmp_path)
    finish(cells[1], tmp_path, folds_sha256="0" * 64)
    with pytest.raises(DataError, match="have different folds of the same data: they are no pairs"):
        collect(cells, tmp_path)
    moved = replace(cells[1], digest="1" * 64)
    finish(moved, tmp_path, folds_sha256="0" * 64)
    assert len(collect([cells[0], moved], tmp_path)) == 2
