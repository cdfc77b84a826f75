"""Killed at any moment, a resumed run ends with exactly the weights of the uninterrupted one."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import magsd.fold_training
from magsd.checkpoint import load_checkpoint
from magsd.config import resolve
from magsd.distributed import Processes
from magsd.training import train
from tiny_run import TINY, write_tiny_manifest

GROUP = Processes(0, 1, torch.device("cpu"))


class Killed(BaseException):
    """Stands for a kill: nothing in the code under test catches it."""


def final_state(run: Path, folds: list[int]) -> dict[str, torch.Tensor]:
    """Weights of last.pt and best.pt, and the momentum, of each fold."""
    tensors = {}
    for fold in folds:
        for name in ("last.pt", "best.pt"):
            content, _ = load_checkpoint(run / f"fold{fold}" / name)
            tensors |= {f"{fold}/{name}/{key}": value for key, value in content["model"].items()}
            for index, state in content.get("optimizer", {}).get("state", {}).items():
                tensors[f"{fold}/{name}/momentum/{index}"] = state["momentum_buffer"]
    return tensors


def assert_equal_runs(one: Path, other: Path, folds: list[int]) -> None:
    a, b = final_state(one, folds), final_state(other, folds)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different[:5]
    drop = ("images_per_second", "seconds")
    for fold in folds:
        logs = [(run / f"fold{fold}" / "log.csv").read_text().splitlines() for run in (one, other)]
        header = logs[0][0].split(",")
        kept = [i for i, name in enumerate(header) if name not in drop]
        rows = [[[line.split(",")[i] for i in kept] for line in log] for log in logs]
        assert rows[0] == rows[1]


def test_stopped_at_every_step_within_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(
        {
            **TINY,
            "data": str(write_tiny_manifest(tmp_path / "data")),
            "epochs": 2,
            "folds": 2,
            "batch_size": 3,
        }
    )
    train(config, tmp_path / "whole", GROUP, fold=0)

    # a checkpoint after every step, and a stop before every second one
    monkeypatch.setattr(magsd.fold_training, "CHECKPOINT_SECONDS", -1.0)
    real, calls = magsd.fold_training.draw_generator, [0]

    def stopping(*arguments: object) -> torch.Generator:
        calls[0] += 1
        if calls[0] % 3 == 0:
            raise Killed
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(magsd.fold_training, "draw_generator", stopping)
    stops = 0
    while True:
        try:
            train(config, tmp_path / "stopped", GROUP, fold=0, resume=True)
            break
        except Killed:
            stops += 1
            assert stops < 50
    assert stops >= 3
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped", [0])


def command(data: Path, out: Path) -> list[str]:
    options = [f"--{k.replace('_', '-')}={v}" for k, v in {**TINY, "folds": 2, "epochs": 6}.items()]
    return [sys.executable, "-m", "magsd.cli", "train", f"--data={data}", f"--out={out}", "--device=cpu",
            "--threads=1", "--resume", *options]  # fmt: skip


def files_now(folder: Path) -> dict[str, int]:
    """The time of each file's last change; files come and go while this looks."""
    times = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            times[str(path)] = path.stat().st_mtime_ns
    return times


def wait_for_changes(process: subprocess.Popen[bytes], folder: Path, count: int) -> None:
    """Return once files in ``folder`` were seen to change ``count`` times, or the process has ended."""
    before = files_now(folder)
    while count > 0 and process.poll() is None:
        time.sleep(0.002)
        now = files_now(folder)
        count -= now != before
        before = now


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    data = write_tiny_manifest(tmp_path / "data", patients=48)
    subprocess.run(command(data, tmp_path / "whole"), check=True, capture_output=True)
    seed = int(os.environ.get("MAGSD_KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"MAGSD_KILL_SEED={seed}")
    moments, kills = random.Random(seed), 0
    # Counted by what the run has written, not by the clock: most of a run's time is its imports, and how long
    # they take differs by a factor from one run to the next. An epoch changes about five files; there are twelve.
    while kills < 6:
        process = subprocess.Popen(
            command(data, tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        wait_for_changes(process, tmp_path / "killed", moments.randint(1, 12))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moments.uniform(0, 0.1))
        process.kill()  # does nothing to a process that has been waited for
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
        kills += 1
    # how many fit into the run depends on the machine, the first one always does
    assert kills >= 1, f"MAGSD_KILL_SEED={seed}"
    subprocess.run(command(data, tmp_path / "killed"), check=True, capture_output=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed", [0, 1])
