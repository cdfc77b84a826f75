"""Killed at any moment, a resumed run ends with exactly the weights of the uninterrupted one."""

from __future__ import annotations

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
    options = [f"--{k.replace('_', '-')}={v}" for k, v in {**TINY, "folds": 2, "epochs": 4}.items()]
    return [sys.executable, "-m", "magsd.cli", "train", f"--data={data}", f"--out={out}", "--device=cpu",
            "--threads=1", "--resume", *options]  # fmt: skip


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    data = write_tiny_manifest(tmp_path / "data", patients=48)
    started = time.monotonic()
    subprocess.run(command(data, tmp_path / "whole"), check=True, capture_output=True)
    whole = time.monotonic() - started
    seed = int(os.environ.get("MAGSD_KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"MAGSD_KILL_SEED={seed}")
    moments, kills = random.Random(seed), 0
    for _ in range(60):
        # after six kills the run may end: killing for ever before the first checkpoint proves nothing
        limit = moments.uniform(0.3, 1.0) * whole if kills < 6 else None
        process = subprocess.Popen(command(data, tmp_path / "killed"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            _, errors = process.communicate(timeout=limit)
            assert process.returncode == 0, errors.decode()
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
    assert kills >= 2, f"only {kills} kills: MAGSD_KILL_SEED={seed}"
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed", [0, 1])
