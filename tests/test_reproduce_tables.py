"""The tables against slow reference implementations; Markdown and LaTeX; estimates."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score, recall_score

from magsd.data import Manifest, Record
from magsd_runtime.errors import DataError, UsageError
from reproduction import estimate, published
from reproduction.cells import SCORES, Cell, expand, settings_of
from reproduction.estimate import Costs, duration, network_of, passes, work
from reproduction.output import escaped, grids, placed, to_latex, to_markdown
from reproduction.plan import Plan, parse_plan
from reproduction.tables import build, data_facts, scores_of
from reproduction.variants import TABLES

RECORDS = tuple(Record(Path(f"{i}.png"), ("covid19", "other")[i % 2], f"p{i // 2}") for i in range(20))
CONTENT = {
    "name": "test", "data": {"A": "a.csv", "B": "b.csv"}, "folds": 4, "seeds": [0, 1], "epochs": 3,
    "positive": {"A": "covid19"}, "settings": {"backbone": "tf_efficientnet_lite0", "size": 128},
    "stages": [
        {"data": ["A", "B"], "models": ["magsd", "magsd-oaug", "fpn"], "ablations": ["l2", "gap", "no-clahe"]},
        {"data": ["A"], "models": ["vgg16"]},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def planned() -> tuple[Plan, list[Cell], dict[str, Any]]:
    plan = parse_plan(CONTENT)
    manifests = {name: Manifest(Path(name), RECORDS, Path(f"{name}.csv")) for name in "AB"}
    # one digest would make the data sets one
    cells = [replace(cell, digest=cell.data * 64) for cell in expand(plan, manifests)]
    return plan, cells, {name: data_facts(name, RECORDS) for name in "AB"}


def made_up(cells: list[Cell], leave_out: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Random results of all cells but those of ``leave_out``: variant -> folds."""
    rng = np.random.default_rng(3)
    results = {}
    for cell in cells:
        confusion = rng.integers(1, 30, (2, 2))
        scores = dict(zip(SCORES, rng.uniform(0.5, 1, len(SCORES)).tolist()))
        if cell.fold in leave_out.get(cell.variant, ()):
            continue
        results[cell.key] = {
            "scores": scores, "confusion": confusion.tolist(), "classes": ["covid19", "other"], "data": cell.data,
            "images": {"train": 60 + cell.fold, "validation": 10, "test": 20}, "notes": [], "commit": "c",
            "magsd_version": "1",
        }  # fmt: skip
    return results


def test_means_deviations_and_differences_are_those_of_the_folds(
    planned: tuple[Plan, list[Cell], dict[str, Any]], tmp_path: Path
) -> None:
    plan, cells, data = planned
    results = made_up(cells, {"l2": [2], "fpn": range(4), "gap": [0, 1, 2]})
    report = build(plan, cells, results, data, tmp_path)
    rows = {
        (table["number"], name, row["variant"]): row
        for table in report["tables"] for name, part in table["data"].items() for row in part["rows"]
    }  # fmt: skip
    found = {
        (table["number"], name, each["variant"], each["against"]): each
        for table in report["tables"] for name, part in table["data"].items() for each in part["comparisons"]
    }  # fmt: skip

    def values(data_set: str, variant: str, score: str) -> dict[int, float]:
        """Slowly: the mean over seeds of each fold."""
        of_fold: dict[int, list[float]] = {}
        for cell in cells:
            if (cell.data, cell.variant) == (data_set, variant) and cell.key in results:
                result = results[cell.key]
                value = result["scores"][score]
                if data_set == "A" and score in ("sensitivity", "specificity", "f1"):
                    truth = np.repeat([1, 1, 0, 0], np.ravel(result["confusion"]))
                    judged = np.repeat([1, 0, 1, 0], np.ravel(result["confusion"]))
                    if score == "specificity":
                        truth, judged = 1 - truth, 1 - judged
                    value = f1_score(truth, judged) if score == "f1" else recall_score(truth, judged)
                of_fold.setdefault(cell.fold, []).append(float(value))
        return {fold: sum(each) / len(each) for fold, each in of_fold.items()}

    for number, variant in [(3, "magsd"), (3, "magsd-oaug"), (4, "no-clahe"), (8, "l2"), (6, "gap"), (3, "vgg16")]:
        for data_set in "AB":
            for score in SCORES:
                each = list(values(data_set, variant, score).values())
                summary = rows[number, data_set, variant]["scores"][score]
                if not each:
                    assert summary == {"value": None, "std": None}
                    continue
                assert summary["value"] == pytest.approx(sum(each) / len(each))
                if len(each) > 1:
                    mean = sum(each) / len(each)
                    squares = sum((value - mean) ** 2 for value in each)
                    assert summary["std"] == pytest.approx(math.sqrt(squares / (len(each) - 1)))
                else:
                    assert summary["std"] is None
    # l2 lacks fold 2: three pairs
    one, other = values("A", "l2", "f1"), values("A", "magsd", "f1")
    pairs = [(one[fold], other[fold]) for fold in (0, 1, 3)]
    paired = found[8, "A", "l2", "magsd"]["scores"]["f1"]
    assert paired["n"] == 3
    assert paired["mean"] == pytest.approx(np.mean([a - b for a, b in pairs]))
    assert paired["p_paired_t"] == pytest.approx(stats.ttest_rel(*zip(*pairs)).pvalue)
    assert found[8, "A", "l2", "magsd"]["test_to_train"] == pytest.approx(np.mean([20 / n for n in (60, 61, 63)]))
    assert found[6, "B", "gap", "magsd-oaug"]["scores"]["auc"]["n"] == 1
    assert found[8, "A", "l2", "magsd"]["published_difference"]["accuracy"] == pytest.approx(95.93 - 96.94)
    assert (3, "A", "fpn", "magsd") not in found  # nothing of it is done
    assert report["comparisons"] == len(found)
    # what is missing is there
    assert (rows[3, "A", "fpn"]["planned"], rows[3, "A", "fpn"]["done"]) == (8, 0)
    assert rows[3, "B", "vgg16"]["planned"] == 0
    assert (rows[8, "A", "l2"]["done"], rows[8, "A", "l2"]["planned"]) == (6, 8)
    assert rows[3, "A", "bcnn"]["published"]["accuracy"] == {"mean": 96.0, "std": 1.52}


