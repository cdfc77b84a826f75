"""``python -m benchmarks``: the figures that it makes of measurements, and that every part of it runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magsd_runtime.errors import DataError
from magsd_runtime.images import read_radiograph
from suite import runner
from suite.charts import bars, curves
from suite.figures import BENDS, FINE, STEEP, TOO_FEW, exponent, growth, ratio, spread
from suite.films import FORMATS, Format, film, folder_of
from suite.growth import curve
from suite.memory import write_renamed
from suite.peers import PEERS
from suite.processes import Job, in_turns, program, run
from suite.report import Bars, Goal, Report, Table, cell, markdown, number, record, text

X = [64.0, 128, 256, 512, 1024, 2048, 4096, 8000]
ROOT = Path(__file__).resolve().parents[1]


@given(st.floats(-3, 3), st.floats(1e-3, 1e3))
def test_the_exponent_of_a_power_is_that_power(power: float, factor: float) -> None:
    assert exponent(X, [factor * x**power for x in X]) == pytest.approx(power, abs=1e-9)


@given(st.lists(st.floats(0.1, 1e4), min_size=3, max_size=9, unique=True), st.integers(0, 2**31))
def test_the_exponent_is_the_slope_that_numpy_fits(x: list[float], seed: int) -> None:
    y = np.random.default_rng(seed).lognormal(size=len(x))
    u = np.log(x)
    if np.ptp(u) < 1e-3:
        return
    assert exponent(x, y.tolist()) == pytest.approx(float(np.polyfit(u, np.log(y), 1)[0]), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("x", "y"), [([1, 1], [1, 2]), ([1], [1]), ([1, 2], [0, 1]), ([1, 2], [1, -1]), ([1, 2], [1])])
def test_what_has_no_exponent_is_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="expected pairs above 0"):
        exponent(x, y)


@pytest.mark.parametrize(
    ("cost", "expected", "verdict"),
    [
        (lambda x: 5.0, 1, FINE),
        (lambda x: 0.01 * x, 1, FINE),
        (lambda x: 300 + 0.01 * x, 1, FINE),  # turns upward on a log-log plot, and is linear
        (lambda x: 5000 + x * x, 2, FINE),
        (lambda x: math.sqrt(x), 1, FINE),
        (lambda x: 1 / x, 0, FINE),
        (lambda x: 3 / x + 1, 0, FINE),  # Amdahl
        (lambda x: x**1.1, 1, FINE),  # within the tolerance
        (lambda x: x**2, 1, STEEP),
        (lambda x: x**3, 2, STEEP),
        (lambda x: 1e4 + 0.001 * x**2, 1, BENDS),
        (lambda x: x + x**2 / 500, 1, BENDS),
        (lambda x: 100 + x**3 / 1e5, 2, BENDS),
        (lambda x: 10 if x < 2000 else x / 200, 0, BENDS),  # flat, and then it is not
    ],
)
def test_the_bend_rule_on_curves_of_known_form(cost: object, expected: float, verdict: str) -> None:
    assert callable(cost)
    found = growth(X, [float(cost(x)) for x in X], expected=expected)
    assert found.verdict == verdict
    assert found.bends == (verdict == BENDS)


def test_the_bend_rule_bears_noise_and_any_order() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        y = [(20 + 0.05 * x) * float(rng.uniform(0.95, 1.05)) for x in X]
        assert growth(X, y, expected=1).verdict == FINE
        order = rng.permutation(len(X))
        assert growth([X[i] for i in order], [y[i] for i in order], expected=1) == growth(X, y, expected=1)


def test_three_points_are_too_few_for_a_verdict() -> None:
    found = growth([1, 2, 4], [1, 4, 16], expected=1)
    assert (found.verdict, found.bends, found.whole) == (TOO_FEW, False, pytest.approx(2))


def test_spread_and_ratio_are_of_rounds() -> None:
    assert spread([3.0]).to_dict() == {"median": 3.0, "low": 3.0, "high": 3.0, "count": 1}
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]).to_dict() == {"median": 3.0, "low": 2.0, "high": 4.0, "count": 5}
    # a round in which everything takes ten times as long changes no ratio
    assert ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]).to_dict() == {"median": 2.0, "low": 2.0, "high": 2.0, "count": 3}
    with pytest.raises(ValueError):
        ratio([1.0], [1.0, 2.0])


def test_numbers_and_cells() -> None:
    values = (0.0, 3.0, 3.14159, 99.96, 123.4, 12345.6, 0.00123)
    assert [number(value) for value in values] == ["0", "3", "3.14", "100", "123", "12,346", "0.00123"]
    assert [cell(value) for value in (None, "a|b\nc", 2.0)] == ["-", "a\\|b c", "2"]


def test_a_table_is_aligned_markdown() -> None:
    assert markdown(("name", "x"), [("a", 1.5), ("long name", None)]).splitlines() == [
        "| name      | x   |",
        "| --------- | --- |",
        "| a         | 1.5 |",
        "| long name | -   |",
    ]
    with pytest.raises(ValueError, match="not 2 cells"):
        markdown(("a", "b"), [("only one",)])


def a_report() -> Report:
    drawn = curve("of <nothing>", "files", "s", {1: [1.0, 2.0], 2: [2.0], 4: [4.0], 8: [30.0]}, 1)
    return Report(
        (Table("title", ("a",), ((1.0,),)),), (Goal("g", 1.6, "x", 1.7), Goal("h", 130, "MB", 129.6)),
        (Bars("b", "ms", (("one", 1.0, 2.0), ("two", 0.0, 0.0))),), (drawn,), {"peer": "not installed"}, ("note",),
        {"kept": 1},
    )  # fmt: skip


def test_a_quick_run_judges_no_goal() -> None:
    whole, quick = (record("cold", a_report(), {"cores": 2}, quick=quick) for quick in (False, True))
    assert [goal["met"] for goal in whole["goals"]] == [False, True]
    assert quick["goals"] == []
    json.dumps(whole, allow_nan=False)
    said, quickly = (text("title", a_report(), "cores 2", quick=quick) for quick in (False, True))
    assert "| g    | 1.6 x   | 1.7 x    | no  |" in said
    assert "No figure here means anything" in quickly
    assert "1.7 x" not in quickly
    for found in (said, quickly):
        assert "Not measured: peer: not installed" in found
        assert found.endswith("note\n")


def test_the_curve_holds_the_middle_of_its_rounds() -> None:
    (found,) = a_report().curves
    assert (found.y, found.low[0], found.high[0]) == ((1.5, 2.0, 4.0, 30.0), 1.25, 1.75)
    assert found.growth.bends
    assert found.to_dict()["points"][-1] == [8.0, 30.0]


def test_pictures_are_svg_that_holds_every_value() -> None:
    report = a_report()
    for picture, words in (
        (bars("t & t", "s", report.bars), ["one", "two", "t & t"]),
        (curves("t", "s", report.curves), ["s by files", "of <nothing>"]),
    ):
        tree = ElementTree.fromstring(picture)
        shown = " ".join(element.text or "" for element in tree.iter() if element.tag.endswith("text"))
        assert all(word in shown for word in words)
        for element in tree.iter():
            for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
                if (value := element.get(name)) is not None:
                    assert math.isfinite(float(value))
                    assert -1 <= float(value) <= 1000
    circles = [element for element in ElementTree.fromstring(curves("t", "s", report.curves)).iter()
               if element.tag.endswith("circle")]  # fmt: skip
    assert len(circles) == 4
    for nothing in (lambda: bars("t", "s", (Bars("b", "ms", ()),)), lambda: curves("t", "s", ())):
        with pytest.raises(ValueError, match="nothing to draw"):
            nothing()


@pytest.mark.parametrize("arguments", [["--only", "cold,hot"], ["--repeats", "0"], ["--bundle", "none"],
                                       ["--processor-time"]])  # fmt: skip
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        runner.main(arguments)
    assert ended.value.code == 2
    assert "python -m benchmarks: error" in capsys.readouterr().err


def test_parts_are_listed_and_chosen_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(runner.PARTS)
    assert runner.parse(["--only", "memory,cold,memory"]).only == ("cold", "memory")
    assert runner.parse(["--quick"]).repeats == 1
    assert runner.parse([]).repeats == runner.REPEATS


def test_a_process_is_measured_with_what_it_started(tmp_path: Path) -> None:
    """200 MB that a child of the command holds count; what this process holds does not."""
    mine = np.ones(20_000_000)
    holds = "x = bytearray(200_000_000); print(len(x))"
    nested = f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', {holds!r}]).decode())"
    small, large = (run(Job([sys.executable, "-c", code]), tmp_path) for code in ("pass", nested))
    assert mine.nbytes == 160_000_000
    assert small.peak_mb < 60
    assert 200 < large.peak_mb < 260
    assert large.output.strip() == "200000000"
    assert large.processor > 0
    assert large.seconds > 0


def test_a_command_that_fails_says_its_last_words(tmp_path: Path) -> None:
    fails = [sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"]
    with pytest.raises(DataError, match="ended with 3: the reason"):
        run(Job(fails), tmp_path)
    assert run(Job(fails, allowed=(0, 3)), tmp_path).code == 3
    with pytest.raises(DataError, match="could not be started"):
        run(Job([str(tmp_path / "nothing")]), tmp_path)


def test_processes_take_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    jobs = {name: Job([sys.executable, "-c", f"open({str(log)!r}, 'a').write({name!r})"]) for name in "ab"}
    found = in_turns(jobs, tmp_path, repeats=2, warmup=1)
    assert log.read_text() == "ababab"
    assert {name: len(runs) for name, runs in found.items()} == {"a": 2, "b": 2}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("films")


@pytest.mark.parametrize("kind", FORMATS)
def test_films_are_read_as_drawn(kind: Format, films: Path) -> None:
    drawn = read_radiograph(film(films, 96)).pixels
    stored = read_radiograph(film(films, 96, kind)).pixels
    assert stored.shape == (96, 96)
    assert np.abs(stored.astype(int) - drawn).mean() < (6 if kind == "jpg" else 2)


def test_a_folder_of_films_holds_eight_different_ones(films: Path) -> None:
    files = sorted(folder_of(films, 10, 64).iterdir())
    assert len(files) == 10
    assert len({path.read_bytes() for path in files}) == 8


def test_phantoms_get_the_classes_of_the_model_a_patient_the_same(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("path,label,patient,source\n0,x,p,s\n1,x,p,s\n2,y,q,s\n3,y,r,s\n4,y,t,s\n")
    write_renamed(manifest, tmp_path / "new.csv", ("a", "b", "c"))
    assert (tmp_path / "new.csv").read_text().split() == [
        "path,label,patient",
        "0,a,p",
        "1,a,p",
        "2,b,q",
        "3,c,r",
        "4,a,t",
    ]


STAND_INS = {
    "ultralytics": """
        class Probs:
            top1 = 7
        class Result:
            probs = Probs()
        class YOLO:
            def __init__(self, model, task): assert (model, task) == ("yolo11n-cls.yaml", "classify")
            def predict(self, *, source, imgsz, device, verbose, save):
                assert source.endswith(".png") and (imgsz, device, verbose, save) == (224, "cpu", False, False)
                return [Result()]
    """,
    "torchxrayvision": """
        import torch
        class datasets:
            @staticmethod
            def normalize(film, maximum):
                return (2 * (film / maximum) - 1.0) * 1024
            class XRayCenterCrop:
                def __call__(self, film):
                    assert film.shape == (1, 96, 96)
                    return film
            class XRayResizer:
                def __init__(self, size): self.size = size
                def __call__(self, film): return film[:, :32, :32]
        class models:
            @staticmethod
            def DenseNet(num_classes, in_channels, weights):
                assert (num_classes, in_channels, weights) == (18, 1, None)
                return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 18))
    """,
}


@pytest.mark.parametrize("peer", ["ultralytics", pytest.param("torchxrayvision", marks=pytest.mark.slow)])
def test_a_peer_is_called_as_its_documentation_says(peer: str, tmp_path: Path, films: Path) -> None:
    """On stand-ins with the names and the arguments of the real ones, which no test installs."""
    (tmp_path / f"{peer}.py").write_text(textwrap.dedent(STAND_INS[peer]))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    job = Job(program(PEERS[peer][1], film(films, 96)), {"PYTHONPATH": path})
    assert 0 <= int(run(job, tmp_path).output) < 18


@pytest.mark.slow
def test_a_quick_run_of_everything(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in runner.PARTS:
        facts = json.loads((tmp_path / f"{name}.json").read_text())
        assert (facts["part"], facts["quick"], facts["goals"]) == (name, True, [])
        assert (tmp_path / f"{name}.md").read_text() in done.stdout
        ElementTree.parse(tmp_path / f"{name}.svg")
        # what is left out is for want of a library that is named, and nothing else
        assert all("not installed" in reason for reason in facts["skipped"].values()), facts["skipped"]
