"""``benchmarks/gpu.py``: without a GPU it says so, and its dry run executes all that a CPU can."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu
from engine_trial import needs_rtx
from gpu_parts.context import NOT_MEASURED, Context, command, milliseconds, script


def context(out: Path, seconds: float = 60) -> Context:
    return Context(torch.device("cpu"), out, out / "m.csv", time.monotonic() + seconds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 6
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_a_dry_run_calls_everything_once_and_takes_no_time(tmp_path: Path) -> None:
    called: list[str] = []
    found = milliseconds(context(tmp_path), {name: lambda name=name: called.append(name) for name in ("a", "b")})
    assert called == ["a", "b"]
    assert found == {"a": NOT_MEASURED, "b": NOT_MEASURED}


def test_a_command_that_fails_says_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"magsd verify ended with 4: magsd verify: .*no such folder"):
        command("verify", tmp_path / "none")
    assert "usage: magsd" in command("--help")


def test_a_script_is_stopped_when_time_is_up(tmp_path: Path) -> None:
    code, said = script(context(tmp_path, 2), "-c", "import time; print('begun', flush=True); time.sleep(60)")
    assert (code, said.strip()) == (124, "begun")


def test_a_part_that_fails_or_has_no_time_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpu_parts import engine, ratios, training

    def fails(_: Any) -> Any:
        raise ValueError("as if the engine\ncould not be built")

    monkeypatch.setattr(engine, "engine", fails)
    monkeypatch.setattr(training, "step", lambda context: {"result": "ran"})

    def late(used: Context) -> dict[str, str]:
        used.deadline = 0.0
        return {"result": "ran"}

    monkeypatch.setattr(ratios, "ratios", late)
    target = tmp_path / "gpu.json"
    (tmp_path / "m.csv").write_text("path,label,patient\n")
    arguments = ["--dry-run", "--out", str(tmp_path), "--data", str(tmp_path / "m.csv"), "--json", str(target)]
    assert gpu.main([*arguments, "--only", "engine,step,ratios,tests"]) == 1
    parts = json.loads(target.read_text())["parts"]
    assert parts["engine"] == {"failed": "ValueError: as if the engine could not be built"}
    assert parts["step"]["result"] == parts["ratios"]["result"] == "ran"
    assert parts["tests"] == {"skipped": "out of time"}
    assert "engine    failed   ValueError" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--only", "nothing"])


@needs_rtx
@pytest.mark.slow
def test_the_dry_run_builds_compares_and_trains(tmp_path: Path) -> None:
    target = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--json", str(target), "--only", "engine,step,training"]) == 0
    results = json.loads(target.read_text())
    assert results["dry_run"] is True
    found = results["parts"]["engine"]["test_efficientnet"]
    assert found["fp16"]["layers"]["HALF"] > 0
    assert "HALF" not in found["fp32"]["layers"]
    assert found["torch,fp32"]["passed"]
    assert found["fp32,fp16"]["passed"]
    assert set(found["refusals"]) == {"another GPU", "another driver", "a damaged plan"}
    assert found["latency"] == found["run"] == NOT_MEASURED  # no figure of a CPU under a GPU's name
    rates = results["parts"]["step"]["images a second"]
    assert {row["images_per_second"] for row in rates} == {NOT_MEASURED}
    assert results["parts"]["training"]["epochs"] == {"fold0": 1}
