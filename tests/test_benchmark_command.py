"""``magsd benchmark``: figures from timings by hand, and the processes that take turns."""

from __future__ import annotations

import json
import os
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny_bundle
from magsd.cli import main
from magsd_runtime.benchmarking import measuring
from magsd_runtime.benchmarking.plot import plot
from magsd_runtime.benchmarking.summary import FILES, Measured, format_record, ratios, record
from magsd_runtime.errors import BackendUnavailableError

BUNDLE = {"path": "b", "name": "tiny <&>", "version": "1", "model_sha256": "0"}
MACHINE = {"processor": "a processor", "cores": 2, "threads": "all cores", "load": 0.1, "gpu": None}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "tiny")


def two() -> list[Measured]:
    slow = Measured("cpu", "cpu", "fp32", "", [0.5, 0.7, 0.6], [0.1, 0.3, 0.2])
    fast = Measured("cpu-int8", "cpu", "int8", "", [0.4], [0.1])
    slow.turns = {FILES: [[0.030, 0.040], [0.050]], 4: [[0.020, 0.020], [0.040]]}
    fast.turns = {FILES: [[0.035], [0.025]], 4: [[0.010], [0.010]]}
    for one in (slow, fast):
        one.peak_bytes = {FILES: 100_000_000, 4: None}
    return [slow, fast]


def test_ratios_compare_rounds_and_the_record_is_what_was_measured() -> None:
    slow, fast = two()
    assert ratios(slow, slow, 4) == (1.0, 1.0, 1.0)
    # round by round 20 / 10 and 40 / 10: not the ratio of the medians of all calls, which is 2
    assert ratios(slow, fast, 4) == pytest.approx((3.0, 2.5, 3.5))
    facts = record(BUNDLE, MACHINE, [slow, fast], {"cuda": "not here"})
    first, second = facts["backends"]
    assert first["first_result_ms"] == pytest.approx(600)
    assert first["open_ms"] == pytest.approx(200)
    (network,) = first["network"]
    assert network["p50_ms"] == pytest.approx(20)
    assert network["images_per_second"] == pytest.approx(4 * 3 / 0.08)
    assert first["file_to_prediction"]["images_per_second"] == pytest.approx(3 / 0.12)
    assert second["network"][0]["faster_than_first"] == pytest.approx(3.0)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    shown = format_record(facts)
    assert "left out: cuda: not here" in shown
    rows = [line.split()[3:] for line in shown.splitlines() if "network, batch 4" in line]
    assert [row[:5] for row in rows] == [
        ["3", "20.00", "36.00", "39.60", "150.0"],
        ["2", "10.00", "10.00", "10.00", "400.0"],
    ]
    assert shown.endswith("Research use only. Not for clinical use.")


def test_the_plot_is_whole_and_its_bars_follow_the_figures() -> None:
    facts = record(BUNDLE, MACHINE, two(), {})
    root = ElementTree.fromstring(plot(facts))
    space = "{http://www.w3.org/2000/svg}"
    bars = [float(bar.get("width", 0)) for bar in root.iter(f"{space}rect")][1:]  # the first is the paper
    texts = ["".join(text.itertext()) for text in root.iter(f"{space}text")]
    assert len(bars) == 4
    assert bars[0] > bars[1]  # file to prediction: 40 ms and 30 ms
    assert bars[2] > bars[3]
    assert {"file to prediction", "network, batch 4", "cpu  40", "cpu-int8  2.5"} <= set(texts)
    assert any("tiny <&> 1" in text for text in texts)
    assert any("Research use only" in text for text in texts)


def test_magsd_benchmark_measures_and_writes(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "TURN_SECONDS", 0.01)
    files = ["--out", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.svg")]
    sizes = ["--batch", "1,3", "--rounds", "2", "--starts", "1", "--threads", "1"]
    assert main(["benchmark", str(bundle), *sizes, *files, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["schema"] == "magsd.benchmark/1"
    assert facts == json.loads((tmp_path / "b.json").read_text())
    assert "cpu-int8" in facts["left_out"]  # the tiny bundle has none, which is no error where nobody asked for it
    cpu = facts["backends"][0]
    assert cpu["name"] == "cpu"
    assert [entry["batch"] for entry in cpu["network"]] == [1, 3]
    assert cpu["first_result_ms"] > cpu["open_ms"] > 0
    for entry in (cpu["file_to_prediction"], *cpu["network"]):
        assert entry["calls"] >= 2
        assert 0 < entry["p50_ms"] <= entry["p90_ms"] <= entry["p99_ms"]
        assert entry["peak_bytes"] is None or entry["peak_bytes"] > 10_000_000
    ElementTree.parse(tmp_path / "b.svg")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--backend", "cpu,cpu-int8"], 6, "has no network in int8"),
        (["--plot", "x.png"], 2, "an SVG is written, name it .svg"),
        (["--out", "no/such/folder/x.json"], 2, "there is no folder"),
        (["--image", "none.png"], 2, "none.png: no such file"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", str(bundle), "--starts", "1", "--rounds", "1", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_film_is_said(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is a film measured that is rejected: that is an answer without the network, and far too fast."""
    (tmp_path / "x.png").write_bytes(b"not a picture")
    Image.new("L", (256, 256)).save(tmp_path / "blank.png")
    for name, said in (
        ("x.png", "is not an image"),
        ("blank.png", "is rejected (no_contrast), which needs no network"),
    ):
        assert main(["benchmark", str(bundle), "--image", str(tmp_path / name), "--backend", "cpu"]) == 3
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_process_that_dies_is_an_error_and_none_is_left(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = bundle / "golden" / "noise.png"
    worker = measuring.Worker(bundle, "cpu", image, 1)
    process: Any = worker._process
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(BackendUnavailableError, match="its process ended"):
        worker.ask(batch=1, calls=1)
    worker.close()

    started: list[Any] = []
    real = measuring.Worker.__init__

    def remember(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        started.append(self)

    def interrupted(*_: object) -> list[float]:
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring.Worker, "__init__", remember)
    monkeypatch.setattr(measuring, "_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measuring.measure(bundle, ["cpu"], image, batches=[1], rounds=1, starts=1, threads=1)
    assert len(started) == 2
    assert all(one._process.returncode is not None for one in started)
