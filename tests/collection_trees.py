"""Drawn images, manifests as rows, and `magsd data` called: for the tests of collections and of what is composed."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from magsd.cli import main


def image(path: Path, value: int = 0, side: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 255, (side, side)).astype(np.uint8)
    assert cv2.imwrite(str(path), pixels)
    return path


def lines(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def facts(path: Path, *names: str) -> list[tuple[str, ...]]:
    return [tuple(line[name] for name in names) for line in lines(path)]


def build(tmp_path: Path, collection: str, folder: Path, *more: str) -> Path:
    out = tmp_path / "out" / f"{collection}.csv"
    assert main(["data", collection, str(folder), *more, "--out", str(out), "--force"]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *command: str) -> str:
    capsys.readouterr()
    assert main(["data", *command, "--out", str(tmp_path / "refused.csv")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not (tmp_path / "refused.csv").exists()
    return error