def test_a_pair_has_the_same_seeds(planned: tuple[Plan, list[Cell], dict[str, Any]], tmp_path: Path) -> None:
    plan, cells, data = planned
    results = made_up(cells, {})
    lost = next(c for c in cells if (c.data, c.variant, c.fold, c.config.seed) == ("B", "magsd", 1, 0))
    del results[lost.key]
    report = build(plan, cells, results, data, tmp_path)
    (found,) = [each for each in report["tables"][5]["data"]["B"]["comparisons"] if each["variant"] == "l2"]
    of = {(c.variant, c.fold, c.config.seed): results[c.key]["scores"]["auc"] for c in cells
          if c.data == "B" and c.key in results}  # fmt: skip
    assert found["scores"]["auc"]["differences"][1] == pytest.approx(of["l2", 1, 1] - of["magsd", 1, 1])


def test_an_undefined_score_is_no_number(planned: tuple[Plan, list[Cell], dict[str, Any]], tmp_path: Path) -> None:
    plan, cells, data = planned
    results = made_up(cells, {})
    for each in results.values():
        each["scores"]["auc"] = None
    report = build(plan, cells, results, data, tmp_path)
    assert report["tables"][0]["data"]["A"]["rows"][-1]["scores"]["auc"] == {"value": None, "std": None}
    assert report["tables"][0]["data"]["A"]["comparisons"][0]["scores"]["auc"]["n"] == 0
    assert "nan" not in to_markdown(report).lower()
    none = {"data": "A", "classes": ["covid19", "other"], "confusion": [[0, 0], [1, 2]], "scores": {"f1": 1.0}}
    assert scores_of(none, {"A": "covid19"}) == {"sensitivity": None, "specificity": 2 / 3, "f1": None}
    assert scores_of(none, {}) == {"f1": 1.0}


def test_the_printed_tables(planned: tuple[Plan, list[Cell], dict[str, Any]], tmp_path: Path) -> None:
    plan, cells, data = planned
    report = build(plan, cells, made_up(cells, {"l2": [2]}), data, tmp_path)
    lost = next(c for c in cells if (c.data, c.variant, c.fold) == ("A", "l2", 2))
    lost.folder(tmp_path).mkdir(parents=True)
    (lost.folder(tmp_path) / "failed.json").write_text("{}")
    report = build(plan, cells, made_up(cells, {"l2": [2]}), data, tmp_path)
    text = to_markdown(report)
    for table in TABLES:
        for row in table.rows:
            printed = None if row.extra else published.TABLES_3_TO_8[row.variant]["A"][0]
            if printed is not None:
                pattern = rf"^\| {re.escape(row.text)} \|.*\| {printed[0]:.2f}±{printed[1]:.2f} \|"
                assert re.search(pattern, text, re.MULTILINE), row
    assert re.search(r"^\| L2 \|.*\| 6 of 8, 1 failed \| 95\.93±0\.61", text, re.MULTILINE)
    assert re.search(r"^\| U-Net \| - \| - \| - \| - \| - \| not planned \|", text, re.MULTILINE)
    assert "Research use only. Not for clinical use." in text
    assert "With 4 folds the sign-flip test cannot give less than p = 0.125" in text
    assert "vgg16 (vgg16, 128 pixels, 3 epochs)" in text
    assert f"{report['comparisons']} comparisons, and p values not corrected" in text
    for grid in grids(report):
        assert {len(row) for row in grid.rows} == {len(grid.head)}


def test_the_latex_is_whole(planned: tuple[Plan, list[Cell], dict[str, Any]], tmp_path: Path) -> None:
    plan, cells, data = planned
    report = build(plan, cells, made_up(cells, {}), data, tmp_path)
    report["notes"].append('50 % of a_b & c#d {x} ~ ^ \\ $1 <p> "q" |')
    text = to_latex(report)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.isascii()
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", body):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened
    unescaped = re.sub(r"\\[&%$#_{}\\]", "", body)
    assert unescaped.count("{") == unescaped.count("}")
    for columns, inside in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", body, re.DOTALL):
        rows = [line for line in inside.splitlines() if line.endswith(r"\\")]
        assert len(rows) >= 2
        for row in rows:
            assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1
    assert r"$\pm$" in body


@given(st.text(max_size=30))
def test_escaped_text_has_no_character_that_latex_reads(text: str) -> None:
    result = escaped(text)
    assert "\n" not in result
    known = (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}", r"\textless{}", r"\textgreater{}",
             r"\textbar{}", r"\textquotedbl{}", r"$\pm$", r"$\times$", r"\&", r"\%", r"\$", r"\#", r"\_", r"\{",
             r"\}")  # fmt: skip
    pattern = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    assert not set(re.sub(pattern, "", result)) & set('\\&%$#_{}~^<>|"±*')
    # nothing of it is lost
    assert len(re.sub(pattern, "x", result)) == len([c for c in " ".join(text.split()) if c.isprintable()])


def test_tables_go_where_a_page_has_a_place_for_them(tmp_path: Path) -> None:
    page = "before\n<!-- tables: quick -->\nold\n<!-- end -->\nafter <!-- tables: full -->x<!-- end -->\n"
    once = placed(page, "quick", "new\n", tmp_path)
    assert once == page.replace("old\n", "new\n")
    assert placed(once, "quick", "new\n", tmp_path) == once
    for without in ("text", "<!-- tables: quick -->", "<!-- end -->"):
        with pytest.raises(UsageError, match="has no place for the tables"):
            placed(without, "quick", "new", tmp_path)


def test_work_is_multiply_adds_times_images_epochs_and_passes(
    planned: tuple[Plan, list[Cell], dict[str, Any]]
) -> None:  # fmt: skip
    cells = {cell.variant: cell for cell in planned[1] if cell.fold == 0}
    assert {name: passes(cells[name]) for name in ("magsd", "magsd-oaug", "gap", "l2")} == {
        "magsd": 12, "magsd-oaug": 3, "gap": 3, "l2": 12,
    }  # fmt: skip
    config = cells["magsd"].config
    assert passes(replace(cells["magsd"], config=replace(config, backbone_rate=0.0))) == 4
    # 20 images, 4 folds: 15, of which 12 are trained on three times 12 passes and 3 are validated on
    assert work(cells["magsd"], 10.0) == pytest.approx(10 * 3 * (12 * 12 + 3))


def test_the_estimate_takes_the_best_there_is(planned: tuple[Plan, list[Cell], dict[str, Any]]) -> None:
    _, cells, _ = planned
    first, like, other = cells[0], cells[12], next(c for c in cells if c.variant == "fpn")
    assert (first.variant, like.variant, like.data) == ("magsd", "magsd", "A")
    costs = Costs({network_of(cell): 1e9 for cell in cells})
    with pytest.raises(DataError, match="nothing was measured"):
        costs.seconds(first, {})
    stepped = Costs(costs.multiply_adds, 1e-12)
    assert stepped.seconds(first, {}) == (estimate.START_SECONDS + 1e-12 * costs.work(first), "step")
    result = {
        "manifest_sha256": first.digest, "settings": settings_of(first.config), "multiply_adds": 2e12,
        "seconds": {"epochs": 100.0, "evaluation": 5.0, "start": 7.0},
    }  # fmt: skip
    results = {first.key: result}
    assert stepped.seconds(like, results) == (112.0, "like")
    assert stepped.seconds(other, results) == (pytest.approx(12 + 100 / 2e12 * costs.work(other)), "rate")
    found = estimate.estimate([first, like, other, other], stepped, results)
    assert (found.like, found.rate, found.step, found.assumed) == (1, 1, 0, 0)
    assert found.seconds == pytest.approx(112 + 12 + 100 / 2e12 * costs.work(other))
    held_up = {name: {**result, "seconds": {**result["seconds"], "epochs": 9e9}} for name in "x"}
    again = {"a": result, "b": result, **held_up}
    assert stepped.seconds(like, again) == (112.0, "like")
    assert stepped.seconds(other, again) == (pytest.approx(12 + 100 / 2e12 * costs.work(other)), "rate")
    assert [duration(s) for s in (40, 700, 7300, 300_000)] == ["40 s", "12 min", "2 h 2 min", "3.5 days"]
